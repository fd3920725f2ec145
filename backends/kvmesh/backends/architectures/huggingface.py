"""A model's shape from a Hugging Face config.json, for costs: more families than can be run."""

from pathlib import Path
from typing import Any

from kvmesh.backends.architectures.shape import ModelShape, validated
from kvmesh.backends.errors import ShapeError
from kvmesh.backends.models.config import read_json

_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
_MOE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "kimi_k2")
_GEMMA = ("gemma2", "gemma3_text")
FAMILIES = (*_PLAIN, *_MOE, *_GEMMA)


def read_shape(path: Path) -> ModelShape:
    """Raises CheckpointError for a file that is no JSON object, ShapeError for what is unknown."""
    fields = read_json(path)
    if isinstance(fields.get("text_config"), dict):  # vision and language: the decoder alone
        fields = fields["text_config"]
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ShapeError(f"{path}: model_type is {family!r}, must be one of {', '.join(FAMILIES)}")
    found = _common(path, fields)
    if family in ("deepseek_v3", "kimi_k2"):
        found |= _mla(path, fields)
    if family in _MOE:
        found["moe"] = _moe(path, fields, family)
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        found["qk_norm"] = True
    if family in _GEMMA:
        found |= {"post_norms": True, "tied": fields.get("tie_word_embeddings", True)}
    if family == "gpt_oss":
        found |= {"qkv_bias": True, "output_bias": True, "sinks": True}
    if family == "qwen2":
        found["qkv_bias"] = True
    return validated(path, found)


def _need(path: Path, fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ShapeError(f"{path}: {name} is missing")
    return fields[name]


def _common(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    heads = _need(path, fields, "num_attention_heads")
    hidden = _need(path, fields, "hidden_size")
    bias = bool(fields.get("attention_bias"))
    found = {
        "name": path.resolve().parent.name,
        "source": "config.json",
        "layers": _need(path, fields, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or _head_dim(path, hidden, heads),
        "vocab": _need(path, fields, "vocab_size"),
        "ffn": fields.get("intermediate_size") or 0,
        "max_context": fields.get("max_position_embeddings") or 131072,
        "tied": fields.get("tie_word_embeddings") or False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mtp_layers": fields.get("num_nextn_predict_layers") or 0,
    }
    return found | _window(fields)


def _head_dim(path: Path, hidden: Any, heads: Any) -> int:
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        raise ShapeError(f"{path}: num_attention_heads is {heads!r}, must be a whole number >= 1")
    return hidden // heads


def _window(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields.get("sliding_window")
    if not tokens or fields.get("use_sliding_window") is False:
        return {}
    every = fields.get("sliding_window_pattern") or 0
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
    elif not every and fields["model_type"] != "mistral":
        every = 6 if fields["model_type"] == "gemma3_text" else 2
    return {"window": {"tokens": tokens, "every": every}}


def _mla(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    names = {
        "q_lora": "q_lora_rank",
        "kv_lora": "kv_lora_rank",
        "rope": "qk_rope_head_dim",
        "nope": "qk_nope_head_dim",
        "value": "v_head_dim",
    }
    return {"mla": {own: _need(path, fields, theirs) for own, theirs in names.items()}}


def _moe(path: Path, fields: dict[str, Any], family: str) -> dict[str, Any]:
    experts = ("n_routed_experts", "num_local_experts", "num_experts")
    count = next((fields[name] for name in experts if fields.get(name) is not None), None)
    if count is None:
        raise ShapeError(f"{path}: one of {', '.join(experts)} is missing")
    ffn = fields.get("moe_intermediate_size") or _need(path, fields, "intermediate_size")
    gpt_oss = family == "gpt_oss"
    return {
        "experts": count,
        "top_k": _need(path, fields, "num_experts_per_tok"),
        "ffn": ffn,
        "shared": fields.get("n_shared_experts") or 0,
        "dense_layers": fields.get("first_k_dense_replace") or 0,
        "score_bias": gpt_oss or family in ("deepseek_v3", "kimi_k2"),
        "expert_bias": gpt_oss,
    }
