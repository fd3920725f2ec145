"""Spans per second into the trace receiver, a process of its own, and the memory it takes."""

import asyncio
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from kvmesh.integration.launch_child import BoundedLog, child_environment, member_command, spawn
from kvmesh.integration.launch_plan import TRACES
from kvmesh.integration.launch_state import log_path, traces_path
from kvmesh.services.traces.reader import SpanReader

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
BATCH = 512  # spans of a request, as a service sends them
SPANS_PER_TRACE = 16
IN_FLIGHT = 4
POLL_S = 0.02
BACK_OFF_S = 0.15  # after a batch that found no room
READY_S = 30.0
CONFIG = "[telemetry]\ntraces_port = 0\n"


@dataclass(frozen=True, slots=True)
class SpansResult:
    """refused: spans that found the receiver behind, and were sent again.

    peak_rss_bytes: of the receiver; None where the system does not say.
    """

    spans: int
    stored: int
    refused: int
    seconds: float
    spans_per_s: float
    peak_rss_bytes: int | None
    store_bytes: int


async def bench_spans(num_spans: int, folder: Path) -> SpansResult:
    """Sends `num_spans` as fast as they are taken; the time ends when all are in the file."""
    (folder / "mesh.toml").write_text(CONFIG)
    command = [*member_command(TRACES, folder, ""), "--config", str(folder / "mesh.toml")]
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def told(word: str, addresses: tuple[str, ...]) -> None:
        if word == "ready" and not bound.done():
            bound.set_result(addresses[0])

    log = BoundedLog(log_path(folder, TRACES))
    child = await spawn(command, child_environment({}), log, told)
    try:
        address = await asyncio.wait_for(bound, READY_S)
        batches = [_batch(BATCH) for _ in range(-(-num_spans // BATCH))]
        began = time.perf_counter()
        rejected = await _send(address, batches)
        with SpanReader(traces_path(folder)) as reader:
            while (stored := reader.num_spans()) < BATCH * len(batches):
                await asyncio.sleep(POLL_S)
        seconds = time.perf_counter() - began
        peak = _peak_rss(child.pid)
    finally:
        child.signal(signal.SIGKILL)
        await child.wait()
        log.close()
    sent = BATCH * len(batches)
    size = traces_path(folder).stat().st_size
    return SpansResult(sent, stored, rejected, seconds, stored / seconds, peak, size)


async def _send(address: str, batches: list[bytes]) -> int:
    """How many times a span found the receiver behind; its batch waits and goes again."""
    waiting = list(reversed(batches))
    rejected = 0

    async def one(channel: grpc.aio.Channel) -> None:
        nonlocal rejected
        export: Any = channel.unary_unary(
            EXPORT, None, trace_service_pb2.ExportTraceServiceResponse.FromString
        )
        while waiting:
            batch = waiting.pop()
            answer = await export(batch, timeout=30.0)
            if answer.partial_success.rejected_spans:
                rejected += answer.partial_success.rejected_spans
                waiting.append(batch)
                await asyncio.sleep(BACK_OFF_S)

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(one(channel) for _ in range(IN_FLIGHT)))
    return rejected


def _batch(count: int) -> bytes:
    """An encoded request of `count` spans with what a span of a worker carries."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "kvmesh-worker"
    group.resource.attributes.add(key="service.instance.id").value.string_value = "worker-0"
    group.resource.attributes.add(key="kvmesh.clock").value.string_value = "measured"
    scope = group.scope_spans.add()
    now, trace_id = time.time_ns(), b""
    for number in range(count):
        if number % SPANS_PER_TRACE == 0:
            trace_id = secrets.token_bytes(16)
        span = scope.spans.add(name="kv fetch", trace_id=trace_id, start_time_unix_nano=now)
        span.span_id, span.end_time_unix_nano = secrets.token_bytes(8), now + 1_000_000
        if number % SPANS_PER_TRACE:
            span.parent_span_id = secrets.token_bytes(8)
        for key in ("kvmesh.kv.blocks", "kvmesh.kv.bytes", "kvmesh.kv.hit_tokens"):
            span.attributes.add(key=key).value.int_value = number
        span.attributes.add(key="kvmesh.member").value.string_value = "worker-0"
    return request.SerializeToString()


def _peak_rss(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
