"""Who is in the mesh at a given time: members with leases. Pure; `now` is in seconds.

A member that is not renewed within its lease is gone. The same member_id with another incarnation
is another life of the same process: it replaces the old one at once.
"""

from dataclasses import dataclass

from kvmesh.services.common.addresses import is_address
from kvmesh.services.common.errors import Incompatible, InvalidRequest, NotFound
from kvmesh.v1 import inference_pb2, mesh_pb2

MAX_ID_BYTES = 128
MAX_URL_CHARS = 300
KINDS = ("worker", "kvcache", "tokenizer", "gateway")
ROLES = ("prefill", "decode", "both")


@dataclass(slots=True)
class Lease:
    """One member's place in the mesh; it ends at `expires`."""

    member: mesh_pb2.Member
    expires: float
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """What a registration did. fresh: a new life; replaced: the one before it, now over."""

    lease: Lease
    fresh: bool
    replaced: Lease | None


class Membership:
    """Members by id.

    The first worker sets the mesh's model and block format for as long as this router lives: a
    request that moves to another worker must go on with the same model.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}
        self._model: inference_pb2.ModelInfo | None = None

    @property
    def lease_s(self) -> float:
        return self._lease_s

    @property
    def model(self) -> inference_pb2.ModelInfo | None:
        """The mesh's model; None before the first worker came."""
        return self._model

    def register(self, member: mesh_pb2.Member, now: float) -> Joined:
        """Raises InvalidRequest for a malformed member, Incompatible for another block format."""
        _check(member)
        self._check_model(member)
        known = self._leases.get(member.member_id)
        if known is not None and known.member.incarnation == member.incarnation:
            _check_same(known.member, member)
            known.member.CopyFrom(member)
            known.expires = now + self._lease_s
            known.draining = False
            return Joined(known, False, None)
        if member.kind == "worker" and self._model is None:
            self._model = inference_pb2.ModelInfo()
            self._model.CopyFrom(member.model)
        lease = Lease(member, now + self._lease_s)
        self._leases[member.member_id] = lease
        return Joined(lease, True, known)

    def renew(self, member_id: str, incarnation: int, draining: bool, now: float) -> Lease:
        """Raises NotFound if this life of the member is not in the mesh (any more)."""
        lease = self._leases.get(member_id)
        if lease is None or lease.member.incarnation != incarnation or lease.expires <= now:
            raise NotFound(f"no member '{member_id}' with incarnation {incarnation}; register")
        lease.expires = now + self._lease_s
        lease.draining = draining
        return lease

    def leave(self, member_id: str, incarnation: int) -> Lease | None:
        """The lease that ended; None if there was none, so leaving twice is no error."""
        lease = self._leases.get(member_id)
        if lease is None or lease.member.incarnation != incarnation:
            return None
        return self._leases.pop(member_id)

    def expire(self, now: float) -> list[Lease]:
        """Removes and returns the leases that ran out by `now`."""
        ended = [lease for lease in self._leases.values() if lease.expires <= now]
        for lease in ended:
            del self._leases[lease.member.member_id]
        return ended

    def get(self, member_id: str) -> Lease | None:
        return self._leases.get(member_id)

    def leases(self, kind: str = "") -> list[Lease]:
        """By member id; all kinds if `kind` is empty."""
        found = [x for x in self._leases.values() if kind in ("", x.member.kind)]
        return sorted(found, key=lambda lease: lease.member.member_id)

    def _check_model(self, member: mesh_pb2.Member) -> None:
        mesh = self._model
        if mesh is None or member.kind == "kvcache":
            return
        if member.model.name and member.model.name != mesh.name:
            raise Incompatible(
                f"{member.member_id} has model '{member.model.name}', the mesh has '{mesh.name}'"
            )
        if member.kind == "worker" and member.model.format != mesh.format:
            raise Incompatible(
                f"{member.member_id} has block format {_format(member.model)}, "
                f"the mesh has {_format(mesh)}"
            )


def _check(member: mesh_pb2.Member) -> None:
    size = len(member.member_id.encode())
    if not 0 < size <= MAX_ID_BYTES:
        raise InvalidRequest(f"member_id has {size} bytes, must have 1..{MAX_ID_BYTES}")
    if member.kind not in KINDS:
        raise InvalidRequest(f"kind is '{member.kind}', must be one of {', '.join(KINDS)}")
    _check_address(member)
    if member.incarnation == 0:
        raise InvalidRequest(f"incarnation of {member.member_id} is 0, must be > 0")
    if member.kind != "worker":
        return
    if member.role not in ROLES:
        raise InvalidRequest(f"role is '{member.role}', must be one of {', '.join(ROLES)}")
    if not member.model.name or not member.model.max_context or not member.model.vocab_size:
        raise InvalidRequest(
            f"model of {member.member_id} needs a name, max_context and vocab_size"
        )


def _check_address(member: mesh_pb2.Member) -> None:
    """A gateway's is a URL, which nobody in the mesh opens."""
    if member.kind == "gateway" and 0 < len(member.address) <= MAX_URL_CHARS:
        return
    if not is_address(member.address):
        shown = member.address[:MAX_URL_CHARS]
        raise InvalidRequest(f"address of {member.member_id} is {shown!r}, must be host:port")


def _check_same(known: mesh_pb2.Member, member: mesh_pb2.Member) -> None:
    """What the router made for a member when it joined fits only what it was then."""
    for name in ("kind", "role", "address"):
        before, now = getattr(known, name), getattr(member, name)
        if before != now:
            raise InvalidRequest(
                f"{member.member_id} joined as {known.kind} {known.role} at {known.address}; "
                f"its {name} is now {now!r}, which needs another incarnation"
            )


def _format(model: inference_pb2.ModelInfo) -> str:
    block = model.format
    return (
        f"{block.fingerprint.hex() or 'none'}/{block.codec}/{block.block_size} tokens/"
        f"{block.block_bytes} bytes"
    )
