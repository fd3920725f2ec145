"""Choices, their cost and a budget: what is arithmetic is worked out again here."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Parallel
from kvmesh.backends.errors import DeviceError, DoesNotFit
from kvmesh.cli.main import app
from kvmesh.integration.planning.budget import Growth, budget, budget_plot
from kvmesh.integration.planning.choice import ChoiceError, layouts, read_choice
from kvmesh.integration.planning.compare import (
    Answer,
    PlanError,
    Question,
    ask,
    compare,
    pareto_plot,
    read_choices,
)
from kvmesh.integration.planning.evaluate import mean_accepted


@pytest.fixture(scope="module")
def question() -> Question:
    return ask("chat", "llama-3.1-8b")


@pytest.fixture(scope="module")
def answers(question: Question) -> list[Answer]:
    return compare(question, read_choices(["h100", "h100,tp1,kv=k4v4,price=2.5", "h100,dep2"]))


def test_a_line_is_read_part_by_part():
    choice = read_choice("gb300,dep16,mtp3,disagg,p4,kv=k4v4,price=rental")
    assert choice.parallel == Parallel(data=16, expert=16)
    assert (choice.drafts, choice.prefill) == (3, Parallel(tensor=4))
    assert (choice.formats.weights, choice.formats.attention) == ("nvfp4", "fp8")
    assert (choice.formats.kv, choice.price.per_hour) == ("k4v4", 3.96)
    assert read_choice("h100").formats.weights == "fp8"
    assert read_choice("h100,price=1.5").price.per_hour == 1.5
    assert mean_accepted(0) == 1 and mean_accepted(3) == pytest.approx(2.49, abs=0.01)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gb300,foo", r"'foo' is not understood"),
        ("gb300,kv=k5v5", r"kv is 'k5v5', must be one of"),
        ("gb300,dep8,ep8", r"dep says dp and ep at once"),
        ("gb300,mtp4", r"mtp is 4, must be at most 3"),
        ("gb300,price=-1", r"price is -1, must be at least 0"),
        ("gb300,tp0", r"parallel.tensor is 0, must be at least 1"),
    ],
)
def test_a_wrong_line_names_the_part(line: str, message: str):
    with pytest.raises(ChoiceError, match=message):
        read_choice(line)


def test_unknown_devices_prices_and_models_are_named():
    with pytest.raises(DeviceError, match=r"no device is named 'gb400'; did you mean"):
        read_choice("gb400")
    with pytest.raises(DeviceError, match=r"lpu-v1 is timed by a cycle simulator and has no cost"):
        layouts(read_choice("lpu-v1"), load_shape("llama-3.1-8b"))
    with pytest.raises(DeviceError, match=r"no price 'gift'; it has"):
        read_choice("gb300,price=gift")
    with pytest.raises(DoesNotFit, match=r"does not fit 1"):
        layouts(read_choice("h100,tp1"), load_shape("llama-3.1-405b"))
    with pytest.raises(PlanError, match=r"hits is 2, must be from 0 to 1"):
        ask("chat", hits=2)
    with pytest.raises(PlanError, match=r"tpot_ms is -1, must be greater than 0"):
        ask("chat", tpot_ms=-1)
    with pytest.raises(PlanError, match=r"0 choices, must be 1 to"):
        read_choices([])
    with pytest.raises(PlanError, match=r"must with their outputs fit the 8,192"):
        ask("long-documents", "gemma-2-9b")


def test_every_dollar_is_counted(question: Question, answers: list[Answer]):
    found = answers[1].found
    assert found is not None and found.best is not None
    best = found.best
    tokens_hour = best.output_tokens_s * 3600
    assert best.dollars_output == pytest.approx(2.5 / tokens_hour * 1e6)
    ratio = question.traffic.inputs.mean / question.traffic.outputs.mean
    assert best.dollars_input == pytest.approx(best.dollars_output / ratio)
    assert 1 / best.dollars_total == pytest.approx(1 / best.dollars_output + 1 / best.dollars_input)
    assert best.joules == pytest.approx(1730 / best.output_tokens_s)  # all-in watts of an H100
    assert best.ttft_s <= 1.0 and 1.25 / best.user_tokens_s <= 0.04  # p99 over mean
    assert best.binds == "limits" and 1.25 / best.user_tokens_s > 0.039
    cheaper = [p for p in found.points if p.meets and p.dollars_output < best.dollars_output]
    assert not cheaper


def test_the_frontier_is_not_beaten(answers: list[Answer]):
    found = answers[0].found
    assert found is not None
    for point in found.frontier:
        assert not any(
            other.user_tokens_s > point.user_tokens_s
            and other.output_tokens_s > point.output_tokens_s
            for other in found.points
        )


def test_one_impossible_choice_does_not_hide_the_others(question: Question, answers: list[Answer]):
    assert answers[2].found is None and "llama-3.1-8b has no experts" in answers[2].error
    svg = pareto_plot(question, answers)
    assert "simulated" in svg and svg.count('<path class="line"') >= 2
    with pytest.raises(PlanError, match=r"nothing to plot"):
        pareto_plot(question, answers[2:])


def test_prompts_of_their_own_pool_cost_devices(question: Question):
    apart, together = compare(
        ask("mlperf-deepseek-r1"), read_choices(["gb300,dep16,disagg,p4", "gb300,dep16"])
    )
    assert apart.found is not None and together.found is not None
    point = apart.found.points[-1]
    assert point.devices > 16
    decode = point.output_tokens_s * point.devices / 16
    assert decode > together.found.points[-1].output_tokens_s


def test_a_budget_is_arithmetic(question: Question, answers: list[Answer]):
    found = answers[0].found
    assert found is not None and found.best is not None
    growth = Growth(2e6, growth=0.1, months=3, peak=2.0, headroom=0.2)
    made = budget(question, answers, growth)
    last = made[0].months[-1]
    assert last.requests_day == pytest.approx(2e6 * 1.21)
    per_device = found.best.output_tokens_s / question.traffic.outputs.mean
    wanted = last.requests_day / 86_400 * 2.0 / 0.8 / per_device
    size = found.best.layout.devices
    assert wanted <= last.devices < wanted + size
    assert last.devices % size == 0
    assert last.dollars == pytest.approx(last.devices * 1.30 * 730)
    assert last.watts == last.devices * 1730
    assert last.energy_kwh == pytest.approx(last.devices * 1.73 * 730)
    assert made[2].months == () and "no experts" in made[2].error
    assert "dollars per month" in budget_plot(question, made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests_day": 0}, r"requests_day is 0, must be greater than 0"),
        ({"growth": -1}, r"growth is -1 per month, must be above -1"),
        ({"months": 0}, r"months is 0, must be in 1..120"),
        ({"peak": 0.5}, r"peak is 0.5, must be in 1..100"),
        ({"headroom": 1}, r"headroom is 1, must be at least 0 and below 1"),
    ],
)
def test_a_wrong_growth_is_named(fields: dict[str, float], message: str):
    with pytest.raises(PlanError, match=message):
        Growth(**{"requests_day": 1e6, **fields})  # type: ignore[arg-type]


def test_the_command_prints_one_document(tmp_path: Path):
    plot = tmp_path / "pareto.svg"
    command = ["plan", "--model", "llama-3.1-8b", "--choice", "h100,tp1", "--choice", "b200,tp1"]
    result = CliRunner().invoke(app, [*command, "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["simulated"] is True and [c["device"] for c in told["choices"]] == ["h100", "b200"]
    assert told["choices"][1]["best"]["layout"] == "tp1"
    assert plot.read_text().startswith("<svg")
    table = CliRunner().invoke(app, command)
    assert "simulated" in table.stdout and "$/M out" in table.stdout


def test_limits_that_no_load_keeps_fail_the_command():
    result = CliRunner().invoke(app, ["plan", "--choice", "h100,tp8", "--tpot-ms", "0.01"])
    assert result.exit_code == 1 and "keeps no limit" in result.stdout
    assert "TPOT is at least" in result.stdout and "must be at most 0.01 ms" in result.stdout
    result = CliRunner().invoke(app, ["plan", "--workload", "chat", "validate"])
    assert result.exit_code == 2 and "--workload belongs behind 'validate'" in result.output


def test_the_budget_command():
    command = ["plan", "budget", "--requests-per-day", "1e6", "--months", "2"]
    command += ["--model", "llama-3.1-8b", "--choice", "b200,tp1"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["simulated"] is True and len(told["budgets"][0]["months"]) == 2
    assert "$/month" in CliRunner().invoke(app, command).stdout
