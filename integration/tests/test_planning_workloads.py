"""Workload files and the requests that are made of them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cli.main import app
from kvmesh.integration.planning.requests import generate, mix
from kvmesh.integration.planning.traffic import WorkloadError, load_workload, workload_names
from kvmesh.kernels.layout import BLOCK_SIZE

SMALL = """
title = "small"
source = "made up"
default = "live"
input = { kind = "fixed", tokens = 100 }
output = { kind = "fixed", tokens = 10 }
[scenarios.live]
arrival = "poisson"
ttft_ms = 100
"""


def test_every_bundled_workload_loads_and_makes_requests():
    names = workload_names()
    assert {"chat", "long-documents", "agent-loop", "ambient", "video"} <= set(names)
    for name in names:
        workload = load_workload(name)
        made = generate(workload, 50, 5.0, seed=1)
        assert len(made.requests) == 50 and made.longest <= 131_072
        assert mix(workload).cached < 1


@pytest.mark.parametrize(
    ("name", "scenario", "ttft", "tpot"),
    [  # MLPerf's limits, p99 in milliseconds
        ("mlperf-llama-3.1-8b", "server", 2000, 100),
        ("mlperf-llama-3.1-8b", "interactive", 500, 30),
        ("mlperf-llama-2-70b", "server", 2000, 200),
        ("mlperf-llama-2-70b", "interactive", 450, 40),
        ("mlperf-llama-3.1-405b", "server", 6000, 175),
        ("mlperf-llama-3.1-405b", "interactive", 4500, 80),
        ("mlperf-mixtral-8x7b", "server", 2000, 200),
        ("mlperf-deepseek-r1", "server", 2000, 80),
        ("mlperf-deepseek-r1", "interactive", 1500, 15),
        ("mlperf-gpt-oss-120b", "server", 3000, 80),
        ("mlperf-gpt-oss-120b", "interactive", 2000, 15),
    ],
)
def test_limits_are_mlperfs(name: str, scenario: str, ttft: float, tpot: float):
    found = load_workload(f"{name}:{scenario}").scenario
    assert (found.ttft_ms, found.tpot_ms) == (ttft, tpot)
    assert load_workload(name).share_prefixes is False


def test_the_length_distribution_of_deepseek_r1_is_the_measured_one():
    output = load_workload("mlperf-deepseek-r1").output
    assert output.mean == pytest.approx(3755, rel=0.01)
    assert output.biased == pytest.approx(4254, rel=0.04)


def test_requests_repeat_by_seed_and_come_at_the_rate():
    workload = load_workload("chat")
    made = generate(workload, 2000, 10.0, seed=7)
    assert made == generate(workload, 2000, 10.0, seed=7)
    assert made != generate(workload, 2000, 10.0, seed=8)
    assert made.duration_s == pytest.approx(200, rel=0.15)
    times = [request.arrival_s for request in made.requests]
    assert times == sorted(times) and times[0] == 0


def test_a_turn_begins_with_the_turn_before():
    made = generate(load_workload("agent-loop"), 400, 5.0, seed=1)
    sessions: dict[int, list[tuple[int, ...]]] = {}
    for request in made.requests:
        assert len(request.hash_ids) == -(-request.input_tokens // BLOCK_SIZE)
        sessions.setdefault(request.hash_ids[6144 // BLOCK_SIZE], []).append(request.hash_ids)
    assert max(len(turns) for turns in sessions.values()) > 3
    for turns in sessions.values():
        assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(turns))
    beginnings = {request.hash_ids[:96] for request in made.requests}
    assert len(beginnings) == 2  # groups


def test_offline_requests_are_all_there_at_once():
    made = generate(load_workload("mlperf-deepseek-r1:offline"), 20, 1.0, seed=0)
    assert {request.arrival_s for request in made.requests} == {0.0}


def test_frames_become_tokens():
    video = load_workload("video")
    assert video.frames is not None
    made = generate(video, 100, 1.0, seed=0)
    assert min(r.input_tokens for r in made.requests) >= 256 + 10 * 256


def test_hits_scale_what_is_cached():
    workload = load_workload("chat")
    assert mix(workload, hits=0.5).cached == pytest.approx(mix(workload).cached / 2)
    assert mix(load_workload("mlperf-llama-2-70b")).cached == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tokens = 100", "tokens = -1"), r"input.tokens is -1: input should be greater than 0"),
        (("tokens = 100", 'tokens = "x"'), r"input.tokens is 'x'"),
        (("fixed", "exact"), r"input.kind is 'exact'"),
        (('default = "live"', 'default = "dead"'), r"default is 'dead', must be one of .* live"),
        (('arrival = "poisson"', 'arrival = "bursts"'), r"scenarios.live.arrival is 'bursts'"),
        (('source = "made up"', ""), r"source is missing"),
        (("ttft_ms = 100", "ttft_s = 1"), r"scenarios.live.ttft_s is not a field here"),
        (("title", "= title"), r"is not TOML"),
        (
            ('"fixed", tokens = 100', '"log_normal", median = 5'),
            r"input: sigma is missing, which kind = 'log_normal' needs",
        ),
        (
            ('"fixed", tokens = 100', '"quantiles", points = [[0, 5], [0.5, 4], [1, 9]]'),
            r"points must rise",
        ),
    ],
)
def test_a_wrong_file_names_field_and_limit(tmp_path: Path, change: tuple[str, str], message: str):
    path = tmp_path / "mine.toml"
    path.write_text(SMALL.replace(*change, 1))
    with pytest.raises(WorkloadError, match=message):
        load_workload(str(path))


def test_names_and_scenarios_that_are_not_there(tmp_path: Path):
    with pytest.raises(WorkloadError, match=r"no workload is named 'chats'; did you mean 'chat'"):
        load_workload("chats")
    with pytest.raises(WorkloadError, match=r"no scenario 'night'; it has: interactive, offline"):
        load_workload("chat:night")
    with pytest.raises(WorkloadError, match=r"cannot be read"):
        load_workload(str(tmp_path / "none.toml"))
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert load_workload(str(path)).name == "mine"
    assert load_workload(f"{path}:live").scenario.ttft_ms == 100
    with pytest.raises(ValueError, match=r"count is 0"):
        generate(load_workload("chat"), 0, 1.0, 1)


def test_a_copy_is_a_workload_too(tmp_path: Path):
    run = CliRunner()
    copied = run.invoke(app, ["plan", "workloads", "chat"])
    path = tmp_path / "mine.toml"
    path.write_text(copied.stdout)
    mine, chat = load_workload(str(path)), load_workload("chat")
    assert mine.model_copy(update={"name": "chat"}) == chat
    listed = json.loads(run.invoke(app, ["plan", "workloads", "--json"]).stdout)
    assert [each["name"] for each in listed] == workload_names()
    assert "agent-loop" in run.invoke(app, ["plan", "workloads"]).stdout
    assert run.invoke(app, ["plan", "workloads", "chit"]).exit_code == 2
