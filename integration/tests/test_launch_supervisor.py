"""The launcher over real processes; its members are small scripts that speak its protocol."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmesh.integration.launch import LaunchOptions, Mesh, MeshFailed, running_mesh
from kvmesh.integration.launch_child import BoundedLog
from kvmesh.integration.launch_plan import Phase, RestartPolicy
from kvmesh.integration.launch_state import log_path, process_runs, read_state, running_state
from kvmesh.services.common.config import GatewayConfig, KvCacheConfig, MeshConfig, WorkerConfig
from kvmesh.services.common.errors import ConfigError

WAIT_S = 30.0
CONFIG = MeshConfig(
    kvcache=KvCacheConfig(shards=1),
    gateway=GatewayConfig(enabled=False),
    workers=(WorkerConfig(count=2),),
)
MEMBERS = ["traces", "router", "tokenizer", "kvcache-0", "worker-0", "worker-1"]

# Says its addresses, notes its end in a file of all members, and behaves as FAKE_<member> says.
FAKE_MEMBER = """
import json, os, signal, socket, sys, threading
member, mesh_address, ends = sys.argv[1:4]
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
how = os.environ.get("FAKE_" + member.replace("-", "_"), "")
print(member, "joins", mesh_address or "nobody", "on", os.environ.get("KVMESH_PORT", "any"),
      "with", os.environ["OMP_NUM_THREADS"], "threads", flush=True)
tie = socket.socket(fileno=int(options["--launcher-fd"]))
def say(word):
    port = os.environ.get("KVMESH_PORT", "4%03d" % (os.getpid() % 1000))
    mesh_port = os.environ.get("KVMESH_MESH_PORT", "5%03d" % (os.getpid() % 1000))
    addresses = ["127.0.0.1:" + port] + ["127.0.0.1:" + mesh_port] * (member == "router")
    tie.sendall(json.dumps({word: addresses}).encode() + b"\\n")
if how == "fails":
    sys.exit("no such model")
if how == "misconfigured":
    print("error: router.port is 0.5", file=sys.stderr); sys.exit(2)
ended = threading.Event()
def end(*_):
    with open(ends, "a") as file: file.write(member + "\\n")
    if how != "stays": ended.set()
signal.signal(signal.SIGTERM, end)
say("bound")
if how != "never ready": say("ready")
ended.wait()
"""


@dataclass(frozen=True)
class Fake:
    """A run directory and how its fake members are started."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def ends(self) -> Path:
        return self.folder / "ends"

    def command(self, member_id: str, _: Path, mesh_address: str) -> list[str]:
        return [sys.executable, "-c", FAKE_MEMBER, member_id, mesh_address, str(self.ends)]

    def options(self, stop_s: float = WAIT_S, **behaviour: str) -> LaunchOptions:
        return LaunchOptions(
            environment={f"FAKE_{member}": how for member, how in behaviour.items()},
            policy=RestartPolicy(first_s=0.01, max_start_crashes=2),
            stop_s=stop_s,
            command=self.command,
        )

    def log(self, member_id: str) -> str:
        return log_path(self.run_dir, member_id).read_text()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


async def all_ready(mesh: Mesh) -> None:
    await mesh.wait_for(lambda: mesh.all_ready, WAIT_S)


async def test_launch_starts_all_and_stops_in_order(fake: Fake):
    async with running_mesh(CONFIG, fake.run_dir, fake.options()) as mesh:
        await all_ready(mesh)
        assert sorted(mesh.pids) == sorted(MEMBERS)
        state = running_state(fake.run_dir)
        assert state is not None
        assert {m.member_id: m.pid for m in state.members} == mesh.pids
        assert state.public_address == mesh.public_address
        pids, mesh_address = list(mesh.pids.values()), mesh.mesh_address
    # A log is whole only when its member has ended.
    assert f"worker-1 joins {mesh_address} on any with 1 threads" in fake.log("worker-1")
    assert "router joins nobody" in fake.log("router")
    ends = fake.ends.read_text().split()
    assert ends[0] == "router"
    assert sorted(ends[1:3]) == ["worker-0", "worker-1"]
    assert ends[3:] == ["kvcache-0", "tokenizer", "traces"]
    assert not any(process_runs(pid) for pid in pids)
    assert read_state(fake.run_dir) is None


async def test_launch_brings_a_killed_member_back_on_its_port(fake: Fake):
    async with running_mesh(CONFIG, fake.run_dir, fake.options()) as mesh:
        await all_ready(mesh)
        old = mesh.pids
        shard, router = mesh.members["kvcache-0"].addresses, mesh.members["router"].addresses
        mesh.kill("kvcache-0")
        mesh.kill("router")
        await mesh.wait_restarted("kvcache-0", 1, WAIT_S)
        await mesh.wait_restarted("router", 1, WAIT_S)
        assert mesh.members["kvcache-0"].addresses == shard
        assert mesh.members["router"].addresses == router
        changed = {member for member, pid in mesh.pids.items() if old[member] != pid}
        assert changed == {"kvcache-0", "router"}
    assert f"on {shard[0].rpartition(':')[2]} with" in fake.log("kvcache-0")


async def test_launch_kills_a_member_that_does_not_stop(fake: Fake):
    options = fake.options(stop_s=0.5, worker_0="stays")
    async with running_mesh(CONFIG, fake.run_dir, options) as mesh:
        await all_ready(mesh)
        pid = mesh.pids["worker-0"]
    assert not process_runs(pid)
    assert mesh.members["worker-0"].exit_code == -signal.SIGKILL
    assert mesh.members["worker-1"].exit_code == 0
    assert fake.ends.read_text().split()[-1] == "traces"


