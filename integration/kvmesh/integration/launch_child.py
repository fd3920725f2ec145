"""A child process as the launcher holds it: its socket, its log, its exit."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from kvmesh.integration.launch_plan import PORT_VARIABLES

MAX_LOG_BYTES = 4 << 20  # per member; two files are kept, so at most twice this
# A worker computes with the threads of its configuration; a library that starts one per core
# besides would only take cores from the other members.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Teller = Callable[[str, tuple[str, ...]], None]


class BoundedLog:
    """Appends to a file that is rotated once, so that its size is bounded."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        if self._file.tell() + len(data) > self._max_bytes:
            self._file.close()
            self._path.replace(self._path.with_suffix(".old.log"))
            self._file = self._path.open("ab")
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's own, with one thread per library, and with ports only if `extra` has them."""
    own = {name: value for name, value in os.environ.items() if name not in PORT_VARIABLES}
    return {**own, **dict.fromkeys(THREAD_VARIABLES, "1"), **extra}


class Child:
    """A running process in a session of its own, which a Ctrl-C in the terminal does not reach."""

    def __init__(self, process: asyncio.subprocess.Process, work: Awaitable[object]) -> None:
        self._process = process
        self._work = work
        self.pid = process.pid

    async def wait(self) -> int:
        """Its exit code, once it has ended and all it said is in the log."""
        code = await self._process.wait()
        await self._work
        return code

    def signal(self, number: int) -> None:
        """No error if it has ended already."""
        if self._process.returncode is None:
            self._process.send_signal(number)


async def spawn(
    command: Sequence[str], environment: Mapping[str, str], log: BoundedLog, tell: Teller
) -> Child:
    """Starts `command` with `--launcher-fd N --launcher-pid P` appended.

    tell: called with ("metrics" | "bound" | "ready", addresses) when the child says so.
    """
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--launcher-fd", str(theirs.fileno()), "--launcher-pid", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    work = asyncio.gather(_listen(ours, tell), _copy(process, log))
    return Child(process, work)


async def _listen(ours: socket.socket, tell: Teller) -> None:
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        while line := await reader.readline():
            for word, addresses in json.loads(line).items():
                tell(word, tuple(addresses))
    except ConnectionError:
        pass  # it died with our end unread; its exit tells the rest
    finally:
        writer.close()


async def _copy(process: asyncio.subprocess.Process, log: BoundedLog) -> None:
    assert process.stdout is not None
    while data := await process.stdout.read(1 << 16):
        log.write(data)


def member_command(member_id: str, run_dir: Path, mesh_address: str) -> list[str]:
    """The command line of one member, before the launcher's own options."""
    command = [sys.executable, "-m", "kvmesh.cli.serve", member_id]
    command += ["--run-dir", str(run_dir)]
    if mesh_address:
        command += ["--mesh-address", mesh_address]
    return command
