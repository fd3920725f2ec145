"""Seconds of steps against numbers worked out by hand, on devices made for easy arithmetic."""

import math
from pathlib import Path

import pytest

from kvmesh.backends.architectures import ModelShape, load_shape
from kvmesh.backends.architectures.shape import Mla, Moe, Window
from kvmesh.backends.base import StepShape
from kvmesh.backends.cost.estimate import linear_estimate
from kvmesh.backends.cost.imbalance import Routing
from kvmesh.backends.cost.links import Links
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.rates import without_floor
from kvmesh.backends.cost.shapes import FEATURES, F, StepWork, windowed_attended
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import Device, load_device
from kvmesh.backends.errors import DeviceError, ShapeError

IDEAL = """
title = "ideal"
kind = "gpu"
architecture = "none"
model = "roofline"
[peak]
bf16 = 1e12
fp8 = 2e12
vector = 1e11
[memory]
bytes = 1e12
bandwidth_bytes_s = 1e9
reserved_bytes = 0
[scale_up]
bandwidth_bytes_s = 1e8
domain = 4
[scale_out]
bandwidth_bytes_s = 1e7
latency_s = 1e-3
"""
SMALL = ModelShape(
    name="small", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, vocab=100, ffn=128
)


@pytest.fixture
def ideal(tmp_path: Path) -> Device:
    """All shares 1, no floors: 1 TFLOP/s, 1 GB/s, links of 100 and 10 MB/s."""
    path = tmp_path / "ideal.toml"
    path.write_text(IDEAL)
    return load_device(str(path))


def test_work_sums():
    work = StepWork.of(chunks=[(10, 3)], decodes=[5, 7], window=6)
    # Tokens 10, 11, 12 attend to 11, 12 and 13 tokens.
    assert (work.prefill_attended, work.prefill_context, work.prefill_tokens) == (36, 13, 3)
    assert (work.decode_sequences, work.decode_context) == (2, 12)
    assert (work.windowed_attended, work.windowed_prefill, work.windowed_decode) == (18, 9, 11)
    assert work.divided(2).decode_sequences == 1
    for start, count, window in ((0, 10, 4), (3, 5, 4), (9, 2, 4), (0, 3, 8)):
        expected = sum(min(p + 1, window) for p in range(start, start + count))
        assert windowed_attended(start, count, window) == expected
    assert len(F) == FEATURES


def test_a_decode_step_by_hand(ideal: Device):
    times = StepCost(ideal, SMALL).step(StepWork.of(decodes=[100, 300])).by_name()
    # Streaming weights at 1 GB/s binds everything: qkv is 64 x (4 + 2 x 2) x 32 in bf16, 2 layers.
    qkv = 2 * (64 * 256 * 2 + 2 * 2 * (64 + 256))
    assert times["qkv"] == pytest.approx(qkv / 1e9)
    up = 2 * (64 * 256 * 2 + 2 * 2 * (64 + 256))
    assert times["ffn_up"] == pytest.approx(up / 1e9)
    # K and V of 400 tokens: 2 heads x 32 x 2 x 2 bytes, and q and the output of 2 tokens.
    attention = 2 * (400 * 256 + 2 * 2 * 4 * 32 * 2)
    assert times["attention_decode"] == pytest.approx(attention / 1e9)
    head = 64 * 100 * 2 + 2 * 2 * (64 + 100)
    assert times["head"] == pytest.approx(head / 1e9)
    assert "attention_context" not in times and "host" not in times


def test_a_long_prompt_is_bound_by_math(ideal: Device):
    work = StepWork.of(chunks=[(0, 10_000)])
    ops = {op.name: op for op in StepCost(ideal, SMALL).step(work).ops()}
    context = ops["attention_context"]
    assert context.bound == "compute"
    flops = 2 * 4 * 4 * 32 * 10_000 * 10_001 / 2
    assert context.flops == pytest.approx(flops)
    assert context.seconds == pytest.approx(flops / 1e12)
    assert ops["norms"].bound == "memory"
    assert ops["head"].flops == 2 * 64 * 100  # one row of logits


def test_ops_add_up_and_seconds_agree(ideal: Device):
    for model in (SMALL, load_shape("deepseek-r1"), load_shape("gpt-oss-20b")):
        cost = StepCost(load_device("gb300"), model, formats=Formats("nvfp4", "fp8"))
        work = StepWork.of([(0, 100)], [50, 60], model.window.tokens if model.window else None)
        times = cost.step(work)
        assert sum(op.seconds for op in times.ops()) == pytest.approx(times.total_s)
        assert cost.seconds(work) == pytest.approx(times.total_s)
        assert cost.seconds(StepWork()) == 0 == cost.step(StepWork()).total_s


