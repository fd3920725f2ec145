"""The feed-forward part of a layer as terms: plain, or experts and the exchanges between them."""

import math
from collections.abc import Iterator

from kvmesh.backends.architectures import WEIGHT_BYTES
from kvmesh.backends.architectures.shape import Matrix
from kvmesh.backends.cost.links import Links
from kvmesh.backends.cost.shapes import F
from kvmesh.backends.cost.terms import Plan, Term


def ffn_terms(plan: Plan, name: str, ffn: float, count: float) -> Iterator[Term]:
    """`count` gated FFNs of inner size `ffn` on this rank."""
    hidden, weights, width = plan.model.hidden, plan.formats.weights, math.ceil(ffn)
    yield plan.gemm(f"{name}_up", Matrix(hidden, 2 * width), weights, count)
    yield plan.gemm(f"{name}_down", Matrix(width, hidden), weights, count)
    kernels = 1 if plan.options.fused else 2
    yield plan.elementwise(f"{name}_activation", 3 * width * 2, count, kernels)


def moe_terms(plan: Plan, count: float) -> Iterator[Term]:
    """`count` layers of experts: router, shared and routed experts, and what travels between."""
    model, parallel = plan.model, plan.parallel
    assert model.moe is not None
    yield plan.gemm("router", Matrix(model.hidden, model.moe.experts), "bf16", count)
    if model.moe.shared:
        shared = model.moe.shared * model.moe.ffn / (1 if parallel.exchanges else parallel.tensor)
        yield from ffn_terms(plan, "shared", shared, count)
    yield from expert_terms(plan, count)
    if parallel.exchanges:
        yield from _exchanges(plan, count)


def expert_terms(plan: Plan, count: float) -> Iterator[Term]:
    """The routed experts on the busiest rank, as MoE tables measure them: products, then moving
    each token of the group in and out of the order of experts."""
    model, weights = plan.model, plan.formats.weights
    assert model.moe is not None
    split = plan.parallel.expert_split
    elements = model.expert_elements / split
    inner = model.moe.ffn / split
    yield plan.term(
        "experts",
        plan.rates.experts(weights),
        {F.ASSIGNMENTS: 2 * elements * count},
        {F.EXPERTS: elements * WEIGHT_BYTES[weights] * count},
        {F.ANY: count},
    )
    size = plan.rates.activation_bytes(weights)
    per_assignment = 8 * inner + inner * size * 2 + 4 * model.hidden
    per_token = model.hidden * (2 + size + 4)
    yield plan.term(
        "moe_tokens",
        plan.rates.elementwise()._replace(floor_s=0.0),
        {},
        {F.ASSIGNMENTS: per_assignment * count, F.GROUP_TOKENS: per_token * count},
        {},
    )


def _exchanges(plan: Plan, count: float) -> Iterator[Term]:
    links = Links(plan.device, plan.parallel.expert)
    sizes = exchange_bytes(plan)
    floors = (links.dispatch_floor_s, links.combine_floor_s)
    for name, size, floor in zip(("dispatch", "combine"), sizes, floors, strict=True):
        yield Term(
            name,
            link={F.VISITS: size * links.exchange_byte_s() * count},
            floor={F.ANY: (floor + links.exchange_latency_s) * count},
            bytes={F.VISITS: size * count},
        )


def exchange_bytes(plan: Plan) -> tuple[float, float]:
    """Bytes of a token that goes to an expert (in the math's format) and comes back."""
    hidden = plan.model.hidden
    back = 2 if plan.options.exchange == "bf16" else 1
    return hidden * plan.rates.activation_bytes(plan.formats.weights), hidden * back