async def test_launch_kills_a_member_that_is_frozen(fake: Fake):
    async with running_mesh(CONFIG, fake.run_dir, fake.options(stop_s=0.5)) as mesh:
        await all_ready(mesh)
        mesh.kill("tokenizer", signal.SIGSTOP)
    assert mesh.members["tokenizer"].exit_code == -signal.SIGKILL


async def test_launch_names_the_member_that_cannot_start(fake: Fake):
    options = fake.options(worker_1="fails")
    async with running_mesh(CONFIG, fake.run_dir, options) as mesh:
        with pytest.raises(MeshFailed, match=r"worker-1 exited with 1 .*no such model .*worker-1"):
            await mesh.wait_ready(WAIT_S)
        assert fake.log("worker-1").count("no such model") == 2
    assert mesh.pids == {}


async def test_launch_does_not_retry_a_bad_configuration(fake: Fake):
    options = fake.options(router="misconfigured")
    async with running_mesh(CONFIG, fake.run_dir, options) as mesh:
        with pytest.raises(ConfigError, match=r"router exited with 2 .*router\.port is 0\.5"):
            await mesh.wait_ready(WAIT_S)
        assert fake.log("router").count("router.port") == 1
        assert mesh.members["worker-0"].phase is Phase.WAITING


async def test_launch_names_the_member_that_is_late(fake: Fake):
    options = fake.options(kvcache_0="never ready")
    async with running_mesh(CONFIG, fake.run_dir, options) as mesh:
        others = [process for name, process in mesh.members.items() if name != "kvcache-0"]
        await mesh.wait_for(lambda: all(p.phase is Phase.READY for p in others), WAIT_S)
        with pytest.raises(MeshFailed, match="not ready within 0 s: kvcache-0"):
            await mesh.wait_ready(0.05)


async def test_launch_says_that_a_command_cannot_be_run(fake: Fake):
    options = LaunchOptions(command=lambda *_: [str(fake.folder / "nothing")])
    async with running_mesh(CONFIG, fake.run_dir, options) as mesh:
        with pytest.raises(MeshFailed, match="router cannot be run"):
            await mesh.wait_ready(WAIT_S)


async def test_launch_refuses_a_directory_in_use(fake: Fake):
    async with running_mesh(CONFIG, fake.run_dir, fake.options()) as mesh:
        await all_ready(mesh)
        with pytest.raises(ConfigError, match="already runs"):
            async with running_mesh(CONFIG, fake.run_dir, fake.options()):
                pass
        assert running_state(fake.run_dir) is not None


def test_launch_log_is_bounded(tmp_path: Path):
    log = BoundedLog(tmp_path / "logs" / "a.log", max_bytes=100)
    for number in range(50):
        log.write(b"%09d\n" % number)
    log.close()
    old, new = tmp_path / "logs" / "a.old.log", tmp_path / "logs" / "a.log"
    assert old.stat().st_size <= 100
    assert new.stat().st_size <= 100
    assert (old.read_bytes() + new.read_bytes()).endswith(b"%09d\n" % 49)


# A launcher with one child, which is told how to hang on it; it prints the child's pid.
LAUNCHER = """
import asyncio, os, sys
from pathlib import Path
from kvmesh.integration.launch_child import BoundedLog, child_environment, spawn
async def main():
    child = await spawn([sys.executable, "-c", sys.argv[1]], child_environment({}),
                        BoundedLog(Path(sys.argv[2])), lambda *_: print(child.pid, flush=True))
    await child.wait()
asyncio.run(main())
"""
CHILD = """
import os, sys, time
from kvmesh.integration.launch_member import LauncherTie, die_with_parent
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
{hold}
LauncherTie(int(options["--launcher-fd"])).tell("ready", ["127.0.0.1:1"])
time.sleep(600)
"""
BY_KERNEL = (
    'die_with_parent(int(options["--launcher-pid"])); LauncherTie._watch = lambda self: None'
)
BY_SOCKET = ""


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(
            BY_KERNEL,
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only"),
            id="kernel",
        ),
        pytest.param(BY_SOCKET, id="socket"),
    ],
)
def test_launch_members_do_not_outlive_a_killed_launcher(tmp_path: Path, hold: str):
    log = tmp_path / "child.log"
    command = [sys.executable, "-c", LAUNCHER, CHILD.format(hold=hold), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        assert process_runs(child), log.read_text()
        launcher.kill()
        launcher.wait()
        # The child has no copy of this pipe, but its death is what we wait for.
    wait_gone(child)


def wait_gone(pid: int) -> None:
    """Returns when `pid`, which is not our child, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return

    async def ended() -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        loop.add_reader(fd, event.set)
        await asyncio.wait_for(event.wait(), WAIT_S)
        loop.remove_reader(fd)

    try:
        asyncio.run(ended())
    except TimeoutError:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        raise
    finally:
        os.close(fd)


def test_launch_child_whose_launcher_has_gone_ends_at_once():
    code = "from kvmesh.integration.launch_member import die_with_parent; die_with_parent(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], timeout=WAIT_S, check=False)
    assert done.returncode == (1 if sys.platform.startswith("linux") else 0)
