"""The ops of a decoder layer as terms (see terms.py): attention, norms, head and host."""

import math
from collections.abc import Iterator
from dataclasses import replace

from kvmesh.backends.architectures.shape import Matrix
from kvmesh.backends.cost.ffn import ffn_terms, moe_terms
from kvmesh.backends.cost.rates import Rate
from kvmesh.backends.cost.shapes import F
from kvmesh.backends.cost.terms import Coefficients, Plan, Term
from kvmesh.kernels.layout import BLOCK_SIZE, CODECS

_QUERY_TILE = 128  # query tokens of a chunk that share one reading and decoding of K and V
_DECODE_FLOPS = 4  # per cached element: unpack (2), level, scale
_ENCODE_FLOPS = 10  # per element, beside the rotation: norm (2), scale, thresholds, pack


def layer_terms(plan: Plan, dense: float, experts: float) -> Iterator[Term]:
    """Ops of `dense` layers with a plain FFN and `experts` layers with experts."""
    layers = dense + experts
    # What an all-reduce follows: the attention's output, and the FFN's.
    reduces = {"output": layers, "ffn_down": dense} if plan.parallel.tensor > 1 else {}
    overlapped = reduces if plan.options.overlap else {}
    for term in _layer_terms(plan, dense, experts):
        count = overlapped.get(term.name, 0.0)
        yield replace(term, link={F.ALL_REDUCE_S: count}) if count else term
    alone = 0.0 if overlapped else layers + dense
    alone += 0 if plan.parallel.exchanges else experts
    if plan.parallel.tensor > 1:
        yield Term("all_reduce", link={F.ALL_REDUCE_S: alone})


def _layer_terms(plan: Plan, dense: float, experts: float) -> Iterator[Term]:
    layers = dense + experts
    if plan.model.mla is None:
        yield from _gqa(plan, layers)
    else:
        yield from _mla(plan, layers)
    yield from _codec(plan, layers)
    yield from _norms(plan, layers)
    if dense:
        yield from ffn_terms(plan, "ffn", plan.model.ffn / plan.parallel.tensor, dense)
    if experts:
        yield from moe_terms(plan, experts)


def head_terms(plan: Plan, count: float = 1) -> Iterator[Term]:
    """The LM head over the rows that need logits, and the gap in which only the host works."""
    model = plan.model
    matrix = Matrix(model.hidden, math.ceil(model.vocab / plan.parallel.tensor))
    read = 2 * (matrix.inputs + matrix.outputs)
    yield plan.term(
        "head",
        plan.rates.gemm("bf16"),
        {F.LOGITS: 2 * matrix.elements * count},
        {F.ANY_LOGITS: 2 * matrix.elements * count, F.LOGITS: read * count},
        {F.ANY_LOGITS: count},
    )


def host_term(plan: Plan) -> Term:
    found = plan.rates.efficiency
    step, sequence = (found.host.step_s.value, found.host.sequence_s.value) if found else (0.0, 0.0)
    return Term("host", floor={F.ANY: step, F.SEQUENCES: sequence})


def _gqa(plan: Plan, layers: float) -> Iterator[Term]:
    model, t, weights = plan.model, plan.parallel.tensor, plan.formats.projections
    heads, kv_heads = model.heads // t, max(1, model.kv_heads // t)
    dim = model.head_dim
    yield plan.gemm("qkv", Matrix(model.hidden, (heads + 2 * kv_heads) * dim), weights, layers)
    yield plan.gemm("output", Matrix(heads * dim, model.hidden), weights, layers)
    yield plan.elementwise("rope_cache", (2 * heads + 4 * kv_heads) * dim * 2, layers)
    share = kv_heads / model.kv_heads
    local = layers * model.window_layers / model.layers
    kinds = (
        ("attention", layers - local, F.ATTENDED, F.CHUNK_CONTEXT, F.DECODE_CONTEXT),
        ("window_attention", local, F.W_ATTENDED, F.W_CHUNK_CONTEXT, F.W_DECODE_CONTEXT),
    )
    kv = model.kv_layer_bytes(plan.formats.kv) * share
    elements = 2 * kv_heads * dim
    query = 2 * heads * dim * 2  # read q, write the output
    for name, count, attended, chunk, decode in kinds:
        if not count:
            continue
        flops = 4 * heads * dim
        yield _attend(
            plan,
            f"{name}_context",
            plan.rates.context_attention(plan.formats.kv),
            {attended: flops * count},
            {chunk: kv * count},
            ({attended: elements / _QUERY_TILE * count}, {F.ANY_CHUNK: count}),
        )
        yield _attend(
            plan,
            f"{name}_decode",
            plan.rates.decode_attention(plan.formats.kv),
            {decode: flops * plan.width * count},
            {decode: kv * count, F.DECODE: query * count},
            ({decode: elements * count}, {F.ANY_DECODE: count}),
        )


def _attend(
    plan: Plan,
    name: str,
    rate: Rate,
    flops: Coefficients,
    moved: Coefficients,
    decoded: tuple[Coefficients, Coefficients],
) -> Term:
    """decoded: (cached elements that are decoded, once per reading; floors)."""
    elements, floor = decoded
    term = plan.term(name, rate, flops, moved, floor)
    if _encoded(plan.formats.kv):
        rate_s = plan.rates.vector_flops_s()
        for feature, count in elements.items():
            term.math[feature] = term.math.get(feature, 0.0) + count * _DECODE_FLOPS / rate_s
    return term


