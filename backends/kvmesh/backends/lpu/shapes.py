"""Models by their shape, and how a shape is shared out over chips."""

import functools
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path

from kvmesh.backends import architectures
from kvmesh.backends.architectures import load_shape, shape_names
from kvmesh.backends.lpu.chip import LpuChip
from kvmesh.backends.lpu.program import LpuError, ModelDoesNotFit
from kvmesh.backends.models.config import LlamaConfig, read_config
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a dense Llama-style decoder's program depends on. max_context: tokens."""

    name: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def weights(self) -> int:
        """All matrices; the embedding counts beside the head, as it lies on other chips."""
        return self.num_layers * self.layer_weights + 2 * self.vocab * self.hidden


def shape_of(config: LlamaConfig, name: str) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn_size,
        vocab=config.vocab_size,
        max_context=config.max_context,
    )


@functools.cache
def known_shapes() -> dict[str, ModelShape]:
    """The published models that are plain Llama-style decoders, by name."""
    found = (load_shape(name) for name in shape_names())
    return {each.name: _plain(each) for each in found if each.plain}


def _plain(shape: architectures.ModelShape) -> ModelShape:
    return ModelShape(
        name=shape.name,
        num_layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        vocab=shape.vocab,
        max_context=shape.max_context,
    )


def find_shape(name: str) -> ModelShape:
    """The shape of a known model, or of a checkpoint folder.

    Raises CheckpointError for a bad folder, LpuError for what is neither.
    """
    known = known_shapes()
    if name in known:
        return known[name]
    path = Path(name)
    if name in shape_names():
        raise LpuError(
            f"{name} is not a plain Llama-style decoder, and only such are compiled: "
            f"{', '.join(known)}, or a checkpoint's folder"
        )
    if not path.is_dir():
        raise LpuError(
            f"{name!r} is neither a checkpoint's folder nor a known model: {', '.join(known)}"
        )
    return shape_of(read_config(path), path.resolve().name)


def kv_bits(codec: str, shape: ModelShape) -> tuple[float, float]:
    """Bits of one element of K and of V in a sealed block, its scale included."""
    layout = KvLayout(1, 1, shape.head_dim, codec, bytes(16))
    planes = layout.planes(0)
    keys = planes.value_codes - planes.key_codes + planes.value_scales - planes.key_scales
    values = planes.key_scales - planes.value_codes + planes.end - planes.value_scales
    elements = BLOCK_SIZE * shape.head_dim
    return 8 * keys / elements, 8 * values / elements


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on chips. A stage is a group of `group` chips of one node that share its layers.

    context: tokens of one sequence whose K and V the chips have room for, `sequences` times.
    """

    shape: ModelShape
    chips: int
    group: int
    stages: int
    layers_per_stage: int  # of the fullest stage
    weight_bytes: int  # of the fullest chip
    kv_bytes: int  # of one sequence at full length, on that chip
    sequences: int


def place_model(
    shape: ModelShape, chips: int | None, codec: str, context: int, chip: LpuChip
) -> Placement:
    """Shares layers out over groups of chips, weights of one byte each; none: as few as hold it.

    Raises ModelDoesNotFit saying how many chips it needs.
    """
    if chips is not None and chips < 1:
        raise LpuError(f"chips is {chips}, must be 1 or more")
    fitting = [
        placement
        for group in range(1, chip.node_chips + 1)
        if shape.kv_heads % group == 0
        and shape.heads % group == 0
        and (placement := _fit(shape, group, chips, (codec, context), chip)) is not None
    ]
    if not fitting:
        needed = None if chips is None else place_model(shape, None, codec, context, chip).chips
        raise ModelDoesNotFit(
            f"{shape.name} at {context} tokens of {codec} does not fit {chips} chips of "
            f"{chip.data_bytes >> 20} MiB each for data; it needs {needed}"
            if needed
            else f"a layer of {shape.name} has {shape.layer_weights >> 20} MiB of weights, more "
            f"than the {chip.node_chips} chips of a node hold beside its cache"
        )
    if chips is None:
        return min(fitting, key=lambda each: (each.chips, -each.group))
    return max(fitting, key=lambda each: each.group)  # a wider group is a shorter way


def _fit(
    shape: ModelShape, group: int, chips: int | None, cache: tuple[str, int], chip: LpuChip
) -> Placement | None:
    codec, context = cache
    keys, values = kv_bits(codec, shape)
    elements = context * shape.kv_heads // group * shape.head_dim
    kv_layer = ceil(elements * (keys + values) / 8)
    weights_layer = ceil(shape.layer_weights / group)
    ends = ceil(shape.vocab * shape.hidden / group)
    most = shape.num_layers + 2
    if chips is not None:
        most = min(chips // group, most)
    for stages, own in product(range(1, most + 1) if chips is None else (most,), (0, 2)):
        # The first stage has the embedding and the last the head, or (own) each has a stage.
        used = min(stages - own, shape.num_layers)
        if used < 1:
            continue
        layers = ceil(shape.num_layers / used)
        # Where layers do not share out evenly, the ends have one fewer than the fullest.
        short = used * layers - shape.num_layers >= 2
        last = (layers - short) * weights_layer + ends * (2 if used == 1 else 1)
        weights = max(layers * weights_layer, ends if own else last)
        kv = layers * kv_layer
        if weights + kv <= chip.data_bytes:
            return Placement(
                shape, (used + own) * group if chips is None else chips, group, used + own, layers,
                weights, kv, (chip.data_bytes - weights) // max(1, kv),
            )  # fmt: skip
    return None