def test_windows_bound_what_is_read(ideal: Device):
    model = SMALL.model_copy(update={"window": Window(tokens=50, every=2)})
    times = StepCost(ideal, model).step(StepWork.of(decodes=[400], window=50)).by_name()
    query = 2 * 4 * 32 * 2
    assert times["attention_decode"] == pytest.approx((400 * 256 + query) / 1e9)
    assert times["window_attention_decode"] == pytest.approx((50 * 256 + query) / 1e9)
    aggregate = StepWork(decode_sequences=1, decode_context=400)
    assert StepCost(ideal, model).seconds(aggregate) == pytest.approx(sum(times.values()))


def test_a_codec_is_bytes_and_work_not_a_factor(ideal: Device):
    decodes = [1000]
    exact = StepCost(ideal, SMALL, formats=Formats(kv="fp16")).step(StepWork.of((), decodes))
    packed = StepCost(ideal, SMALL, formats=Formats(kv="k4v4")).step(StepWork.of((), decodes))
    query = 2 * 2 * 4 * 32 * 2
    # 32 elements at 4 bits and a scale of 2 bytes, for K and V of 2 heads in 2 layers.
    assert packed.by_name()["attention_decode"] == pytest.approx(
        (2 * 1000 * 2 * 2 * (16 + 2) + query) / 1e9
    )
    assert exact.by_name()["attention_decode"] == pytest.approx((2 * 1000 * 256 + query) / 1e9)
    ops = {op.name: op for op in packed.ops()}
    # Per layer: 128 elements of K and V encoded (10 + log2 32), 2 x 128 of q and output rotated.
    assert ops["codec"].flops == 2 * (128 * (10 + 5) + 2 * 128 * 5)
    assert "codec" not in exact.by_name()
    # Everything else is untouched.
    rest = {k: v for k, v in exact.by_name().items() if k != "attention_decode"}
    assert rest.items() <= packed.by_name().items()


def test_decoding_a_codec_can_bind(tmp_path: Path):
    slow = IDEAL.replace("vector = 1e11", "vector = 1e8")
    (tmp_path / "slow.toml").write_text(slow)
    cost = StepCost(load_device(str(tmp_path / "slow.toml")), SMALL, formats=Formats(kv="k2v2"))
    op = next(o for o in cost.step(StepWork.of((), [1000])).ops() if o.name == "attention_decode")
    assert op.bound == "compute"
    # 4 operations for each of 128 elements of 1,000 tokens in 2 layers, beside the dot products.
    assert op.seconds == pytest.approx(2 * 1000 * (128 * 4 / 1e8 + 4 * 4 * 32 / 1e12))


def test_fp8_changes_the_rate_of_math_too(ideal: Device):
    prompt = StepWork.of(chunks=[(0, 10_000)])
    times = [
        StepCost(ideal, SMALL, formats=Formats(kv=kv)).step(prompt).by_name()["attention_context"]
        for kv in ("fp16", "fp8", "k8v8")
    ]
    assert times[0] == pytest.approx(2 * times[1])
    assert times[2] >= times[0]  # a codec shrinks bytes, and its math stays in bf16


def test_latent_attention_by_hand(ideal: Device):
    mla = Mla(q_lora=16, kv_lora=32, rope=32, nope=32, value=32)
    model = SMALL.model_copy(update={"mla": mla})
    ops = {o.name: o for o in StepCost(ideal, model).step(StepWork.of((), [100] * 3)).ops()}
    decode = ops["attention_decode"]
    assert decode.flops == 2 * 2 * 4 * (64 + 32) * 300
    assert decode.bytes == 2 * (300 * 64 * 2 + 3 * 4 * (64 * 2 + 32 * 2))
    assert ops["absorb_q"].flops == 2 * 3 * 2 * 4 * 32 * 32
    assert ops["kv_up"].seconds == 0


