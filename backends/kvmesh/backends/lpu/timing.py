"""Seconds of a step on simulated LPU chips, from programs that were compiled and run."""

import functools
from dataclasses import dataclass, replace

from kvmesh.backends.base import DeviceInfo, Estimate, StepShape
from kvmesh.backends.lpu.chip import LpuChip
from kvmesh.backends.lpu.compile import CHIP, DEVICE, compile_model
from kvmesh.backends.lpu.shapes import ModelShape, Placement
from kvmesh.backends.simulated.device import device_info

_SHORT, _LONG = 64, 1024  # tokens of context
_WIDE = 8  # tokens of one program


@dataclass(frozen=True, slots=True)
class LpuClock:
    """Between the programs that were compiled, cycles are linear in tokens and in context.

    A program for `t` new tokens of one sequence at context `c` takes
    first + t * token + (single or shared) * (c - 64) cycles, where the tokens of a prompt share one
    reading of K and V and each decoding sequence needs its own.

    device: what the chips are together. placement: how the model lies on them.
    """

    device: DeviceInfo
    placement: Placement
    chip: LpuChip
    first: float
    token: float
    single: float  # cycles per token of context, of one sequence's decode
    shared: float  # likewise, for each further token of a prompt

    def timed_as(self, name: str, own: ModelShape) -> "LpuClock":
        """The clock of another model than `own`, which computes: its device says so."""
        timed = self.placement.shape
        elements = [each.num_layers * each.kv_heads * each.head_dim for each in (timed, own)]
        ratio = elements[0] / elements[1]
        device = replace(
            self.device,
            name=f"{self.device.name}, timed as {name}",
            transfer_byte_s=self.device.transfer_byte_s * ratio,
        )
        return replace(self, device=device)

    def step_seconds(self, shape: StepShape) -> float:
        """One step: the tokens of a prompt, and of all that decode, go through the layers."""
        tokens = shape.prefill_tokens + shape.decode_sequences
        if tokens == 0:
            return 0.0
        context = max(0.0, shape.context_tokens / tokens - _SHORT)
        readings = shape.decode_sequences + (shape.prefill_tokens > 0)
        cycles = self.first + self.token * tokens + self.single * context * readings
        cycles += self.shared * context * max(0, shape.prefill_tokens - 1)
        return cycles / self.chip.clock_hz

    def idle_seconds(self, shape: StepShape) -> float:
        """No host takes part in a schedule."""
        return 0.0

    def estimate(self) -> Estimate:
        """A line that is exact for one decoding sequence, and near for others."""
        hz = self.chip.clock_hz
        return Estimate(
            base_s=max(0.0, self.first - self.single * _SHORT) / hz,
            prefill_token_s=self.token / hz,
            decode_token_s=self.token / hz,
            context_token_s=self.single / hz,
            simulated=True,
        )


@functools.lru_cache(maxsize=16)
def lpu_clock(shape: ModelShape, codec: str) -> LpuClock:
    """Compiles four programs, on as few chips as hold the model; takes seconds.

    Raises ModelDoesNotFit.
    """
    short = min(_SHORT, shape.max_context)
    long = min(_LONG, shape.max_context)
    at = {
        (tokens, context): compile_model(shape, None, codec, context, tokens, whole=False)
        for tokens in (1, _WIDE)
        for context in {short, long}
    }
    one = at[1, short]
    token = (at[_WIDE, short].cycles - one.cycles) / (_WIDE - 1)
    single, wide = (
        (at[tokens, long].cycles - at[tokens, short].cycles) / max(1, long - short)
        for tokens in (1, _WIDE)
    )
    placement = one.placement
    return LpuClock(
        device=_device(placement),
        placement=placement,
        chip=CHIP,
        first=one.cycles - token,
        token=token,
        single=single,
        shared=max(0.0, (wide - single) / (_WIDE - 1)),
    )


def _device(placement: Placement) -> DeviceInfo:
    chips = placement.chips
    # The file's bandwidth is what streams carry; a chip's own memory gives more.
    own = CHIP.mem_bytes_per_cycle * CHIP.clock_hz * chips
    found = device_info(DEVICE, chips, f"LPU v1 x {chips}", 1.0)
    return replace(found, bandwidth_bytes_s=own)
