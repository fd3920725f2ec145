"""kvmesh simulate as a user meets it."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app

SMALL = ("--rate", "20", "--requests", "40", "--output-tokens", "8")


def kvmesh(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def as_json(*arguments: str) -> dict[str, Any]:
    result = kvmesh(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_people_see_that_it_is_simulated() -> None:
    result = kvmesh(*SMALL, "--ttft-ms", "500")
    assert result.exit_code == 0, result.output
    for text in ("SIMULATED: llama-3.1-8b on 1 workers of 1 h100", "TTFT", "legacy", "steady",
                 "goodput", "what binds: TTFT p99", "simulated seconds per second"):  # fmt: skip
        assert text in result.stdout


def test_programs_get_one_document() -> None:
    found = as_json(*SMALL, "--workers", "2")
    assert found["simulated"] and found["result"]["simulated"]
    result = found["result"]
    assert result["requests"] == result["finished"] == 40
    assert result["output_tokens"] == 320
    assert len(result["pools"][0]["queue"]["at"]) == 200
    assert found["scenario"]["pools"][0]["workers"] == 2
    assert found["speed"]["simulated_s_per_s"] > 0
    again = as_json(*SMALL, "--workers", "2")
    assert again["result"] == result


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": i * 500, "input_length": 1000, "output_length": 4, "hash_ids": [0, i + 1]}
        for i in range(10)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    found = as_json("--trace", str(trace), "--model", "llama-3.1-70b", "--workers", "1xtp4")
    assert found["result"]["requests"] == 10
    assert found["result"]["prefix_hits"] == pytest.approx(9 * 512 / 10000)


def test_apart_with_drafts_and_a_failure(tmp_path: Path) -> None:
    plot = tmp_path / "queues.svg"
    found = as_json(
        "--model", "deepseek-r1", "--device", "gb300", "--prefill", "2xdep2", "--decode", "2xdep4",
        "--drafts", "3", "--fail", "decode-1@0.5+0.5", *SMALL, "--plot", str(plot),
    )  # fmt: skip
    assert found["scenario"]["options"]["acceptance"] == [0.79, 0.61, 0.46]
    assert found["result"]["devices"] == 12
    assert found["result"]["finished"] == 40
    root = ElementTree.fromstring(plot.read_text())
    assert any("simulated" in (text or "") for text in root.itertext())


def test_a_limit_that_is_not_kept_fails_and_says_what_binds() -> None:
    result = kvmesh(*SMALL, "--tpot-ms", "0.1")
    assert result.exit_code == 1
    assert "TPOT p99" in result.stderr and "> 0.1 ms" in result.stderr


def test_find_max_qps() -> None:
    found = as_json(
        "--find-max-qps", "--requests", "40", "--min-seconds", "1", "--ttft-ms", "100",
        "--prompt-tokens", "2000", "--output-tokens", "4",
    )  # fmt: skip
    assert found["simulated"] and found["max_qps"] > 0
    assert found["best"]["verdict"]["met"] and not found["over"]["verdict"]["met"]
    assert "TTFT p99" in found["binds"] and "> 100.0 ms" in found["binds"]
    assert kvmesh("--find-max-qps").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "gb400"), "did you mean 'gb300'"),
        (("--transfer-gbs=-3",), "must be greater than 0"),
        (("--model", "llama-3.1-405b"), "would hold it"),
        (("--workers", "2xq8"), "'q8' is not understood"),
        (("--drafts", "2"), "must have 0"),
        (("--kv", "k9"), "kv is 'k9'"),
        (("--prefill", "2"), "go together"),
        (("--fail", "x@1"), "no worker is named 'x'"),
        (("--acceptance", "a"), "--acceptance"),
        (("--workload", "nothing"), "no workload is named"),
        (("--workload", "mlperf-llama-3.1-8b"), "rate is missing"),
    ],
)
def test_bad_input_names_the_field(arguments: tuple[str, ...], told: str) -> None:
    result = kvmesh(*arguments)
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.stderr.split())


def test_a_device_with_a_negative_bandwidth(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "h100"\n[memory]\nbandwidth_bytes_s = -5\n')
    result = kvmesh("--device", str(mine))
    assert result.exit_code == 2
    assert "memory.bandwidth_bytes_s is -5, must be greater than 0" in result.stderr


def test_a_trace_line_without_a_field(tmp_path: Path) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n')
    result = kvmesh("--trace", str(trace))
    assert result.exit_code == 2
    assert "bad.jsonl, line 1: output_length must be" in result.stderr


@pytest.mark.parametrize("other", [("--rate", "5"), ("--workload", "chat"), ("--find-max-qps",)])
def test_a_closed_loop_beside_an_open_one_is_refused(other: tuple[str, ...]) -> None:
    result = kvmesh("--concurrency", "3", *other)
    assert result.exit_code == 2
    assert "--concurrency is a closed loop" in result.stderr
