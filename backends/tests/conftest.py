"""Random Llama checkpoints, small enough to make in a test run, and the same model in torch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import SHIM, open_anywhere

from kvmesh.backends.base import Model, ModelOptions

try:
    import torch
    import transformers
except ImportError:
    torch = None  # type: ignore[assignment]  # the reference needs it; the product does not


@dataclass(frozen=True)
class Variant:
    """What sets one random checkpoint apart from another."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    shard_size: str = "1GB"


COMMON = {
    "vocab_size": 131,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
TIED_GQA2 = Variant(
    "tied_gqa2_d64",
    {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
)
SHARDED_LLAMA3 = Variant(
    "untied_gqa1_d32_llama3_bias_sharded",
    {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    shard_size="60KB",
)
BF16_LINEAR = Variant(
    "untied_gqa4_d128_linear_bf16",
    {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
    },
    dtype="bfloat16",
)
VARIANTS = (TIED_GQA2, SHARDED_LLAMA3, BF16_LINEAR)


@dataclass(frozen=True)
class RandomCheckpoint:
    folder: Path
    torch_model: Any  # transformers.LlamaForCausalLM
    vocab_size: int = int(str(COMMON["vocab_size"]))

    def reference(self, ids: np.ndarray) -> np.ndarray:
        """fp32 [tokens, vocab]: logits after every token, by transformers."""
        with torch.no_grad():
            logits: np.ndarray = self.torch_model(torch.from_numpy(ids)[None]).logits[0].numpy()
        return logits


def make_checkpoint(folder: Path, variant: Variant) -> RandomCheckpoint:
    if torch is None:
        pytest.skip("torch is not installed here: nothing to compare with")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**COMMON, **variant.fields})
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))
    model.to(getattr(torch, variant.dtype)).save_pretrained(
        folder, max_shard_size=variant.shard_size
    )
    # Read back, as narrowing the model in place also narrows its rotary tables.
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return RandomCheckpoint(folder, loaded.eval())


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda variant: variant.name)
def each_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> RandomCheckpoint:
    """Every variant in turn."""
    variant: Variant = request.param
    return make_checkpoint(tmp_path_factory.mktemp("each") / variant.name, variant)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> RandomCheckpoint:
    """One variant, not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("one") / TIED_GQA2.name, TIED_GQA2)


@pytest.fixture
def biased(tmp_path: Path) -> RandomCheckpoint:
    """One whose projections have biases; the test may change it."""
    return make_checkpoint(tmp_path / SHARDED_LLAMA3.name, SHARDED_LLAMA3)


Open = Callable[..., Model]


@pytest.fixture
def open_on() -> Iterator[Open]:
    """open_on(backend, folder, **options): a small model that is closed after the test."""
    with ExitStack() as stack:

        def open_small(backend: str, folder: Path, **options: Any) -> Model:
            small = ModelOptions(**{"num_blocks": 64, "num_slots": 16, **options})
            return stack.enter_context(closing(open_anywhere(backend, folder, small)))

        yield open_small


# Tests of many steps take long where one CUDA thread runs after the other: there, each has a few of
# its (variant, codec) pairs. Kernels and codecs have tests of their own beside the kernels.
ON_SHIM = {
    "test_same_logits_as_transformers": ((TIED_GQA2, "fp32"), (BF16_LINEAR, "fp16")),
    "test_cuts_of_the_prompt_change_nothing": ((TIED_GQA2, "k4v4"),),
    "test_company_in_the_batch_changes_nothing": ((BF16_LINEAR, "k4v4"),),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _wanted(item)]


def _wanted(item: pytest.Item) -> bool:
    params = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    if params.get("backend") != SHIM:
        return True
    pairs = ON_SHIM.get(getattr(item, "originalname", ""))
    return pairs is None or (params["each_checkpoint"], params["codec"]) in pairs
