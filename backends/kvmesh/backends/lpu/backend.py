"""The LPU, simulated: numbers by the CPU backend, time by compiled programs."""

from pathlib import Path

from kvmesh.backends.base import Model, ModelOptions, Simulation
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
        if options.simulation != Simulation(model=options.simulation.model):
            raise BackendUnavailable(
                "backend 'lpu' takes as few chips of the first LPU as hold the model, with INT8 "
                "weights; of [workers.simulate] it takes the model alone"
            )
        from kvmesh.backends.cpu.model import CpuModel
        from kvmesh.backends.lpu.shapes import find_shape, shape_of
        from kvmesh.backends.lpu.timing import lpu_clock
        from kvmesh.backends.models.loader import load_checkpoint
        from kvmesh.backends.simulated.wrapper import SimulatedModel

        checkpoint = load_checkpoint(path)
        own = shape_of(checkpoint.config, "")
        timed = options.simulation.model
        clock = lpu_clock(find_shape(timed) if timed else own, options.codec)
        if timed:
            clock = clock.timed_as(timed, own)
        return SimulatedModel(CpuModel(checkpoint, options), clock)
