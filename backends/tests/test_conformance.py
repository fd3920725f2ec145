"""What every backend must do, measured against transformers and against itself.

A backend that is listed and runs on this machine is tested; nothing here knows which one it is.
"""

import numpy as np
import pytest
from cuda_on_cpu import SHIM

from kvmesh.backends.base import Model, Segment
from kvmesh.backends.registry import list_backends
from kvmesh.kernels.errors import BlockError

ON_GPU = ("cuda",)
BACKENDS = [
    *(name for name, reason in list_backends().items() if reason is None and name not in ON_GPU),
    SHIM,
    *(
        pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)])
        for name, reason in list_backends().items()
        if name in ON_GPU
    ),
]
CODECS = ["fp32", "fp16", "k4v4"]
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2}  # of the range of the logits
ODD_CUTS = [1, 2, 65, 67, 100, 127, 128, 129]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def random_ids(count: int, seed: int = 0, vocab: int = 131) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count)


def table(first: int, count: int = 6) -> np.ndarray:
    """Block ids that are neither in order nor starting at zero."""
    return np.arange(first + count, first, -1, dtype=np.int32)


class Sequence:
    """One sequence on a model: knows where it is, and makes its next segment."""

    def __init__(self, ids: np.ndarray, slot: int, first_block: int = 0, start: int = 0) -> None:
        self.ids, self.slot, self.start = ids, slot, start
        self.table = table(first_block)

    def take(self, count: int, want_logits: bool = True) -> Segment:
        ids = self.ids[self.start : self.start + count]
        segment = Segment(self.slot, self.start, ids, self.table, want_logits)
        self.start += count
        return segment


def run(model: Model, sequence: Sequence, ends: list[int]) -> np.ndarray:
    """fp32 [len(ends), vocab]: logits after each of the positions, one forward for each."""
    steps = [sequence.take(end - sequence.start) for end in ends]
    return np.concatenate([model.forward([step]) for step in steps])


@pytest.mark.parametrize("codec", sorted(TOLERANCE))
def test_same_logits_as_transformers(backend, codec, each_checkpoint, open_on):
    ids = random_ids(264)
    reference = each_checkpoint.reference(ids)
    bound = TOLERANCE[codec] * np.ptp(reference)
    model = open_on(backend, each_checkpoint.folder, codec=codec)
    ways = {
        "prefill": [200],
        "chunked prefill, then decode": [7, 64, 77, 131, 199, *range(200, 265)],
    }
    for slot, (way, ends) in enumerate(ways.items()):
        logits = run(model, Sequence(ids, slot, 10 * slot), ends)
        assert np.abs(logits - reference[np.array(ends) - 1]).max() <= bound, way


@pytest.mark.parametrize("codec", CODECS)
def test_cuts_of_the_prompt_change_nothing(backend, codec, each_checkpoint, open_on):
    ids = random_ids(201)
    model = open_on(backend, each_checkpoint.folder, codec=codec)
    whole, cut, single = (Sequence(ids, slot, 10 * slot) for slot in range(3))
    expected = run(model, whole, [200, 201])
    assert np.array_equal(run(model, cut, [*ODD_CUTS, 200, 201])[-2:], expected)
    assert np.array_equal(run(model, single, list(range(1, 202)))[-2:], expected)
    for block in range(3):
        first = model.pool.export_block(int(whole.table[block]))
        assert model.pool.export_block(int(cut.table[block])) == first
        assert model.pool.export_block(int(single.table[block])) == first
    for sequence in (cut, single):
        assert model.pool.export_tail(sequence.slot, 9) == model.pool.export_tail(whole.slot, 9)


@pytest.mark.parametrize("codec", CODECS)
def test_company_in_the_batch_changes_nothing(backend, codec, each_checkpoint, open_on):
    prompts = [random_ids(count + 20, seed=count) for count in (1, 3, 63, 64, 65, 100, 130, 180)]
    alone = open_on(backend, each_checkpoint.folder, codec=codec, num_blocks=128)
    together = open_on(
        backend, each_checkpoint.folder, codec=codec, num_blocks=128, max_step_tokens=1024
    )
    expected, batches = [], []
    for slot, ids in enumerate(prompts):
        prompt = len(ids) - 20
        expected.append(run(alone, Sequence(ids, slot, 10 * slot), [*range(prompt, len(ids))]))
    sequences = [Sequence(ids, 15 - slot, 10 * slot) for slot, ids in enumerate(prompts)]
    batches.append(together.forward([each.take(len(each.ids) - 20) for each in sequences]))
    for _ in range(19):
        batches.append(together.forward([each.take(1) for each in sequences]))
    assert np.array_equal(np.stack(batches, axis=1), np.stack(expected))


