"""Who calls: the mesh's operator, or a tenant.

The bearer token of a call is the mesh's own token, which its processes and its operator have, or a
tenant's API key. Without either in the configuration everybody is the operator.
"""

import hmac
from collections.abc import Iterable
from typing import Any

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common.api_keys import Tenant
from kvmesh.services.common.config import SecurityConfig
from kvmesh.services.common.errors import Forbidden, Unauthenticated
from kvmesh.services.common.key_file import KeyFile
from kvmesh.services.common.metrics import Meters, Metric

AUTHORIZATION = "authorization"


class Callers:
    """Knows callers by their metadata; HTTP headers will do, as bytes or text."""

    def __init__(self, token: str | None = None, keys: KeyFile | None = None) -> None:
        self._token = token.encode() if token else None
        self.keys = keys

    @property
    def open(self) -> bool:
        """Nobody has to say who they are."""
        return self._token is None and self.keys is None

    def identify(self, metadata: Iterable[tuple[str, Any]] | None) -> Tenant | None:
        """The tenant; None for the operator. Compares in constant time.

        Raises Unauthenticated for a caller nobody knows, Forbidden for a tenant that is disabled.
        """
        if self.open:
            return None
        given = _bearer(metadata)
        if self._token is not None and hmac.compare_digest(given, self._token):
            return None
        tenant = self._find(given)
        if tenant is None:
            what = "bearer token" if self.keys is None else "API key"
            raise Unauthenticated(
                f"{what} missing or wrong; send 'authorization: Bearer <{what.split()[-1]}>'"
            )
        if tenant.disabled:
            raise Forbidden(f"tenant {tenant.name} is disabled; ask who runs this mesh")
        return tenant

    def _find(self, given: bytes) -> Tenant | None:
        if self.keys is None or not given.isascii():
            return None
        return self.keys.table().find(given.decode("ascii"))


def load_callers(token: str | None, files: SecurityConfig, meters: Meters) -> Callers:
    """Those of a public address. Raises ConfigError for a key file that cannot be used."""
    if files.keys_file is None:
        return Callers(token)
    keys = KeyFile(files.keys_file)
    meters.counters(
        [
            Metric(
                metric.KEY_FAILURES, "{failure}", "Versions of the key file that were not taken.",
                lambda: keys.failures,
            )
        ]
    )  # fmt: skip
    return Callers(token, keys)


def authorization(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """What the caller sent to say who it is; empty if nothing."""
    for name, value in metadata or ():
        if name == AUTHORIZATION:
            return value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return ""


def _bearer(metadata: Iterable[tuple[str, Any]] | None) -> bytes:
    scheme, _, key = authorization(metadata).partition(" ")
    return key.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
