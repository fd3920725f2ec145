"""A row of a stage depends on that row alone, bit for bit, for any number of rows."""

import numpy as np
import pytest

from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.backends.ort import SessionOptions, StagePipeline

MOST = 512
COUNTS = [*range(1, 71), 100, 127, 128, 129, 255, 511]


def outputs(stages: StagePipeline, count: int, offset: int) -> list[np.ndarray]:
    """All that the stages compute for `count` rows that begin at `offset` of a fixed input."""
    rng = np.random.default_rng(0)
    stages.buffers.ids[:count] = rng.integers(0, 131, MOST)[offset : offset + count]
    stages.buffers.positions[:count, 0] = rng.integers(0, 512, MOST)[offset : offset + count]
    attention = rng.standard_normal((MOST, *stages.buffers.attention.shape[1:]), np.float32)
    found = []
    for stage in range(2):
        stages.run(stage, count)
        found += [
            each[:count].copy() for each in (stages.buffers.q, stages.buffers.k, stages.buffers.v)
        ]
        stages.buffers.attention[:count] = attention[offset : offset + count]
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_their_number(threads, each_checkpoint):
    loaded = load_checkpoint(each_checkpoint.folder)
    stages = StagePipeline(loaded, MOST, SessionOptions(threads))
    whole = outputs(stages, MOST, 0)
    for count in COUNTS:
        offset = (MOST - count) * 2 // 3
        for expected, found in zip(whole, outputs(stages, count, offset), strict=True):
            assert np.array_equal(found, expected[offset : offset + count]), count


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_do_not_depend_on_their_number(threads, each_checkpoint):
    loaded = load_checkpoint(each_checkpoint.folder)
    stages = StagePipeline(loaded, MOST, SessionOptions(threads))
    outputs(stages, MOST, 0)
    for stage in range(loaded.config.num_layers):
        stages.run(stage, MOST)
    whole = stages.logits(MOST, np.arange(MOST))
    for count in COUNTS:
        rows = np.random.default_rng(count).permutation(MOST)[:count]
        assert np.array_equal(stages.logits(MOST, rows), whole[rows]), count
