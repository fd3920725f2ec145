"""StepCost: seconds of a step on one rank, op by op."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.cost.imbalance import Routing
from kvmesh.backends.cost.links import Links, stage_hop_s
from kvmesh.backends.cost.ops import head_terms, host_term, layer_terms, seal_share
from kvmesh.backends.cost.parallel import Formats, Options, Parallel, check_parallel
from kvmesh.backends.cost.rates import Rates
from kvmesh.backends.cost.shapes import FEATURES, F, StepWork, windowed
from kvmesh.backends.cost.terms import Plan, Term
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import ShapeError

Floats = npt.NDArray[np.float64]
_PARTS = ("compute", "memory", "link")


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op over all its layers. bound: compute, memory, link, or floor if that is more than all
    of them; the host's gap is always floor."""

    name: str
    seconds: float
    bound: str
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class OpTimes:
    """A step on the busiest rank of one stage.

    total_s: how long the step occupies it. latency_s: until its tokens are out, through all stages
    of the pipeline.
    """

    total_s: float
    latency_s: float
    _compiled: "tuple[_Terms, ...]"
    _features: tuple[Floats, ...]

    def ops(self) -> Iterator[OpTime]:
        """Each op with what binds it; their seconds add up to total_s. Those of a draft pass are
        called draft.*, once for each pass."""
        for index, (compiled, x) in enumerate(zip(self._compiled, self._features, strict=True)):
            for op in compiled.ops(x):
                yield replace(op, name=f"draft.{op.name}") if index else op

    def by_name(self) -> dict[str, float]:
        """Seconds by op, draft passes summed up; ops that took none are left out."""
        seconds: dict[str, float] = {}
        for op in self.ops():
            if op.seconds > 0:
                seconds[op.name] = seconds.get(op.name, 0.0) + op.seconds
        return seconds


class _Terms:
    """Terms as one matrix: rows are (part, term), columns features."""

    def __init__(self, terms: Iterable[Term]) -> None:
        self._terms = tuple(terms)
        parts = ("math", "memory", "link", "floor")
        matrix = np.zeros((len(parts), len(self._terms), FEATURES))
        for p, part in enumerate(parts):
            for row, term in enumerate(self._terms):
                for feature, seconds in getattr(term, part).items():
                    matrix[p, row, feature] = seconds
        self._count = len(self._terms)
        self._matrix = matrix
        # Rows of math, memory and links, and one of all floors, which just add up.
        rows = matrix[:3].reshape(-1, FEATURES)
        self._fast = np.concatenate([rows, matrix[3].sum(axis=0)[None]])

    def seconds(self, features: Floats) -> float:
        # Plain Python on a short list: a third of the time that more NumPy calls would take.
        n, parts = self._count, self._fast.dot(features).tolist()
        return float(sum(map(max, parts[:n], parts[n : 2 * n], parts[2 * n : -1]), parts[-1]))

    def ops(self, features: Floats) -> Iterator[OpTime]:
        parts = self._matrix.dot(features)
        for row, term in enumerate(self._terms):
            column = parts[:, row]
            most = int(column[:3].argmax())
            bound = _PARTS[most] if column[most] >= column[3] else "floor"
            yield OpTime(
                term.name,
                float(column[most] + column[3]),
                bound,
                sum(value * features[f] for f, value in term.flops.items()),
                sum(value * features[f] for f, value in term.bytes.items()),
            )