def test_prefill_and_decode_share_a_step(backend, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder)
    ids = random_ids(150)
    expected = run(model, Sequence(ids, 0), [100, 101, 102])
    runner, arrival = Sequence(ids, 1, 20), Sequence(random_ids(90, seed=9), 2, 30)
    model.forward([runner.take(100)])
    for row, count in ((1, 50), (2, 40)):
        mixed = model.forward([arrival.take(count), runner.take(1)])
        assert np.array_equal(mixed[1], expected[row])


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_and_tail_move_to_another_instance(backend, codec, checkpoint, open_on):
    ids = random_ids(200)
    there = open_on(backend, checkpoint.folder, codec=codec)
    here = open_on(backend, checkpoint.folder, codec=codec)
    origin, moved = Sequence(ids, 3, 5), Sequence(ids, 7, 40, start=150)
    there.forward([origin.take(150, want_logits=False)])
    for source, target in zip(origin.table[:2], moved.table[:2], strict=True):
        here.pool.import_block(int(target), there.pool.export_block(int(source)))
    here.pool.import_tail(moved.slot, 22, there.pool.export_tail(origin.slot, 22))
    ends = list(range(151, 201))
    assert np.array_equal(run(here, moved, ends), run(there, origin, ends))


@pytest.mark.parametrize("codec", CODECS)
def test_bad_block_is_refused_and_not_copied(backend, codec, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder, codec=codec)
    sequence = Sequence(random_ids(64), 0)
    model.forward([sequence.take(64)])
    good = model.pool.export_block(int(sequence.table[0]))
    model.pool.import_block(40, good)
    for at in (0, 9, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(BlockError):
            model.pool.import_block(40, bytes(bad))
    with pytest.raises(BlockError):
        model.pool.import_block(40, good[:-1])
    assert model.pool.export_block(40) == good
    model.pool.verify_block(40)
    with pytest.raises(BlockError):
        model.pool.verify_block(41)  # never sealed


def test_block_of_another_model_is_refused(backend, checkpoint, each_checkpoint, open_on):
    if each_checkpoint.folder.name == checkpoint.folder.name:
        pytest.skip("the same weights")
    origin = open_on(backend, each_checkpoint.folder)
    origin.forward([Sequence(random_ids(64), 0).take(64)])
    with pytest.raises(BlockError):
        open_on(backend, checkpoint.folder).pool.import_block(
            0, origin.pool.export_block(int(table(0)[0]))
        )


def test_bad_tail_is_refused(backend, checkpoint, open_on):
    pool = open_on(backend, checkpoint.folder).pool
    tail = pool.export_tail(0, 5)
    with pytest.raises(BlockError, match="takes"):
        pool.import_tail(0, 6, tail)
    with pytest.raises(ValueError, match="slot 16"):
        pool.import_tail(16, 5, tail)


def test_only_wanted_rows_come_back_in_order(backend, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder)
    sequences = [Sequence(random_ids(30, seed), seed, 10 * seed) for seed in range(3)]
    expected = [run(model, Sequence(each.ids, 5, 45), [30])[0] for each in sequences]
    wants = [True, False, True]
    logits = model.forward(
        [each.take(30, want) for each, want in zip(sequences, wants, strict=True)]
    )
    assert logits.shape == (2, model.spec.vocab_size) and logits.dtype == np.float32
    assert np.array_equal(logits, [expected[0], expected[2]])


def test_no_wanted_rows_gives_an_empty_result(backend, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder)
    logits = model.forward([Sequence(random_ids(5), 0).take(5, want_logits=False)])
    assert logits.shape == (0, model.spec.vocab_size)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least one segment"),
        ([Segment(0, 0, np.array([131]), table(0))], r"token id 131 is not in \[0, 131\)"),
        ([Segment(0, 0, np.array([-1]), table(0))], "token id -1"),
        ([Segment(0, 0, np.array([], np.int64), table(0))], "no tokens"),
        ([Segment(0, 511, np.array([1, 2]), table(0, 9))], "context is 512"),
        ([Segment(0, -1, np.array([1]), table(0))], "context is 512"),
        ([Segment(16, 0, np.array([1]), table(0))], "slot 16"),
        ([Segment(0, 64, np.array([1]), table(0, 1))], "1 entries, 65 tokens need 2"),
        ([Segment(0, 63, np.array([1]), table(63))], "block id 69"),
        ([Segment(1, 0, np.array([1]), table(0))] * 2, "slot 1 is in two segments"),
        ([Segment(0, 0, np.ones(301, np.int64), table(0))], "301 tokens is over the limit of 300"),
    ],
)
def test_broken_segments_are_refused(backend, segments, message, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder, max_step_tokens=300)
    with pytest.raises(ValueError, match=message):
        model.forward(segments)


def test_spec_device_and_estimate(backend, checkpoint, open_on):
    model = open_on(backend, checkpoint.folder)
    spec, device = model.spec, model.device
    assert (spec.vocab_size, spec.max_context, spec.eos_token_ids) == (131, 512, (2,))
    assert spec.bos_token_id == 1 and len(spec.layout.fingerprint) == 16
    assert device.name and model.estimate().simulated == device.simulated
    assert model.pool.layout == spec.layout
    model.close()
    model.close()
