"""Torch's attention on a device, as rivals in `kvmesh bench kernels`.

Each of scaled_dot_product_attention's implementations that runs a case is one rival; FlashAttention
is among them. In decode the query heads of a group also stand in for query tokens (`packed`): one
read of K and V then serves the group, whatever an implementation makes of grouped heads.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kvmesh.integration.bench_kernels import CHUNK, KernelCase, Timed
from kvmesh.kernels.cuda.device import Place

_IMPLEMENTATIONS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


class NoRivals:
    """Where nothing else is installed."""

    def __init__(self, reason: str) -> None:
        self.missing: Sequence[str] = (reason,)

    def decode(self, case: KernelCase) -> Sequence[Timed]:
        return ()

    def prefill(self, case: KernelCase) -> Sequence[Timed]:
        return ()


def open_torch(place: Place) -> "TorchRivals | NoRivals":
    """On that device and stream, or the reason why there is none."""
    if importlib.util.find_spec("torch") is None:
        return NoRivals("torch: not installed; pip install torch, a build with CUDA")
    torch = importlib.import_module("torch")
    if place.kind == "cuda" and not torch.cuda.is_available():
        return NoRivals(f"torch {torch.__version__}: this build sees no GPU; install one with CUDA")
    return TorchRivals(torch, place)


class TorchRivals:
    """missing: implementations that refuse a case, with the reason; it grows with the cases."""

    def __init__(self, torch: Any, place: Place) -> None:
        self._torch, self._place = torch, place
        self._where = f"cuda:{place.number}" if place.kind == "cuda" else "cpu"
        self._attention = importlib.import_module("torch.nn.attention")
        self._missing: dict[str, None] = {}

    @property
    def missing(self) -> Sequence[str]:
        return tuple(self._missing)

    def decode(self, case: KernelCase) -> Sequence[Timed]:
        """One query token for each sequence."""
        heads, group, dim = case.kv_heads, case.group, case.head_dim
        packed = (case.batch, heads, group, dim)
        grouped = (case.batch, heads * group, 1, dim)
        found: list[Timed] = []
        for dtype in ("float32", "bfloat16"):
            kv = self._kv(case, case.context + 1, dtype)
            for name, shape, options in (
                ("packed", packed, {}),
                ("grouped", grouped, {"enable_gqa": True}),
            ):
                found += self._each(name, (self._tensor(shape, dtype), *kv), options)
        return found

    def prefill(self, case: KernelCase) -> Sequence[Timed]:
        """CHUNK query tokens for each sequence, causal among themselves."""
        bias = importlib.import_module("torch.nn.attention.bias")
        tokens = case.context + CHUNK
        shape = (case.batch, case.kv_heads * case.group, CHUNK, case.head_dim)
        found: list[Timed] = []
        for dtype in ("float32", "bfloat16"):
            kv = self._kv(case, tokens, dtype)
            mask = bias.causal_lower_right(CHUNK, tokens)
            options = {"enable_gqa": True, "attn_mask": mask}
            found += self._each("grouped", (self._tensor(shape, dtype), *kv), options)
        return found

    def _kv(self, case: KernelCase, tokens: int, dtype: str) -> tuple[Any, Any]:
        shape = (case.batch, case.kv_heads, tokens, case.head_dim)
        return self._tensor(shape, dtype), self._tensor(shape, dtype)

    def _tensor(self, shape: tuple[int, ...], dtype: str) -> Any:
        # How long attention takes does not depend on the values.
        return self._torch.randn(shape, dtype=getattr(self._torch, dtype), device=self._where)

    def _each(self, form: str, qkv: tuple[Any, Any, Any], options: dict[str, Any]) -> list[Timed]:
        """A rival for each implementation that runs; the others go to `missing`."""
        width = 8 * qkv[1].element_size()
        moved = sum(each.numel() * each.element_size() for each in qkv[1:])
        found: list[Timed] = []
        for implementation in _IMPLEMENTATIONS:
            name = f"torch {implementation.lower()} {form}, {width} bits"
            run = self._runner(implementation, qkv, options)
            try:
                run()
                self._wait()
            except Exception as error:  # torch raises what its implementations do
                self._missing[f"{name}: {str(error).splitlines()[0]}"] = None
                continue
            found.append(Timed(name, width, moved, run))
        return found

    def _runner(
        self, implementation: str, qkv: tuple[Any, Any, Any], options: dict[str, Any]
    ) -> Callable[[], Any]:
        chosen = getattr(self._attention.SDPBackend, implementation)
        attend = self._torch.nn.functional.scaled_dot_product_attention

        def run() -> Any:
            with self._stream(), self._torch.no_grad(), self._attention.sdpa_kernel([chosen]):
                return attend(*qkv, **options)

        return run

    def _stream(self) -> AbstractContextManager[Any]:
        """The stream of our kernels, where the device's events are."""
        if self._place.kind == "cpu":
            return nullcontext()
        stream: AbstractContextManager[Any] = self._torch.cuda.stream(
            self._torch.cuda.ExternalStream(self._place.stream, device=self._where)
        )
        return stream

    def _wait(self) -> None:
        if self._place.kind == "cuda":
            self._torch.cuda.synchronize(self._place.number)