def test_experts_count_what_the_busiest_rank_reads(ideal: Device):
    moe = Moe(experts=8, top_k=2, ffn=16)
    model = SMALL.model_copy(update={"moe": moe})
    cost = StepCost(ideal, model, Parallel(data=4, expert=4))
    ops = {o.name: o for o in cost.step(StepWork.of((), [10] * 16)).ops()}
    expert = 3 * 64 * 16
    # 64 tokens of 4 replicas with 2 experts each: 32 assignments and both experts on every rank.
    assert ops["experts"].flops == 2 * 32 * 2 * expert
    assert ops["experts"].bytes == 2 * 2 * expert * 2
    # A token visits 2 ranks of 4; a quarter stays at home. bf16 both ways at 100 MB/s.
    assert ops["dispatch"].seconds == pytest.approx(2 * 64 * 2 / 4 * 3 / 4 * 64 * 2 / 1e8)
    assert ops["combine"].bound == "link"
    few = {o.name: o for o in cost.step(StepWork.of((), [10]), group_tokens=2).ops()}
    assert few["experts"].bytes == 2 * 1 * expert * 2
    joined = StepCost(ideal, model, Parallel(tensor=2, expert=2)).step(StepWork.of((), [10] * 4))
    assert "dispatch" not in joined.by_name() and joined.by_name()["all_reduce"] > 0


def test_routing_by_power_law_is_uneven_and_never_impossible():
    even, uneven = Routing(256, 8, 8, "balanced"), Routing(256, 8, 8, "power_law")
    assert even.busiest(16_384) == (16_384, 32)
    assert even.busiest(1) == (1, 1)
    for tokens in (1, 7, 100, 5000, 100_000, 1_000_000):
        assignments, experts = uneven.busiest(tokens)
        assert tokens * 1.0 <= assignments <= tokens * 8
        assert 0 < experts <= 32
    assert 1.3 < uneven.busiest(4096)[0] / 4096 < 2.5
    assert even.busiest(0) == (0, 0)


def test_collectives_by_hand(ideal: Device):
    assert Links(ideal, 1).all_reduce_s(1e6) == 0
    assert Links(ideal, 4).all_reduce_s(1e6) == pytest.approx(2 * 3 / 4 * 1e6 / 1e8)
    # Two domains of 4: a quarter of the data crosses between each pair, over the slower link.
    crossed = 1e-3 + 2 * 1 / 2 * 1e6 / 4 / 1e7
    assert Links(ideal, 8).all_reduce_s(1e6) == pytest.approx(2 * 3 / 4 * 1e6 / 1e8 + crossed)
    assert Links(ideal, 4).exchange_byte_s() == pytest.approx(1e-8)
    assert Links(ideal, 8).exchange_byte_s() == pytest.approx(4 / 7 / 1e7)
    h100 = Links(load_device("h100"), 8)
    assert h100.all_reduce_s(256) == pytest.approx(3.2e-6, rel=0.01)


def test_tensor_parallel_divides_and_talks(ideal: Device):
    one = StepCost(ideal, SMALL).step(StepWork.of((), [1000])).by_name()
    two = StepCost(ideal, SMALL, Parallel(tensor=2)).step(StepWork.of((), [1000])).by_name()
    assert two["attention_decode"] == pytest.approx(one["attention_decode"] / 2)
    assert two["all_reduce"] == pytest.approx(4 * (2 * 1 / 2 * 64 * 2 / 1e8))
    replicated = StepCost(ideal, SMALL, Parallel(tensor=4)).step(StepWork.of((), [1000])).by_name()
    assert replicated["attention_decode"] > one["attention_decode"] / 4  # 2 K and V heads for 4


def test_a_pipeline_shortens_the_step_and_not_the_way(ideal: Device):
    work = StepWork.of((), [1000])
    whole, halved = StepCost(ideal, SMALL), StepCost(ideal, SMALL, Parallel(pipeline=2))
    one, two = whole.step(work), halved.step(work)
    assert two.total_s < one.total_s < two.latency_s
    assert two.latency_s == pytest.approx(2 * two.total_s + 64 * 2 / 1e8)


def test_drafts_cost_passes_and_widen_the_step():
    device, model = load_device("gb300"), load_shape("deepseek-r1")
    layout, formats = Parallel(data=16, expert=16), Formats("nvfp4", "fp8")
    work = StepWork.of((), [2000] * 32)
    plain = StepCost(device, model, layout, formats)
    drafting = StepCost(device, model, layout, formats, Options(draft_tokens=3))
    ops = list(drafting.step(work).ops())
    assert sum(op.name == "draft.head" for op in ops) == 3
    head = next(op for op in ops if op.name == "head")
    assert head.flops == 2 * 4 * 32 * 7168 * 129280
    assert plain.seconds(work) < drafting.seconds(work) < 2 * plain.seconds(work)
    prefill = StepWork.of(chunks=[(0, 64)])
    assert drafting.seconds(prefill) == pytest.approx(plain.seconds(prefill))
    with pytest.raises(ShapeError, match=r"draft_tokens is 3, must be 0: llama-3.1-8b has no"):
        StepCost(device, load_shape("llama-3.1-8b"), options=Options(draft_tokens=3))


