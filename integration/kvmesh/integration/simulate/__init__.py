"""A mesh in virtual time: the live router's and schedulers' decisions, no numerics, all simulated.

result = simulate(Scenario(model, device, pools=(WorkerPool(8, Parallel(tensor=4)),)), load)
"""

from kvmesh.integration.simulate.arrivals import ClosedLoop, Load, load_of
from kvmesh.integration.simulate.result import Result
from kvmesh.integration.simulate.run import simulate
from kvmesh.integration.simulate.scenario import (
    Failure,
    Optimisations,
    Overheads,
    Scenario,
    ScenarioError,
    WorkerPool,
)

__all__ = [
    "ClosedLoop",
    "Failure",
    "Load",
    "Optimisations",
    "Overheads",
    "Result",
    "Scenario",
    "ScenarioError",
    "WorkerPool",
    "load_of",
    "simulate",
]
