"""What the router knows of each worker's load. Pure.

A worker's report is late by a step, so the requests sent since count as well: the larger of what it
reports and what this router has under way there.

What a worker says of its pace it learned from its last steps. If they were slow, on a machine that
was busy for a moment, it would get no more requests, and never learn better: so the estimate of one
that has been idle for a while is doubted, and the best that is known of its like taken instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvmesh.services.router.cost import StepEstimate, WorkerLoad
from kvmesh.v1 import mesh_pb2, worker_pb2

# Seconds without a request after which a worker's estimate is doubted. One that is slow indeed gets
# at most one request in so many seconds that a faster one would have had.
DOUBT_S = 5.0


@dataclass(slots=True)
class WorkerState:
    """One life of a worker. sent: request -> its prompt tokens that no first token has yet paid.

    first: the first estimate that it reported; None until it did. idle_since: when a decision
    found that it had nothing to do; None while it has. doubted: for so long that `loads` gives
    another estimate.
    """

    member: mesh_pb2.Member
    connected: bool = False
    draining: bool = False
    report: worker_pb2.LoadReport = field(default_factory=worker_pb2.LoadReport)
    estimate: StepEstimate = field(default_factory=StepEstimate)
    first: StepEstimate | None = None
    idle_since: float | None = None
    doubted: bool = False
    sent: dict[str, int] = field(default_factory=dict)
    backlog: int = 0  # sum of sent

    @property
    def state(self) -> str:
        if not self.connected:
            return "connecting"
        return "draining" if self.draining or self.report.draining else "serving"

    @property
    def kind(self) -> tuple[object, ...]:
        """What workers have in common that should take the same time for a step."""
        member = self.member
        return member.device, member.devices, member.simulated, member.role, member.model.name

    def load(self, block_size: int) -> WorkerLoad:
        report = self.report
        max_prompt = self.member.model.max_context - 1
        if report.blocks_total:
            max_prompt = min(max_prompt, report.blocks_total * block_size)
        state = self.state
        return WorkerLoad(
            member_id=self.member.member_id,
            role=self.member.role,
            estimate=self.estimate,
            running=max(report.running + report.waiting, len(self.sent)),
            backlog_tokens=max(report.pending_prefill_tokens, self.backlog),
            max_prompt=max_prompt,
            refused="" if state == "serving" else state,
        )


class WorkerTable:
    """Workers by member id. Verbs about a worker that is not there any more do nothing."""

    def __init__(self) -> None:
        self._states: dict[str, WorkerState] = {}
        # Of workers whose state has not changed since: a decision asks all of them.
        self._loads: dict[str, WorkerLoad] = {}
        self._block_size = 0

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._states.values())

    def get(self, member_id: str) -> WorkerState | None:
        return self._states.get(member_id)

    def join(self, member: mesh_pb2.Member) -> None:
        """A new life: what an earlier one was sent is forgotten."""
        self._states[member.member_id] = WorkerState(member)
        self._loads.pop(member.member_id, None)

    def leave(self, member_id: str) -> None:
        self._states.pop(member_id, None)
        self._loads.pop(member_id, None)

    def connected(self, member_id: str, connected: bool) -> None:
        state = self._changed(member_id)
        if state is not None:
            state.connected = connected
            if not connected:
                state.sent.clear()
                state.backlog = 0
                state.report = worker_pb2.LoadReport()

    def draining(self, member_id: str, draining: bool) -> None:
        state = self._changed(member_id)
        if state is not None:
            state.draining = draining

    def reported(self, member_id: str, report: worker_pb2.LoadReport) -> None:
        state = self._changed(member_id)
        if state is not None:
            state.report = report
            if report.HasField("estimate"):
                state.estimate = _estimate(report.estimate)
                state.first = state.first or state.estimate

    def sent(self, member_id: str, request_id: str, uncached_tokens: int) -> None:
        """A request went there; it counts until `ended`."""
        state = self._changed(member_id)
        if state is not None:
            state.idle_since = None
            state.backlog += uncached_tokens - state.sent.get(request_id, 0)
            state.sent[request_id] = uncached_tokens

    def first_token(self, member_id: str, request_id: str) -> None:
        """Its prompt has been computed."""
        state = self._changed(member_id)
        if state is not None and state.sent.get(request_id):
            state.backlog -= state.sent[request_id]
            state.sent[request_id] = 0

    def ended(self, member_id: str, request_id: str) -> None:
        """Twice is no error."""
        state = self._changed(member_id)
        if state is not None:
            state.backlog -= state.sent.pop(request_id, 0)

    def loads(self, block_size: int, now: float) -> list[WorkerLoad]:
        """now: seconds, of the same clock at each decision."""
        if block_size != self._block_size:
            self._block_size = block_size
            self._loads.clear()
        known = self._loads
        doubted = []
        for name, state in self._states.items():
            if name not in known:
                known[name] = load = state.load(block_size)
                state.doubted = False
                if load.running:
                    state.idle_since = None
                elif state.idle_since is None:
                    state.idle_since = now
            since = state.idle_since
            if since is not None and not state.doubted and now - since >= DOUBT_S:
                doubted.append(state)
        if doubted:
            self._doubt(doubted)
        return [known[name] for name in self._states]

    def _doubt(self, states: list[WorkerState]) -> None:
        best: dict[tuple[object, ...], StepEstimate] = {}
        for state in self._states.values():
            if state.first is not None:
                known = best.get(state.kind, state.first)
                best[state.kind] = min(known, state.first, state.estimate, key=_lone_step_s)
        for state in states:
            state.doubted = True
            load = self._loads[state.member.member_id]
            if state.kind in best:
                self._loads[load.member_id] = replace(load, estimate=best[state.kind])

    def _changed(self, member_id: str) -> WorkerState | None:
        """The state, which the caller is about to change."""
        self._loads.pop(member_id, None)
        return self._states.get(member_id)

    def can_generate(self) -> bool:
        """Whether any worker takes requests now."""
        return any(state.state == "serving" for state in self._states.values())


def _lone_step_s(estimate: StepEstimate) -> float:
    return estimate.base_s + estimate.decode_token_s


def _estimate(message: worker_pb2.Estimate) -> StepEstimate:
    return StepEstimate(
        message.base_s, message.prefill_token_s, message.decode_token_s, message.context_token_s
    )