def test_the_floor_is_taken_out_of_a_measured_share():
    assert without_floor(0.5, 10.0, 5.0) == pytest.approx(10 / 15)
    assert without_floor(0.9, 10.0, 5.0) == 1.0
    assert without_floor(0.5, 10.0, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parallel(tensor=0), "parallel.tensor is 0, must be at least 1"),
        (lambda: Parallel(tensor=4, expert=3), "expert is 3, must divide tensor"),
        (lambda: Formats(kv="k5v5"), "formats.kv is 'k5v5', must be one of fp8"),
        (lambda: Formats(weights="int3"), "formats.weights is 'int3'"),
        (lambda: Options(draft_tokens=-1), "draft_tokens is -1"),
        (lambda: StepCost(load_device("h100"), SMALL, Parallel(tensor=8)), "must divide the 4"),
        (lambda: StepCost(load_device("h100"), SMALL, Parallel(2, expert=2)), "no experts"),
        (lambda: StepCost(load_device("h100"), SMALL, Parallel(pipeline=3)), "at most the 2"),
        (
            lambda: StepCost(load_device("gb300"), load_shape("kimi-k2"), Parallel(data=8)),
            "expert is 1 with data = 8",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_named(make, message: str):
    with pytest.raises(ShapeError, match=message):
        make()


def test_devices_that_cannot_answer_say_why():
    with pytest.raises(DeviceError, match=r"cycle simulator"):
        StepCost(load_device("lpu-v1"), SMALL)
    lp30 = StepCost(load_device("lp30"), SMALL, formats=Formats("fp8", "fp8"))
    assert lp30.seconds(StepWork.of((), [10])) > 0
    with pytest.raises(DeviceError, match=r"peak.vector is missing"):
        StepCost(load_device("lp30"), SMALL, formats=Formats("fp8", "k4v4"))


def test_four_bit_weights_on_a_device_without_their_math():
    """They are decoded to bf16 on Hopper: fewer bytes, and the rate of bf16."""
    h100, model = load_device("h100"), load_shape("llama-3.1-8b")
    prompt, token = StepWork.of(chunks=[(0, 8192)]), StepWork.of((), [10])
    bf16, fp4 = (StepCost(h100, model, formats=Formats(w)) for w in ("bf16", "nvfp4"))
    assert fp4.step(prompt).by_name()["ffn_up"] == bf16.step(prompt).by_name()["ffn_up"]
    assert fp4.seconds(token) < 0.6 * bf16.seconds(token)


def test_unfused_costs_more():
    h100, model = load_device("h100"), load_shape("llama-3.1-8b")
    work = StepWork.of((), [1000] * 8)
    unfused = StepCost(h100, model, options=Options(fused=False)).seconds(work)
    assert unfused > StepCost(h100, model).seconds(work)


def test_the_linear_estimate_is_near_where_a_step_is_linear():
    cost = StepCost(load_device("h100"), load_shape("llama-3.1-8b"))
    estimate = linear_estimate(cost)
    assert estimate.simulated
    errors = []
    for sequences in (1, 8, 32, 128):
        for context in (512, 4096, 16384):
            work = StepWork.of((), [context] * sequences)
            told = estimate.seconds(StepShape(0, sequences, sequences * context))
            errors.append(abs(math.log(told / cost.seconds(work))))
    assert sorted(errors)[len(errors) // 2] < 0.25
    assert linear_estimate(StepCost(load_device("h100"), load_shape("mini"))).base_s > 0


def test_latent_attention_of_few_heads_is_not_held_by_the_math_of_all():
    """The measured shares of H200 (.29 of bandwidth, .34 of math) are of 128 heads; an eighth of
    them reads as fast as GQA decode does (.63)."""
    model, work = load_shape("deepseek-r1"), StepWork.of(decodes=[8192] * 64)
    stored = 64 * 8192 * 576 / 4.8e12
    seconds = []
    for parallel in (Parallel(data=8, expert=8), Parallel(tensor=8, expert=8)):
        cost = StepCost(load_device("h200"), model, parallel, Formats("fp8_block", "fp8"))
        seconds.append(cost.step(work).by_name()["attention_decode"] / model.layers)
    assert seconds[0] == pytest.approx(stored / 0.29, rel=0.1)
    assert seconds[1] == pytest.approx(stored / 0.63, rel=0.15)
