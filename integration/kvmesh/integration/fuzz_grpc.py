"""Mutated protobuf requests against every service of a running mesh: nothing may crash or hang.

    kvmesh up --detach
    python -m kvmesh.integration.fuzz_grpc --count 20000

Each request is a valid one, made from what the mesh itself says, with mutations of its fields or
of its bytes, and goes to one method of one process. INTERNAL, UNKNOWN and the like are never
meant. At the end nothing is held: no blocks, no requests; no process was restarted, or has grown.
One number, the seed, makes all requests.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message

from kvmesh.integration.fuzz_messages import mutated
from kvmesh.integration.fuzz_seeds import Target, find_targets, warm_up
from kvmesh.integration.launch_state import MeshState, resolve_run_dir, running_state
from kvmesh.services.common.client import CHANNEL_OPTIONS, Link
from kvmesh.services.common.errors import MeshError
from kvmesh.services.router.client import InferenceClient

ANSWER_S = 60.0  # of a call that has nothing to wait for; beyond, it counts as hung
LEAVE_S = 1.0  # a mutation may ask for thousands of tokens, and some streams never end
MAX_READ = 3  # responses of a stream, then it is left
IN_FLIGHT = 8
SERVES_S = 30.0  # of a plain request
IDLE_S = 90.0  # until nothing is held any more; leases of a shard last up to 60 s
MAX_GROWTH = 128 << 20  # bytes of a process; its caches fill up to their budgets
_MEANT = frozenset(
    ("OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "FAILED_PRECONDITION",
     "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DATA_LOSS")
)  # fmt: skip
LEFT = "LEFT"  # by us, before its end
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(slots=True)
class Tally:
    """statuses: by method. unexpected: what was wrong, with the request's number."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def note(self, number: int, method: str, status: str, detail: str = "") -> None:
        self.statuses.setdefault(method, Counter())[status] += 1
        if status not in _MEANT and status != LEFT:
            self.unexpected.append(f"request {number} to {method} ended {status}: {detail[:200]}")


