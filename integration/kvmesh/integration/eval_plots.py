"""Pictures of evaluations. Pure."""

from collections.abc import Mapping, Sequence

from kvmesh.backends.models.codec_check import Loss
from kvmesh.integration.evaluate import Score
from kvmesh.integration.kl import Divergence
from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import HeatMap, Line, LinePlot, heat_map, line_plot
from kvmesh.services.common.codec_choice import EXACT_CODECS

NEEDLE_NOTE = "share of exact answers; kvmesh eval needle"
KL_NOTE = "kvmesh eval kl"


def needle_plot(codec: str, scores: Sequence[Score]) -> str:
    """A heat map over (length, depth) of one codec's scores."""
    means = {score.group: score.mean for score in scores if score.codec == codec}
    lengths, depths = (list(dict.fromkeys(group[i] for group in means)) for i in (0, 1))
    return heat_map(
        HeatMap(
            title=f"Needle, {codec}",
            columns=[f"{int(length):,}" for length in lengths],
            rows=depths,
            values=[[means.get((length, depth)) for length in lengths] for depth in depths],
            column_label="tokens of the document",
            row_label="depth of the fact",
            show=lambda share: f"{share:.0%}",
            note=NEEDLE_NOTE,
        )
    )


def kl_position_plot(model: str, found: Mapping[str, Divergence]) -> str:
    """Does the loss grow with the context? One line per codec that loses anything."""
    lines = [Line(codec, one.by_block()) for codec, one in found.items() if one.kl.any()]
    x, y = Axis("position in the sequence"), Axis("KL against fp16, nats", "log")
    return line_plot(LinePlot(f"KL by position, {model}", x, y, lines, KL_NOTE))


def kl_bytes_plot(model: str, losses: Mapping[str, Loss]) -> str:
    """What a byte buys. One dot per compressed codec, named in the legend."""
    lines = [
        Line(codec, [(loss.bytes_per_token, loss.kl_nats)])
        for codec, loss in losses.items()
        if loss.kl_nats > 0 and codec not in EXACT_CODECS
    ]
    x, y = Axis("bytes per token", "log2"), Axis("KL against fp16, nats", "log")
    return line_plot(LinePlot(f"KL against memory, {model}", x, y, lines, KL_NOTE))
