"""Row C1: every measured op latency against what the cost model predicts for it."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kvmesh.backends.architectures import WEIGHT_BYTES, ModelShape, load_shape
from kvmesh.backends.cost.links import Links
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.rates import Rates
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import load_device

# What a table calls the MLA block, and the MoE layer.
MLA_BLOCK = (
    "q_kv_down", "q_up", "absorb_q", "absorb_v", "output", "rope_cache", "attention_decode",
)  # fmt: skip
MOE_LAYER = ("experts", "moe_tokens")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One measured latency and its prediction, both in microseconds."""

    kind: str
    case: str
    published_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted_us / self.published_us - 1


def kernel_cases() -> list[Kernel]:
    """All of kernels.toml, in its order."""
    path = files("kvmesh.integration.calibration") / "kernels.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    deepseek = load_shape("deepseek-r1")
    return [
        *(case for row in tables["gemm"] for case in _gemm(row)),
        *(case for row in tables["attention"] for case in _attention(row)),
        *_mla_block(tables["mla_block"], deepseek),
        *(case for row in tables["moe"] for case in _moe(row, deepseek)),
        *(case for row in tables["all_to_all"] for case in _all_to_all(row, deepseek)),
        *(case for row in tables["all_reduce"] for case in _all_reduce(row)),
    ]


def _gemm(row: dict[str, Any]) -> Iterator[Kernel]:
    device, weights = load_device(row["device"]), row["weights"]
    rates = Rates(device)
    rate = rates.gemm(weights)
    size, rows, stored = 4096, 16, 7168 * 8192 * WEIGHT_BYTES[weights]
    flops = 2 * size**3
    peak, bandwidth = device.peak[rates.math(weights)].value, device.memory.bandwidth_bytes_s.value
    compute = flops / rate.flops_s + rate.floor_s
    yield _kernel("gemm", row, f"{weights} {size}^3", flops / peak / row["compute"], compute)
    memory = stored / rate.bytes_s + rate.floor_s
    case = f"{weights} {rows} x 7168 x 8192"
    yield _kernel("gemm", row, case, stored / bandwidth / row["memory"], memory)


def _attention(row: dict[str, Any]) -> Iterator[Kernel]:
    """64 sequences of 8,192 tokens, and a prompt of 8,192, with the heads of Llama 70B over 8."""
    device, kv = load_device(row["device"]), row["kv"]
    model = load_shape("llama-3.1-70b")
    cost = StepCost(device, model, Parallel(tensor=8), Formats(kv=kv))
    sequences, context = 64, 8192
    times = cost.step(StepWork.of(decodes=[context] * sequences)).by_name()
    stored = sequences * context * 2 * model.head_dim * (1 if kv == "fp8" else 2)
    published = stored / device.memory.bandwidth_bytes_s.value / row["decode"]
    predicted = times["attention_decode"] / model.layers
    yield _kernel("attention", row, f"decode {kv} {sequences} x {context}", published, predicted)
    flops = 4 * model.heads // 8 * model.head_dim * context * (context + 1) / 2
    peak = device.peak[Rates(device).attention_math(kv)].value
    times = cost.step(StepWork.of(chunks=[(0, context)])).by_name()
    predicted = times["attention_context"] / model.layers
    yield _kernel(
        "attention", row, f"context {kv} {context}", flops / peak / row["context"], predicted
    )


def _mla_block(row: dict[str, Any], model: ModelShape) -> Iterator[Kernel]:
    device = load_device(row["device"])
    cost = StepCost(device, model, Parallel(data=8, expert=8), Formats("nvfp4", "fp8"))
    for batch, published in row["us"].items():
        for context, us in zip(row["context"], published, strict=True):
            times = cost.step(StepWork.of(decodes=[context] * int(batch))).by_name()
            predicted = sum(times[name] for name in MLA_BLOCK) / model.layers
            yield _kernel("mla_block", row, f"batch {batch} x {context}", us * 1e-6, predicted)


def _moe(row: dict[str, Any], model: ModelShape) -> Iterator[Kernel]:
    device, ranks = load_device(row["device"]), row["expert"]
    for routing in ("balanced", "power_law"):
        cost = StepCost(
            device,
            model,
            Parallel(data=ranks, expert=ranks),
            Formats(row["weights"], "fp8"),
            Options(routing=routing),
        )
        for tokens, us in zip(row["tokens"], row[f"{routing}_us"], strict=True):
            times = cost.step(StepWork(decode_sequences=1, decode_context=1), tokens).by_name()
            predicted = sum(times[name] for name in MOE_LAYER) / model.moe_layers
            case = f"{row['weights']} EP{ranks} {routing} {tokens}"
            yield _kernel("moe", row, case, us * 1e-6, predicted)


def _all_to_all(row: dict[str, Any], model: ModelShape) -> Iterator[Kernel]:
    device, ranks = load_device(row["device"]), row["expert"]
    cost = StepCost(device, model, Parallel(data=ranks, expert=ranks), Formats("nvfp4", "fp8"))
    for index, tokens in enumerate(row["tokens"]):
        times = cost.step(StepWork(decode_sequences=tokens, decode_context=tokens)).by_name()
        for name in ("dispatch", "combine"):
            case = f"{name} EP{ranks} {row['protocol']} {tokens}"
            published = row[f"{name}_us"][index] * 1e-6
            yield _kernel("all_to_all", row, case, published, times[name] / model.moe_layers)


def _all_reduce(row: dict[str, Any]) -> Iterator[Kernel]:
    links = Links(load_device(row["device"]), row["ranks"])
    for elements, us in zip(row["elements"], row["us"], strict=True):
        predicted = links.all_reduce_s(2 * elements)
        yield _kernel("all_reduce", row, f"{row['ranks']} ranks {elements}", us * 1e-6, predicted)


def _kernel(
    kind: str, row: dict[str, Any], case: str, published: float, predicted: float
) -> Kernel:
    return Kernel(kind, f"{row['device']} {case}", published * 1e6, predicted * 1e6)
