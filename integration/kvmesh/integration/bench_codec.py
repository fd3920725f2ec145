"""What each way to store keys and values costs and loses, on the same vectors. Pure measuring.

Ours is centered by the sample's own mean, where a model's blocks use the mean of its calibration.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.kernels import reference
from kvmesh.kernels.baselines import polar, turboquant, uniform
from kvmesh.kernels.layout import KvLayout

Vectors = npt.NDArray[np.float64]
Restore = Callable[[Vectors], Vectors]
_OURS = (2, 3, 4, 8)
_SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Keys and values [n, d] of one head, and queries [m, d] that attend to them; n a multiple
    of 32."""

    name: str
    keys: Vectors
    values: Vectors
    queries: Vectors


@dataclass(frozen=True, slots=True)
class Method:
    """One way to store keys and another, perhaps the same, to store values."""

    name: str
    bits_per_element: Callable[[int], float]
    restore_keys: Restore
    restore_values: Restore


class _Rival(Protocol):
    """What every class of kvmesh.kernels.baselines is."""

    def bits_per_element(self, dim: int) -> float: ...
    def quantize_dequantize(self, x: Vectors) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class CodecRow:
    """All of keys, except attention_error, the relative error of the output with both restored.

    bits_per_element counts side information. mse is relative to the keys' mean square. Bias and
    variance are those of query-key products, relative to the root mean square and the mean square
    of |q||k|/sqrt(d); constant shifts per query, which softmax ignores, stay in. softmax_kl: nats.
    """

    method: str
    sample: str
    bits_per_element: float
    mse: float
    ip_bias: float
    ip_variance: float
    softmax_kl: float
    attention_error: float


def _ours(bits: int) -> Method:
    def restore(kind: Literal["key", "value"]) -> Restore:
        def restored(x: Vectors) -> Vectors:
            mu = x.mean(axis=0).astype(np.float32)
            codes, scales = reference.encode(x.astype(np.float32), mu, kind, bits)
            return reference.decode(codes, scales, mu, bits)

        return restored

    return Method(
        f"kvmesh {bits}", lambda dim: bits + _SCALE_BITS / dim, restore("key"), restore("value")
    )


def methods() -> list[Method]:
    """Ours, then the rivals."""
    rivals: dict[str, _Rival] = {
        **{f"turboquant mse {bits}": turboquant.TurboQuantMse(bits) for bits in (1, 2, 3, 4)},
        **{f"turboquant prod {bits}": turboquant.TurboQuantProd(bits) for bits in (2, 3, 4)},
        **{f"turboquant split {b}.5": turboquant.OutlierSplit(b) for b in (2, 3)},
        "qjl 3": turboquant.Qjl(3),
        "polarquant": polar.PolarQuant(),
        "int8": uniform.Int8(),
        "fp8 e4m3": uniform.Fp8(),
        "nvfp4": uniform.Nvfp4(),
        "q4_0": uniform.Q4_0(),
    }
    found = [_ours(bits) for bits in _OURS]
    for name, rival in rivals.items():
        restore = rival.quantize_dequantize
        found.append(Method(name, rival.bits_per_element, restore, restore))
    for bits in (2, 4):
        keys, values = uniform.Kivi(bits, "key"), uniform.Kivi(bits, "value")
        found.append(
            Method(
                f"kivi {bits}", keys.bits_per_element,
                keys.quantize_dequantize, values.quantize_dequantize,
            )
        )  # fmt: skip
    return found


def synthetic(dim: int = 128, tokens: int = 2048, queries: int = 64, seed: int = 0) -> list[Sample]:
    """Gaussian keys, and keys with four channels offset by ten standard deviations."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, tokens, dim))
    asked = rng.standard_normal((queries, dim)) * 2
    offset = keys.copy()
    offset[:, rng.choice(dim, 4, replace=False)] += 10
    return [Sample("gaussian", keys, values, asked), Sample("offset", offset, values, asked)]


def captured(
    layout: KvLayout, blocks: npt.NDArray[np.uint8], layer: int, head: int, queries: Vectors
) -> Sample:
    """Keys and values of a model from its sealed blocks [n, block_bytes] of codec fp32."""
    if layout.codec != "fp32" or layout.layer_codecs:
        raise ValueError(f"codec is {layout.codec_label}, must be fp32: others have lost already")
    centers = np.zeros((2, layout.num_kv_heads, layout.head_dim), np.float32)
    pairs = [reference.decode_layer(layout, block, layer, centers) for block in blocks]
    keys, values = (np.concatenate([pair[i][:, head] for pair in pairs]) for i in range(2))
    return Sample(f"layer {layer} head {head}", keys, values, queries)


def _softmax(scores: Vectors) -> Vectors:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def measure(method: Method, sample: Sample) -> CodecRow:
    """One row."""
    dim = sample.keys.shape[1]
    keys = method.restore_keys(sample.keys)
    values = method.restore_values(sample.values)
    exact = sample.queries @ sample.keys.T
    found = sample.queries @ keys.T
    norms = np.linalg.norm(sample.queries, axis=1)[:, None] * np.linalg.norm(sample.keys, axis=1)
    error = (found - exact) * np.sqrt(dim) / norms
    weights, approximate = (_softmax(scores / np.sqrt(dim)) for scores in (exact, found))
    tiny = np.finfo(np.float64).tiny
    kl = (weights * np.log((weights + tiny) / (approximate + tiny))).sum(axis=1).mean()
    out = weights @ sample.values
    return CodecRow(
        method.name,
        sample.name,
        method.bits_per_element(dim),
        float(((keys - sample.keys) ** 2).sum() / (sample.keys**2).sum()),
        float(error.mean()),
        float(error.var()),
        float(kl),
        float(np.linalg.norm(approximate @ values - out) / np.linalg.norm(out)),
    )


def bench_codec(samples: list[Sample]) -> Iterator[CodecRow]:
    """Every method on every sample, a row at a time."""
    for sample in samples:
        for method in methods():
            yield measure(method, sample)
