"""A device's measured shares as rates: FLOP/s, bytes/s and floors by op class and format."""

from typing import NamedTuple

from kvmesh.backends.architectures import WEIGHT_BYTES
from kvmesh.backends.devices.device import Device, Efficiency, Figure, MoeEfficiency
from kvmesh.backends.errors import DeviceError

# Measured shares include the kernel's floor; ops add it apart. It is taken out at these sizes, of
# the kind that the tables' medians are over: M x N x K of a GEMM, and a decode attention whose
# bytes alone take so long.
_COMPUTE_GEMM = (8192, 8192, 8192)
_MEMORY_GEMM = (16, 7168, 16384)
_ATTENTION_S = 40e-6
_LATENT_HEADS = 128  # of the MLA kernels that were measured

# What a format of weights multiplies in, best first; the last one for devices that have only it.
_MATH = {
    "fp32": ("bf16", "fp16", "fp8"),
    "bf16": ("bf16", "fp16", "fp8"),
    "fp8": ("fp8", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "int8": ("int8", "fp8", "bf16"),
    "nvfp4": ("nvfp4", "bf16", "fp8"),
    "mxfp4": ("nvfp4", "bf16", "fp8"),
}
_ACTIVATION_BYTES = {"nvfp4": WEIGHT_BYTES["nvfp4"], "fp8": 1.0, "int8": 1.0}


class Rate(NamedTuple):
    """flops_s and bytes_s that an op reaches, and its least seconds, which come on top."""

    flops_s: float
    bytes_s: float
    floor_s: float


def check_timed(device: Device) -> None:
    """Raises DeviceError for a device that has no cost by op."""
    if device.model == "cycle":
        raise DeviceError(
            f"device {device.name} is timed by a cycle simulator and has no cost by op; "
            "choose another, or compile the model for it"
        )


class Rates:
    """Rates of one device. Raises DeviceError for what its file does not say."""

    def __init__(self, device: Device) -> None:
        check_timed(device)
        self._device = device
        self._bandwidth = device.memory.bandwidth_bytes_s.value
        self._found = device.efficiency
        self.scale = self._found.scale.value if self._found else 1.0

    def math(self, weights: str) -> str:
        """The dtype that weights of this format multiply in on this device."""
        for dtype in _MATH[weights]:
            if dtype in self._device.peak:
                return dtype
        have = ", ".join(self._device.peak)
        raise DeviceError(f"device {self._device.name} has no peak for {weights}; it has: {have}")

    def activation_bytes(self, weights: str) -> float:
        """Bytes of an element that goes into a product with weights of this format."""
        return _ACTIVATION_BYTES.get(self.math(weights), 2.0)

    def _share(self, share: float) -> float:
        return min(1.0, share * self.scale)

    def _row(self, table: str, weights: str) -> str:
        """The format whose row of a table of efficiencies is to be used."""
        rows = getattr(self._found, table)
        if weights in rows and self.math(weights) in (weights, weights.removesuffix("_block")):
            return weights
        return self.math(weights)

    def _look(self, table: str, row: str) -> object:
        rows = getattr(self._found, table)
        if row not in rows:
            raise DeviceError(
                f"device {self._device.name}: efficiency.{table}.{row} is missing; "
                f"it has: {', '.join(rows) or 'none'}"
            )
        return rows[row]

    def gemm(self, weights: str) -> Rate:
        """A product with weights of this format."""
        peak = self._device.peak[self.math(weights)].value
        if self._found is None:
            return Rate(peak, self._bandwidth, 0.0)
        row = self._look("gemm", self._row("gemm", weights))
        compute, memory, floor = _values(row, "compute", "memory", "floor_s")
        m, n, k = _COMPUTE_GEMM
        compute = without_floor(compute, 2 * m * n * k / peak, floor)
        stored = _MEMORY_GEMM[1] * _MEMORY_GEMM[2] * WEIGHT_BYTES[self._row("gemm", weights)]
        memory = without_floor(memory, stored / self._bandwidth, floor)
        return Rate(peak * self._share(compute), self._bandwidth * self._share(memory), floor)

    def experts(self, weights: str) -> Rate:
        """The grouped products of a whole MoE layer."""
        peak = self._device.peak[self.math(weights)].value
        if self._found is None:
            return Rate(peak, self._bandwidth, 0.0)
        row = self._look("moe", self._row("moe", weights))
        assert isinstance(row, MoeEfficiency)
        compute, memory, floor = _values(row, "compute", "memory", "floor_s")
        return Rate(peak * self._share(compute), self._bandwidth * self._share(memory), floor)

    def attention_math(self, kv: str) -> str:
        """fp8 keys and values multiply in fp8; everything else is decoded to bf16 first."""
        return self.math("fp8" if kv == "fp8" else "bf16")

    def context_attention(self, kv: str) -> Rate:
        dtype = self.attention_math(kv)
        peak = self._device.peak[dtype].value
        if self._found is None:
            return Rate(peak, self._bandwidth, 0.0)
        share = self._look("context_attention", dtype)
        decode = self._look("gqa_decode", dtype)
        assert isinstance(share, Figure)
        memory, floor = _values(decode, "memory", "floor_s")
        return Rate(peak * self._share(share.value), self._bandwidth * self._share(memory), floor)

    def decode_attention(self, kv: str, latent_heads: int = 0) -> Rate:
        """latent_heads: of MLA, which share what is cached; 0: other attention."""
        dtype = self.attention_math(kv)
        peak = self._device.peak[dtype].value
        if self._found is None:
            return Rate(peak, self._bandwidth, 0.0)
        row = self._look("mla_decode" if latent_heads else "gqa_decode", dtype)
        memory, compute, floor = _values(row, "memory", "compute", "floor_s")
        # Both shares are of one measured time, whose bytes alone take _ATTENTION_S.
        freed = without_floor(memory, _ATTENTION_S, floor) / memory
        if latent_heads:
            compute *= freed
        if 0 < latent_heads < _LATENT_HEADS:
            # The math of all heads is in that time, so it shows the least that memory bears. Few
            # of them, as on a tensor rank, read as fast as other keys and values are read.
            memory = max(memory, _values(self._look("gqa_decode", dtype), "memory")[0])
            freed = without_floor(memory, _ATTENTION_S, floor) / memory
        return Rate(
            peak * self._share(compute), self._bandwidth * self._share(memory * freed), floor
        )

    def elementwise(self) -> Rate:
        if self._found is None:
            return Rate(float("inf"), self._bandwidth, 0.0)
        memory, floor = _values(self._found.elementwise, "memory", "floor_s")
        return Rate(float("inf"), self._bandwidth * self._share(memory), floor)

    def vector_flops_s(self) -> float:
        """Outside the matrix units: where a codec encodes and decodes."""
        figure = self._device.peak.get("vector")
        if figure is None:
            raise DeviceError(
                f"device {self._device.name}: peak.vector is missing, which a codec's cost needs; "
                "use kv fp8 or fp16"
            )
        return figure.value * self._share(
            self._found.elementwise.memory.value if self._found else 1
        )

    @property
    def efficiency(self) -> Efficiency | None:
        return self._found


def without_floor(share: float, ideal_s: float, floor_s: float) -> float:
    """The share that remains when the floor is taken out of ideal_s / share; at most 1."""
    rest = ideal_s / share - floor_s
    return 1.0 if rest <= ideal_s else ideal_s / rest


def _values(section: object, *names: str) -> tuple[float, ...]:
    return tuple(getattr(section, name).value for name in names)
