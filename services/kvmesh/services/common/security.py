"""Who may connect: loopback without more; any other address only with TLS and a token.

Between services TLS is mutual: both sides show a certificate of the mesh's authority. The public
address shows a certificate and asks clients for the bearer token.
"""

import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvmesh.services.common.errors import ConfigError

TOKEN_VARIABLE = "KVMESH_TOKEN"


@dataclass(frozen=True, slots=True)
class Security:
    """Credentials of one process. The token is kept out of repr, and so out of logs."""

    cert: bytes | None = None
    key: bytes | None = None
    ca: bytes | None = None
    token: str | None = None

    def __repr__(self) -> str:
        return f"Security(tls={self.tls}, token={'set' if self.token else 'none'})"

    @property
    def tls(self) -> bool:
        return self.cert is not None

    def server_credentials(self, mutual: bool) -> grpc.ServerCredentials | None:
        """None without TLS. With `mutual`, callers must show a certificate of the authority."""
        if self.cert is None or self.key is None:
            return None
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)],
            root_certificates=self.ca if mutual else None,
            require_client_auth=mutual,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        if self.ca is None:
            return None
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class TokenCheck:
    """Compares bearer tokens in constant time."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def allows(self, metadata: Iterable[tuple[str, Any]] | None) -> bool:
        for key, value in metadata or ():
            if key == "authorization":
                given = value if isinstance(value, bytes) else str(value).encode()
                return hmac.compare_digest(given, self._expected)
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost is taken as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, security: Security) -> None:
    """Raises ConfigError if `host` can be reached from elsewhere without TLS and a token."""
    if is_loopback(host):
        return
    missing = [
        name
        for name, there in (
            ("a certificate (security.cert)", security.cert),
            ("its key (security.key)", security.key),
            ("the authority (security.ca)", security.ca),
            (f"a token (security.token_file or {TOKEN_VARIABLE})", security.token),
        )
        if not there
    ]
    if missing:
        raise ConfigError(
            f"address {host} can be reached from other machines and needs {', '.join(missing)}; "
            "bind to 127.0.0.1, or set them"
        )


def load_security(
    cert: Path | None, key: Path | None, ca: Path | None, token_file: Path | None
) -> Security:
    """Reads the files. KVMESH_TOKEN in the environment wins over `token_file`.

    Raises ConfigError naming the file that cannot be read, or the half of a pair that is missing.
    """
    if (cert is None) != (key is None):
        raise ConfigError("security.cert and security.key go together; set both or neither")
    if cert is not None and ca is None:
        raise ConfigError("security.ca is needed beside security.cert: services check each other")
    token = os.environ.get(TOKEN_VARIABLE)
    if not token and token_file is not None:
        token = _read(token_file, "security.token_file").decode().strip()
        if not token:
            raise ConfigError(f"security.token_file {token_file} is empty")
    return Security(
        cert=_read(cert, "security.cert") if cert else None,
        key=_read(key, "security.key") if key else None,
        ca=_read(ca, "security.ca") if ca else None,
        token=token or None,
    )


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