class StepCost:
    """What a step of one instance costs on a device. Pure, and cheap enough to simulate with.

    Raises DeviceError if the device's file lacks what the model needs, ShapeError if the model
    cannot be laid out so.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        parallel: Parallel | None = None,
        formats: Formats | None = None,
        options: Options | None = None,
    ) -> None:
        self.device, self.model = device, model
        self.parallel, self.formats = parallel or Parallel(), formats or Formats()
        self.options = options or Options()
        check_parallel(model, self.parallel)
        drafts = self.options.draft_tokens
        if drafts and not model.mtp_layers:
            raise ShapeError(
                f"draft_tokens is {drafts}, must be 0: {model.name} has no layer of multi-token "
                "prediction"
            )
        self._width = 1 + drafts
        self._terms = _Terms(self._step_terms())
        self._draft = _Terms(self._draft_terms()) if drafts else None
        self._reduce = Links(device, self.parallel.tensor)
        self._routing = None
        if model.moe is not None:
            self._routing = Routing(
                model.moe.experts, model.moe.top_k, self.parallel.expert, self.options.routing
            )
        self._window = model.window.tokens if model.window else None

    def _plan(self, width: int) -> Plan:
        rates = Rates(self.device)
        return Plan(
            self.device, self.model, self.parallel, self.formats, self.options, rates, width
        )

    def _step_terms(self) -> Iterator[Term]:
        plan, model = self._plan(self._width), self.model
        share = -(-model.layers // self.parallel.pipeline) / model.layers  # of the fullest stage
        yield from layer_terms(plan, model.dense_layers * share, model.moe_layers * share)
        yield from head_terms(plan)
        yield host_term(plan)

    def _draft_terms(self) -> Iterator[Term]:
        """One pass of multi-token prediction over the decoding sequences; the rest is alike."""
        plan, moe = self._plan(1), self.model.moe is not None
        yield from layer_terms(plan, 0 if moe else 1, 1 if moe else 0)
        yield from head_terms(plan)

    def instance(self, work: StepWork) -> StepWork:
        """One rank's even share of an instance's work: attention replicas divide the sequences."""
        return work.divided(self.parallel.data)

    def seconds(self, work: StepWork, group_tokens: float | None = None) -> float:
        """total_s of step(): the fast way."""
        if work.prefill_tokens + work.decode_sequences <= 0:
            return 0.0
        total = self._terms.seconds(self._features(work, self._width, group_tokens))
        if self._draft is not None and work.decode_sequences:
            drafted = self._features(_decodes(work), 1, self._drafted_group(work, group_tokens))
            total += self.options.draft_tokens * self._draft.seconds(drafted)
        return total

    def step(self, work: StepWork, group_tokens: float | None = None) -> OpTimes:
        """A step of one rank.

        work: of the busiest attention replica. group_tokens: tokens of all replicas together, which
        the experts share; [each has as many as this one].
        """
        if work.prefill_tokens + work.decode_sequences <= 0:
            return OpTimes(0.0, 0.0, (), ())
        features = [self._features(work, self._width, group_tokens)]
        terms = [self._terms]
        if self._draft is not None and work.decode_sequences:
            drafted = self._features(_decodes(work), 1, self._drafted_group(work, group_tokens))
            features += [drafted] * self.options.draft_tokens
            terms += [self._draft] * self.options.draft_tokens
        total = sum(t.seconds(f) for t, f in zip(terms, features, strict=True))
        latency = total + self._stages_s(features[0][F.TOKENS], total)
        return OpTimes(total, latency, tuple(terms), tuple(features))

    def _stages_s(self, tokens: float, total: float) -> float:
        """What the other stages of the pipeline add to a token's way through the model."""
        stages = self.parallel.pipeline
        if stages == 1:
            return 0.0
        size = tokens * self.model.hidden * 2 / self.parallel.tensor
        hop = stage_hop_s(self.device, size, self.parallel.devices)
        return (stages - 1) * (total + hop)

    def _drafted_group(self, work: StepWork, group_tokens: float | None) -> float | None:
        """Of a group's tokens, those that a draft has: one of each decoding sequence."""
        if group_tokens is None:
            return None
        own = work.prefill_tokens + work.decode_sequences * self._width
        return group_tokens * work.decode_sequences / own

    def _features(self, work: StepWork, width: int, group_tokens: float | None) -> Floats:
        """In the order of shapes.F; written out, since a simulator asks for it at every step."""
        decodes = work.decode_sequences * width
        tokens = work.prefill_tokens + decodes
        attended = read = decode = 0.0
        if self._window is not None:
            attended, read, decode = windowed(work, self._window)
        group = assignments = experts = visits = reduce_s = 0.0
        if self._routing is not None:
            group = tokens * self.parallel.data if group_tokens is None else group_tokens
            assignments, experts = self._routing.busiest(group)
            # A token comes once to a rank, however many experts it has there.
            visits = min(group, assignments) * (1 - 1 / self.parallel.expert)
        if self.parallel.tensor > 1:
            reduce_s = self._reduce.all_reduce_s(tokens * self.model.hidden * 2)
        rows = work.prefill_outputs + decodes
        return np.array(
            (
                tokens,
                decodes,
                work.prefill_context,
                work.prefill_attended,
                work.decode_context,
                read,
                attended,
                decode,
                rows,
                work.prefill_chunks + work.decode_sequences,
                group,
                assignments,
                experts,
                visits,
                reduce_s,
                1.0,
                1.0 if work.prefill_tokens else 0.0,
                1.0 if decodes else 0.0,
                1.0 if rows else 0.0,
                seal_share(tokens),
            ),
            np.float64,
        )


def _decodes(work: StepWork) -> StepWork:
    """The decoding sequences of a step alone."""
    return StepWork(
        decode_sequences=work.decode_sequences,
        decode_context=work.decode_context,
        windowed_decode=work.windowed_decode,
    )
