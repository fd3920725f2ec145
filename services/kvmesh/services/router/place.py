"""A request's place: among all requests of the mesh, and within what its tenant may take."""

import secrets

from kvmesh.services.common.api_keys import Tenant
from kvmesh.services.router.parts import RouterParts


class Place:
    """tenant: None for the operator, who has no limits of his own."""

    def __init__(self, parts: RouterParts, tenant: Tenant | None) -> None:
        self._parts = parts
        self._tenant = tenant
        self._ticket = secrets.token_hex(8)  # nothing that callers name, who may use a name twice

    def take(self) -> None:
        """Raises Overloaded if there is none; leave() in any case."""
        now = self._parts.clock()
        if self._tenant is not None:
            self._parts.limits.enter(self._tenant, self._ticket, now)
        self._parts.admission.enter(self._ticket, now)

    def hold(self, num_tokens: int) -> None:
        """Raises Overloaded if the tenant may not have so many tokens now."""
        if self._tenant is not None:
            self._parts.limits.hold(self._tenant, self._ticket, num_tokens, self._parts.clock())

    def leave(self, num_tokens: int, finished: bool) -> None:
        """num_tokens: what it used. Without a place it does nothing."""
        now = self._parts.clock()
        if self._tenant is not None:
            self._parts.limits.leave(self._tenant, self._ticket, num_tokens, now, finished)
        self._parts.admission.leave(self._ticket, now, finished)
