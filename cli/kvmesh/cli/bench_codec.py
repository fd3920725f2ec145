"""`kvmesh bench codec`: what each way to store keys and values costs and loses."""

from dataclasses import asdict

from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import print_json, print_table

_LOSSES = ("mse", "ip_bias", "ip_variance", "softmax_kl", "attention_error")


@command
def codec(json: Json = False) -> None:
    """Bits with all side information, and what is lost, for ours and for others."""
    from kvmesh.integration.bench_codec import bench_codec, methods, synthetic

    samples = synthetic()
    rows = []
    with progress_bar("bench", len(samples) * len(methods()), hidden=json) as advance:
        for row in bench_codec(samples):
            rows.append(row)
            advance()
    if json:
        print_json({"benchmark": "codec", "rows": [asdict(row) for row in rows]})
        return
    columns = (
        "sample", "method", ">bits", ">mse", ">ip bias", ">ip variance", ">softmax KL",
        ">attention error",
    )  # fmt: skip
    print_table(
        "",
        columns,
        [
            (
                row.sample,
                row.method,
                f"{row.bits_per_element:.3f}",
                *(f"{getattr(row, name):.3g}" for name in _LOSSES),
            )
            for row in rows
        ],
    )
