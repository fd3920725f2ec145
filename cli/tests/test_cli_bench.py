"""`kvmesh bench codec`: the table that a reader of the paper looks for."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cli.main import app


def test_bench_codec_prints_every_method_on_every_sample(tmp_path: Path) -> None:
    picture = tmp_path / "loss.svg"
    result = CliRunner().invoke(app, ["bench", "codec", "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    by_method = {(row["sample"], row["method"]): row for row in found["rows"]}
    assert len(by_method) == len(found["rows"])
    # The published distortion of the paper's codec at 4 bits, d=128.
    paper = by_method["gaussian", "turboquant mse 4"]
    assert paper["losses"]["mse"] == pytest.approx(0.0093, rel=0.02)
    # What centering is for: keys with offset channels cost ours no more than others; and those of
    # a model have a mean too.
    for sample, times in (("offset", 2), ("captured from mini", 1)):
        for bits in (2, 3, 4):
            theirs = by_method[sample, f"turboquant mse {bits}"]
            assert theirs["ours"] == f"kvmesh {bits}"
            assert theirs["kl_to_ours"] > times
    assert "kvmesh" in picture.read_text()
    # The paper's figures: by its formulas within 1 %, and as printed as far as it prints them.
    for row in found["paper"]:
        assert row["measured"] == pytest.approx(row["exact"], rel=0.01)
    printed = {(row["quantity"], row["bits"]): row["printed"] for row in found["paper"]}
    assert printed["D_mse", 2] == 0.117 and printed["D_prod", 1] == 1.57
