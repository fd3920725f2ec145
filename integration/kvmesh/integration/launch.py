"""Starts every member of a mesh as its own process, keeps them running, and stops them in order.

`running_mesh` is the whole of it for a program; `kvmesh up` wraps it for people.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.integration.launch_child import (
    BoundedLog,
    Child,
    child_environment,
    member_command,
    spawn,
)
from kvmesh.integration.launch_health import wait_serving
from kvmesh.integration.launch_plan import (
    CONFIG_EXIT,
    GATEWAY,
    ROUTER,
    TRACES,
    MemberProcess,
    Phase,
    RestartPolicy,
    describe_exit,
    plan_members,
    port_environment,
    stop_order,
)
from kvmesh.integration.launch_state import (
    MemberState,
    MeshState,
    absolute_paths,
    last_line,
    log_path,
    process_started,
    remove_state,
    run_dir_lock,
    write_state,
)
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.security import Security, check_binding, load_security
from kvmesh.services.common.server import DRAIN_S, GRACE_S
from kvmesh.services.common.telemetry import TRACES_VARIABLE

TRACES_WAIT_S = 5.0  # for the trace receiver's address, before the others start without one
STOP_S = DRAIN_S + GRACE_S + 4.0  # a member that takes longer after SIGTERM is killed
CommandOf = Callable[[str, Path, str], list[str]]


class MeshFailed(Exception):
    """The mesh cannot start; the message names the member and its log."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How members are started. environment: added to this process's own, for every member."""

    environment: Mapping[str, str] = field(default_factory=dict)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    stop_s: float = STOP_S
    command: CommandOf = member_command


