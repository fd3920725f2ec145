"""The real command over a real mesh: up, requests, failures, down."""

import asyncio
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app
from kvmesh.integration.launch import running_mesh
from kvmesh.integration.launch_health import is_serving
from kvmesh.integration.launch_state import process_runs, read_state, running_state
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import (
    GatewayConfig,
    KvCacheConfig,
    MeshConfig,
    RouterConfig,
    WorkerConfig,
)
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2

WAIT_S = 120.0
# Blocks are few, so that the meshes of one test run do not claim half of the memory each.
SMALL = """
[router]
port = 0
[gateway]
port = 0
[kvcache]
shards = {shards}
max_bytes = 16777216
[[workers]]
role = "both"
blocks = 256
"""
SENTENCES = " ".join(f"The number of the house in the street is {i}." for i in range(30))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A detached mesh; its run directory."""
    folder = tmp_path_factory.mktemp("mesh")
    run_dir = folder / "run"
    (folder / "mesh.toml").write_text(SMALL.format(shards=1))
    result = kvmesh(run_dir, "up", "--detach", "--config", str(folder / "mesh.toml"))
    assert result.exit_code == 0, result.output + logs(run_dir)
    assert "ready at 127.0.0.1:" in result.stdout
    assert "OpenAI's API at http://127.0.0.1:" in result.stdout
    state = running_state(run_dir)
    assert state is not None
    yield run_dir
    result = kvmesh(run_dir, "down")
    assert result.exit_code == 0, result.output
    pids = [member.pid for member in state.members if member.pid is not None]
    assert not any(process_runs(pid) for pid in [*pids, state.launcher_pid])
    assert read_state(run_dir) is None
    assert kvmesh(run_dir, "status").exit_code == 3


def kvmesh(run_dir: Path, *arguments: str, **environment: str) -> Result:
    for name in ("KVMESH_ADDRESS", "KVMESH_TOKEN"):
        environment.setdefault(name, "")
    return CliRunner().invoke(
        app,
        [*arguments, "--run-dir", str(run_dir)],
        env={k: v or None for k, v in environment.items()},
    )


def answer(run_dir: Path, *arguments: str) -> dict:
    result = kvmesh(run_dir, *arguments, "--json")
    assert result.exit_code == 0, result.output + logs(run_dir)
    return json.loads(result.stdout)


def logs(run_dir: Path) -> str:
    paths = sorted((run_dir / "logs").glob("*.log"))
    return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in paths)


def test_launch_mesh_status_shows_all_members(mesh: Path):
    members = {m["member_id"]: m for m in answer(mesh, "status")["members"]}
    assert sorted(members) == ["gateway", "kvcache-0", "router", "tokenizer", "worker-0"]
    assert {m["state"] for m in members.values()} == {"serving"}
    assert members["worker-0"]["blocks_total"] == 256
    state = running_state(mesh)
    assert state is not None
    assert [m.member_id for m in state.members if m.member_id not in members] == ["traces"]
    for member in state.members[1:]:
        assert members[member.member_id]["address"] == member.addresses[0]


def test_launch_mesh_answers_the_same_for_the_same_seed_and_finds_the_prefix(mesh: Path):
    command = ("generate", SENTENCES, "--raw", "-n", "24", "-t", "1", "--ignore-eos")
    first = answer(mesh, *command, "--seed", "5")
    again = answer(mesh, *command, "--seed", "5")
    other = answer(mesh, *command, "--seed", "6")
    assert first["token_ids"] == again["token_ids"]
    assert first["token_ids"] != other["token_ids"]
    assert (first["finish_reason"], first["usage"]["completion_tokens"]) == ("length", 24)
    assert first["usage"]["cached_tokens"] == 0
    whole_blocks = (first["usage"]["prompt_tokens"] - 1) // 64 * 64
    assert again["usage"]["cached_tokens"] >= whole_blocks - 64 > 0
    (shard,) = answer(mesh, "kv", "stats")
    assert shard["puts"] >= whole_blocks // 64
    route = answer(mesh, "route", SENTENCES, "--raw", "-n", "24")
    (chosen,) = [c for c in route["candidates"] if c["chosen"]]
    assert chosen["local_cached_tokens"] > 0
    assert sum(chosen[f"{leg}_s"] for leg in ("queue", "prefill", "transfer", "decode")) == (
        pytest.approx(chosen["total_s"])
    )


def test_launch_mesh_streams_text_and_figures_apart(mesh: Path):
    result = kvmesh(mesh, "generate", "Who are you?", "-n", "8", "--seed", "1")
    assert result.exit_code == 0
    expected = answer(mesh, "generate", "Who are you?", "-n", "8", "--seed", "1")
    assert result.stdout == expected["text"] + "\n"
    assert re.search(r"TTFT [\d.]+ ms, .* seed 1, trace [0-9a-f]{32}", result.stderr)


def test_launch_mesh_tables_name_what_there_is(mesh: Path):
    assert "worker-0" in kvmesh(mesh, "status").stdout
    assert "mini" in kvmesh(mesh, "models").stdout
    assert "kvcache-0" in kvmesh(mesh, "kv", "stats").stdout
    assert "chosen" in kvmesh(mesh, "route", "hello", COLUMNS="200").stdout
    assert "runs at" in kvmesh(mesh, "doctor", COLUMNS="200").stdout


def test_launch_mesh_refused_request_is_one_line(mesh: Path):
    result = kvmesh(mesh, "generate", "hello", "--model", "nobody")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "nobody" in result.stderr
    assert result.stderr.count("\n") == 1


def test_launch_mesh_two_in_one_directory_are_refused(mesh: Path):
    for how in ("--detach", "--foreground"):
        result = kvmesh(mesh, "up", how)
        assert result.exit_code == 2
        assert "already runs" in result.stderr


def test_launch_mesh_chat_remembers(mesh: Path):
    lines = "Who are you?\n\nAnd you?\n/exit\n"
    arguments = ["chat", "-n", "4", "--run-dir", str(mesh)]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    prompts = [int(n) for n in re.findall(r"of (\d+) prompt tokens", result.stderr)]
    assert len(prompts) == 2
    assert prompts[1] > prompts[0] + 4  # the second holds the first, its answer, and more


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kvmesh.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_launch_mesh_interrupted_request_is_cancelled(mesh: Path):
    before = answer(mesh, "status")["requests_total"]
    endless = ("generate", "x", "--raw", "-n", "7000", "--ignore-eos", "--run-dir", str(mesh))
    with start(*endless) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    status = answer(mesh, "status")
    assert status["requests_total"] == before + 1
    assert status["requests_active"] == 0


def test_launch_mesh_up_in_the_foreground_until_ctrl_c(tmp_path: Path):
    (tmp_path / "mesh.toml").write_text(SMALL.format(shards=0))
    run_dir = tmp_path / "run"
    with start("up", "--config", str(tmp_path / "mesh.toml"), "--run-dir", str(run_dir)) as process:
        assert process.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith(b"Ctrl-C")):
            lines.append(process.stdout.readline())
            assert lines[-1], logs(run_dir)
        state = running_state(run_dir)
        assert state is not None
        assert state.ready
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert not any(process_runs(member.pid or 0) for member in state.members)


async def generate_ids(client: InferenceClient) -> list[int]:
    request = inference_pb2.GenerateRequest(text="The house", echo_token_ids=True)
    request.sampling.max_tokens = 16
    request.sampling.ignore_eos = True
    return [i async for response in client.generate(request, WAIT_S) for i in response.token_ids]


async def test_launch_mesh_brings_killed_members_back(tmp_path: Path):
    config = MeshConfig(
        router=RouterConfig(port=0, lease_s=1.0),
        gateway=GatewayConfig(port=0),
        kvcache=KvCacheConfig(shards=1, max_bytes=16 << 20),
        workers=(WorkerConfig(blocks=256),),
    )
    async with running_mesh(config, tmp_path) as mesh:
        await mesh.wait_ready(WAIT_S)
        async with Link(mesh.public_address, mesh.security) as link:
            client = InferenceClient(link)
            expected = await generate_ids(client)
            assert len(expected) == 16
            for killed in (("worker-0", "tokenizer", "kvcache-0", "gateway"), ("router",)):
                addresses = {member: mesh.members[member].addresses for member in killed}
                for member in killed:
                    mesh.kill(member, signal.SIGKILL)
                for member in killed:
                    await mesh.wait_restarted(member, 1, WAIT_S)
                    assert mesh.members[member].addresses == addresses[member]
            async with asyncio.timeout(WAIT_S):
                while not await is_serving(link):
                    await asyncio.sleep(0.1)
            assert await generate_ids(client) == expected, logs(tmp_path)


def test_launch_mesh_members_die_with_a_killed_launcher(tmp_path: Path):
    (tmp_path / "mesh.toml").write_text(SMALL.format(shards=1))
    run_dir = tmp_path / "run"
    with start("up", "--config", str(tmp_path / "mesh.toml"), "--run-dir", str(run_dir)) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"Ctrl-C"):
            assert process.poll() is None, logs(run_dir)
        state = running_state(run_dir)
        assert state is not None
        ends = [os.pidfd_open(member.pid) for member in state.members if member.pid]
        assert len(ends) == 6
        process.kill()
    asyncio.run(all_ended(ends))
    assert kvmesh(run_dir, "status").exit_code == 3
    assert kvmesh(run_dir, "down").exit_code == 3


async def all_ended(pidfds: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for fd in pidfds:
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        await asyncio.wait_for(ended.wait(), 30.0)
        loop.remove_reader(fd)
        os.close(fd)


def https_status(url: str, authority: str, key: str) -> int:
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=authority)
    address = url.removeprefix("https://")
    with closing(http.client.HTTPSConnection(address, timeout=20, context=context)) as connection:
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        return connection.getresponse().status


def test_launch_mesh_with_tls_and_a_token(tmp_path: Path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "token").write_text("s3cret\n")
    names = {"ca": "ca.pem", "cert": "cert.pem", "key": "key.pem", "token_file": "token"}
    security = "".join(f'{key} = "{tmp_path / name}"\n' for key, name in names.items())
    config = tmp_path / "mesh.toml"
    config.write_text(SMALL.format(shards=1) + f"[security]\n{security}")
    (tmp_path / "client.toml").write_text(f'[security]\nca = "{tmp_path / "ca.pem"}"\n')
    run_dir = tmp_path / "run"
    result = kvmesh(run_dir, "up", "--detach", "--config", str(config))
    assert result.exit_code == 0, result.output + logs(run_dir)
    try:
        state = running_state(run_dir)
        assert state is not None
        assert answer(run_dir, "generate", "hello", "-n", "4")["text"]
        assert len(answer(run_dir, "kv", "stats")) == 1
        remote = ("status", "--address", state.public_address, "--config")
        client = (*remote, str(tmp_path / "client.toml"))
        assert kvmesh(run_dir, *client, KVMESH_TOKEN="s3cret").exit_code == 0
        wrong = kvmesh(run_dir, *client, KVMESH_TOKEN="guess")
        assert wrong.exit_code == 1
        assert "bearer token missing or wrong" in wrong.stderr
        authority_file = str(tmp_path / "ca.pem")
        assert https_status(state.http_url, authority_file, "s3cret") == 200
        assert https_status(state.http_url, authority_file, "guess") == 401
        assert "s3cret" not in logs(run_dir) + (run_dir / "mesh.json").read_text()
    finally:
        assert kvmesh(run_dir, "down").exit_code == 0
