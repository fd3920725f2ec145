"""What the router knows of each worker's load. Pure.

A worker's report is late by a step, so the requests sent since count as well: the larger of what it
reports and what this router has under way there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmesh.services.router.cost import StepEstimate, WorkerLoad
from kvmesh.v1 import mesh_pb2, worker_pb2


@dataclass(slots=True)
class WorkerState:
    """One life of a worker. sent: request -> its prompt tokens that no first token has yet paid."""

    member: mesh_pb2.Member
    connected: bool = False
    draining: bool = False
    report: worker_pb2.LoadReport = field(default_factory=worker_pb2.LoadReport)
    estimate: StepEstimate = field(default_factory=StepEstimate)
    sent: dict[str, int] = field(default_factory=dict)
    backlog: int = 0  # sum of sent

    @property
    def state(self) -> str:
        if not self.connected:
            return "connecting"
        return "draining" if self.draining or self.report.draining else "serving"

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

    def sent(self, member_id: str, request_id: str, uncached_tokens: int) -> None:
        """A request went there; it counts until `ended`."""
        state = self._changed(member_id)
        if state is not None:
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

    def loads(self, block_size: int) -> list[WorkerLoad]:
        if block_size != self._block_size:
            self._block_size = block_size
            self._loads.clear()
        known = self._loads
        for name, state in self._states.items():
            if name not in known:
                known[name] = state.load(block_size)
        return [known[name] for name in self._states]

    def _changed(self, member_id: str) -> WorkerState | None:
        """The state, which the caller is about to change."""
        self._loads.pop(member_id, None)
        return self._states.get(member_id)

    def can_generate(self) -> bool:
        """Whether any worker takes requests now."""
        return any(state.state == "serving" for state in self._states.values())


def _estimate(message: worker_pb2.Estimate) -> StepEstimate:
    return StepEstimate(
        message.base_s, message.prefill_token_s, message.decode_token_s, message.context_token_s
    )
