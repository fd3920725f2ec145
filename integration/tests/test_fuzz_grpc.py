"""Mutated protobuf requests to every process of a mesh; the documented command sends many more."""

import asyncio
import random
from pathlib import Path

from meshes import mesh_config, ready

from kvmesh.integration.fuzz_grpc import run
from kvmesh.integration.fuzz_messages import mutated
from kvmesh.integration.launch import running_mesh
from kvmesh.oip import inference_pb2 as oip
from kvmesh.services.common.config import GatewayConfig, WorkerConfig
from kvmesh.v1 import inference_pb2

SERVICES = ("kvmesh.v1.Inference", "kvmesh.v1.Tokenizer", "kvmesh.v1.KvCache", "kvmesh.v1.Worker",
            "kvmesh.v1.Mesh", "inference.GRPCInferenceService")  # fmt: skip


async def test_mutated_requests_are_answered_and_nothing_stays(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    gateway = GatewayConfig(port=0, oip_port=0)
    async with running_mesh(
        mesh_config([WorkerConfig(role="both")], gateway=gateway), tmp_path
    ) as m:
        await ready(m)
        report = await asyncio.to_thread(run, tmp_path, 700, seed)
    assert not report["wrong"], (seed, report["wrong"][:3])
    assert {name.rpartition(".")[0] for name in report["statuses"]} == set(SERVICES)
    for statuses in report["statuses"].values():
        assert sum(statuses.values()) > 10
    generated = report["statuses"]["kvmesh.v1.Inference.Generate"]
    assert generated.get("INVALID_ARGUMENT"), seed


def test_mutations_depend_on_their_seed_alone_and_differ() -> None:
    seeds = [inference_pb2.GenerateRequest(text="Hello", request_id="r")]

    def made(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutated(rng, seeds) for _ in range(200)]

    assert made(3) == made(3)
    assert made(3) != made(4)
    assert len(set(made(3))) > 150
    assert seeds == [inference_pb2.GenerateRequest(text="Hello", request_id="r")]


def test_mutations_reach_maps_repeated_fields_and_what_is_no_message() -> None:
    seed = oip.ModelInferRequest(model_name="mini", raw_input_contents=[b"a", b"b"])
    seed.parameters["max_tokens"].int64_param = 4
    rng = random.Random(1)
    broken, parsed = 0, []
    for _ in range(500):
        try:
            parsed.append(oip.ModelInferRequest.FromString(mutated(rng, [seed])))
        except Exception:
            broken += 1
    assert broken > 20
    assert any(len(message.parameters) > 1 for message in parsed)
    assert any(len(message.raw_input_contents) > 10 for message in parsed)
    assert any(message.inputs for message in parsed)
