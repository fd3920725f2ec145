"""What a tokenizer shows of itself, read when somebody scrapes."""

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common.metrics import Meters, Metric
from kvmesh.services.tokenizer.servicer import TokenizerServicer


def show_tokenizer(meters: Meters, servicer: TokenizerServicer) -> None:
    """Makes the tokenizer's metrics."""
    meters.gauges(
        [
            Metric(
                metric.TOKENIZER_OPEN, "{request}", "Prompts being encoded, and outputs streamed.",
                lambda: servicer.num_open,
            ),
        ]
    )  # fmt: skip
    meters.counters(
        [
            Metric(
                metric.TOKENIZER_PROMPTS, "{prompt}", "Encoded.", lambda: servicer.prompts_encoded
            ),
            Metric(metric.TOKENIZER_TOKENS, "{token}", "Of them.", lambda: servicer.tokens_encoded),
        ]
    )
