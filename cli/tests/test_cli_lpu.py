"""`kvmesh lpu` and `kvmesh up --backend` as a user meets them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app
from kvmesh.cli.up_backend import with_backend
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.errors import ConfigError


def lpu(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["lpu", *arguments])


def test_compile_of_the_bundled_model_prints_and_writes(tmp_path: Path):
    gantt, trace = tmp_path / "mini.svg", tmp_path / "mini.json"
    result = lpu("compile", "--context", "64", "--gantt", str(gantt), "--trace", str(trace))
    assert result.exit_code == 0, result.output
    for text in (
        "mini on 1 LPU chip (simulated): 1 stage",
        "cycles per token",
        "MXM weights",
        "norm 1",
    ):
        assert text in result.stdout
    assert gantt.read_text().startswith("<svg")
    assert json.loads(trace.read_text())["otherData"]["clock"] == "simulated"


def test_slices_of_one_thread_do_not_overlap(tmp_path: Path):
    """Perfetto drops slices that overlap another of their thread without lying in it."""
    trace = tmp_path / "two.json"
    assert lpu("compile", "--context", "64", "--chips", "2", "--trace", str(trace)).exit_code == 0
    events = json.loads(trace.read_text())["traceEvents"]
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            at = threads.setdefault((event["pid"], event["tid"]), [])
            at.append((event["ts"], event["ts"] + event["dur"]))
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == set(threads)
    for slices in threads.values():
        slices.sort()
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(slices))


def test_chips_without_work_are_said():
    result = lpu("compile", "--context", "64", "--chips", "100")
    assert "84 chips of these take no part" in result.stdout


def test_compile_as_json_twice_is_the_same():
    first, second = (lpu("compile", "--context", "64", "--chips", "2", "--json") for _ in "12")
    assert first.exit_code == 0 and first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert found["simulated"] is True and found["chips"] == 2
    # Two chips are one group here, so its program is the whole model, but with sums over links.
    assert sum(row["cycles"] for row in found["critical_path"]) == found["parts"][0]["cycles"]
    assert sum(p["cycles"] * p["times"] for p in found["parts"]) == found["cycles_per_token"]


def test_roofline_says_what_it_is():
    result = lpu("roofline", "llama-2-70b")
    assert result.exit_code == 0
    assert "simulated; roofline and links only" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "no-such"), "no-such"),
        (("compile", "llama-2-70b", "--chips", "9"), "it needs"),
        (("compile", "--codec", "k9"), "codec is 'k9'"),
        (("compile", "deepseek-r1"), "is not a plain Llama-style decoder"),
        (("compile", "--context", "64", "--gantt", "/no/x.svg"), "/no/x.svg: No such file"),
        (("compile", "--context", "9000"), "takes 1 to 8192"),
        (("roofline", "llama-2-70b", "--chips", "1"), "it needs"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str):
    result = lpu(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_backend_option_is_every_workers():
    config = with_backend(MeshConfig(), "lpu")
    assert [each.backend for each in config.workers] == ["lpu", "lpu"]
    assert [each.role for each in config.workers] == ["prefill", "decode"]


def test_unknown_backend_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="known names: auto, blackwell, cpu"):
        with_backend(MeshConfig(), "abacus")
