"""From a checkpoint and the options it is opened with to what a model says of itself."""

from collections import Counter

from kvmesh.backends.base import ModelOptions, ModelSpec
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.kernels.layout import KvLayout


def model_spec(checkpoint: Checkpoint, options: ModelOptions) -> ModelSpec:
    """Raises CheckpointError for codecs that do not fit the model."""
    config = checkpoint.config
    return ModelSpec(
        name=checkpoint.name,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        layout=_layout(checkpoint, options),
    )


def _layout(checkpoint: Checkpoint, options: ModelOptions) -> KvLayout:
    config = checkpoint.config
    try:
        return KvLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            codec=base_codec(options.codec, options.layer_codecs),
            fingerprint=checkpoint.fingerprint,
            layer_codecs=options.layer_codecs,
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.root}: cannot be opened so: {error}") from error


def base_codec(codec: str, layer_codecs: tuple[str, ...]) -> str:
    """The codec that names a layout: with layer codecs the one that most layers have, the first
    of them if several do, so that equal assignments have equal names, and so equal keys."""
    return Counter(layer_codecs).most_common(1)[0][0] if layer_codecs else codec
