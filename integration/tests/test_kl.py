"""The decode path's KL: against torch's, against itself, and against a prefill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.backends.base import ModelOptions, Segment
from kvmesh.backends.registry import open_model
from kvmesh.integration.eval_plots import kl_bytes_plot, kl_position_plot
from kvmesh.integration.kl import (
    KlBench,
    Stored,
    bytes_per_token,
    compare,
    decode_steps,
    layer_bytes,
)
from kvmesh.integration.model_check import CheckPlan, check_model
from kvmesh.integration.prompts import PromptSet, load_sequences, read_texts
from kvmesh.kernels.layout import KvLayout
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError

MINI = checkpoint_path(ModelConfig())


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Of different lengths, one too short to be compared."""
    made = PromptSet(MINI).bundled(400, 256)
    return [made[0][:150], made[1][:131], made[0][:40], made[1][10:110]]


@pytest.fixture(scope="module")
def bench(sequences: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> KlBench:
    return KlBench("cpu", MINI, sequences, tmp_path_factory.mktemp("kl"))


def test_kl_and_agreement_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 8, (2, 50, 301)).astype(np.float32)
    second[:10] = first[:10]
    second[10] = first[10] + 700  # the same distribution
    kl, same = compare(first, second)
    logs = [torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (first, second)]
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none")
    np.testing.assert_allclose(kl, expected.sum(-1).clamp(min=0).numpy(), rtol=1e-9, atol=1e-12)
    assert same[:11].all() and same.tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()


def test_steps_feed_every_token_alone_in_its_place(sequences: list[list[int]]) -> None:
    """And their logits are those of a prefill, which is the same computation by law."""
    options = ModelOptions(codec="k4v4", num_blocks=6, num_slots=2, max_step_tokens=256)
    model = open_model("cpu", MINI, options)
    try:
        fed: list[tuple[int, int]] = []
        last: dict[int, Any] = {}
        for places, logits in decode_steps(model, sequences):
            assert len(places) <= 2
            fed += places
            last |= {s: row.copy() for (s, _), row in zip(places, logits, strict=True)}
        assert sorted(fed) == [(s, p) for s, ids in enumerate(sequences) for p in range(len(ids))]
        for s, ids in enumerate(sequences):
            whole = Segment(0, 0, np.array(ids), np.arange(3, dtype=np.int32))
            assert np.array_equal(model.forward([whole])[0], last[s])
    finally:
        model.close()


def test_fp16_differs_from_itself_nowhere_and_fewer_bits_differ_more(bench: KlBench) -> None:
    assert bench.num_tokens == 150 + 131 + 100
    assert bench.num_positions == bench.num_tokens - 3 * 64
    found = {codec: bench.measure(Stored(codec)) for codec in ("fp16", "k8v8", "k4v4", "k2v2")}
    losses = {codec: one.loss() for codec, one in found.items()}
    assert losses["fp16"].kl_nats == 0 and losses["fp16"].top1 == 1
    kl = [loss.kl_nats for loss in losses.values()]
    assert kl == sorted(kl) and len(set(kl)) == len(kl)
    lossy = found["k2v2"]
    assert [p for p, _ in lossy.by_block()] == [64, 128]
    lengths = (150 - 64, 131 - 64, 100 - 64)
    means = [mean * n for mean, n in zip(lossy.by_sequence(), lengths, strict=True)]
    assert sum(means) / sum(lengths) == pytest.approx(losses["k2v2"].kl_nats)
    for plot in (kl_position_plot("mini", found), kl_bytes_plot("mini", losses)):
        assert "k2v2" in plot and "fp16<" not in plot


def test_bytes_are_those_of_the_planes() -> None:
    layout = KvLayout(2, 4, 64, "k4v4", bytes(16), ("k4v4", "k8v8"))
    # 4 heads of 64 dims: K and V at 4 bits and two fp16 scales; at 8 bits in the second layer.
    assert layer_bytes(layout) == [4 * (64 + 4), 4 * (128 + 4)]
    assert bytes_per_token(layout) == sum(layer_bytes(layout))


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than 64 tokens"):
        KlBench("cpu", MINI, [list(range(64))], tmp_path)


def test_the_check_finds_an_assignment_that_holds_and_costs_less(bench: KlBench) -> None:
    plan = CheckPlan("mini", "test", ("k2v2",), budget_nats=0.01)
    steps: list[int] = []
    found = check_model(bench, plan, 4, steps.append)
    assert sum(steps) <= plan.num_measurements(4) * bench.num_tokens
    assert found.chosen.kl_nats <= plan.budget_nats
    again = bench.measure(Stored("fp16", found.layer_codecs)).loss()
    assert again == found.chosen
    under = [loss for loss in found.uniform.values() if loss.kl_nats <= plan.budget_nats]
    assert found.chosen.bytes_per_token <= min(loss.bytes_per_token for loss in under)
    assert found.fingerprint == bench.fingerprint.hex() and len(found.layers["k2v2"]) == 4
    assert found.layers["fp16"] == (0.0,) * 4


def test_prompts_are_bounded_and_the_same_each_time() -> None:
    made = load_sequences(MINI, None, 2000, 300)
    assert made == load_sequences(MINI, None, 2000, 300)
    assert all(64 < len(ids) <= 300 for ids in made)
    assert 2000 <= sum(map(len, made)) < 2300


def test_prompts_from_a_file(tmp_path: Path) -> None:
    text = "The old farmer sits near the river. " * 20
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text(f"{text}\n\nshort\n\n{text}")
    lines.write_text(f'{{"text": "{text}"}}\n"{text}"\n\n')
    assert len(read_texts(plain)) == 3 and len(read_texts(lines)) == 2
    first, second = (load_sequences(MINI, path, 10_000, 128) for path in (plain, lines))
    assert first == second and len(first) >= 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "short", "no text of more than 64 tokens"),
        ("a.jsonl", '"x"\n{', "line 2: is not JSON"),
        ("a.jsonl", '{"texts": 1}', 'line 1: must be a text or an object with "text"'),
        ("absent.txt", None, "cannot read"),
    ],
)
def test_a_file_that_is_no_prompts_is_named(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name) as caught:
        load_sequences(MINI, tmp_path / name, 1000, 128)
    assert said in str(caught.value)
