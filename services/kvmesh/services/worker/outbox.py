"""What a router has yet to be told. Steps that it has not read yet become one message."""

import asyncio

from kvmesh.services.worker.blocks import CacheEvents
from kvmesh.v1 import common_pb2, worker_pb2

IDLE_REPORT_S = 1.0


class Outbox:
    """Messages to one router, in the event loop's thread.

    Bounded by what it coalesces into: one update per request, one entry per block key, one load.
    Event sequence numbers count up by one per message with events, from the snapshot's 1.
    """

    def __init__(self, incarnation: int, held: list[bytes]) -> None:
        self._incarnation = incarnation
        self._sequence = 1
        self._snapshot: list[bytes] | None = held
        self._updates: dict[str, worker_pb2.TokenUpdate] = {}
        self._ended: list[worker_pb2.TokenUpdate] = []
        self._held: dict[bytes, bool] = {}  # changed keys, and whether they are held now
        self._load: worker_pb2.LoadReport | None = None
        self._wake = asyncio.Event()
        self._closed = False

    def add_update(self, update: worker_pb2.TokenUpdate) -> None:
        earlier = self._updates.get(update.request_id)
        if earlier is None:
            self._updates[update.request_id] = update
        else:
            earlier.MergeFrom(update)
        if update.finish_reason:
            # The id may be used again from here on, by another request.
            self._ended.append(self._updates.pop(update.request_id))
        self._wake.set()

    def add_events(self, events: CacheEvents) -> None:
        self._held.update(dict.fromkeys(events.removed, False))
        self._held.update(dict.fromkeys(events.stored, True))
        self._wake.set()

    def set_load(self, load: worker_pb2.LoadReport) -> None:
        self._load = load
        self._wake.set()

    def close(self) -> None:
        """Ends the stream after what is in here."""
        self._closed = True
        self._wake.set()

    async def next(self) -> worker_pb2.WorkerMessage | None:
        """The next message; None once closed, empty if a second passed without news."""
        if not self._wake.is_set():
            try:
                async with asyncio.timeout(IDLE_REPORT_S):
                    await self._wake.wait()
            except TimeoutError:
                return worker_pb2.WorkerMessage()
        self._wake.clear()
        if self._closed:
            return None
        return self._take()

    def hello(self, hello: worker_pb2.Hello) -> worker_pb2.WorkerMessage:
        """The first message, with the snapshot of block events."""
        message = self._take()
        message.hello.CopyFrom(hello)
        return message

    def _take(self) -> worker_pb2.WorkerMessage:
        message = worker_pb2.WorkerMessage(updates=[*self._ended, *self._updates.values()])
        self._ended = []
        self._updates = {}
        events = self._take_events()
        if events is not None:
            message.events.CopyFrom(events)
        if self._load is not None:
            message.load.CopyFrom(self._load)
            self._load = None
        return message

    def _take_events(self) -> common_pb2.BlockEvents | None:
        if self._snapshot is None and not self._held:
            return None
        stored = [key for key, held in self._held.items() if held]
        removed = [key for key, held in self._held.items() if not held]
        events = common_pb2.BlockEvents(
            incarnation=self._incarnation,
            sequence=self._sequence,
            snapshot=self._snapshot is not None,
            stored=[*(self._snapshot or ()), *stored],
            removed=removed,
        )
        self._sequence += 1
        self._snapshot = None
        self._held = {}
        return events
