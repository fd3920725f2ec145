"""Which codec a model is served with. Pure but for `find_check`, which reads a file.

The first of these that is there decides:

    model.layer_codecs   a codec for each layer
    model.codec          one codec for all layers, unless it is "auto"
    the check's file     what 'kvmesh model check' found for this model
    DEFAULT_CODEC        with a warning: nobody has measured what it costs this model
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.codec_check import (
    BLOCK_FORMAT,
    CODEC_FILE,
    CodecCheck,
    read_check,
    refuse_foreign,
)
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError

DEFAULT_CODEC = "k4v4"
EXACT_CODECS = ("fp32", "fp16")  # lose next to nothing, so they need no check


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """What to open a model with. layer_codecs: empty if all layers have `codec`.

    rests_on: the check that the choice follows, which must be of the model that is opened.
    warning: for whoever starts the mesh; empty for none.
    """

    codec: str
    layer_codecs: tuple[str, ...] = ()
    rests_on: CodecCheck | None = None
    warning: str = ""

    @property
    def label(self) -> str:
        """For people: k4v4, or 3 x k3v3, 1 x k8v8."""
        counts = Counter(self.layer_codecs).most_common()
        return ", ".join(f"{n} x {codec}" for codec, n in counts) if counts else self.codec

    def confirm(self, fingerprint: bytes, source: Path) -> None:
        """Raises CheckpointError if the choice rests on a check of another model."""
        if self.rests_on is not None:
            refuse_foreign(self.rests_on, fingerprint, source)


def check_path(model: ModelConfig) -> Path:
    """Where the model's check is, or would be. Raises ConfigError for a missing checkpoint."""
    return model.codec_check or checkpoint_path(model) / CODEC_FILE


def find_check(model: ModelConfig) -> CodecCheck | None:
    """The check of `model`, None if it was never checked.

    Raises ConfigError for a missing checkpoint, a broken file, or a named one that is not there.
    """
    try:
        check = read_check(check_path(model))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if check is None and model.codec_check is not None:
        raise ConfigError(
            f"model.codec_check {model.codec_check} is not there; 'kvmesh model check' writes it"
        )
    return check


def choose_codec(model: ModelConfig, check: CodecCheck | None) -> CodecChoice:
    """See the module. check: the model's, from `find_check`."""
    if model.layer_codecs:
        exact = set(model.layer_codecs) <= set(EXACT_CODECS)
        warning = "" if exact or check else _never_checked(model, "its layer_codecs")
        return CodecChoice(DEFAULT_CODEC, model.layer_codecs, warning=warning)
    if model.codec != "auto":
        return CodecChoice(model.codec, warning=_warning(model, model.codec, check))
    if check is None:
        return CodecChoice(DEFAULT_CODEC, warning=_never_checked(model, DEFAULT_CODEC))
    return CodecChoice(check.codec, check.layer_codecs, check, _outdated(model, check))


def _warning(model: ModelConfig, codec: str, check: CodecCheck | None) -> str:
    if codec in EXACT_CODECS:
        return ""
    if check is None:
        return _never_checked(model, codec)
    loss = check.uniform.get(codec)
    if loss is None or loss.kl_nats <= check.budget_nats:
        return ""
    return (
        f"codec {codec} costs model {model.name} a KL of {loss.kl_nats:.3g} nats, over the budget "
        f'of {check.budget_nats:g} of its check; codec = "auto" takes what stays under it'
    )


def _outdated(model: ModelConfig, check: CodecCheck) -> str:
    if check.block_format == BLOCK_FORMAT:
        return ""
    return (
        f"the codecs of model {model.name} were found on block format {check.block_format}, blocks "
        f"now have {BLOCK_FORMAT}; 'kvmesh model check {model.path or model.name}' measures again"
    )


def _never_checked(model: ModelConfig, codec: str) -> str:
    what = model.path or model.name
    return (
        f"nobody has measured what {codec} costs model {model.name}; "
        f"'kvmesh model check {what}' measures it and finds the best codec of each layer"
    )
