"""Drives a mesh with a workload, closed or open loop, over gRPC."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmesh.integration.launch import running_mesh
from kvmesh.integration.loadgen import (
    RequestResult,
    closed_loop,
    greedy,
    open_loop,
    token_request,
)
from kvmesh.integration.workload import Workload, fitting, prompts
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.security import Security
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2

READY_S = 180.0


class LoadError(ValueError):
    """A load that this mesh cannot take; the message says what to change."""


@dataclass(frozen=True, slots=True)
class ServePlan:
    """concurrency: requests in flight; None: each at its arrival. salt: of all prompts."""

    workload: Workload
    concurrency: int | None
    seed: int = 1
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Driven:
    """too_long: requests left out because they do not fit the model's context."""

    results: list[RequestResult]
    too_long: int
    model: inference_pb2.ModelInfo
    simulated: bool


@asynccontextmanager
async def own_mesh(config: MeshConfig, run_dir: Path) -> AsyncIterator[InferenceClient]:
    """A client of a mesh that runs as long as the block."""
    async with running_mesh(config, run_dir) as mesh:
        await mesh.wait_ready(READY_S)
        async with Link(mesh.public_address, mesh.security) as link:
            yield InferenceClient(link)


@asynccontextmanager
async def other_mesh(address: str, security: Security) -> AsyncIterator[InferenceClient]:
    """A client of a mesh that runs already."""
    async with Link(address, security) as link:
        yield InferenceClient(link)


async def drive(
    client: InferenceClient,
    plan: ServePlan,
    on_start: Callable[[int], None],
    on_done: Callable[[RequestResult], None],
) -> Driven:
    """Sends the whole workload. on_start gets the number of requests that will be sent.

    Nothing is tried again: what the mesh refuses is counted. Raises MeshError if it does not say
    what it serves, LoadError if no request fits its context.
    """
    model = (await client.list_models()).models[0]
    members = (await client.status()).members
    load, too_long = fitting(plan.workload, model.max_context)
    if not load.requests:
        raise LoadError(
            f"no request fits the context of {model.max_context} tokens, the longest has "
            f"{plan.workload.longest}; make them shorter, for a trace with --scale"
        )
    requests = [
        token_request(prompt, greedy(request.output_tokens), plan.salt)
        for prompt, request in zip(
            prompts(load, model.vocab_size, plan.seed), load.requests, strict=True
        )
    ]
    on_start(len(requests))
    if plan.concurrency is not None:
        results = await closed_loop(client, requests, plan.concurrency, on_done)
    else:
        arrivals = [request.arrival_s for request in load.requests]
        results = await open_loop(client, requests, arrivals, on_done)
    return Driven(results, too_long, model, any(member.simulated for member in members))
