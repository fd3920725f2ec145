"""Numbers the changes of a shard's content and hands them to its watchers."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from kvmesh.services.common.errors import MeshError, Overloaded, Unavailable
from kvmesh.v1 import common_pb2

MAX_PENDING = 64  # changes that are gathered into one message at most
MAX_BEHIND = 1024  # messages that wait for a slow watcher

_Queue = asyncio.Queue[common_pb2.BlockEvents | MeshError]


class EventFeed:
    """Belongs to one event loop. Changes are noted as they happen and sent by flush().

    snapshot: all keys held now, as of every change noted so far.
    """

    def __init__(
        self,
        incarnation: int,
        snapshot: Callable[[], Sequence[bytes]],
        max_behind: int = MAX_BEHIND,
    ) -> None:
        self._incarnation = incarnation
        self._snapshot = snapshot
        self._max_behind = max_behind
        self._sequence = 0
        self._pending: dict[bytes, bool] = {}  # key -> held; the last change of a key counts
        self._watchers: set[_Queue] = set()
        self._closed = False

    def note(self, stored: Iterable[bytes] = (), removed: Iterable[bytes] = ()) -> None:
        self._pending.update(dict.fromkeys(removed, False))
        self._pending.update(dict.fromkeys(stored, True))
        if len(self._pending) >= MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Sends what was noted as one message. A watcher whose queue is full is cut off."""
        if not self._pending:
            return
        self._sequence += 1
        event = common_pb2.BlockEvents(
            incarnation=self._incarnation,
            sequence=self._sequence,
            stored=[key for key, held in self._pending.items() if held],
            removed=[key for key, held in self._pending.items() if not held],
        )
        self._pending.clear()
        for queue in list(self._watchers):
            if queue.qsize() >= self._max_behind:
                reason = f"this watcher is {self._max_behind} messages behind; watch again"
                self._cut(queue, Overloaded(reason, retry_after_s=0.1))
            else:
                queue.put_nowait(event)

    async def watch(self) -> AsyncGenerator[common_pb2.BlockEvents, None]:
        """A snapshot, then every change after it.

        Raises Overloaded for a watcher that fell behind, Unavailable when the feed closes.
        """
        if self._closed:
            raise _closing()
        self.flush()
        queue: _Queue = asyncio.Queue()
        queue.put_nowait(
            common_pb2.BlockEvents(
                incarnation=self._incarnation,
                sequence=self._sequence,
                snapshot=True,
                stored=self._snapshot(),
            )
        )
        self._watchers.add(queue)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, MeshError):
                    raise item
                yield item
        finally:
            self._watchers.discard(queue)

    def close(self) -> None:
        """Ends every watch. Twice is safe."""
        self._closed = True
        for queue in list(self._watchers):
            self._cut(queue, _closing())

    def _cut(self, queue: _Queue, error: MeshError) -> None:
        self._watchers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(error)


def _closing() -> Unavailable:
    return Unavailable("this shard drains; watch again when it is back")
