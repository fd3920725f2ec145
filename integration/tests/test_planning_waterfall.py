"""The waterfall: its arithmetic on made-up worths, and small meshes that are really simulated."""

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.cost.price import price_of
from kvmesh.backends.devices import load_device
from kvmesh.cli.main import app
from kvmesh.integration.planning.choice import read_choice
from kvmesh.integration.planning.claims import hardware_axis
from kvmesh.integration.planning.compare import PlanError, ask
from kvmesh.integration.planning.shapley import contributions, orders_of, sets_of
from kvmesh.integration.planning.switches import (
    BALANCE,
    DISAGG,
    FUSED,
    KV,
    MTP,
    ROUTING,
    TITLES,
    WIDE,
    applicable,
    scenario_of,
    setup_of,
)
from kvmesh.integration.planning.traffic import load_workload
from kvmesh.integration.planning.waterfall import bench_of, plan_orders, waterfall
from kvmesh.integration.planning.waterfall_plot import waterfall_plot


def test_factors_multiply_to_the_whole():
    def worth(on: frozenset[str]) -> float:  # a and b hinder each other, c stands alone
        gain = 3.0 if {"a", "b"} <= on else 2.0 if on & {"a", "b"} else 1.0
        return 100 * gain * (1.5 if "c" in on else 1.0)

    found = {each.name: each for each in contributions(orders_of("abc", None, 0), worth)}
    assert math.prod(each.factor for each in found.values()) == pytest.approx(4.5)
    assert found["a"].factor == pytest.approx(math.sqrt(3))
    assert (found["a"].low, found["a"].high) == (pytest.approx(1.5), pytest.approx(2.0))
    assert (found["c"].low, found["c"].high) == (pytest.approx(1.5), pytest.approx(1.5))


def test_the_mean_is_over_every_order():
    def worth(on: frozenset[str]) -> float:
        return 1 + sum(ord(name) for name in on) ** 1.5

    found = {each.name: each for each in contributions(orders_of("abcd", None, 0), worth)}
    for name in "abcd":
        gains = []
        for order in permutations("abcd"):
            before = frozenset(order[: order.index(name)])
            gains.append(math.log(worth(before | {name}) / worth(before)))
        assert math.log(found[name].factor) == pytest.approx(sum(gains) / len(gains))


def test_orders_are_drawn_with_their_reverse_and_repeat_by_seed():
    orders = orders_of("abcdef", 6, seed=3)
    assert orders == orders_of("abcdef", 6, seed=3) and len(set(orders)) == 6
    assert all(order[::-1] in orders for order in orders)
    assert len(orders_of("abc", 0 or None, 1)) == 6
    sets = sets_of(orders)
    assert sets[0] == frozenset() and sets[-1] == frozenset("abcdef")
    assert [len(on) for on in sets] == sorted(len(on) for on in sets)
    with pytest.raises(ValueError, match=r"9 changes, must be at most 8"):
        orders_of("abcdefghi", None, 0)
    with pytest.raises(ValueError, match=r"worth of \['a'\] is 0"):
        contributions([("a",)], lambda on: 0.0 if on else 1.0)


def test_each_switch_changes_what_it_says():
    model, device = load_shape("deepseek-r1"), load_device("gb300")
    setup = setup_of(model, device, Formats("nvfp4", "k4v4", "fp8"), "k4v4")
    assert (setup.narrow, setup.wide) == (Parallel(1, 4, 4), Parallel(1, 8, 8))
    base = scenario_of(setup, frozenset(), device)
    assert (base.options.kv, base.options.fused, base.options.balance) == ("fp16", False, False)
    assert base.options.policy == "round-robin" and base.options.acceptance == ()

    def options(name: str) -> object:
        return scenario_of(setup, frozenset({name}), device).options

    changed = {
        KV: ("kv", "k4v4"), FUSED: ("fused", True), BALANCE: ("balance", True),
        MTP: ("acceptance", (0.79, 0.61, 0.46)), ROUTING: ("policy", "kv-aware"),
    }  # fmt: skip
    for name, (field, value) in changed.items():
        assert getattr(options(name), field) == value
        others = [f for f, _ in changed.values() if f != field]
        assert all(getattr(options(name), f) == getattr(base.options, f) for f in others)
    wide = scenario_of(setup, frozenset({WIDE}), device)
    assert wide.pools[0].parallel == setup.wide and wide.devices == base.devices
    apart = scenario_of(setup, frozenset({DISAGG}), device)
    assert [pool.role for pool in apart.pools] == ["prefill", "decode"]


