"""Shapes of published models against the totals that their makers state."""

import json
from pathlib import Path

import pytest

from kvmesh.backends.architectures import load_shape, shape_names
from kvmesh.backends.errors import CheckpointError, ShapeError
from kvmesh.kernels.layout import KvLayout

# name: total and active parameters in billions, KV elements per token over all layers.
PUBLISHED = {
    "llama-3.1-8b": (8.030, 7.505, 65_536),
    "llama-3.1-70b": (70.554, 69.503, 163_840),
    "llama-3.1-405b": (405.853, 403.752, 258_048),
    "llama-2-70b": (68.977, 68.715, 163_840),
    "llama-2-7b": (6.738, 6.607, 262_144),
    "mistral-7b": (7.242, 7.111, 65_536),
    "mixtral-8x7b": (46.703, 12.749, 65_536),
    "deepseek-v3": (671.03, 36.63, 35_136),
    "deepseek-r1": (671.03, 36.63, 35_136),
    "kimi-k2": (1026.4, 31.69, 35_136),
    "gpt-oss-120b": (116.83, 5.133, 36_864),
    "gpt-oss-20b": (20.915, 3.608, 24_576),
    "qwen3-8b": (8.191, 7.568, 73_728),
    "qwen3-32b": (32.762, 31.984, 131_072),
    "qwen3-30b-a3b": (30.532, 3.042, 49_152),
    "qwen3-235b-a22b": (235.09, 21.57, 96_256),
    "gemma-2-2b": (2.614, 2.614, 53_248),
    "gemma-2-9b": (9.242, 9.242, 172_032),
    "gemma-2-27b": (27.227, 27.227, 188_416),
    "gemma-3-1b": (1.000, 1.000, 13_312),
    "gemma-3-4b": (3.880, 3.880, 69_632),
    "gemma-3-12b": (11.766, 11.766, 196_608),
    "gemma-3-27b": (27.009, 27.009, 253_952),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals(name: str):
    total, active, kv = PUBLISHED[name]
    shape = load_shape(name)
    assert shape.total_parameters / 1e9 == pytest.approx(total, rel=2.5e-4)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=5e-4)
    assert shape.kv_elements_per_token == kv


def test_multi_token_prediction_counts_beside_the_model():
    shape = load_shape("deepseek-v3")
    assert shape.mtp_parameters / 1e9 == pytest.approx(11.6, abs=0.05)
    assert shape.mtp_active_parameters / 1e9 == pytest.approx(0.69, abs=0.005)
    assert shape.attention_elements / 1e6 == pytest.approx(187.1, abs=0.05)


def test_weight_bytes_by_format():
    shape = load_shape("llama-3.1-8b")
    assert shape.weight_bytes("bf16") == 2 * shape.total_parameters
    # 32 x (q, k, v, o and three FFN matrices); embedding and head stay at two bytes.
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = shape.total_parameters - matrices
    assert shape.weight_bytes("nvfp4") == matrices * 0.5625 + 2 * rest
    assert shape.weight_bytes("fp8_block") == matrices * (1 + 4 / 16384) + 2 * rest
    attention = 32 * (4096 * 6144 + 4096 * 4096)
    mixed = (matrices - attention) * 0.5625 + attention + 2 * rest
    assert shape.weight_bytes("nvfp4", attention="fp8") == mixed


def test_kv_bytes_have_the_side_information_of_a_real_block():
    shape = load_shape("llama-3.1-8b")
    assert shape.kv_bytes_per_token("fp8") == 65_536
    assert shape.kv_bytes_per_token("fp16") == 131_072 + 2
    for codec in ("k8v8", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2"):
        block = KvLayout(32, 8, 128, codec, bytes(16)).block_bytes
        assert 64 * shape.kv_bytes_per_token(codec) == block
    # 32 layers x 8 heads x (64 + 64 bytes of codes, two scales of 2 bytes), frame 128 / 64.
    assert shape.kv_bytes_per_token("k4v4") == 32 * 8 * (64 + 64 + 4) + 2


def test_latents_are_kept_once_for_key_and_value():
    shape = load_shape("deepseek-r1")
    assert shape.kv_bytes_per_token("fp8") == 61 * 576
    # 512 as two vectors of 256 and 64 rotary elements, at 4 bits, with three scales of 2 bytes.
    assert shape.kv_layer_bytes("k4v4") == 576 / 2 + 3 * 2
    assert shape.kv_layer_bytes("k4v3") == shape.kv_layer_bytes("k4v4")


def test_windowed_layers_stop_growing():
    shape = load_shape("gpt-oss-120b")
    assert shape.window_layers == 18
    layer = 2 * 8 * 64
    assert shape.kv_bytes(100, "fp8") == 36 * 100 * layer
    assert shape.kv_bytes(1000, "fp8") == 18 * (1000 + 128) * layer
    assert load_shape("gemma-3-27b").window_layers == 62 - 10
    assert load_shape("mistral-7b-v0.1").window_layers == 32
    assert load_shape("mistral-7b-v0.1").kv_bytes(10_000, "fp8") == 32 * 4096 * 2 * 8 * 128


def test_the_bundled_model_and_any_config():
    mini = load_shape("mini")
    assert "mini" in shape_names()
    layer = 256 * (8 + 2 * 4) * 64 + 8 * 64 * 256 + 3 * 256 * 384 + 2 * 256
    assert mini.total_parameters == 4 * layer + 256 + 1088 * 256


def write(folder: Path, **fields: object) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_families_of_config_json(tmp_path: Path):
    deepseek = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168,
        "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128,
        "vocab_size": 129280, "intermediate_size": 18432, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    read, known = load_shape(write(tmp_path, **deepseek)), load_shape("deepseek-r1")
    assert read.total_parameters == known.total_parameters
    assert read.mtp_parameters == known.mtp_parameters
    gemma = {
        "model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "vocab_size": 262144, "intermediate_size": 21504, "sliding_window": 1024,
        },
    }  # fmt: skip
    read = load_shape(write(tmp_path, **gemma))
    assert read.total_parameters == load_shape("gemma-3-27b").total_parameters
    assert read.window_layers == 52
    gpt = {
        "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088,
        "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4,
        "attention_bias": True, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    }  # fmt: skip
    read = load_shape(write(tmp_path, **gpt))
    assert read.total_parameters == load_shape("gpt-oss-120b").total_parameters
    assert read.window_layers == 18


def test_errors_name_the_field(tmp_path: Path):
    with pytest.raises(ShapeError, match=r"did you mean 'llama-3.1-8b'"):
        load_shape("llama-3.1-8")
    with pytest.raises(ShapeError, match=r"model_type is 'mamba'"):
        load_shape(write(tmp_path, model_type="mamba"))
    with pytest.raises(ShapeError, match=r"num_hidden_layers is missing"):
        load_shape(write(tmp_path, model_type="llama", hidden_size=8, num_attention_heads=2))
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        load_shape(str(tmp_path / "none" / "config.json"))
    file = tmp_path / "odd.toml"
    sizes = "layers = -1\nhidden = 64\nheads = 3\nkv_heads = 2\nhead_dim = 64\nvocab = 9\nffn = 8\n"
    file.write_text(sizes)
    with pytest.raises(ShapeError, match=r"layers is -1: Input should be greater than or equal"):
        load_shape(str(file))
    file.write_text(sizes.replace("-1", "1") + "depth = 2\n")
    with pytest.raises(ShapeError, match=r"depth is not a field"):
        load_shape(str(file))
    file.write_text(sizes.replace("-1", "1"))
    with pytest.raises(ShapeError, match=r"heads is 3, must be a multiple of 2"):
        load_shape(str(file))
