"""config.json of a Llama-style decoder: what is supported, and a refusal of what is not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from kvmesh.backends.errors import CheckpointError
from kvmesh.kernels.layout import MAX_HEAD_DIM, MIN_HEAD_DIM, supports_head_dim

ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_KINDS = ("default", "linear", "llama3")

_DEFAULT_THETA = 10000.0
_REFUSED_IF_SET = ("quantization_config", "sliding_window", "mlp_bias")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` is read by linear and llama3, what follows it by llama3 alone."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The fields of config.json that the graph or the mesh depends on."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tied_head: bool
    attention_bias: bool
    max_context: int  # tokens
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class _Reader:
    """Typed access to one JSON object, with errors that name the file and the field."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def refuse(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.fields.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(f"{name} is {value!r}, must be a positive whole number")
        return value

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.fields.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refuse(f"{name} is {value!r}, must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.fields.get(name) or False
        if not isinstance(value, bool):
            raise self.refuse(f"{name} is {value!r}, must be true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.fields.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
            raise self.refuse(f"{name} is {value!r}, must be a token id or a list of them")
        return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(folder: Path) -> LlamaConfig:
    """Parses config.json (and the end tokens of generation_config.json) in a checkpoint folder.

    Raises CheckpointError naming the field that is missing or the value that is not supported.
    """
    reader = _Reader(folder / "config.json", read_json(folder / "config.json"))
    _refuse_unsupported(reader)
    hidden_size = reader.positive_int("hidden_size")
    num_heads, num_kv_heads, head_dim = _read_heads(reader, hidden_size)
    bos = reader.token_ids("bos_token_id")
    return LlamaConfig(
        vocab_size=reader.positive_int("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=reader.positive_int("intermediate_size"),
        num_layers=reader.positive_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=reader.positive_float("rms_norm_eps", 1e-6),
        rope=_read_rope(reader),
        tied_head=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        max_context=reader.positive_int("max_position_embeddings", 2048),
        eos_token_ids=_read_eos(folder, reader),
        bos_token_id=bos[0] if bos else None,
    )


def _refuse_unsupported(reader: _Reader) -> None:
    architectures = reader.fields.get("architectures") or [reader.fields.get("model_type")]
    if architectures[0] not in (*ARCHITECTURES, "llama"):
        raise reader.refuse(
            f"architecture {architectures[0]!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    activation = reader.fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise reader.refuse(f"hidden_act {activation!r} is not supported; supported: silu")
    for name in _REFUSED_IF_SET:
        if reader.fields.get(name):
            raise reader.refuse(f"{name} is {reader.fields[name]!r}, which is not supported")


def _read_heads(reader: _Reader, hidden_size: int) -> tuple[int, int, int]:
    """(query heads, K and V heads, head dim)."""
    num_heads = reader.positive_int("num_attention_heads")
    num_kv_heads = reader.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.refuse(
            f"num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    if reader.fields.get("head_dim") is None and hidden_size % num_heads:
        raise reader.refuse(f"hidden_size {hidden_size} is not a multiple of {num_heads} heads")
    head_dim = reader.positive_int("head_dim", hidden_size // num_heads)
    if not supports_head_dim(head_dim):
        raise reader.refuse(
            f"head_dim {head_dim} is not supported, must be a multiple of 8 in "
            f"{MIN_HEAD_DIM}..{MAX_HEAD_DIM} that has a Hadamard matrix"
        )
    return num_heads, num_kv_heads, head_dim


def _read_rope(reader: _Reader) -> RopeConfig:
    # transformers 5 writes everything into rope_parameters; before, the base stood apart.
    found = reader.fields.get("rope_parameters") or reader.fields.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise reader.refuse(f"rope_scaling is {found!r}, must be an object")
    rope = _Reader(reader.path, found)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise reader.refuse(
            f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    partial = found.get("partial_rotary_factor", reader.fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise reader.refuse(f"partial_rotary_factor is {partial!r}, supported: 1.0")
    theta = rope.positive_float("rope_theta", reader.positive_float("rope_theta", _DEFAULT_THETA))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=rope.positive_float("factor"))
    return RopeConfig(
        theta=theta,
        kind=cast(Literal["llama3"], kind),
        factor=rope.positive_float("factor"),
        low_freq_factor=rope.positive_float("low_freq_factor"),
        high_freq_factor=rope.positive_float("high_freq_factor"),
        original_context=rope.positive_int("original_max_position_embeddings"),
    )


def _read_eos(folder: Path, reader: _Reader) -> tuple[int, ...]:
    # Chat models list the ends of a turn in generation_config.json alone.
    ids = reader.token_ids("eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        ids += _Reader(path, read_json(path)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))
