"""A mesh on TLS and a token, and meshes that refuse to start."""

from pathlib import Path

import pytest
from meshes import issue, mesh_config, prompts

from kvmesh.integration.launch import running_mesh
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.loadgen import run_request, token_request
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig, RouterConfig, WorkerConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.security import Security
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.v1 import common_pb2

GREEDY = common_pb2.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


async def ask(address: str, security: Security) -> str:
    async with Link(address, security) as link:
        client = InferenceClient(link)
        return (await run_request(client, token_request(prompts()[0], GREEDY))).error


async def test_tls_and_token_through_the_whole_mesh(tmp_path: Path) -> None:
    secure = issue(tmp_path)
    config = mesh_config([WorkerConfig(role="both")], security=secure)
    run_dir = tmp_path / "run"
    async with running_mesh(config, run_dir) as mesh:
        await mesh.wait_ready()
        ca = (tmp_path / "ca.pem").read_bytes()
        # A client needs the authority and the token, no certificate of its own.
        assert await ask(mesh.public_address, Security(ca=ca, token="s3cret-token")) == ""
        assert "Unauthenticated" in await ask(mesh.public_address, Security(ca=ca, token="wrong"))
        assert "Unauthenticated" in await ask(mesh.public_address, Security(ca=ca))
        # Services ask each other for certificates: the token alone opens nothing.
        worker = mesh.members["worker-0"].addresses[0]
        assert "Unavailable" in await ask(worker, Security(ca=ca, token="s3cret-token"))
    for log in (run_dir / "logs").iterdir():
        assert "s3cret-token" not in log.read_text()
    with SpanReader(traces_path(run_dir)) as reader:
        assert reader.newest(Filter(), 10)
    for store in run_dir.glob("traces.sqlite*"):
        assert b"s3cret-token" not in store.read_bytes()


async def test_an_open_address_needs_tls_and_a_token(tmp_path: Path) -> None:
    config = MeshConfig(host="0.0.0.0", router=RouterConfig(port=0))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 .* needs a certificate"):
        async with running_mesh(config, tmp_path):
            pass
