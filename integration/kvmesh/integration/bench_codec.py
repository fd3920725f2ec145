"""What each way to store keys and values costs and loses, on the same vectors. Pure measuring.

Ours is centered by a mean that the vectors measured had no part in: of other draws, or of the
checkpoint's calibration, as in serving.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.integration.capture import Capture
from kvmesh.kernels import reference
from kvmesh.kernels.baselines import polar, turboquant, uniform

Vectors = npt.NDArray[np.float64]
Restore = Callable[[Vectors, Vectors], Vectors]  # (vectors, their center) to what was kept of them
_OURS = (2, 3, 4, 8)
_SCALE_BITS = 16
_ASKING_TOKENS = 64  # the last of a captured sequence; those before are asked


@dataclass(frozen=True, slots=True)
class Head:
    """Keys and values [n, d] of one head, queries [m, d] that attend to them, centers [2, d].

    n: a multiple of 32.
    """

    keys: Vectors
    values: Vectors
    queries: Vectors
    centers: Vectors


@dataclass(frozen=True, slots=True)
class Sample:
    """Heads whose losses are averaged."""

    name: str
    heads: tuple[Head, ...]


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
class Losses:
    """All of keys, except attention_error, the relative error of the output with both restored.

    mse is relative to the keys' mean square. Bias and variance are those of query-key products,
    relative to the root mean square and the mean square of |q||k|/sqrt(d); constant shifts per
    query, which softmax ignores, stay in. softmax_kl: nats.
    """

    mse: float
    ip_bias: float
    ip_variance: float
    softmax_kl: float
    attention_error: float


@dataclass(frozen=True, slots=True)
class CodecRow:
    """bits_per_element counts side information.

    ours: kvmesh at the most bits that are no more than this method's, and how many times its
    softmax KL the method's is; empty and 0 where ours has nothing so small.
    """

    method: str
    sample: str
    bits_per_element: float
    head_dim: int
    losses: Losses
    ours: str = ""
    kl_to_ours: float = 0.0


def _ours(bits: int) -> Method:
    def restore(kind: Literal["key", "value"]) -> Restore:
        def restored(x: Vectors, center: Vectors) -> Vectors:
            mu = center.astype(np.float32)
            codes, scales = reference.encode(x.astype(np.float32), mu, kind, bits)
            return reference.decode(codes, scales, mu, bits)

        return restored

    return Method(
        f"kvmesh {bits}", lambda dim: bits + _SCALE_BITS / dim, restore("key"), restore("value")
    )


def _fitted(bits: int) -> Method:
    """Our codes, their scale not the unbiased one but the one that fits each key best."""

    def restored(x: Vectors, center: Vectors) -> Vectors:
        mu, none = center.astype(np.float32), np.zeros(x.shape[1], np.float32)
        codes, _ = reference.encode(x.astype(np.float32), mu, "key", bits)
        coded = reference.decode(codes, np.ones(len(x), np.float16), none, bits)
        squares = (coded**2).sum(axis=1)
        scales = ((x - mu) * coded).sum(axis=1) / np.where(squares > 0, squares, 1)
        return np.asarray(scales.astype(np.float16)[:, None] * coded + mu)

    ours = _ours(bits)
    return replace(ours, name=f"fitted scale {bits}", restore_keys=restored)


def methods() -> list[Method]:
    """Ours, then ours with another scale, then the rivals."""
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
    found = [_ours(bits) for bits in _OURS] + [_fitted(bits) for bits in _OURS if bits < 8]
    for name, rival in rivals.items():
        restore = _uncentered(rival)
        found.append(Method(name, rival.bits_per_element, restore, restore))
    for bits in (2, 4):
        keys, values = uniform.Kivi(bits, "key"), uniform.Kivi(bits, "value")
        found.append(
            Method(
                f"kivi {bits}", keys.bits_per_element, _uncentered(keys), _uncentered(values)
            )
        )  # fmt: skip
    return found


def _uncentered(rival: _Rival) -> Restore:
    return lambda x, _: rival.quantize_dequantize(x)


def synthetic(dim: int = 128, tokens: int = 2048, queries: int = 64, seed: int = 0) -> list[Sample]:
    """Gaussian keys, and keys with four channels offset by ten standard deviations."""
    rng = np.random.default_rng(seed)
    keys, values, *others = rng.standard_normal((4, tokens, dim))
    asked = rng.standard_normal((queries, dim)) * 2
    centers = np.stack([other.mean(axis=0) for other in others])
    offset = np.zeros(dim)
    offset[rng.choice(dim, 4, replace=False)] = 10
    moved = centers + np.stack((offset, np.zeros(dim)))
    return [
        Sample("gaussian", (Head(keys, values, asked, centers),)),
        Sample("offset", (Head(keys + offset, values, asked, moved),)),
    ]


def captured(found: Capture, name: str) -> Sample:
    """Every layer and head of a captured sequence: its last tokens ask for those before.

    Raises ValueError for a sequence too short for that.
    """
    layers, tokens, heads, _ = found.k.shape
    seen = (tokens - _ASKING_TOKENS) // 32 * 32
    if seen < 32:
        raise ValueError(f"captured {tokens} tokens, needs {_ASKING_TOKENS + 32}")
    group = found.q.shape[2] // heads
    parts = []
    for layer, head in itertools.product(range(layers), range(heads)):
        queries = found.q[layer, -_ASKING_TOKENS:, head * group : (head + 1) * group]
        parts.append(
            Head(
                keys=found.k[layer, :seen, head].astype(np.float64),
                values=found.v[layer, :seen, head].astype(np.float64),
                queries=queries.reshape(-1, queries.shape[2]).astype(np.float64),
                centers=found.centers[layer, :, head].astype(np.float64),
            )
        )
    return Sample(name, tuple(parts))


def _softmax(scores: Vectors) -> Vectors:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _measure_head(method: Method, head: Head) -> list[float]:
    dim = head.keys.shape[1]
    keys = method.restore_keys(head.keys, head.centers[0])
    values = method.restore_values(head.values, head.centers[1])
    exact = head.queries @ head.keys.T
    found = head.queries @ keys.T
    norms = np.linalg.norm(head.queries, axis=1)[:, None] * np.linalg.norm(head.keys, axis=1)
    error = (found - exact) * np.sqrt(dim) / norms
    weights, approximate = (_softmax(scores / np.sqrt(dim)) for scores in (exact, found))
    tiny = np.finfo(np.float64).tiny
    kl = (weights * np.log((weights + tiny) / (approximate + tiny))).sum(axis=1).mean()
    out = weights @ head.values
    return [
        float(((keys - head.keys) ** 2).sum() / (head.keys**2).sum()),
        float(error.mean()),
        float(error.var()),
        float(kl),
        float(np.linalg.norm(approximate @ values - out) / np.linalg.norm(out)),
    ]


def measure(method: Method, sample: Sample) -> CodecRow:
    """One row; `ours` is left empty."""
    losses = np.mean([_measure_head(method, head) for head in sample.heads], axis=0)
    dim = sample.heads[0].keys.shape[1]
    bits = method.bits_per_element(dim)
    return CodecRow(method.name, sample.name, bits, dim, Losses(*losses.tolist()))


def beside_ours(rows: Sequence[CodecRow]) -> list[CodecRow]:
    """The rows of one sample, each with ours at no more bits."""
    own = sorted(
        (row for row in rows if row.method.startswith("kvmesh")),
        key=lambda row: row.bits_per_element,
    )
    found = []
    for row in rows:
        fair = [each for each in own if each.bits_per_element <= row.bits_per_element]
        if fair:
            ratio = row.losses.softmax_kl / max(fair[-1].losses.softmax_kl, 1e-300)
            row = replace(row, ours=fair[-1].method, kl_to_ours=ratio)
        found.append(row)
    return found


def bench_codec(
    samples: Sequence[Sample], on_row: Callable[[], None] = lambda: None
) -> Iterator[CodecRow]:
    """Every method on every sample, a sample at a time."""
    for sample in samples:
        rows = []
        for method in methods():
            rows.append(measure(method, sample))
            on_row()
        yield from beside_ours(rows)
