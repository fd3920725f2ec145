"""Requests as the simulator takes them: lengths, arrivals, and the keys of their prompts' blocks.

A key stands for a block and all before it, as in the live mesh, but is made of the trace's hash ids
instead of tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.integration.workload import Workload
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.kvcache.keys import KEY_BYTES

_PLACE_BYTES = 4
_CHAIN_BYTES = KEY_BYTES - _PLACE_BYTES


@dataclass(frozen=True, slots=True)
class SimRequest:
    """keys: of the prompt's full blocks of 64 tokens, 16 bytes each."""

    index: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests in flight: the next one comes when one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}, must be at least 1")


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to the mesh; loop: None sends each request at its arrival.

    too_long: requests that were left out because no context holds them.
    """

    requests: tuple[SimRequest, ...]
    loop: ClosedLoop | None = None
    too_long: int = 0


def load_of(
    workload: Workload,
    max_context: int,
    loop: ClosedLoop | None = None,
    share_prefixes: bool = True,
) -> Load:
    """Without share_prefixes no two requests have a block in common, as MLPerf demands."""
    keys = _Keys(workload.block_tokens)
    requests: list[SimRequest] = []
    for request in workload.requests:
        if request.input_tokens + request.output_tokens > max_context:
            continue
        index = len(requests)
        salt = -1 if share_prefixes else index
        made = keys.of(request.hash_ids, request.input_tokens, salt)
        lengths = request.input_tokens, request.output_tokens
        requests.append(SimRequest(index, request.arrival_s, *lengths, made))
    return Load(tuple(requests), loop, len(workload.requests) - len(requests))


class _Keys:
    """Chains hash ids. Block [64 i, 64 i + 64) has the key of all ids up to its last token's."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._places: list[bytes] = []
        self._known: dict[tuple[int, int], tuple[int, tuple[bytes, ...]]] = {}

    def of(self, ids: Sequence[int], tokens: int, salt: int) -> tuple[bytes, ...]:
        keys: list[bytes] = []
        chain = salt
        for place, hash_id in enumerate(ids):
            known = self._known.get((chain, hash_id))
            if known is None:
                known = self._known[chain, hash_id] = self._made(chain, hash_id, place)
            chain, part = known
            keys += part
        return tuple(keys[: tokens // BLOCK_SIZE])

    def _made(self, chain: int, hash_id: int, place: int) -> tuple[int, tuple[bytes, ...]]:
        """The chain after this id, and the keys of the blocks that end within its tokens."""
        start, stop = place * self._block_tokens, (place + 1) * self._block_tokens
        text = f"{chain}/{hash_id}".encode()
        digest = hashlib.blake2b(text, digest_size=_CHAIN_BYTES).digest()
        first, last = start // BLOCK_SIZE + 1, stop // BLOCK_SIZE + 1
        while len(self._places) < last:
            self._places.append(len(self._places).to_bytes(_PLACE_BYTES, "little"))
        keys = tuple([digest + place for place in self._places[first:last]])
        return int.from_bytes(digest, "little"), keys
