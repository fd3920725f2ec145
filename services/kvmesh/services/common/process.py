"""What every service process is given when it starts."""

import os
import secrets
from dataclasses import dataclass, field
from typing import TypeVar

from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.metrics import Meters
from kvmesh.services.common.security import Security
from kvmesh.services.common.telemetry import Telemetry

PORT_VARIABLE = "KVMESH_PORT"
MESH_PORT_VARIABLE = "KVMESH_MESH_PORT"  # the second listener of router and gateway
METRICS_PORT_VARIABLE = "KVMESH_METRICS_PORT"


Configured = TypeVar("Configured", int, int | None)


def listen_port(configured: Configured, variable: str = PORT_VARIABLE) -> int | Configured:
    """The port of `variable`, which a restarted member gets to keep its old one, or `configured`.

    Raises ConfigError if the variable holds no port.
    """
    text = os.environ.get(variable)
    if text is None:
        return configured
    if not text.isdecimal() or int(text) > 65_535:
        raise ConfigError(f"{variable} is {text!r}; set a port from 0 (any free one) to 65535")
    return int(text)


def new_incarnation() -> int:
    """A number that tells this life of a process from every other; 1 <= n < 2**63."""
    return secrets.randbelow(2**63 - 1) + 1


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """One process of the mesh: who it is and what it talks with.

    member_id: its place in the mesh, the same after a restart: router, tokenizer, kvcache-0,
        kvcache-1, worker-0 ... (numbers count over all [[workers]] tables in order).
    mesh_address: the router's Mesh service; empty for the router itself.
    """

    config: MeshConfig
    member_id: str
    mesh_address: str
    security: Security
    telemetry: Telemetry
    incarnation: int = field(default_factory=new_incarnation)
    meters: Meters = field(default_factory=Meters)
