"""A worker with a real, tiny random checkpoint on the CPU backend, against itself and torch."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cuda_on_cpu import SHIM, open_anywhere
from worker_harness import attached, settled, shard, worker

from kvmesh.backends.base import Model, ModelOptions
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.codec_check import BLOCK_FORMAT, CODEC_FILE, CodecCheck, write_check
from kvmesh.backends.registry import open_model
from kvmesh.services.common.config import MeshConfig, ModelConfig, WorkerConfig
from kvmesh.services.kvcache.keys import block_keys
from kvmesh.services.worker.messages import Receipt, block_format, to_work
from kvmesh.services.worker.service import open_configured
from kvmesh.v1 import worker_pb2

PROMPTS = [np.random.default_rng(i).integers(3, 120, 30 + 45 * i).tolist() for i in range(5)]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 12, "max_tokens": 40, "ignore_eos": True}
GREEDY = {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "tiny"
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=["cpu", SHIM])
def opened(folder: Path, request: pytest.FixtureRequest) -> Iterator[list[Model]]:
    """Two models of the same checkpoint, with blocks for few sequences at once."""
    options = ModelOptions(codec="k4v4", num_blocks=12, num_slots=4)
    with (
        closing(open_anywhere(request.param, folder, options)) as one,
        closing(open_anywhere(request.param, folder, options)) as two,
    ):
        yield [one, two]


async def test_tokens_are_the_same_alone_together_cached_and_handed_over(
    opened: list[Model],
) -> None:
    async with (
        shard() as (_, shard_address),
        worker(opened[0], slots=4, prefill_chunk=37) as (one, one_address),
        worker(opened[1], slots=4, prefill_chunk=200) as (two, two_address),
        attached(one_address) as first,
        attached(two_address) as second,
    ):
        for i, prompt in enumerate(PROMPTS):  # one at a time
            await first.submit(f"alone {i}", prompt, sampling=SAMPLED)
            await first.end_of(f"alone {i}")
        for i, prompt in enumerate(PROMPTS):  # all at once, with prefix hits and pre-emption
            await first.submit(f"again {i}", prompt, sampling=SAMPLED)
        shards = [shard_address]
        for i, prompt in enumerate(PROMPTS):
            await first.end_of(f"again {i}")
            await first.submit(
                f"over {i}", prompt, sampling=SAMPLED, prefill_only=True, shard_addresses=shards
            )
            await first.end_of(f"over {i}")
            await second.submit(
                f"over {i}", prompt + first.tokens[f"over {i}"], num_prompt_tokens=len(prompt),
                sampling=SAMPLED, tail_address=one_address, shard_addresses=shards,
            )  # fmt: skip
            await second.end_of(f"over {i}")
            alone = first.tokens[f"alone {i}"]
            assert len(alone) == 40
            assert first.tokens[f"again {i}"] == alone, i
            assert first.tokens[f"over {i}"] + second.tokens[f"over {i}"] == alone, i
            assert second.updates[f"over {i}"][0].cached_tokens > 0
        await settled(one)
        await settled(two)


async def test_exact_blocks_say_what_torch_says(folder: Path) -> None:
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = ModelOptions(codec="fp32", num_blocks=12, num_slots=4)
    with closing(open_model("cpu", folder, options)) as model:
        async with worker(model, slots=4) as (_, address), attached(address) as router:
            for i, prompt in enumerate(PROMPTS[:3]):
                await router.submit(str(i), prompt, sampling=GREEDY)
            for i, prompt in enumerate(PROMPTS[:3]):
                await router.end_of(str(i))
                with torch.no_grad():
                    tokens = reference.generate(
                        torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
                        eos_token_id=None, pad_token_id=0,
                    )  # fmt: skip
                assert router.tokens[str(i)] == tokens[0, len(prompt) :].tolist(), i


def check_of(fingerprint: bytes, layer_codecs: tuple[str, ...]) -> CodecCheck:
    loss = {"kl_nats": 0.0, "kl_p99_nats": 0.0, "top1": 1.0, "bytes_per_token": 1}
    return CodecCheck.model_validate(
        {
            "model": "tiny",
            "fingerprint": fingerprint.hex(),
            "block_format": BLOCK_FORMAT,
            "prompts": "test",
            "positions": 1,
            "budget_nats": 0.01,
            "codec": "k4v4",
            "layer_codecs": layer_codecs,
            "chosen": loss,
            "uniform": {},
            "layers": {},
        }
    )


def test_the_codec_check_beside_the_checkpoint_is_used(
    folder: Path, opened: list[Model], tmp_path: Path
) -> None:
    """Or refused, if it is of another model; and its blocks have keys of their own."""
    fingerprint = opened[0].spec.layout.fingerprint
    file = tmp_path / CODEC_FILE
    config = MeshConfig(model=ModelConfig(name="tiny", path=folder, codec_check=file))
    settings = WorkerConfig(blocks=12, slots=4)
    write_check(file, check_of(fingerprint, ("k8v8", "k3v3")))
    with closing(open_configured(config, settings)) as model:
        assert model.spec.layout.codec_label == "k8v8+1:k3v3"
        submit = worker_pb2.Submit(request_id="r", token_ids=range(3, 70), num_prompt_tokens=67)
        keys = [
            block_keys(to_work(submit, each.spec, Receipt(1, 0.0, ())).root, submit.token_ids)
            for each in (model, opened[0])
        ]
        assert keys[0] != keys[1]
        assert block_format(model.spec.layout).codec == "k8v8+1:k3v3"
    write_check(file, check_of(b"x" * 16, ("k8v8", "k3v3")))
    with pytest.raises(CheckpointError, match=f"fingerprint {(b'x' * 16).hex()}"):
        open_configured(config, settings)
    write_check(file, check_of(fingerprint, ("k8v8",) * 3))
    with pytest.raises(CheckpointError, match=f"must have 2; codecs are from {file}"):
        open_configured(config, settings)


def test_a_model_that_was_never_checked_is_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MeshConfig(model=ModelConfig(name="tiny", path=folder))
    with closing(open_configured(config, WorkerConfig(blocks=12, slots=4))) as model:
        assert model.spec.layout.codec_label == "k4v4"
    assert f"kvmesh model check {folder}" in caplog.text
