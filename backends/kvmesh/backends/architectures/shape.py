"""The shape of a decoder: parameters, bytes of weights, bytes of KV."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvmesh.backends.architectures.formats import WEIGHT_BYTES, kv_vector_bytes, latent_bytes
from kvmesh.backends.errors import ShapeError
from kvmesh.kernels.layout import BLOCK_SIZE, CODECS, HEADER_BYTES, TRAILER_BYTES

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Size = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mla(Part):
    """Multi-head latent attention: one latent (and one rotary key) for all heads is cached."""

    q_lora: Size
    kv_lora: Size
    rope: Size
    nope: Size
    value: Size

    @property
    def cached(self) -> int:
        """Elements that a token caches in a layer."""
        return self.kv_lora + self.rope


class Moe(Part):
    """ffn: size of one expert. shared: experts that every token passes. dense_layers: the first
    layers that have a plain FFN instead. score_bias: the router adds one bias per expert."""

    experts: Size
    top_k: Size
    ffn: Size
    shared: Number = 0
    dense_layers: Number = 0
    score_bias: bool = False
    expert_bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Moe":
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, must be at most experts = {self.experts}")
        return self


class Window(Part):
    """Sliding-window attention. Of each `every` layers one is global; 0: none is."""

    tokens: Size
    every: Number = 0


class Matrix(NamedTuple):
    """A dense layer: inputs, outputs; `repeats` of them."""

    inputs: int
    outputs: int
    repeats: int = 1

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs * self.repeats


class ModelShape(Part):
    """One model. Sizes are elements; `source` says where they are from."""

    name: str
    title: str = ""
    source: str = "config.json"
    layers: Size
    hidden: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab: Size
    ffn: Number = 0  # of layers without experts
    max_context: Size = 131072
    tied: bool = False  # the LM head is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # two more norms per layer
    mtp_layers: Number = 0  # multi-token prediction: a whole layer and a projection each
    mla: Mla | None = None
    moe: Moe | None = None
    window: Window | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModelShape":
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}, must be a multiple of {self.kv_heads} kv_heads"
            )
        dense = self.layers if self.moe is None else self.moe.dense_layers
        if dense and not self.ffn:
            raise ValueError(f"ffn is 0, must be at least 1 as {dense} layers have no experts")
        if dense > self.layers:
            raise ValueError(f"moe.dense_layers is {dense}, must be at most layers = {self.layers}")
        return self

    @property
    def plain(self) -> bool:
        """Nothing in it but what Llama has."""
        other = (self.mla, self.moe, self.window, self.qk_norm, self.post_norms, self.sinks)
        return not any((*other, self.qkv_bias, self.output_bias))

    # Layers.

    @property
    def dense_layers(self) -> int:
        return self.layers if self.moe is None else self.moe.dense_layers

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def window_layers(self) -> int:
        """Layers that see no more than the window."""
        if self.window is None:
            return 0
        return self.layers - (self.layers // self.window.every if self.window.every else 0)

    # Parameters.

    def attention_matrices(self) -> list[Matrix]:
        """Of one layer."""
        if self.mla is None:
            width = self.heads * self.head_dim
            kv = 2 * self.kv_heads * self.head_dim
            return [Matrix(self.hidden, width + kv), Matrix(width, self.hidden)]
        m = self.mla
        return [
            Matrix(self.hidden, m.q_lora + m.cached),
            Matrix(m.q_lora, self.heads * (m.nope + m.rope)),
            Matrix(m.kv_lora, self.heads * (m.nope + m.value)),
            Matrix(self.heads * m.value, self.hidden),
        ]

    @property
    def attention_elements(self) -> int:
        """Weights of one layer's attention matrices."""
        return sum(matrix.elements for matrix in self.attention_matrices())

    @property
    def expert_elements(self) -> int:
        """Weights of one expert; 0 without experts."""
        return 3 * self.hidden * self.moe.ffn if self.moe else 0

    def _attention_extras(self) -> int:
        extras = self.sinks * self.heads + 2 * self.qk_norm * self.head_dim
        if self.mla is not None:
            extras += self.mla.q_lora + self.mla.kv_lora
        extras += self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim
        return extras + self.output_bias * self.hidden + (4 if self.post_norms else 2) * self.hidden

    def _moe_extras(self, experts: int) -> int:
        if self.moe is None:
            return 0
        router = self.hidden * self.moe.experts + self.moe.score_bias * self.moe.experts
        return router + self.moe.expert_bias * experts * (2 * self.moe.ffn + self.hidden)

    def _layer_elements(self, moe: bool, experts: int) -> int:
        body = self.attention_elements + self._attention_extras()
        if not moe or self.moe is None:
            return body + 3 * self.hidden * self.ffn
        used = experts + self.moe.shared
        return body + used * self.expert_elements + self._moe_extras(experts)

    def _parameters(self, experts: int) -> int:
        layers = self.dense_layers * self._layer_elements(False, 0)
        layers += self.moe_layers * self._layer_elements(True, experts)
        return layers + self.hidden + self.vocab * self.hidden

    @property
    def total_parameters(self) -> int:
        """Without the layers of multi-token prediction."""
        experts = self.moe.experts if self.moe else 0
        return self._parameters(experts) + (not self.tied) * self.vocab * self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights that a decoded token passes: the LM head counts, the embedding's look-up not."""
        return self._parameters(self.moe.top_k if self.moe else 0)

    def _mtp(self, experts: int) -> int:
        layer = self._layer_elements(self.moe is not None, experts)
        return self.mtp_layers * (layer + 2 * self.hidden**2 + 3 * self.hidden)

    @property
    def mtp_parameters(self) -> int:
        """Of multi-token prediction, beside total_parameters; embedding and head are shared."""
        return self._mtp(self.moe.experts if self.moe else 0)

    @property
    def mtp_active_parameters(self) -> int:
        return self._mtp(self.moe.top_k if self.moe else 0)

    def weight_bytes(self, weights: str, attention: str | None = None, mtp: bool = False) -> float:
        """Bytes of the whole model. Embedding, head, norms, biases and router stay in bf16.

        attention: the attention matrices' format, if it is another. Raises KeyError for an unknown
        one (see WEIGHT_BYTES).
        """
        expert_layers = self.moe_layers + (self.mtp_layers if mtp and self.moe else 0)
        layers = self.layers + (self.mtp_layers if mtp else 0)
        attended = layers * self.attention_elements
        experts = self.moe.experts + self.moe.shared if self.moe else 0
        ffn = 3 * self.hidden * self.ffn * (layers - expert_layers)
        ffn += expert_layers * experts * self.expert_elements
        total = self.total_parameters + (self.mtp_parameters if mtp else 0)
        return (
            attended * WEIGHT_BYTES[attention or weights]
            + ffn * WEIGHT_BYTES[weights]
            + (total - attended - ffn) * WEIGHT_BYTES["bf16"]
        )

    # KV.

    @property
    def kv_elements_per_token(self) -> int:
        """Over all layers, as if none had a window."""
        if self.mla is not None:
            return self.layers * self.mla.cached
        return self.layers * 2 * self.kv_heads * self.head_dim

    def kv_layer_bytes(self, kv_format: str) -> float:
        """Bytes that a token caches in one layer, scales included, a block's header not.

        Raises ValueError for an unknown format (see KV_FORMATS).
        """
        if self.mla is not None:
            return latent_bytes(self.mla.kv_lora, kv_format) + latent_bytes(
                self.mla.rope, kv_format
            )
        return self.kv_heads * sum(kv_vector_bytes(self.head_dim, kv_format))

    def kv_bytes_per_token(self, kv_format: str) -> float:
        """Bytes that a token caches in all layers, as if none had a window."""
        return self.layers * self.kv_layer_bytes(kv_format) + _frame_bytes(kv_format)

    def kv_bytes(self, context: int, kv_format: str) -> float:
        """Bytes of a sequence of so many tokens: windowed layers keep no more than the window."""
        layer = self.kv_layer_bytes(kv_format)
        total = context * ((self.layers - self.window_layers) * layer + _frame_bytes(kv_format))
        if self.window is not None:
            total += self.window_layers * min(context, self.window.tokens) * layer
        return total


def _frame_bytes(kv_format: str) -> float:
    """A token's share of a block's header and trailer; fp8 is the hardware's and has none."""
    return (HEADER_BYTES + TRAILER_BYTES) / BLOCK_SIZE if kv_format in CODECS else 0.0


def validated(path: Path, fields: dict[str, Any]) -> ModelShape:
    """Raises ShapeError with one line for each wrong field."""
    try:
        return ModelShape.model_validate(fields)
    except ValidationError as error:
        told = "; ".join(_explain(problem) for problem in error.errors())
        raise ShapeError(f"{path}: {told}") from None


def _explain(problem: "ErrorDetails") -> str:
    where = ".".join(str(part) for part in problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if cause is not None:
        return f"{where}.{cause}" if where else str(cause)
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field of a model's shape"
    return f"{where} is {problem['input']!r}: {problem['msg']}"
