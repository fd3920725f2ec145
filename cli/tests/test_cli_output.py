"""What commands print, from hand-made answers."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cli.demo import make_questions
from kvmesh.cli.generate import record, stats_line, tokens_per_s
from kvmesh.cli.main import app
from kvmesh.cli.options import command
from kvmesh.cli.render import plain, size
from kvmesh.cli.sampling import Prompt, Sampling, build_request
from kvmesh.cli.trace import settled
from kvmesh.client import Answer
from kvmesh.integration.launch_state import traces_path
from kvmesh.services.traces.store import Limits, SpanStore
from kvmesh.v1 import common_pb2, inference_pb2

MS = 1_000_000


def write_trace(run_dir: Path, lost: int = 0) -> None:
    def record(span_id: str, parent: str | None, member: str, start: int, end: int, **more):
        return {
            "trace_id": "ab" * 16,
            "span_id": span_id,
            "parent_id": parent,
            "name": span_id,
            "service": f"kvmesh-{member.partition('-')[0]}",
            "member": member,
            "start_ns": (1_000 + start) * MS,
            "end_ns": (1_000 + end) * MS,
            "status": "UNSET",
            "status_message": "",
            "attributes": {},
            "events": [],
            "links": [],
            "resource": {},
            **more,
        }

    event = {"name": "migrated", "time_ns": 1_030 * MS, "attributes": {"to": "worker-1"}}
    spans = [
        record(
            "chat mini",
            None,
            "router",
            0,
            100,
            events=[event],
            attributes={"kvmesh.tenant": "acme"},
        ),
        record("prefill", "chat mini", "worker-0", 20, 60, attributes={"kvmesh.tokens": 9}),
        record("kv put", "prefill", "kvcache-0", 50, 55, status="ERROR", status_message="full"),
    ]
    store = SpanStore(traces_path(run_dir), Limits(1 << 20, 1e12))
    store.append(spans, {"dropped_full": lost})
    store.close()


def trace(run_dir: Path, *arguments: str):
    result = CliRunner().invoke(
        app, ["trace", *arguments, "--run-dir", str(run_dir)], env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_cli_output_waterfall(tmp_path: Path):
    write_trace(tmp_path)
    head, *lines = trace(tmp_path, "show", "last").splitlines()
    assert head == f"trace {'ab' * 16}, 3 spans, 100.0 ms"
    # A terminal of 120 leaves 48 for the bars, each standing where its time is.
    assert [line.split() for line in lines] == [
        ["chat", "mini", "router", "0.0", "100.0", "ms", "█" * 48, "1", "event"],
        ["prefill", "worker-0", "20.0", "40.0", "ms", "█" * 19],
        ["kv", "put", "kvcache-0", "50.0", "5.0", "ms", "█" * 2, "full"],
    ]
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 2, 4]
    begins = [line.index("█") for line in lines]
    assert [begin - begins[0] for begin in begins] == [0, 9, 24]


class SlowMembers:
    """A clock; while it is waited for, a member's span comes."""

    def __init__(self, run_dir: Path) -> None:
        self.now, self.run_dir = 0.0, run_dir

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if self.now == 0.0:
            write_trace(self.run_dir)
        self.now += seconds


def test_cli_output_waits_for_spans_that_members_still_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    SpanStore(traces_path(tmp_path), Limits(1 << 20, 1e12)).close()
    members = SlowMembers(tmp_path)
    monkeypatch.setattr("kvmesh.cli.trace.time", members)
    monkeypatch.setattr("kvmesh.integration.launch_state.running_state", lambda run_dir: run_dir)
    assert "3 spans" in trace(tmp_path, "show", "last")
    assert members.now > 0.5  # which is what a span may wait for others to go with
    members.now = 0.1
    assert settled(lambda: members.now, 1.0, 3.0) >= 3.0  # never at rest: it ends nonetheless


def test_cli_output_trace_attributes_and_events(tmp_path: Path):
    write_trace(tmp_path)
    text = trace(tmp_path, "show", "abab", "--attributes")
    assert "at 30.0 ms: migrated {'to': 'worker-1'}" in text
    assert "kvmesh.tokens = 9" in text


def test_cli_output_trace_json(tmp_path: Path):
    write_trace(tmp_path)
    rows = json.loads(trace(tmp_path, "show", "--json"))
    assert [(row["span"]["name"], row["depth"]) for row in rows] == [
        ("chat mini", 0),
        ("prefill", 1),
        ("kv put", 2),
    ]
    (summary,) = json.loads(trace(tmp_path, "list", "--json"))
    assert (summary["num_spans"], summary["errors"], summary["duration_ms"]) == (3, 1, 100.0)
    assert "chat mini" in trace(tmp_path, "list")
    assert summary["tenant"] == "acme"
    assert len(json.loads(trace(tmp_path, "list", "--json", "--tenant", "acme"))) == 1
    assert json.loads(trace(tmp_path, "list", "--json", "--tenant", "acm")) == []


