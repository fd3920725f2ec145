"""One codec per layer: what a layout is called, what is refused, and that each has its own."""

from typing import Any

import numpy as np
import pytest

from kvmesh.backends.base import Segment
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.spec import base_codec
from kvmesh.backends.registry import list_backends

BACKENDS = [name for name, reason in list_backends().items() if reason is None]


def logits_after(model: Any, ids: np.ndarray) -> np.ndarray:
    table = np.arange(8, dtype=np.int32)
    logits: np.ndarray = model.forward([Segment(0, 0, ids, table)])
    return logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_layer_is_stored_with_its_own_codec(backend, checkpoint, open_on) -> None:
    ids = np.random.default_rng(5).integers(0, checkpoint.vocab_size, 200)
    ways: dict[str, dict[str, Any]] = {
        "fp16": {"codec": "fp16"},
        "k2v2": {"codec": "k2v2"},
        "both k2v2": {"codec": "k8v8", "layer_codecs": ("k2v2", "k2v2")},
        "first": {"layer_codecs": ("k2v2", "fp16")},
        "last": {"layer_codecs": ("fp16", "k2v2")},
    }
    models = {name: open_on(backend, checkpoint.folder, **way) for name, way in ways.items()}
    logits = {name: logits_after(model, ids) for name, model in models.items()}
    labels = {name: model.spec.layout.codec_label for name, model in models.items()}
    assert labels["both k2v2"] == "k2v2"
    assert np.array_equal(logits["both k2v2"], logits["k2v2"])
    assert len({labels[name] for name in ("fp16", "k2v2", "first", "last")}) == 4
    for one in ("first", "last"):
        for other in ("fp16", "k2v2"):
            assert not np.array_equal(logits[one], logits[other])
    assert models["first"].spec.layout.block_bytes == models["last"].spec.layout.block_bytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_codecs": ("k4v4",)}, "layer_codecs has 1 codecs, must have 2"),
        ({"layer_codecs": ("k4v4", "k9v9")}, "k9v9"),
    ],
)
def test_codecs_that_do_not_fit_are_refused(backend, options, said, checkpoint, open_on) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_on(backend, checkpoint.folder, **options)


def test_equal_assignments_have_equal_names() -> None:
    codecs = ("k3v3", "k8v8", "k3v3", "k4v4")
    assert {base_codec(name, codecs) for name in ("k4v4", "k8v8", "fp16")} == {"k3v3"}
    assert base_codec("k4v4", ()) == "k4v4"
    assert base_codec("k4v4", ("k8v8", "k3v3")) == "k8v8"
