"""The LPU, simulated: numbers by the CPU backend, time by compiled programs."""

from pathlib import Path

from kvmesh.backends.base import Model, ModelOptions
from kvmesh.backends.cpu.backend import CpuBackend
from kvmesh.backends.errors import BackendUnavailable


class LpuBackend:
    """Opens checkpoints on as few simulated chips as hold them."""

    def probe(self) -> str | None:
        """As the CPU backend, which computes what the simulated chips would."""
        return CpuBackend().probe()

    def open(self, path: Path, options: ModelOptions) -> Model:
        """Raises CheckpointError for a bad checkpoint, ModelDoesNotFit for a layer that no node
        holds, BackendUnavailable if probe() objects."""
        reason = self.probe()
        if reason is not None:
            raise BackendUnavailable(f"backend 'lpu' cannot run here: {reason}", {"lpu": reason})
        from kvmesh.backends.cpu.model import CpuModel
        from kvmesh.backends.lpu.shapes import shape_of
        from kvmesh.backends.lpu.timing import lpu_clock
        from kvmesh.backends.models.loader import load_checkpoint
        from kvmesh.backends.simulated.wrapper import SimulatedModel

        checkpoint = load_checkpoint(path)
        clock = lpu_clock(shape_of(checkpoint.config, ""), options.codec)
        return SimulatedModel(CpuModel(checkpoint, options), clock)