def fuzz(targets: Sequence[Target], count: int, seed: int) -> Tally:
    """Sends `count` requests, as many to each method, one service after the other."""
    tally = Tally()
    channels = {
        address: grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        for address in {target.address for target in targets}
    }

    def send(number: int) -> tuple[str, str]:
        target = targets[number * len(targets) // count]
        return _send(channels[target.address], target, random.Random(f"{seed}/{number}"))

    try:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for number, (status, detail) in enumerate(pool.map(send, range(count))):
                name = targets[number * len(targets) // count].method.full_name
                tally.note(number, name, status, detail)
    finally:
        for channel in channels.values():
            channel.close()
    return tally


def _send(channel: grpc.Channel, target: Target, rng: random.Random) -> tuple[str, str]:
    """How it ended, and what was said of it."""
    method = target.method
    requests = [mutated(rng, target.seeds)]
    if method.client_streaming:
        requests += [mutated(rng, target.seeds) for _ in range(rng.randrange(3))]
    try:
        with closing(_responses(channel, target, requests, rng.random() < 0.5)) as responses:
            for read, response in enumerate(responses, start=1):
                inner = _inner_error(method, response)
                if inner is not None:
                    return inner
                if read >= MAX_READ:
                    return LEFT, ""
    except grpc.RpcError as error:
        call: Any = error
        if call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            return call.code().name, call.details() or ""
        return (LEFT, "") if target.lasts else ("HUNG", f"no end within {ANSWER_S:g} s")
    return "OK", ""


def _responses(
    channel: grpc.Channel, target: Target, requests: Sequence[bytes], half_close: bool
) -> Generator[bytes, None, None]:
    """half_close: whether a stream of requests ends; else it stays open until the call has."""
    method = target.method
    kind = ("unary", "stream")
    name = f"{kind[method.client_streaming]}_{kind[method.server_streaming]}"
    assert method.containing_service is not None
    path = f"/{method.containing_service.full_name}/{method.name}"
    timeout = LEAVE_S if target.lasts else ANSWER_S
    ended = threading.Event()

    def stream() -> Iterator[bytes]:
        yield from requests
        if method.server_streaming and not half_close:
            ended.wait()

    try:
        given: Any = stream() if method.client_streaming else requests[0]
        answer = getattr(channel, name)(path)(given, timeout=timeout)
        if not method.server_streaming:
            yield answer
            return
        try:
            yield from answer
        finally:
            answer.cancel()
    finally:
        ended.set()


def _inner_error(method: MethodDescriptor, data: bytes) -> tuple[str, str] | None:
    """An error inside a response that is never meant; None if there is none such."""
    response = message_factory.GetMessageClass(method.output_type)()
    try:
        response.ParseFromString(data)
    except DecodeError as error:
        return "UNREADABLE", str(error)
    for code, text in _errors(response):
        if _CODES.get(code, str(code)) not in _MEANT:
            return f"inner {_CODES.get(code, code)}", text
    return None


def _errors(message: Message) -> list[tuple[int, str]]:
    if message.DESCRIPTOR.full_name == "kvmesh.v1.RequestError":
        error: Any = message
        return [(error.code, error.message)]
    found: list[tuple[int, str]] = []
    for described, value in message.ListFields():
        if described.message_type is None or described.message_type.GetOptions().map_entry:
            continue
        for child in value if described.is_repeated else (value,):
            found += _errors(child)
    return found


async def left_behind(state: MeshState) -> list[str]:
    """What is still held, after a while, or fails; empty if all is well."""
    async with Link(state.public_address) as link:
        client = InferenceClient(link)
        try:
            await warm_up(client, SERVES_S)
        except MeshError as error:
            return [f"a plain request failed afterwards: {error}"]
        deadline = asyncio.get_running_loop().time() + IDLE_S
        while True:
            status = await client.status()
            held = [
                f"{m.member_id} holds {m.blocks_total - m.blocks_free} blocks, runs {m.running}, "
                f"lets {m.waiting} wait"
                for m in status.members
                if m.kind == "worker" and (m.blocks_total > m.blocks_free or m.running + m.waiting)
            ]
            if status.requests_active:
                held.append(f"{status.requests_active} requests are active")
            if not held or asyncio.get_running_loop().time() > deadline:
                return held
            await asyncio.sleep(0.1)


def resident(state: MeshState) -> dict[str, int]:
    """Bytes of memory of each process."""
    return {m.member_id: _resident(m.pid) for m in state.members if m.pid is not None}


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def run(run_dir: Path, count: int, seed: int) -> dict[str, Any]:
    """The report; `wrong` is empty if all is well."""
    before = _state(run_dir)
    targets = asyncio.run(find_targets(before))
    warm = fuzz(targets, max(1, count // 5), seed + 1)  # caches fill, code is loaded
    memory = resident(before)
    tally = fuzz(targets, count - count // 5, seed)
    wrong = warm.unexpected + tally.unexpected + asyncio.run(left_behind(before))
    after = _state(run_dir)
    wrong += [
        f"{new.member_id} was restarted"
        for old, new in zip(before.members, after.members, strict=True)
        if (old.pid, old.restarts) != (new.pid, new.restarts)
    ]
    grown = {name: size - memory.get(name, size) for name, size in resident(after).items()}
    wrong += [
        f"{name} has grown by {size >> 20} MiB, at most {MAX_GROWTH >> 20} are expected"
        for name, size in grown.items()
        if size > MAX_GROWTH
    ]
    return {
        "seed": seed,
        "requests": count,
        "statuses": {name: dict(found.most_common()) for name, found in tally.statuses.items()},
        "grown_mib": {name: round(size / 2**20, 1) for name, size in grown.items()},
        "wrong": wrong,
    }


def _state(run_dir: Path) -> MeshState:
    state = running_state(run_dir)
    if state is None:
        sys.exit(f"no mesh runs in {run_dir}; start one with 'kvmesh up --detach'")
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--run-dir", type=Path, help="of the mesh, if not the default one")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = run(resolve_run_dir(options.run_dir), options.count, options.seed)
    wrong = report.pop("wrong")
    print(json.dumps(report, indent=1))
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