class Mesh:
    """A mesh of processes that this process owns. Made by `running_mesh`."""

    def __init__(self, config: MeshConfig, run_dir: Path, options: LaunchOptions) -> None:
        self.config = config
        self.run_dir = run_dir
        self.security = _security(config)
        self._options = options
        self._plan = plan_members(config)
        self.members: Mapping[str, MemberProcess] = {
            plan.member_id: MemberProcess(plan, options.policy) for plan in self._plan
        }
        self._children: dict[str, Child] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()  # set, and replaced, at each change
        self._stopping = asyncio.Event()
        self._serving = False
        self._started_at = time.time()

    @property
    def public_address(self) -> str:
        """Where clients reach the router; empty until it listens."""
        return next(iter(self.members[ROUTER].addresses), "")

    @property
    def http_url(self) -> str:
        """Of the HTTP edge; empty if there is none, or until it listens."""
        gateway = self.members.get(GATEWAY)
        return next(iter(gateway.addresses), "") if gateway is not None else ""

    @property
    def oip_address(self) -> str:
        """Of the Open Inference Protocol; empty without it, or until it listens."""
        gateway = self.members.get(GATEWAY)
        return next(iter(gateway.addresses[1:]), "") if gateway is not None else ""

    @property
    def mesh_address(self) -> str:
        """Where members reach the router; empty until it listens."""
        return next(iter(self.members[ROUTER].addresses[1:]), "")

    @property
    def traces_address(self) -> str:
        """Where members send their spans; empty until the receiver listens, or without one."""
        receiver = self.members.get(TRACES)
        return next(iter(receiver.addresses), "") if receiver is not None else ""

    @property
    def pids(self) -> dict[str, int]:
        """Of the members that run now."""
        return {m: process.pid for m, process in self.members.items() if process.pid is not None}

    @property
    def all_ready(self) -> bool:
        return all(process.settled for process in self.members.values())

    def kill(self, member_id: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a member that runs. Raises KeyError if it does not."""
        os.kill(self.pids[member_id], number)

    async def wait_for(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Until `holds()`, asked again whenever a member's state changed.

        Raises MeshFailed once a member has failed for good, TimeoutError after `timeout_s`.
        """
        async with asyncio.timeout(timeout_s):
            while not holds():
                self._check_failed()
                await self._changed.wait()

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until every member is ready and the router's health says that it serves.

        Raises ConfigError if a member's configuration cannot work, MeshFailed if one cannot start.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_for(lambda: self.all_ready, timeout_s)
                await wait_serving(self.public_address, self.security)
        except TimeoutError as error:
            late = [m for m, p in self.members.items() if not p.settled] or [ROUTER]
            raise MeshFailed(
                f"not ready within {timeout_s:.0f} s: {', '.join(late)}; "
                f"see {log_path(self.run_dir, late[0])}"
            ) from error
        self._serving = True
        self._note()

    async def wait_restarted(self, member_id: str, restarts: int, timeout_s: float = 60.0) -> None:
        """Until `member_id` is ready again after at least so many restarts."""
        process = self.members[member_id]
        await self.wait_for(
            lambda: process.restarts >= restarts and process.phase is Phase.READY, timeout_s
        )

    def start(self) -> None:
        """Starts the members' processes, those that join as soon as the router listens."""
        self._note()
        for member_id in self.members:
            self._tasks[member_id] = asyncio.create_task(self._keep(member_id))

    async def stop(self) -> None:
        """Ends all members in order; each gets SIGTERM, and SIGKILL if it stays. Twice is safe."""
        self._stopping.set()
        for process in self.members.values():
            process.stopping()
        self._note()
        for group in stop_order(self._plan):
            await asyncio.gather(*(self._stop_one(member_id) for member_id in group))

    def kill_all(self) -> None:
        """SIGKILL to everything, for when a stop has to be now."""
        self._stopping.set()
        for process in self.members.values():
            process.stopping()
        for member_id in self.members:
            self._signal(member_id, signal.SIGKILL)

    def state(self) -> MeshState:
        return MeshState(
            launcher_pid=os.getpid(),
            launcher_started=process_started(os.getpid()),
            started_at=self._started_at,
            ready=self._serving and self.all_ready,
            public_address=self.public_address,
            mesh_address=self.mesh_address,
            http_url=self.http_url,
            oip_address=self.oip_address,
            config=self.config,
            members=tuple(_member_state(process) for process in self.members.values()),
        )

    async def _stop_one(self, member_id: str) -> None:
        task = self._tasks.get(member_id)
        if task is None:
            return
        self._signal(member_id, signal.SIGTERM)
        _, late = await asyncio.wait({task}, timeout=self._options.stop_s)
        if late:
            self._signal(member_id, signal.SIGKILL)
            await asyncio.wait({task})

    def _signal(self, member_id: str, number: int) -> None:
        child = self._children.get(member_id)
        if child is not None:
            child.signal(number)

    async def _keep(self, member_id: str) -> None:
        """Runs one member, again and again, until the mesh stops or it has failed."""
        process = self.members[member_id]
        if member_id != TRACES:
            await self._wait_traces()
        if member_id not in (ROUTER, TRACES):
            await self._until(lambda: bool(self.mesh_address))
        log = BoundedLog(log_path(self.run_dir, member_id))
        try:
            while not self._stopping.is_set() and process.phase is not Phase.FAILED:
                await self._run_once(process, log)
                if process.retry_at is not None:
                    await self._pause(process.retry_at - time.monotonic())
        finally:
            log.close()
            self._note()

    async def _run_once(self, process: MemberProcess, log: BoundedLog) -> None:
        member_id = process.plan.member_id
        address = "" if member_id in (ROUTER, TRACES) else self.mesh_address
        command = self._options.command(member_id, self.run_dir, address)
        extra = {
            **self._options.environment,
            **port_environment(process.addresses, process.metrics),
            TRACES_VARIABLE: self.traces_address,
        }
        child = await spawn(
            command, child_environment(extra), log, lambda *said: self._told(process, *said)
        )
        process.started(child.pid)
        self._children[member_id] = child
        if self._stopping.is_set():  # asked while it was being started
            process.stopping()
            child.signal(signal.SIGTERM)
        self._note()
        try:
            code = await child.wait()
        finally:
            child.signal(signal.SIGKILL)  # only if the wait itself failed does it still run
            del self._children[member_id]
        process.exited(code, time.monotonic())
        self._note()

    def _told(self, process: MemberProcess, word: str, addresses: tuple[str, ...]) -> None:
        if word == "ready":
            process.became_ready(addresses, time.monotonic())
        elif word == "metrics":
            (process.metrics,) = addresses
        else:
            process.bound(addresses)
        self._note()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), max(0.0, seconds))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds() and not self._stopping.is_set():
            await self._changed.wait()

    async def _wait_traces(self) -> None:
        """Until the trace receiver listens, or will not: nothing fails for its sake."""
        receiver = self.members.get(TRACES)
        if receiver is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRACES_WAIT_S):
                    await self._until(lambda: bool(self.traces_address) or receiver.settled)

    def _check_failed(self) -> None:
        for member_id, process in self.members.items():
            log = log_path(self.run_dir, member_id)
            if not process.plan.needed:
                continue
            if process.phase is Phase.FAILED and process.exit_code is not None:
                kind = ConfigError if process.exit_code == CONFIG_EXIT else MeshFailed
                raise kind(
                    f"{member_id} {describe_exit(process.exit_code)} before it was ready: "
                    f"{last_line(log)} (see {log})"
                )
            task = self._tasks[member_id]
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise MeshFailed(f"{member_id} cannot be run: {task.exception()} (see {log})")

    def _note(self) -> None:
        """Writes the state file and wakes who waits for a change."""
        write_state(self.run_dir, self.state())
        self._changed.set()
        self._changed = asyncio.Event()


@asynccontextmanager
async def running_mesh(
    config: MeshConfig, run_dir: Path, options: LaunchOptions | None = None
) -> AsyncIterator[Mesh]:
    """A started mesh, stopped in order when the block ends; call `wait_ready` to use it.

    Raises ConfigError if the configuration cannot work or the directory is taken.
    """
    run_dir = run_dir.absolute()
    config = absolute_paths(config)
    with run_dir_lock(run_dir):
        mesh = Mesh(config, run_dir, options or LaunchOptions())
        try:
            mesh.start()
            yield mesh
        finally:
            await mesh.stop()
            remove_state(run_dir)


def _security(config: MeshConfig) -> Security:
    files = config.security
    security = load_security(files.cert, files.key, files.ca, files.token_file, files.keys_file)
    check_binding(config.host, security)
    return security


def _member_state(process: MemberProcess) -> MemberState:
    return MemberState(
        member_id=process.plan.member_id,
        kind=process.plan.kind,
        role=process.plan.role,
        phase=process.phase.value,
        pid=process.pid,
        addresses=process.addresses,
        restarts=process.restarts,
        metrics=process.metrics,
    )
