"""Pools of workers in one line: how many, and how each is laid out.

16xtp4               16 workers of 4 devices, heads and FFN split
4xdep16              4 workers of 16 attention replicas that share the experts
2xtp8,pp2            2 workers of 2 stages of 8 devices
8                    8 workers of one device
"""

import re
from dataclasses import replace

from kvmesh.backends.cost.parallel import Parallel
from kvmesh.integration.planning.choice import DEGREES, ChoiceError, layout_of
from kvmesh.integration.simulate.scenario import Failure, Role, ScenarioError, WorkerPool

_FAILURE = re.compile(r"(?P<worker>[^@]+)@(?P<at>[^+]+)(\+(?P<back>.+))?")


def read_pool(text: str, role: Role = "both", like: WorkerPool | None = None) -> WorkerPool:
    """like: whose other fields it has. Raises ScenarioError naming the part and its limit."""
    count, _, layout = text.partition("x")
    if not count.isdecimal():
        raise ScenarioError(
            f"{text!r} is no pool of workers: {count!r} is no number; write as in 16xtp4 or 4xdep16"
        )
    degrees: dict[str, int] = {}
    for part in filter(None, layout.split(",")):
        degree = DEGREES.fullmatch(part)
        if degree is None or degree[1] in ("mtp", "p"):
            raise ScenarioError(
                f"{text!r}: {part!r} is not understood; known: tp8, pp2, dp4, ep8, dep16, "
                "several by commas, as in 2xtp8,pp2"
            )
        degrees[degree[1]] = int(degree[2])
    try:
        parallel = layout_of(degrees, repr(text)) or Parallel()
    except ChoiceError as error:
        raise ScenarioError(str(error)) from None
    return replace(like or WorkerPool(), workers=int(count), parallel=parallel, role=role)


def read_failure(text: str) -> Failure:
    """worker@seconds, or worker@seconds+seconds if it comes back. Raises ScenarioError."""
    found = _FAILURE.fullmatch(text)
    if found is None:
        raise ScenarioError(f"fail: {text!r} is not understood; write as in worker-1@30 or @30+10")
    back = found["back"]
    at_s = _seconds(found["at"], text)
    return Failure(found["worker"], at_s, None if back is None else _seconds(back, text))


def _seconds(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ScenarioError(f"fail: {text!r}: {value!r} is no number of seconds") from None
