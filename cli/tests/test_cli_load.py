"""top, bench serve and grpc as a user meets them, without a mesh."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from kvmesh.cli import top_view
from kvmesh.cli.bench_serve import _sums
from kvmesh.cli.grpc_call import _documents
from kvmesh.cli.main import app
from kvmesh.integration.bench_serve import Driven
from kvmesh.integration.loadgen import RequestResult
from kvmesh.integration.serve_report import Limits, report
from kvmesh.integration.top import Latency, MeshView, Served, ShardRow, WorkerRow
from kvmesh.v1 import inference_pb2

WORKER = WorkerRow(
    "worker-0", "both", "serving", "CPU X", False, 5, 2, 3.5, 123.4, 50.0, 95, 100, 0, 0
)
SHARD = ShardRow("kvcache-0", "serving", 7, 1 << 20, 4 << 20, 0.5, 2048.0, 0.0, 3, 1)
VIEW = MeshView(
    uptime_s=3725.0, window_s=60.0, rate_s=5.0, requests_active=7, requests_total=100,
    rejected_total=1, migrations_total=0, waiting=2, requests_per_s=2.5, output_tokens_per_s=123.4,
    prefill_tokens_per_s=50.0, hit_rate=0.25,
    served=(Served("measured", Latency(0.0123, 0.5, 9), None),), workers=(WORKER,), shards=(SHARD,),
    unread=(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVMESH_ADDRESS", "KVMESH_TOKEN", "KVMESH_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVMESH_RUN_DIR", str(tmp_path / "run"))


def kvmesh(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def shown(view: MeshView, width: int, trouble: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=40)
    frame = top_view.render(view, [0.0, 50.0, 100.0], console.size, trouble)
    console.print(frame)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    "command",
    ["top", "bench serve", "grpc ls", "grpc call", "grpc health"],
)
def test_cli_load_commands_explain_themselves(command: str):
    result = kvmesh(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("arguments", [("top", "--once"), ("bench", "serve"), ("grpc", "ls")])
def test_cli_load_without_a_mesh_says_how_to_start_one(arguments: tuple[str, ...]):
    result = kvmesh(*arguments)
    assert result.exit_code == 3
    assert "start one with 'kvmesh up'" in plain(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "serve", "--trace", "t", "--rate", "2"), "give --trace or --rate, not both"),
        (("bench", "serve", "--rate", "2", "--concurrency", "2"), "not both"),
        (("bench", "serve", "--trace", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("bench", "serve", "--shared-tokens", "200"), "200 shared tokens, must be in 0..128"),
        (("grpc", "call", "a/b", "--address", "127.0.0.1:1", "--header", "x"), "'name: value'"),
    ],
)
def test_cli_load_usage_errors(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").touch()
    result = kvmesh(*arguments)
    assert result.exit_code == 2
    assert words in plain(result.stderr)


def test_cli_load_bad_trace_names_line_and_field(tmp_path: Path):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": "x"}\n')
    result = kvmesh("bench", "serve", "--trace", str(trace))
    assert result.exit_code == 2
    assert "t.jsonl, line 1: input_length must be an integer from 1, is 'x'" in plain(result.stderr)


def test_cli_grpc_nothing_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvmesh.cli.grpc_call.CONNECT_S", 0.2)
    result = kvmesh("grpc", "health", "--address", "127.0.0.1:1")
    assert result.exit_code == 3
    assert "nothing answers at 127.0.0.1:1 (without TLS)" in plain(result.stderr)


def test_cli_grpc_documents_follow_one_another():
    assert _documents(None) == [{}]
    assert _documents(' {"a": 1}\n{"b": [2]} ') == [{"a": 1}, {"b": [2]}]
    assert _documents("") == []
    with pytest.raises(Exception, match="the request is not JSON"):
        _documents('{"a": 1} }')


@pytest.mark.parametrize("width", [80, 120])
def test_cli_top_fits_its_terminal(width: int):
    lines = shown(VIEW, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for words in ("up 1 h 02 min", "7 active, 2 waiting, 100 in all, 1 rejected", "12.3 ms",
                  "500.0 ms", "25%", "███████████░ 95/100", "███░░░░░░░░░ 1 MiB"):  # fmt: skip
        assert words in text
    assert ("CPU X" in text) == (width == 120)


def test_cli_top_unknown_is_a_dash_and_no_zero():
    row = next(line for line in shown(VIEW, 80) if line.startswith("mesh"))
    assert row.split()[-1] == "-"  # no price
    assert row.split()[-4:-2] == ["-", "-"]  # nothing was measured per token
    served = replace(VIEW.served[0], usd_per_million_tokens=0.1234)
    priced = shown(replace(VIEW, served=(served,)), 80)
    assert next(line for line in priced if line.startswith("mesh")).endswith("0.1234")


def test_cli_top_simulated_stands_apart_and_says_so():
    simulated = Served("simulated", Latency(1.0, 2.0, 3), Latency(0.1, 0.2, 3))
    worker = replace(WORKER, simulated=True)
    text = "\n".join(shown(replace(VIEW, served=(*VIEW.served, simulated), workers=(worker,)), 120))
    assert re.search(r"^simulated +1000\.0 ms +2000\.0 ms +100\.0 ms", text, re.MULTILINE)
    assert "CPU X (simulated)" in text


def test_cli_top_says_that_the_mesh_is_away_and_keeps_what_it_saw():
    text = "\n".join(shown(VIEW, 80, trouble="connection refused"))
    assert "the mesh does not answer" in text
    assert "connection refused" in text
    assert "worker-0" in text


def test_cli_bench_serve_sums():
    usage = inference_pb2.Usage(prompt_tokens=200, cached_tokens=50, completion_tokens=2)
    result = RequestResult(
        ttft_s=0.1, duration_s=1.0, usage=usage, token_s=[(0.1, 1), (1.0, 1)], begin_s=5.0
    )
    said = report([result], Limits(ttft_s=0.2))
    driven = Driven([result], 3, inference_pb2.ModelInfo(name="m"), simulated=False)
    asked = {"ttft_ms": 200.0, "tpot_ms": None, "itl_ms": None, "latency_ms": None}
    assert list(_sums(asked, driven, said)) == [
        "output 2 tokens/s, with prompts 202 tokens/s, 1.00 requests/s",
        "goodput 1.00 requests/s: 1 of 1 with TTFT <= 200 ms",
        "50 of 200 prompt tokens cached (25%)",
        "cost: not reported",
        "3 requests left out: longer than the context",
    ]
    priced = replace(said, device_s=0.5, usd_per_million_tokens=1.25)
    assert "cost: 0.50 device seconds, $1.25 per million output tokens" in list(
        _sums(asked, driven, priced)
    )
    simulated = replace(priced, cost_kind="simulated")
    assert "cost: 0.50 device seconds (simulated), $1.25 per million output tokens" in list(
        _sums(asked, driven, simulated)
    )
