"""simulate(): one load through one scenario."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from kvmesh.integration.simulate.arrivals import Load, load_of
from kvmesh.integration.simulate.mesh import SimMesh
from kvmesh.integration.simulate.result import Result, result_of
from kvmesh.integration.simulate.scenario import Scenario, ScenarioError
from kvmesh.integration.workload import Workload


def simulate(scenario: Scenario, requests: Load | Workload, seed: int = 1) -> Result:
    """What the mesh would do with these requests. The same arguments give the same result.

    A Workload is sent open loop, with its shared prefixes. Raises ScenarioError or a BackendError
    (see deploy.deploy) for what cannot be simulated.
    """
    load = requests
    if isinstance(load, Workload):
        load = load_of(load, scenario.model.max_context)
    if not load.requests:
        raise ScenarioError(
            f"no request fits the context of {scenario.model.max_context} tokens of "
            f"{scenario.model.name}; {load.too_long} are too long"
        )
    mesh = SimMesh(scenario, load, seed)
    with _no_collection():
        mesh.run()
        return result_of(scenario, load, mesh)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing here is cyclic garbage, and looking for it among millions of keys takes a third of
    the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