def test_cli_output_trace_export_and_losses(tmp_path: Path):
    write_trace(tmp_path, lost=3)
    chrome = json.loads(trace(tmp_path, "export", "abab"))
    assert {e["name"] for e in chrome["traceEvents"] if e["ph"] == "X"} == {
        "chat mini",
        "prefill",
        "kv put",
    }
    otlp = json.loads(trace(tmp_path, "export", "last", "--format", "otlp"))
    assert otlp["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"] == "ab" * 16
    result = CliRunner().invoke(app, ["trace", "list", "--run-dir", str(tmp_path)])
    assert "3 spans were dropped" in result.stderr


def test_cli_output_trace_that_is_not_there(tmp_path: Path):
    write_trace(tmp_path)
    run = ["trace", "show", "ff", "--run-dir", str(tmp_path)]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 1
    assert "no trace ff; 'kvmesh trace list' shows what there is" in result.stderr
    result = CliRunner().invoke(app, ["trace", "list", "--run-dir", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "send a request to a mesh first" in result.stderr


def test_cli_output_answer_adds_up_its_responses():
    answer = Answer()
    end = common_pb2.FINISH_REASON_LENGTH
    usage = inference_pb2.Usage(
        prompt_tokens=100, cached_tokens=64, completion_tokens=11, ttft_s=0.5, duration_s=1.5,
        prefill_worker="worker-0", decode_worker="worker-1", migrations=1, seed=3,
    )  # fmt: skip
    for response in (
        inference_pb2.GenerateResponse(text="a", request_id="r", trace_id="t", token_ids=[1]),
        inference_pb2.GenerateResponse(text="b", token_ids=[2, 3]),
        inference_pb2.GenerateResponse(finish_reason=end, usage=usage),
    ):
        answer.add(response)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("ab", [1, 2, 3], "length")
    assert tokens_per_s(usage) == pytest.approx(10.0)
    assert stats_line(answer) == (
        "11 tokens (length), TTFT 500.0 ms, 10.0 tokens/s, 64 of 100 prompt tokens cached, "
        "worker-0 -> worker-1, 1 migrations, seed 3, trace t"
    )
    shown = json.loads(json.dumps(record(answer)))
    assert shown["usage"]["cached_tokens"] == 64
    assert shown["finish_reason"] == "length"


def test_cli_output_rate_of_a_single_token_is_zero():
    assert tokens_per_s(inference_pb2.Usage(completion_tokens=1, ttft_s=1, duration_s=1)) == 0.0


def test_cli_output_messages_as_json():
    sampling = common_pb2.SamplingParams(seed=2**63, stop=["x"])
    sampling.logit_bias[5] = 1.5
    shown = plain(sampling)
    assert (shown["seed"], shown["stop"], shown["logit_bias"]) == (2**63, ["x"], {5: 1.5})
    model = inference_pb2.ModelInfo(format=common_pb2.BlockFormat(fingerprint=b"\x01\xff"))
    assert plain(model)["format"]["fingerprint"] == "01ff"
    response = inference_pb2.GenerateResponse(finish_reason=common_pb2.FINISH_REASON_STOP)
    assert plain(response)["finish_reason"] == "FINISH_REASON_STOP"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (256 << 20, "256 MiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_cli_output_sizes(num_bytes: int, text: str):
    assert size(num_bytes) == text


def test_cli_output_request_leaves_unset_options_unset():
    request = build_request("hi", Prompt(), Sampling())
    assert not any(
        request.sampling.HasField(name) for name in ("temperature", "top_p", "seed", "max_tokens")
    )
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "hi")]
    zero = build_request("hi", Prompt(chat=False), Sampling(temperature=0.0, seed=0))
    assert zero.sampling.HasField("temperature")
    assert zero.sampling.HasField("seed")
    assert zero.text == "hi"


def test_cli_output_demo_questions_share_the_document():
    first, second = make_questions(7, 400, lambda text: len(text.split()))
    shared = len(first.prompt) - len(first.question)
    assert first.prompt[:shared] == second.prompt[: len(second.prompt) - len(second.question)]
    assert first.expected != second.expected
    for question in (first, second):
        assert question.expected in question.prompt[:shared]
        assert question.expected not in question.question
    assert make_questions(7, 400, lambda text: len(text.split())) == [first, second]
    assert make_questions(8, 400, lambda text: len(text.split()))[0] != first


def test_cli_output_interrupt_exits_130():
    import typer

    @command
    def interrupted() -> None:
        raise KeyboardInterrupt

    single = typer.Typer()
    single.command()(interrupted)
    assert CliRunner().invoke(single, []).exit_code == 130


def test_cli_output_unexpected_error_is_one_line():
    import typer

    @command
    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    single = typer.Typer()
    single.command()(broken)
    result = CliRunner().invoke(single, [])
    assert result.exit_code == 1
    assert result.stderr == "error: ZeroDivisionError: by nothing (KVMESH_DEBUG=1 shows where)\n"
