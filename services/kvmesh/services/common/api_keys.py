"""API keys and the tenants behind them, as the key file has them. Pure.

A key is 256 random bits, so nobody can guess one or enumerate them, however fast the hash: what
slow hashes do for passwords there is nothing to do for here, and each request would pay for it. The
file keeps HMAC-SHA256 of each key under the file's own secret, so it opens nothing by itself, and
equal keys in two files do not look alike. The salts of tenants are made from the same secret.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from kvmesh.services.common.config import Section
from kvmesh.services.common.errors import ConfigError

PREFIX = "kvm"
SECRET_BYTES = 32
ID_BYTES = 6
MAX_KEY_CHARS = 128  # what is longer is no key of ours, and is not hashed
_SALT_TAG = "kvmesh.tenant.salt/1"

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
HexSecret = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
Limit = Annotated[int, Field(ge=1)] | None


class Limits(Section):
    """What a tenant may take; None: as much as the mesh has."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None  # of prompts and outputs together
    concurrency: Limit = None  # requests at once


class TenantEntry(Limits):
    """disabled: its keys are known, and refused."""

    disabled: bool = False


class KeyEntry(Section):
    """id: the part of a key that is no secret. created, revoked: Unix seconds."""

    id: KeyId
    tenant: TenantName
    hash: HexSecret
    created: int
    revoked: int | None = None


class KeyDocument(Section):
    """The whole file."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    secret: HexSecret
    tenants: dict[TenantName, TenantEntry] = Field(default_factory=dict)
    keys: tuple[KeyEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays for a request. Its secret is kept out of repr, and so out of logs."""

    name: str
    limits: Limits = field(default_factory=Limits)
    disabled: bool = False
    secret: bytes = field(default=b"", repr=False)

    def salt(self, own: str) -> str:
        """The cache salt of its requests; `own`: what the caller chose, within the tenant.

        64 hex digits that nobody can make without the file's secret, so no caller of another
        tenant can name them.
        """
        text = "\0".join((_SALT_TAG, self.name, own))
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


class KeyTable:
    """Finds the tenant of a key."""

    def __init__(self, document: KeyDocument) -> None:
        self._secret = bytes.fromhex(document.secret)
        self._entries = {entry.id: entry for entry in document.keys if entry.revoked is None}
        self._tenants: Mapping[str, Tenant] = {
            name: Tenant(name, entry, entry.disabled, self._secret)
            for name, entry in document.tenants.items()
        }

    def find(self, key: str) -> Tenant | None:
        """None for a key that is unknown or revoked. Takes as long for one that is almost right."""
        if len(key) > MAX_KEY_CHARS:
            return None
        entry = self._entries.get(key_id(key))
        expected = entry.hash if entry is not None else "0" * 64
        if not hmac.compare_digest(_hash(self._secret, key), expected) or entry is None:
            return None
        return self._tenants[entry.tenant]


def key_id(key: str) -> str:
    """The part of a key that names it; of something else, anything."""
    return key.partition("_")[2].partition("_")[0]


def empty_document() -> KeyDocument:
    return KeyDocument(secret=secrets.token_hex(SECRET_BYTES))


def parse_document(text: str, source: str) -> KeyDocument:
    """Raises ConfigError naming the file and the field that is wrong, never a secret."""
    try:
        document = KeyDocument.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{source}: {where}: {first['msg']}") from None
    ids = [entry.id for entry in document.keys]
    for entry in document.keys:
        if entry.tenant not in document.tenants:
            raise ConfigError(f"{source}: key {entry.id} is of '{entry.tenant}', who is no tenant")
        if ids.count(entry.id) > 1:
            raise ConfigError(f"{source}: key {entry.id} is there twice")
    return document


def add_key(
    document: KeyDocument, tenant: str, limits: Mapping[str, int | None], now: int
) -> tuple[KeyDocument, str]:
    """A new key of `tenant`, who becomes one if it was none; the key is in nothing that stays.

    limits: fields of Limits that are set anew. Raises ConfigError for a name that cannot be one.
    """
    known = document.tenants.get(tenant, TenantEntry())
    used = {entry.id for entry in document.keys}
    new_id = secrets.token_hex(ID_BYTES)
    while new_id in used:
        new_id = secrets.token_hex(ID_BYTES)
    key = f"{PREFIX}_{new_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    try:
        entry = KeyEntry(
            id=new_id, tenant=tenant, hash=_hash(bytes.fromhex(document.secret), key), created=now
        )
        changed = TenantEntry.model_validate({**known.model_dump(), **limits})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][-1]} = {first['input']!r}: {first['msg']}") from None
    update = {
        "tenants": {**document.tenants, tenant: changed},
        "keys": (*document.keys, entry),
    }
    return document.model_copy(update=update), key


def revoke_key(document: KeyDocument, wanted: str, now: int) -> KeyDocument:
    """Raises ConfigError if no key has the id `wanted`; one that is revoked stays so."""
    if all(entry.id != wanted for entry in document.keys):
        raise ConfigError(f"no key has the id '{wanted}'; 'kvmesh keys list' shows them")
    keys = tuple(
        entry.model_copy(update={"revoked": now})
        if entry.id == wanted and entry.revoked is None
        else entry
        for entry in document.keys
    )
    return document.model_copy(update={"keys": keys})


def _hash(secret: bytes, key: str) -> str:
    return hmac.new(secret, key.encode(errors="replace"), hashlib.sha256).hexdigest()
