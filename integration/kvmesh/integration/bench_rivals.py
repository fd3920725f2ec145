"""Attention that others have, on the same keys and values: measured if installed, never needed."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.integration.bench_kernels import Timed

Floats = npt.NDArray[np.float32]

_TORCH_TYPES = (("fp32", 32), ("bf16", 16), ("fp16", 16))


class Rivals:
    """missing: why some were not measured, one line each, filled as they are tried."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._has_torch = importlib.util.find_spec("torch") is not None
        if not self._has_torch:
            self.missing.append("torch is not installed: pip install torch")

    def attention(self, q: Floats, k: Floats, v: Floats, threads: int) -> list[Timed]:
        """q: fp32 [B, Hq, n, D]; k, v: fp32 [B, Hkv, T, D]. Every query attends to every token:
        a causal mask would only cost the rivals time."""
        made = [_numpy(q, k, v)]
        if self._has_torch:
            made += _torch_attention(q, k, v, threads)
        made += self._onnx(q, k, v, threads)
        return made

    def casts(self, k: Floats, v: Floats, threads: int) -> list[Timed]:
        """What storing keys and values in 16 bits costs."""
        out = np.empty(k.shape, np.float16)

        def cast() -> None:
            out[...] = k
            out[...] = v

        found = [Timed("numpy cast to fp16", 16, k.nbytes + v.nbytes, cast)]
        if self._has_torch:
            import torch

            torch.set_num_threads(threads)
            both = [torch.from_numpy(x) for x in (k, v)]
            room = torch.empty(k.shape, dtype=torch.bfloat16)
            found.append(
                Timed(
                    "torch cast to bf16", 16, k.nbytes + v.nbytes,
                    lambda: [room.copy_(x) for x in both],
                )
            )  # fmt: skip
        return found

    def _onnx(self, q: Floats, k: Floats, v: Floats, threads: int) -> Iterator[Timed]:
        if q.shape[2] != 1:
            return  # the operator takes a chunk only without a cache, or a token with one
        for name, width, kind in (("fp32", 32, np.float32), ("fp16", 16, np.float16)):
            try:
                run = _onnx_attention(q, k, v, threads, np.dtype(kind))
                run()
            except Exception as error:  # whatever an absent or other version of it raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                line = f"ONNX Runtime GroupQueryAttention {name}: {reason[:160]}"
                if line not in self.missing:
                    self.missing.append(line)
                continue
            moved = (k.nbytes + v.nbytes) * width // 32
            yield Timed(f"onnxruntime GroupQueryAttention {name}", width, moved, run)


def _numpy(q: Floats, k: Floats, v: Floats) -> Timed:
    batch, heads, _, dim = k.shape
    grouped = q.reshape(batch, heads, -1, dim) * np.float32(dim**-0.5)

    def run() -> Floats:
        scores: Any = grouped @ k.transpose(0, 1, 3, 2)
        np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        np.divide(scores, scores.sum(axis=-1, keepdims=True), out=scores)
        out: Floats = scores @ v
        return out

    return Timed("numpy matmul fp32", 32, k.nbytes + v.nbytes, run)


def _torch_attention(q: Floats, k: Floats, v: Floats, threads: int) -> list[Timed]:
    import torch

    torch.set_num_threads(threads)
    made = []
    batch, heads, _, dim = k.shape
    for name, width in _TORCH_TYPES:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        own = [torch.from_numpy(x).to(kind) for x in (q, k, v)]
        moved = 2 * own[1].numel() * width // 8
        grouped = own[0].reshape(batch, heads, -1, dim)
        for title, run in (
            ("SDPA", _sdpa(*own)),
            ("SDPA, group as queries", _sdpa_grouped(grouped, *own[1:])),
            ("matmul", _matmul(grouped, *own[1:])),
        ):
            made.append(Timed(f"torch {title} {name}", width, moved, run))
    return made


def _sdpa(q: Any, k: Any, v: Any) -> Callable[[], object]:
    import torch

    def run() -> object:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def _sdpa_grouped(q: Any, k: Any, v: Any) -> Callable[[], object]:
    """A group's heads given as queries of one head: keys and values are read once for them all."""
    import torch

    def run() -> object:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return run


def _matmul(q: Any, k: Any, v: Any) -> Callable[[], object]:
    import torch

    def run() -> object:
        with torch.inference_mode():
            scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            return torch.matmul(torch.softmax(scores, -1), v)

    return run


def _onnx_attention(
    q: Floats, k: Floats, v: Floats, threads: int, kind: np.dtype[Any]
) -> Callable[[], object]:
    """com.microsoft.GroupQueryAttention over a full cache, whose last token is the query's own.

    Past and present are one buffer, so that nothing is copied.
    """
    import onnxruntime as ort
    from onnx import TensorProto, helper

    batch, heads, tokens, dim = k.shape
    query_heads = q.shape[1]
    element = TensorProto.FLOAT if kind == np.float32 else TensorProto.FLOAT16
    names = (
        ("query", element, [batch, 1, query_heads * dim]),
        ("key", element, [batch, 1, heads * dim]),
        ("value", element, [batch, 1, heads * dim]),
        ("past_key", element, [batch, heads, tokens, dim]),
        ("past_value", element, [batch, heads, tokens, dim]),
        ("seqlens_k", TensorProto.INT32, [batch]),
        ("total_sequence_length", TensorProto.INT32, [1]),
    )
    outs = (
        ("output", element, [batch, 1, query_heads * dim]),
        ("present_key", element, [batch, heads, tokens, dim]),
        ("present_value", element, [batch, heads, tokens, dim]),
    )
    node = helper.make_node(
        "GroupQueryAttention", [n for n, _, _ in names], [n for n, _, _ in outs],
        domain="com.microsoft", num_heads=query_heads, kv_num_heads=heads,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(*x) for x in names],
        [helper.make_tensor_value_info(*x) for x in outs],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    past = [ort.OrtValue.ortvalue_from_numpy(x.astype(kind)) for x in (k, v)]
    last = [x[:, :, -1].reshape(batch, 1, -1).astype(kind) for x in (k, v)]
    binding = session.io_binding()
    given = (
        q[:, :, 0].reshape(batch, 1, -1).astype(kind), *last,
        np.full(batch, tokens - 1, np.int32), np.array([tokens], np.int32),
    )  # fmt: skip
    keep = [ort.OrtValue.ortvalue_from_numpy(x) for x in given]
    for name, value in zip(("query", "key", "value", "seqlens_k", "total_sequence_length"), keep,
                           strict=True):  # fmt: skip
        binding.bind_ortvalue_input(name, value)
    for name, value in zip(("key", "value"), past, strict=True):
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    out = ort.OrtValue.ortvalue_from_numpy(np.empty((batch, 1, query_heads * dim), kind))
    binding.bind_ortvalue_output("output", out)
    bound = (keep, past)  # the binding does not own them

    def run() -> object:
        session.run_with_iobinding(binding)
        return out.numpy() if bound else None

    return run
