"""Whole models on simulated LPU chips: what fits, what takes the time, pictures, the clock."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvmesh.backends.base import StepShape
from kvmesh.backends.lpu.compile import CHIP, Compiled, compile_model
from kvmesh.backends.lpu.critical import critical_path
from kvmesh.backends.lpu.pictures import gantt_svg, perfetto_trace
from kvmesh.backends.lpu.program import LpuError, ModelDoesNotFit
from kvmesh.backends.lpu.roofline import lp30_roofline
from kvmesh.backends.lpu.shapes import ModelShape, find_shape, known_shapes, kv_bits, place_model
from kvmesh.backends.lpu.timing import lpu_clock

SMALL = ModelShape("small", 2, 320, 4, 2, 64, 640, 640, 512)
LLAMA = known_shapes()["llama-2-70b"]


@pytest.fixture(scope="module")
def small() -> Compiled:
    return compile_model(SMALL, codec="k4v4", context=128)


@pytest.fixture(scope="module")
def llama() -> Compiled:
    return compile_model(LLAMA, 576, "fp16", 4096)


def test_llama_2_70b_on_576_chips(llama: Compiled) -> None:
    """Published: 300 tokens per second and user at a context of 4096, within a fifth."""
    assert 240 <= 1 / llama.seconds <= 360
    assert (llama.placement.group, llama.placement.stages) == (8, 72)


def test_one_token_is_bound_by_installing_weights(llama: Compiled) -> None:
    used = llama.utilisation()
    assert used["MXM weights"] > 0.5 > 10 * used["MXM compute"]
    layer = llama.parts[0].execution
    # FP16 weights pass the ports at 2 bytes each; tiles are whole vectors wide.
    ports = (layer.busy["MXM_E.load"] + layer.busy["MXM_W.load"]) / 2
    assert ports >= 2 * LLAMA.layer_weights / 8 / CHIP.install_bytes_per_cycle


def test_weights_of_70b_fit_as_many_chips_as_it_says() -> None:
    least = place_model(LLAMA, None, "fp16", 4096, CHIP)
    assert least.weight_bytes + least.kv_bytes <= CHIP.data_bytes
    assert least.chips * CHIP.data_bytes >= LLAMA.weights
    with pytest.raises(ModelDoesNotFit, match=f"needs {least.chips}"):
        place_model(LLAMA, 300, "fp16", 4096, CHIP)


def test_a_large_vocabulary_gets_stages_of_its_own() -> None:
    placed = place_model(known_shapes()["llama-3.1-70b"], 576, "fp16", 4096, CHIP)
    assert (placed.stages, placed.layers_per_stage) == (72, 2)
    assert placed.weight_bytes + placed.kv_bytes <= CHIP.data_bytes


def test_a_layer_beyond_a_node_is_refused() -> None:
    huge = ModelShape("huge", 2, 1 << 15, 256, 8, 128, 1 << 17, 1000, 4096)
    with pytest.raises(ModelDoesNotFit, match="8 chips of a node"):
        place_model(huge, None, "fp16", 4096, CHIP)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compile_model(SMALL, codec="k9"), "codec is 'k9'"),
        (lambda: compile_model(SMALL, chips=0), "chips is 0"),
        (lambda: compile_model(SMALL, context=600), "600 tokens"),
        (lambda: find_shape("no-such-model"), "known model"),
    ],
)
def test_bad_input_names_value_and_limit(call, message: str) -> None:
    with pytest.raises(LpuError, match=message):
        call()


def test_cache_has_the_codecs_bytes() -> None:
    assert kv_bits("fp16", SMALL) == (16, 16)
    assert kv_bits("k4v3", SMALL) == (4.25, 3.25)  # and a 16 bit scale for 64 elements


def test_compressed_cache_is_read_in_fewer_vectors_and_decoded(small: Compiled) -> None:
    plain = compile_model(SMALL, codec="fp16", context=128)

    def reads(compiled: Compiled, label: str) -> int:
        return sum(
            x.beats
            for x in compiled.parts[0].program.instructions
            if (x.op, x.label) == ("read", label) and int(x.unit[5:]) >= CHIP.work_slices
        )

    for label in ("q K", "p V"):
        assert 0 < reads(small, label) < reads(plain, label)
    labels = {x.label for x in small.parts[0].program.instructions}
    assert {"encode", "rotate q k v", "rotate back"} <= labels


def test_critical_path_covers_every_cycle(small: Compiled) -> None:
    part = small.parts[0]
    legs = critical_path(part.program, part.execution.cycles)
    assert sum(leg.cycles for leg in legs) == small.cycles
    assert [leg.begin for leg in legs] == sorted(leg.begin for leg in legs)


def test_pictures_say_simulated_and_parse(small: Compiled) -> None:
    root = ElementTree.fromstring(gantt_svg(small.parts[0], "small <simulated>"))
    assert "simulated" in "".join(root.itertext())
    trace = json.loads(perfetto_trace(small))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) >= len(small.parts[0].program.instructions)
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names and all("simulated" in name for name in names)


def test_more_chips_of_a_node_shorten_the_way_of_a_large_model(llama: Compiled) -> None:
    seven = compile_model(known_shapes()["llama-2-7b"], codec="fp16", context=64)
    assert seven.seconds < llama.seconds


def test_clock_is_what_was_compiled() -> None:
    clock = lpu_clock(SMALL, "k4v4")
    one = compile_model(SMALL, None, "k4v4", 64, whole=False)
    step = StepShape(decode_sequences=1, context_tokens=64)
    assert clock.step_seconds(step) == pytest.approx(one.seconds)
    assert clock.estimate().seconds(step) == pytest.approx(one.seconds)
    longer = StepShape(decode_sequences=1, context_tokens=512)
    assert clock.step_seconds(longer) > clock.step_seconds(step)
    assert clock.step_seconds(StepShape()) == 0
    assert clock.device.simulated and clock.device.name == "LPU v1 x 1"


def test_lp30_is_a_bound_by_its_data_sheet() -> None:
    bound = lp30_roofline(LLAMA, "fp16", 4096)
    assert bound.chips == 141  # 69.2 GB of weights and 1.3 GB of cache in 500 MB each
    assert bound.seconds >= (LLAMA.weights - LLAMA.vocab * LLAMA.hidden) / (8 * 150e12)
    with pytest.raises(ModelDoesNotFit, match="needs 141"):
        lp30_roofline(LLAMA, "fp16", 4096, chips=8)


def test_shape_of_a_checkpoint() -> None:
    folder = Path(__file__).parents[1] / "kvmesh/backends/bundled/mini"
    assert find_shape(str(folder)) == ModelShape("mini", 4, 256, 8, 4, 64, 384, 1088, 8192)
