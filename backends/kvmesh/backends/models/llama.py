"""A Llama-style decoder as a row of ONNX graphs, cut where attention reads the block pool.

    stage 0       ids                -> hidden, q, k, v of layer 0
    stage l       attention l-1      -> hidden, q, k, v of layer l       (0 < l < L)
    stage L       attention L-1      -> logits of the wanted rows

Between two stages the caller runs attention. Stage L gathers the wanted rows first, so the last
layer's feed-forward and the LM head are computed for them alone.

Names and shapes (T tokens, R rows wanted, C positions in the tables):
    inputs   ids int64 [T], positions int64 [T, 1], rope_cos and rope_sin fp32 [C, D / 2],
             hidden_in fp32 [T, hidden], attention fp32 [T, Hq * D], rows int64 [R]
    outputs  hidden fp32 [T, hidden], q fp32 [T, 1, Hq * D], k fp32 [T, 1, Hkv * D],
             v fp32 [T, Hkv * D], logits fp32 [R, vocab]
"""

from collections.abc import Mapping
from pathlib import Path

from kvmesh.backends.models.config import LlamaConfig
from kvmesh.backends.models.graph import MICROSOFT, GraphBuilder
from kvmesh.backends.models.weights import TensorRef

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the graphs read, with the shape config.json implies ([out, in] for matrices)."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if config.attention_bias:
        sizes = {"q": q_size, "k": kv_size, "v": kv_size, "o": hidden}
        per_layer |= {f"self_attn.{each}_proj.bias": (size,) for each, size in sizes.items()}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in per_layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def build_stage(
    config: LlamaConfig, weights: Mapping[str, TensorRef], root: Path, stage: int
) -> bytes:
    """The serialised ONNX model of one stage, 0 <= stage <= num_layers.

    root: the folder that the graph's external data is relative to (see GraphBuilder).
    """
    graph = GraphBuilder(f"stage_{stage}", weights, root)
    if stage == 0:
        ids = graph.integers("ids", ["T"])
        hidden = graph.node("Gather", graph.weight(EMBEDDING), ids)
    else:
        attention = graph.floats("attention", ["T", config.num_heads * config.head_dim])
        hidden = graph.floats("hidden_in", ["T", config.hidden_size])
        if stage == config.num_layers:
            rows = graph.integers("rows", ["R"])
            attention = graph.node("Gather", attention, rows)
            hidden = graph.node("Gather", hidden, rows)
        hidden = _after_attention(graph, config, stage - 1, (attention, hidden))
    if stage == config.num_layers:
        _head(graph, config, hidden)
    else:
        _before_attention(graph, config, stage, hidden)
    return graph.build()


def _norm(graph: GraphBuilder, config: LlamaConfig, value: str, weight: str) -> str:
    return graph.node(
        "SimplifiedLayerNormalization",
        value,
        graph.weight(weight),
        axis=-1,
        epsilon=config.norm_eps,
        stash_type=1,
    )


def _project(graph: GraphBuilder, value: str, name: str, bias: bool = False) -> str:
    inputs = [value, graph.weight(f"{name}.weight")]
    if bias:
        inputs.append(graph.weight(f"{name}.bias"))
    return graph.node("Gemm", *inputs, transB=1)


def _before_attention(graph: GraphBuilder, config: LlamaConfig, layer: int, hidden: str) -> None:
    prefix, bias = f"model.layers.{layer}", config.attention_bias
    q_size, kv_size = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    positions = graph.integers("positions", ["T", 1])
    tables = [graph.floats(name, ["C", config.head_dim // 2]) for name in ("rope_cos", "rope_sin")]
    axis = graph.constant("axis", [1])
    normed = _norm(graph, config, hidden, f"{prefix}.input_layernorm.weight")
    graph.output("hidden", hidden, ["T", config.hidden_size])
    for each, size in (("q", q_size), ("k", kv_size)):
        value = _project(graph, normed, f"{prefix}.self_attn.{each}_proj", bias)
        # Each token is a batch entry of length 1, so its position stands alone.
        value = graph.node("Unsqueeze", value, axis)
        value = graph.node("RotaryEmbedding", value, positions, *tables, domain=MICROSOFT)
        graph.output(each, value, ["T", 1, size])
    graph.output("v", _project(graph, normed, f"{prefix}.self_attn.v_proj", bias), ["T", kv_size])


def _after_attention(
    graph: GraphBuilder, config: LlamaConfig, layer: int, values: tuple[str, str]
) -> str:
    """Output projection and feed-forward of a layer. values: (attention, hidden)."""
    attention, hidden = values
    prefix = f"model.layers.{layer}"
    projected = _project(graph, attention, f"{prefix}.self_attn.o_proj", config.attention_bias)
    hidden = graph.node("Add", hidden, projected)
    normed = _norm(graph, config, hidden, f"{prefix}.post_attention_layernorm.weight")
    gate = _project(graph, normed, f"{prefix}.mlp.gate_proj")
    up = _project(graph, normed, f"{prefix}.mlp.up_proj")
    gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", hidden, _project(graph, gated, f"{prefix}.mlp.down_proj"))


def _head(graph: GraphBuilder, config: LlamaConfig, hidden: str) -> None:
    normed = _norm(graph, config, hidden, FINAL_NORM)
    matrix = graph.weight(EMBEDDING if config.tied_head else HEAD)
    graph.output("logits", graph.node("Gemm", normed, matrix, transB=1), ["R", config.vocab_size])
