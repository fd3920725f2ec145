"""Reading checkpoint folders: what is found, and what is refused with which words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvmesh.backends.base import ModelOptions
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.centers import CENTERS_FILE, write_centers
from kvmesh.backends.models.config import RopeConfig, read_config
from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.backends.models.rope import inverse_frequencies
from kvmesh.backends.ort import SessionOptions, StagePipeline
from kvmesh.backends.registry import open_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 171,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 131,
}
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def config_of(tmp_path: Path, **fields: object):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return read_config(tmp_path)


def test_config_defaults(tmp_path):
    config = config_of(tmp_path)
    assert (config.num_kv_heads, config.head_dim) == (4, 32)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.eos_token_ids, config.bos_token_id, config.tied_head) == ((), None, False)


def test_end_tokens_of_both_files_in_order(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert config_of(tmp_path, eos_token_id=2).eos_token_ids == (2, 9)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_of_old_and_new_files(tmp_path, place):
    key = "type" if place == "rope_scaling" else "rope_type"
    config = config_of(tmp_path, rope_theta=500.0, **{place: {key: "linear", "factor": 2}})
    assert config.rope == RopeConfig(theta=500.0, kind="linear", factor=2.0)


def test_llama3_keeps_short_waves_and_slows_long_ones():
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    ratio = inverse_frequencies(RopeConfig(500000.0), 128) / inverse_frequencies(rope, 128)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8.0)
    assert (np.diff(ratio) >= -1e-12).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"architectures": ["OtherForCausalLM"]}, "'OtherForCausalLM' is not supported"),
        ({"architectures": None, "model_type": "other"}, "'other' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"hidden_size": 130}, "hidden_size 130 is not a multiple"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of .* 3"),
        ({"head_dim": 52}, "head_dim 52 is not supported"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_unsupported_config_is_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        config_of(tmp_path, **fields)
    assert "config.json" in str(caught.value)


def test_no_folder_no_config_no_json_no_weights(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder, left):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated"):
        load_checkpoint(folder)


def test_malformed_headers_are_refused(folder):
    for header in (b"[]", b"{]", b'{"a": {"dtype": "F32"}}', b'{"a": 3}'):
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="header"):
            load_checkpoint(folder)


def test_wrong_shape_dtype_or_missing_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].astype(np.float64)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{name} has dtype F64, supported: F32"):
        load_checkpoint(folder)
    save_file({**tensors, name: tensors[name][:, :-1].copy()}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(171, 127\)"):
        load_checkpoint(folder)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{name} .* is missing"):
        load_checkpoint(folder)


def test_index_without_its_file_or_tensor(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        load_checkpoint(folder)
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"tensor a of .* is missing"):
        load_checkpoint(folder)
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_checkpoint(folder)


def test_fingerprint_follows_weights_config_and_centers_but_not_files(folder):
    first = load_checkpoint(folder).fingerprint
    change_config(folder, eos_token_id=[5, 6], max_position_embeddings=64)
    tensors = load_file(folder / WEIGHTS)
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    assert load_checkpoint(folder).fingerprint == first
    seen = {first}
    change_config(folder, rms_norm_eps=1e-4)
    seen.add(load_checkpoint(folder).fingerprint)
    save_file({"centers": np.ones((2, 2, 2, 64), np.float32)}, folder / CENTERS_FILE)
    seen.add(load_checkpoint(folder).fingerprint)
    with (folder / "a.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    seen.add(load_checkpoint(folder).fingerprint)
    assert len(seen) == 4


def test_centers_are_read_and_checked(folder):
    assert not load_checkpoint(folder).centers.any()
    centers = np.random.default_rng(0).standard_normal((2, 2, 2, 64), np.float32)
    write_centers(folder, centers)
    assert np.array_equal(load_checkpoint(folder).centers, centers)
    for bad, message in (
        (centers[:1].copy(), "has shape"),
        (centers.astype(np.float16), "dtype F16"),
        (np.full_like(centers, np.nan), "not finite"),
    ):
        save_file({"centers": bad}, folder / CENTERS_FILE)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


def test_weights_behind_links_are_read_in_place(folder, tmp_path):
    """The layout of the Hugging Face cache: names are links to files kept elsewhere."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "0123abcd")
    (folder / WEIGHTS).symlink_to(blobs / "0123abcd")
    loaded = load_checkpoint(folder)
    stages = StagePipeline(loaded, 4, SessionOptions())
    stages.run(0, 4)
    assert stages.buffers.q.any()
    assert sum(len(loaded.stage(stage)) for stage in range(3)) < 10_000  # no weights inside


def test_open_reports_the_checkpoint_not_the_backend(folder):
    change_config(folder, hidden_act="gelu")
    with pytest.raises(CheckpointError, match="gelu"):
        open_model("auto", folder, ModelOptions(num_blocks=4))


def test_unknown_codec_is_named(folder):
    with pytest.raises(CheckpointError, match="k9v9"):
        open_model("cpu", folder, ModelOptions(codec="k9v9", num_blocks=4))


def test_biases_give_centers_when_no_file_does(biased):
    """K's against each position's rotation by transformers, then averaged; V's are the bias."""
    torch = pytest.importorskip("torch")
    loaded = load_checkpoint(biased.folder)
    model, config = biased.torch_model, loaded.config
    positions = torch.arange(config.max_context)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    for layer in range(config.num_layers):
        attention = model.model.layers[layer].self_attn
        bias = attention.k_proj.bias.detach().reshape(config.num_kv_heads, 1, config.head_dim)
        half = config.head_dim // 2
        turned = torch.cat((-bias[..., half:], bias[..., :half]), dim=-1)
        expected = (bias * cos + turned * sin).mean(dim=1).numpy()
        np.testing.assert_allclose(loaded.centers[layer, 0], expected, atol=1e-5)
        value = attention.v_proj.bias.detach().reshape(config.num_kv_heads, -1).numpy()
        np.testing.assert_allclose(loaded.centers[layer, 1], value, atol=1e-6)
    write_centers(biased.folder, np.zeros_like(loaded.centers))
    assert not load_checkpoint(biased.folder).centers.any()
