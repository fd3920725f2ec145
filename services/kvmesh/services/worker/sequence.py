"""One sequence: its tokens, how far they are computed, what it holds, how it ended. Pure.

tokens   |······ prompt ······|··· output ···|
computed |■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■·|   K and V exist; the last token's never do
         |  sealed blocks        |   slot    |   before the next one is to be chosen
"""

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import InvalidRequest, MeshError
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import block_keys, child_key
from kvmesh.services.worker.constraint import OutputMatcher
from kvmesh.services.worker.device_use import DeviceUse
from kvmesh.services.worker.sampler import Choice, Logprob, TokenHistory
from kvmesh.services.worker.timeline import SimulatedTimes, Timeline


class State(Enum):
    """WAITING -> RUNNING -> FINISHED, by way of FETCHING if blocks lie elsewhere.

    A pre-empted sequence goes back to WAITING. FINISHED is the only terminal state.
    """

    FETCHING = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Finish(IntEnum):
    """Why a sequence ended; the numbers of kvmesh.v1.FinishReason."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4
    HANDOVER = 5


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for; see kvmesh.v1.Submit.

    ticket: the submitter's own number for it.
    root: key that the first block's key is derived from.
    eos_token_ids: the model's own.
    deadline: on the scheduler's clock, None for none.
    shards: addresses where blocks come from and go to.
    tail_address: the worker that keeps its unfinished block; empty: none does.
    trace: W3C context of its span.
    matcher: what the settings' constraint allows after the output so far; its sequence owns it.
    keys: of the first full blocks, where the submitter has worked them out; the rest are here.
    """

    ticket: int
    request_id: str
    token_ids: Listed[int]
    num_prompt: int
    settings: SamplingSettings
    root: bytes
    eos_token_ids: tuple[int, ...] = ()
    prefill_only: bool = False
    deadline: float | None = None
    shards: tuple[str, ...] = ()
    tail_address: str = ""
    trace: tuple[tuple[str, str], ...] = ()
    matcher: OutputMatcher | None = None
    keys: tuple[bytes, ...] = ()

    @property
    def is_new(self) -> bool:
        """Whether nothing has been said yet, here or on another worker."""
        return len(self.token_ids) == self.num_prompt

    @property
    def tail_start(self) -> int:
        """Position of the first token of the unfinished block before the last token."""
        return (len(self.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Tail:
    """K and V of an unfinished block in full precision; `start` is a multiple of 64."""

    start: int
    num_tokens: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came from elsewhere for a sequence: sealed blocks by their index, and its tail."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    tail: Tail | None = None


@dataclass(slots=True)  # not frozen: one is made for every token, and that takes a third
class Update:
    """What one step brought to one sequence.

    first: its first token in this process came with this update. finish: set in the last one.
    """

    sequence: "Sequence"
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    first: bool = False
    finish: Finish | None = None
    error: MeshError | None = None


class Sequence:
    """Tokens and progress of one request.

    order: rank of arrival; it never changes. blocks: pool ids, in order, held by this sequence.
    computed: tokens whose K and V exist. generated: tokens that came out of this process.
    capacity: tokens, prompt and output together, at which it ends.
    """

    def __init__(self, order: int, work: Work, capacity: int, now: float) -> None:
        self.order = order
        self.work = work
        self.capacity = capacity
        self.state = State.WAITING
        self.timeline = Timeline(now)
        self.length = len(work.token_ids)
        self.slot: int | None = None
        self.blocks: list[int] = []
        self.computed = 0
        self.generated = 0
        self.steps = 0
        self.cached_tokens = 0
        self.sealed_here = 0  # blocks filled by this process's own steps
        self.prefill_seal_s = 0.0  # device seconds of sealing them, before the first token
        self.decode_seal_s = 0.0  # and after it
        self.next_export = 0  # blocks before this index have been offered to the shards
        self.fetched: Fetched | None = None
        self.use = DeviceUse()
        self.simulated: SimulatedTimes | None = None  # on a simulated device
        self.finish: Finish | None = None
        self.history: TokenHistory | None = None
        if work.settings.penalizes:
            split = work.num_prompt
            self.history = TokenHistory(work.token_ids[:split], work.token_ids[split:])
        self._tokens = np.zeros(capacity, np.int64)
        self._tokens[: self.length] = work.token_ids
        self._table = np.zeros(-(-capacity // BLOCK_SIZE), np.int32)
        self._keys = list(work.keys) or block_keys(work.root, work.token_ids, BLOCK_SIZE)
        ends = () if work.settings.ignore_eos else work.eos_token_ids
        self._end_ids = work.settings.stop_token_ids.union(ends)
        self._banned = tuple(sorted(self._end_ids))
        # Whether nothing but its length can end it, and no token changes how the next is chosen.
        bound = self.history or work.matcher or work.prefill_only
        self._plain = not bound and not self._end_ids

    @property
    def waiting_since(self) -> float:
        """See device_use.Metered."""
        return self.timeline.received

    @property
    def num_output(self) -> int:
        """Output tokens, those said by another process included."""
        return self.length - self.work.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return self.length - self.computed

    @property
    def usable_keys(self) -> list[bytes]:
        """Keys of the full blocks before the last token, which is always computed here."""
        return self._keys[: (self.length - 1) // BLOCK_SIZE]

    @property
    def blocks_to_run(self) -> int:
        """Blocks that all its tokens and one more take."""
        return -(-(self.length + 1) // BLOCK_SIZE)

    @property
    def held_slot(self) -> int:
        """Its slot; only a running sequence has one. Raises ValueError without."""
        if self.slot is None:
            raise ValueError(f"{self.work.request_id} holds no slot")
        return self.slot

    def keys(self, start: int, stop: int) -> Listed[bytes]:
        """The keys of blocks [start, stop), whose tokens are all known."""
        if stop > len(self._keys):
            self.key(stop - 1)
        return self._keys[start:stop]

    def key(self, index: int) -> bytes:
        """The key of block `index`, whose tokens are all known."""
        while len(self._keys) <= index:
            place = len(self._keys)
            parent = self._keys[-1] if self._keys else self.work.root
            ids = self._tokens[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]
            self._keys.append(child_key(parent, ids))
        return self._keys[index]

    def parent_key(self, index: int) -> bytes:
        """The key of the block before `index`; empty for the first."""
        return self.key(index - 1) if index else b""

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """A view of the tokens at [start, stop)."""
        view: npt.NDArray[np.int64] = self._tokens[start:stop]
        return view

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """The pool ids as an array; entries after len(blocks) mean nothing."""
        return self._table

    def note_seals(self, count: int, seconds: float) -> None:
        """So many blocks were filled; `seconds` is their part of the step's sealing."""
        self.sealed_here += count
        if self.generated:
            self.decode_seal_s += seconds
        else:
            self.prefill_seal_s += seconds

    def hold(self, ids: list[int]) -> None:
        """Takes over references to the next blocks of this sequence."""
        start = len(self.blocks)
        self._table[start : start + len(ids)] = ids
        self.blocks += ids

    def choice(self) -> Choice:
        """What the next token depends on besides its logits."""
        settings = self.work.settings
        banned = self._banned if self.num_output < settings.min_tokens else ()
        allowed = self.work.matcher.allowed() if self.work.matcher is not None else None
        return Choice(settings, self.length, self.history, banned, allowed)

    def no_choice(self) -> MeshError:
        """Why none of its tokens could be chosen."""
        name, matcher = self.work.request_id, self.work.matcher
        if matcher is not None and matcher.error:
            return InvalidRequest(f"the constraint of {name} cannot go on: {matcher.error}")
        return MeshError(f"the model's logits for {name} are not finite, or all are ruled out")

    def append(self, token: int) -> Finish | None:
        """Takes the token that was chosen; why the sequence ends with it, if it does."""
        self._tokens[self.length] = token
        self.length += 1
        self.generated += 1
        if self.history is not None:
            self.history.append(token)
        matcher = self.work.matcher
        if matcher is not None:
            matcher.advance(token)
        if token in self._end_ids or (matcher is not None and matcher.done):
            return Finish.STOP
        if self.length >= self.capacity:
            return Finish.LENGTH
        return Finish.HANDOVER if self.work.prefill_only else None

    def extend(self, tokens: Listed[int]) -> Finish | None:
        """`append` for each token in turn.

        Raises ValueError, and has taken the tokens up to there, if one before the last ends it.
        """
        end = self.length + len(tokens)
        if self._plain and end <= self.capacity:  # only the last of them can end it
            self._tokens[self.length : end] = tokens
            self.generated += len(tokens)
            self.length = end
            return Finish.LENGTH if end == self.capacity else None
        finish = None
        for token in tokens:
            if finish is not None:
                raise ValueError(f"{self.work.request_id} ended as {finish.name} before token")
            finish = self.append(token)
        return finish

    @property
    def tokens_left(self) -> int:
        """Output tokens until it ends for its length, if nothing ends it before."""
        return 1 if self.work.prefill_only else self.capacity - self.length

    def end(self, finish: Finish, now: float) -> None:
        """The one way into the terminal state. Raises ValueError the second time."""
        if self.finish is not None:
            raise ValueError(f"{self.work.request_id} already ended as {self.finish.name}")
        self.finish = finish
        self.state = State.FINISHED
        self.timeline.ended = now
