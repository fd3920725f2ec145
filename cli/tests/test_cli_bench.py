"""`kvmesh bench codec`: the table that a reader of the paper looks for."""

import json

import pytest
from typer.testing import CliRunner

from kvmesh.cli.main import app


def test_bench_codec_prints_every_method_on_every_sample() -> None:
    result = CliRunner().invoke(app, ["bench", "codec", "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    by_method = {(row["sample"], row["method"]): row for row in rows}
    assert len(by_method) == len(rows)
    # The published distortion of the paper's codec at 4 bits, d=128.
    paper = by_method["gaussian", "turboquant mse 4"]
    assert paper["mse"] == pytest.approx(0.0093, rel=0.02)
    # What centering is for: keys with offset channels cost ours no more than others.
    ours, theirs = by_method["offset", "kvmesh 4"], by_method["offset", "turboquant mse 4"]
    assert ours["bits_per_element"] == theirs["bits_per_element"]
    assert ours["softmax_kl"] < theirs["softmax_kl"] / 2