def _encoded(kv: str) -> bool:
    return kv in CODECS and CODECS[kv].key_scales


def _mla(plan: Plan, layers: float) -> Iterator[Term]:
    """Decode works on the latent (absorbed projections), chunks on full keys and values."""
    model, weights = plan.model, plan.formats.projections
    assert model.mla is not None
    m, heads = model.mla, model.heads // plan.parallel.tensor
    yield plan.gemm("q_kv_down", Matrix(model.hidden, m.q_lora + m.cached), weights, layers)
    yield plan.gemm("q_up", Matrix(m.q_lora, heads * (m.nope + m.rope)), weights, layers)
    up = Matrix(m.kv_lora, heads * (m.nope + m.value))
    expand = plan.gemm("kv_up", up, weights, layers)
    yield Term(
        expand.name,
        math=_for_chunks(expand.math),
        memory=_for_chunks(expand.memory),
        floor={F.ANY_CHUNK: expand.floor[F.ANY]},
        flops=_for_chunks(expand.flops),
        bytes=_for_chunks(expand.bytes),
    )
    for name, matrix in (
        ("absorb_q", Matrix(m.nope, m.kv_lora, heads)),
        ("absorb_v", Matrix(m.kv_lora, m.value, heads)),
    ):
        yield plan.term(
            name,
            plan.rates.gemm("bf16"),
            {F.DECODE: 2 * matrix.elements * layers},
            {
                F.ANY_DECODE: 2 * matrix.elements * layers,
                F.DECODE: 2 * heads * (matrix.inputs + matrix.outputs) * layers,
            },
            {F.ANY_DECODE: layers},
        )
    yield plan.gemm("output", Matrix(heads * m.value, model.hidden), weights, layers)
    # Two kernels: the norms of the two latents; rotation, quantisation and the cache.
    yield plan.elementwise("rope_cache", heads * m.cached * 3 + m.cached * 4, layers, 2)
    kv = model.kv_layer_bytes(plan.formats.kv)
    yield _attend(
        plan,
        "attention_context",
        plan.rates.context_attention(plan.formats.kv),
        {F.ATTENDED: 2 * heads * (m.nope + m.rope + m.value) * layers},
        {F.CHUNK_CONTEXT: (kv + 2 * heads * (m.nope + m.rope + m.value)) * layers},
        ({F.CHUNK_CONTEXT: m.cached * layers}, {F.ANY_CHUNK: layers}),
    )
    query = heads * (m.cached * (1 if plan.formats.kv == "fp8" else 2) + m.kv_lora * 2)
    yield _attend(
        plan,
        "attention_decode",
        plan.rates.decode_attention(plan.formats.kv, heads),
        {F.DECODE_CONTEXT: 2 * heads * (m.cached + m.kv_lora) * plan.width * layers},
        {F.DECODE_CONTEXT: kv * layers, F.DECODE: query * layers},
        ({F.DECODE_CONTEXT: m.cached * layers}, {F.ANY_DECODE: layers}),
    )


def _for_chunks(part: Coefficients) -> Coefficients:
    """A product of all that the chunks attend to, instead of the step's tokens."""
    features = {F.TOKENS: F.CHUNK_CONTEXT, F.ANY: F.ANY_CHUNK}
    return {features[f]: value for f, value in part.items()}


def _codec(plan: Plan, layers: float) -> Iterator[Term]:
    """Encoding new keys and values, and rotating queries and outputs (Hadamard, d log2 d)."""
    if not _encoded(plan.formats.kv):
        return
    model, t = plan.model, plan.parallel.tensor
    heads = model.heads // t
    if model.mla is None:
        dim, elements = model.head_dim, 2 * max(1, model.kv_heads // t) * model.head_dim
        queries = 2 * heads * dim
    else:
        dim, elements = min(256, model.mla.kv_lora), model.mla.cached
        queries = heads * (model.mla.cached + model.mla.kv_lora)
    rotation = math.log2(dim)
    flops = {F.TOKENS: (elements * (_ENCODE_FLOPS + rotation) + queries * rotation) * layers}
    written = model.kv_layer_bytes(plan.formats.kv) / max(1, min(t, model.kv_heads))
    moved = {F.TOKENS: (2 * elements + written) * layers}
    rate = plan.rates.elementwise()._replace(flops_s=plan.rates.vector_flops_s())
    yield plan.term("codec", rate, flops, moved, {F.SEALS: layers})


def _norms(plan: Plan, layers: float) -> Iterator[Term]:
    per_layer = 4 if plan.model.post_norms else 2
    kernels = 1 if plan.options.fused else 3  # beside the norm: the residual sum, the quantiser
    token_bytes = 4 * plan.model.hidden * 2 * (1 if plan.options.fused else 2)
    yield plan.elementwise("norms", token_bytes, layers * per_layer, kernels)


def seal_share(tokens: float) -> float:
    """The share of steps in which some block fills up."""
    return min(1.0, tokens / BLOCK_SIZE)
