"""Writes a training checkpoint as a Hugging Face folder that any Llama loader can read."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from model import Mini, MiniConfig
from safetensors.torch import save_file
from tokenizer import SPECIAL
from train_mini import (
    BATCH_TOKENS,
    DEFAULT_TOKENIZER,
    KV_NOISE,
    LEARNING_RATE,
    NOISE_BEGIN,
    PHASES,
    SEED,
)

from kvmesh.integration.needle import TRAIN_SEED_BASE

BEGIN, END, PAD = SPECIAL.index("<|begin|>"), SPECIAL.index("<|end|>"), SPECIAL.index("<|pad|>")


def write(path: Path, content: dict[str, object]) -> None:
    """Writes a JSON file in one rename, so that no reader sees half of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(fresh, path)


def recipe(state: dict[str, object], model: Mini) -> dict[str, object]:
    """Describes how the weights came about."""
    return {
        "summary": "trained from scratch on generated text; see integration/training/README.md",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seed": SEED,
        "optimiser_steps": state["step"],
        "seconds_on_one_cpu_core": round(float(str(state["seconds"]))),
        "tokens_per_step": BATCH_TOKENS,
        "learning_rate": LEARNING_RATE,
        "kv_noise": KV_NOISE,
        "kv_noise_from_share": NOISE_BEGIN,
        "length_shares_from_share": [[begin, lengths] for begin, lengths in PHASES],
        "training_seeds_from": TRAIN_SEED_BASE,
        "trained_in": "bfloat16 products, float32 weights",
        "stored_as": "float16",
    }


def export(checkpoint: Path, folder: Path) -> None:
    """Writes the configuration, the weights, and training.json with no figures yet."""
    config = MiniConfig()
    model = Mini(config)
    state = torch.load(checkpoint)
    model.load_state_dict(state["model"])
    tokens = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    write(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **config.to_dict(),
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "tie_word_embeddings": True,
            "use_cache": True,
            "torch_dtype": "float16",
            **tokens,
        },
    )
    write(folder / "generation_config.json", {**tokens, "do_sample": False, "max_new_tokens": 64})
    weights = {
        name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()
    }
    fresh = folder / "model.safetensors.new"
    save_file(weights, fresh, metadata={"format": "pt"})
    fresh.chmod(0o644)
    os.replace(fresh, folder / "model.safetensors")
    write(folder / "training.json", {"recipe": recipe(state, model), "figures": []})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_TOKENIZER)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.folder)