def test_what_can_change_nothing_says_why():
    dense = applicable(load_shape("llama-3.1-8b"), load_workload("mlperf-llama-3.1-8b"), 2)
    assert "no experts" in dense[WIDE] and "no layer of multi-token" in dense[MTP]
    assert dense[ROUTING] == "no prompts share a beginning here" and dense[KV] == ""
    bench = bench_of(ask("chat", "llama-3.1-8b"), load_device("h100"), "k4v4", (60, 1))
    with pytest.raises(PlanError, match=r"optimisation 'magic' is unknown; known: kv"):
        plan_orders(bench, ["magic"], 2)
    with pytest.raises(PlanError, match=r"no optimisation of mtp can change anything"):
        plan_orders(bench, ["mtp"], 2)
    with pytest.raises(PlanError, match=r"orders is -1"):
        plan_orders(bench, None, -1)
    with pytest.raises(PlanError, match=r"requests is 5, must be in 50"):
        bench_of(bench.question, load_device("h100"), "k4v4", (5, 1))


@pytest.fixture(scope="module")
def simulated():
    """Two switches of a small model, both orders, and another device."""
    question = ask("chat", "llama-3.1-8b")
    first, second = load_device("h100"), load_device("b200")
    bench = bench_of(question, first, "k4v4", (120, 1))
    orders, _ = plan_orders(bench, [KV, FUSED], 0)
    found = waterfall(bench, orders, (first, second), (price_of(first), price_of(second)))
    return bench, orders, found


def test_a_simulated_waterfall_adds_up(simulated):
    _bench, orders, found = simulated
    assert len(found.runs) == 4 + 2 and len(orders) == 2
    assert math.prod(s.factor for s in found.steps) == pytest.approx(found.software)
    assert found.total == pytest.approx(found.software * found.hardware.factor)
    fused = next(step for step in found.steps if step.name == FUSED)
    assert fused.factor > 1  # fewer kernels take less time, whatever else is on
    before, _, after = found.dollars
    assert before == pytest.approx(1.30e6 / 3600 / found.base.tokens_s_device)
    assert after == pytest.approx(1.95e6 / 3600 / found.final.tokens_s_device)
    assert "simulated" in waterfall_plot(found, "a title")


def test_it_is_the_same_again(simulated):
    bench, _orders, _found = simulated
    again = bench_of(bench.question, load_device("h100"), "k4v4", (120, 1))
    measured = again.measure(frozenset({FUSED}), load_device("h100"))
    known = bench.known["h100", frozenset({FUSED})]
    assert measured.tokens_s_device == pytest.approx(known.tokens_s_device, rel=0.1)
    assert again.measure(frozenset({FUSED}), load_device("h100")) is measured


def test_a_hardware_claim_has_its_place_on_the_axis():
    axes = hardware_axis(ask("chat", "llama-3.1-8b"), read_choice("h100"), read_choice("rubin"))
    by_factor = {axis.claim.factor: axis for axis in axes}
    assert by_factor[1.74].at_user_tokens_s is not None
    assert all(axis.most >= axis.claim.factor for axis in axes if axis.at_user_tokens_s)


def test_the_command_prints_one_document(tmp_path: Path):
    plot = tmp_path / "waterfall.svg"
    command = ["plan", "waterfall", "--model", "llama-3.1-8b", "--device", "h100", "--to", "none"]
    command += ["--optimisation", "fused", "--requests", "60", "--plot", str(plot)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["simulated"] is True and [s["name"] for s in told["steps"]] == ["fused"]
    assert told["steps"][0]["factor"] == pytest.approx(told["software_factor"])
    assert {claim["tag"] for claim in told["claims"]} == {"M", "C"}
    assert plot.read_text().startswith("<svg")
    table = CliRunner().invoke(app, command)
    assert "published, of other workloads" in table.stdout
    wrong = CliRunner().invoke(app, ["plan", "waterfall", "--optimisation", "magic"])
    assert wrong.exit_code == 2 and "unknown" in wrong.output
    assert set(TITLES) == {KV, FUSED, BALANCE, DISAGG, WIDE, MTP, ROUTING}
