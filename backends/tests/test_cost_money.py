"""Memory that a model takes, and what device time costs: by hand, and against published figures."""

import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.memory import USABLE, plan_memory, rank_weight_bytes
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.cost.price import (
    dollars_per_mtok,
    joules_per_token,
    listed_price,
    power_of,
    price_of,
    usage,
)
from kvmesh.backends.devices import load_device
from kvmesh.backends.errors import DeviceError, DoesNotFit


def test_memory_of_one_device():
    device, model = load_device("h100"), load_shape("llama-3.1-8b")
    plan = plan_memory(device, model, formats=Formats("bf16", "fp8"), step_tokens=1)
    assert plan.weight_bytes == pytest.approx(2 * 8.030e9, rel=1e-3)
    free = 80e9 * USABLE - 3.758e9 - plan.weight_bytes - plan.activation_bytes
    assert plan.kv_bytes == pytest.approx(free)
    assert plan.kv_tokens == int(plan.kv_bytes // 65536)
    assert plan.sequences(1000) == int(plan.kv_bytes // 65_536_000)


def test_a_codec_holds_more_tokens():
    device, model = load_device("h100"), load_shape("llama-3.1-8b")
    held = {
        kv: plan_memory(device, model, formats=Formats(kv=kv)).kv_tokens for kv in ("fp16", "k4v4")
    }
    # 256 bytes of a head's key in fp16 are 64 of codes and 2 of a scale.
    assert held["k4v4"] / held["fp16"] == pytest.approx(256 / 66, rel=1e-3)


def test_experts_are_spread_and_latents_are_not():
    model = load_shape("deepseek-r1")
    formats = Formats("nvfp4", "fp8", attention="fp8")
    eight = rank_weight_bytes(model, Parallel(data=8, expert=8), formats)
    assert 61e9 < eight < 73e9  # attention data parallel: as stated of the published checkpoint
    sixteen = rank_weight_bytes(model, Parallel(data=16, expert=16), formats)
    assert eight - sixteen == pytest.approx(58 * 16 * 3 * 7168 * 2048 * 0.5625)
    device = load_device("gb300")
    plans = [
        plan_memory(device, model, p, formats) for p in (Parallel(8, expert=8), Parallel(8, 2, 16))
    ]
    assert {plan.kv_token_bytes for plan in plans} == {61 * 576}


def test_windows_stop_growing_in_memory():
    model = load_shape("gpt-oss-20b")
    plan = plan_memory(load_device("b200"), model, formats=Formats("mxfp4", "fp8"))
    for context in (64, 128, 5000):
        assert plan.sequence_bytes(context) == pytest.approx(model.kv_bytes(context, "fp8"))


def test_a_model_that_does_not_fit_says_how_many_it_needs():
    with pytest.raises(DoesNotFit, match=r"llama-3.1-405b in fp8 .* does not fit 1, 6 would") as e:
        plan_memory(load_device("h100"), load_shape("llama-3.1-405b"), None, Formats("fp8", "fp8"))
    # 410 GB over the 72 GB of each, in stages of layers: 6 at least.
    assert e.value.needed == 6
    with pytest.raises(DoesNotFit) as e:
        plan_memory(load_device("lp30"), load_shape("deepseek-r1"), None, Formats("fp8", "fp8"))
    # 671 GB of weights in 0.5 GB each are 1,342 without room for anything else.
    assert e.value.needed is not None and 1342 < e.value.needed < 2 * 1342


def test_dollars_per_million_tokens():
    # 3,481 tokens/s are 12.53 million an hour: 3.76 / 12.53.
    assert dollars_per_mtok(3.76, 3481) == pytest.approx(0.300, rel=0.005)
    assert dollars_per_mtok(1.0, 1e6 / 3600) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"tokens_per_s_device is 0"):
        dollars_per_mtok(1.0, 0)


def test_device_time_costs_and_burns():
    gb300 = load_device("gb300")
    price = price_of(gb300)
    assert (price.per_hour, price.preset) == (2.652, "hyperscaler")
    assert price_of(gb300, "july-2026").per_hour == 2.36
    assert price_of(gb300, per_hour=5.0).source == "given"
    used = usage(gb300, 7200.0, price, simulated=True)
    assert used.dollars == pytest.approx(5.304)
    assert used.joules == pytest.approx(7200 * 2100)
    assert joules_per_token(power_of(gb300), 2100) == 1.0


def test_prices_and_power_that_are_not_there():
    with pytest.raises(
        DeviceError, match=r"no price 'free'; it has: hyperscaler, neocloud, rental"
    ):
        price_of(load_device("h100"), "free")
    with pytest.raises(DeviceError, match=r"no published price"):
        price_of(load_device("lp30"))
    with pytest.raises(DeviceError, match=r"-1, must be at least 0"):
        price_of(load_device("h100"), per_hour=-1)
    with pytest.raises(DeviceError, match=r"no published power"):
        power_of(load_device("lp30"))
    assert usage(load_device("lp30"), 1.0, price_of(load_device("h100")), True).joules == 0


@pytest.mark.parametrize(
    ("product", "per_hour"),
    [("NVIDIA H100 80GB HBM3", 1.30), ("NVIDIA GB300", 2.652), ("NVIDIA GeForce RTX 4090", None)],
)
def test_a_gpu_that_is_here_is_priced_by_its_name(product: str, per_hour: float | None):
    price = listed_price(product)
    assert (price.per_hour if price else None) == per_hour
    assert price is None or "[C]" in price.source
