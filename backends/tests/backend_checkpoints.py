"""Random Llama checkpoints, small enough to make in a test."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Variant:
    """What sets one random checkpoint apart from another."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS = (
    Variant(
        "tied_gqa2_d64",
        {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    Variant(
        "untied_gqa1_d32_llama3_sharded",
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "num_hidden_layers": 3,
            "rope_parameters": LLAMA3_SCALING,
            "attention_bias": True,
        },
        shard_size="60KB",
    ),
    Variant(
        "untied_gqa4_d128_bf16",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
        dtype=torch.bfloat16,
    ),
)

_COMMON = {
    "vocab_size": 131,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def make_checkpoint(folder: Path, variant: Variant, seed: int = 0) -> LlamaForCausalLM:
    """Writes the checkpoint and returns the same model in float32, for comparison."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**_COMMON, **variant.fields}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))
    model.to(variant.dtype)
    model.save_pretrained(folder, max_shard_size=variant.shard_size)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
