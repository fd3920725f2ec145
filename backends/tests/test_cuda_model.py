"""The CUDA backend beside the CPU's and the reference; its steps, its refusals."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import SPLITTING, open_on_shim
from cuda_shim import ShimDevice

from kvmesh.backends.base import Model, ModelOptions, Segment, Simulation, StepShape
from kvmesh.backends.cuda import backend as cuda_backend
from kvmesh.backends.cuda.model import CudaModel
from kvmesh.backends.errors import BackendUnavailable, CheckpointError
from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.backends.registry import create_backend, open_model
from kvmesh.backends.simulated import backend as simulated_backend
from kvmesh.kernels import block, reference
from kvmesh.kernels.cuda.device import DeviceFacts, Place
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

OPTIONS = ModelOptions(num_blocks=16, num_slots=4)
TABLE = np.arange(8, dtype=np.int32)


def greedy(model: Model, prompt: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    """(tokens, fp32 [count, vocab]): each token is the likeliest after those before it."""
    rows = [model.forward([Segment(0, 0, prompt, TABLE)])[0]]
    for position in range(len(prompt), len(prompt) + count - 1):
        token = np.array([rows[-1].argmax()])
        rows.append(model.forward([Segment(0, position, token, TABLE)])[0])
    return [int(row.argmax()) for row in rows], np.array(rows)


@pytest.mark.parametrize(("codec", "bound"), [("fp32", 1e-4), ("k4v4", 5e-3)])
def test_cuda_says_the_same_as_the_cpu(codec, bound, checkpoint):
    """Both keep within 2e-3 of attention over the same codes; the CPU rounds queries to 16 bits
    of integers, the device to fp16. bound: of the range of the logits."""
    prompt = np.random.default_rng(2).integers(0, 131, 120)
    options = replace(OPTIONS, codec=codec)
    with closing(open_on_shim(checkpoint.folder, options, warm=False)) as model:
        tokens, logits = greedy(model, prompt, 16)
        assert model.graph_refusal is None
    with closing(open_model("cpu", checkpoint.folder, options)) as model:
        expected, beside = greedy(model, prompt, 16)
    assert tokens == expected
    assert np.abs(logits - beside).max() <= bound * np.ptp(beside)


def test_cuda_model_seals_the_bytes_of_the_reference(checkpoint):
    """The first block attends to none before it, so its K and V are the same under any codec, and
    an fp32 block holds them."""
    ids = np.random.default_rng(3).integers(0, 131, BLOCK_SIZE)
    sealed: dict[str, bytes] = {}
    layouts: dict[str, KvLayout] = {}
    for codec in ("fp32", "k4v4", "k3v3"):
        options = ModelOptions(codec=codec, num_blocks=4, num_slots=2)
        with closing(open_on_shim(checkpoint.folder, options, warm=False)) as model:
            model.forward([Segment(0, 0, ids, TABLE)])
            sealed[codec], layouts[codec] = model.pool.export_block(0), model.spec.layout
    centers = load_checkpoint(checkpoint.folder).centers
    exact = np.frombuffer(sealed["fp32"], np.uint8)
    for codec in ("k4v4", "k3v3"):
        layout = layouts[codec]
        expected = np.zeros(layout.block_bytes, np.uint8)
        for layer in range(layout.num_layers):
            kv = reference.decode_layer(layouts["fp32"], exact, layer, centers[layer])
            k, v = (each.astype(np.float32) for each in kv)
            reference.seal_layer(layout, expected, layer, (k, v), centers[layer])
        block.finish(layout, expected)
        assert sealed[codec] == expected.tobytes(), codec


def test_cuda_replayed_steps_equal_launched_ones(checkpoint):
    prompt = np.random.default_rng(4).integers(0, 131, 70)

    def run(model: CudaModel) -> np.ndarray:
        rows = [model.forward([Segment(slot, 0, prompt, TABLE + 2 * slot)]) for slot in range(2)]
        for position in range(70, 76):
            segments = [
                Segment(slot, position, np.array([position]), TABLE + 2 * slot) for slot in range(2)
            ]
            rows.append(model.forward(segments))
        return np.concatenate(rows)

    class NoGraphs(ShimDevice):
        def capture(self, work):
            raise RuntimeError("no graphs here")

    with closing(open_on_shim(checkpoint.folder, OPTIONS)) as model:
        assert model.graph_refusal is None
        expected = run(model)
    loaded = load_checkpoint(checkpoint.folder)
    with closing(CudaModel(loaded, OPTIONS, NoGraphs(), SPLITTING)) as model:
        assert model.graph_refusal == "RuntimeError: no graphs here"
        assert np.array_equal(run(model), expected)


def test_cuda_times_its_steps_and_fits_an_estimate(checkpoint):
    with closing(open_on_shim(checkpoint.folder, OPTIONS)) as model:
        model.forward([Segment(0, 0, np.zeros(70, np.int64), TABLE)])
        filled = model.last_step
        assert model.last_shape == StepShape(
            prefill_tokens=70,
            context_tokens=70 * 71 // 2,
            prefill_chunks=1,
            prefill_context=70,
            prefill_outputs=1,
        )
        assert filled.sealed_blocks == 1 and 0 < filled.seal_s < filled.total_s
        model.forward([Segment(0, 70, np.zeros(1, np.int64), TABLE)])
        assert model.last_step.seal_s == 0 and model.last_step.simulated_s is None
        guess = model.estimate()
        assert not guess.simulated and guess.seconds(model.last_shape) > 0
        assert model.device.kind == "measured"


def test_cuda_warm_up_leaves_no_trace_in_the_pool(checkpoint):
    with closing(open_on_shim(checkpoint.folder, OPTIONS)) as model:
        assert not model.pool.blocks.any() and not model.pool.tails.any()


class SmallDevice(ShimDevice):
    def describe(self):
        return DeviceFacts("small", "shim", free_bytes=1 << 20)


def test_cuda_pool_takes_a_share_of_the_memory_that_is_free(checkpoint):
    options = ModelOptions(num_slots=2, memory_fraction=0.25)
    with closing(CudaModel(load_checkpoint(checkpoint.folder), options, SmallDevice())) as model:
        layout = model.spec.layout
        assert model.pool.num_blocks == (1 << 18) // layout.block_bytes


def test_cuda_pool_that_does_not_fit_is_refused_with_the_sizes(checkpoint):
    loaded = load_checkpoint(checkpoint.folder)
    with pytest.raises(BackendUnavailable, match=r"1000 blocks.*1,048,576 are free; set workers"):
        CudaModel(loaded, replace(OPTIONS, num_blocks=1000), SmallDevice())


def test_cuda_refuses_a_runtime_that_fell_back_to_the_cpu(checkpoint):
    class Unseen(ShimDevice):
        place = Place("cuda")

    loaded = load_checkpoint(checkpoint.folder)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(BackendUnavailable, match=r"ONNX Runtime cannot use the GPU.*kvmesh\[cuda\]"),
    ):
        CudaModel(loaded, OPTIONS, Unseen())


def test_cuda_names_a_checkpoint_without_finite_values(checkpoint, monkeypatch):
    loaded = load_checkpoint(checkpoint.folder)
    monkeypatch.setattr(
        "kvmesh.backends.ort.rope_tables", lambda *_: [np.full((512, 32), np.inf, np.float32)] * 2
    )
    with pytest.raises(CheckpointError, match="no finite K and V"):
        CudaModel(loaded, OPTIONS, ShimDevice(), SPLITTING)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "both installed"),
        (("onnxruntime",), "the build without CUDA"),
        ((), "is not installed"),
        (("onnxruntime-gpu",), None),
    ],
)
def test_cuda_probe_tells_which_runtime_is_missing(installed, message, monkeypatch):
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda_backend, "_installed", lambda name: name in installed)
    reason = create_backend("cuda").probe()
    assert reason is None if message is None else message in str(reason)


def test_cuda_without_a_gpu_is_refused_with_the_next_step(monkeypatch):
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda: "no GPU is here; install one")
    with pytest.raises(BackendUnavailable, match="cuda: no GPU is here; install one"):
        open_model("cuda", Path("anywhere"), OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize(("codec", "bound"), [("fp32", 1e-4), ("k4v4", 5e-3)])
def test_gpu_says_the_same_as_the_cpu(codec, bound, checkpoint):
    reason = create_backend("cuda").probe()
    if reason is not None:
        pytest.skip(reason)
    prompt = np.random.default_rng(2).integers(0, 131, 120)
    options = replace(OPTIONS, codec=codec)
    with closing(open_model("cuda", checkpoint.folder, options)) as model:
        tokens, logits = greedy(model, prompt, 16)
        assert isinstance(model, CudaModel) and model.graph_refusal is None
    with closing(open_model("cpu", checkpoint.folder, options)) as model:
        expected, beside = greedy(model, prompt, 16)
    assert tokens == expected
    assert np.abs(logits - beside).max() <= bound * np.ptp(beside)


def test_a_gpu_of_a_simulated_family_runs_the_cuda_backend(checkpoint, monkeypatch):
    """blackwell, on a machine with a B200: measured times, at the price of its device file."""

    class B200(ShimDevice):
        def describe(self) -> DeviceFacts:
            return DeviceFacts("NVIDIA B200", "sm_100", free_bytes=1 << 30)

    monkeypatch.setattr(simulated_backend, "visible_gpus", lambda: ("100",))
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda_backend, "_runtime_reason", lambda: None)
    monkeypatch.setattr(cuda_backend, "CupyDevice", B200)
    prompt = np.random.default_rng(5).integers(0, 131, 3)
    with closing(open_model("blackwell", checkpoint.folder, OPTIONS)) as model:
        assert isinstance(model, CudaModel)
        tokens, _ = greedy(model, prompt, 2)
        assert not model.device.simulated and model.last_step.simulated_s is None
        assert model.device.price_per_hour == 1.95 and "[C]" in model.device.price_source
    rack = replace(OPTIONS, simulation=Simulation(count=2))
    with closing(open_model("blackwell", checkpoint.folder, rack)) as model:
        assert model.device.simulated and model.device.count == 2
        assert greedy(model, prompt, 2)[0] == tokens
