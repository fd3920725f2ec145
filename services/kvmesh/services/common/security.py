"""Who may connect: loopback without more; any other address only with TLS, a token and API keys.

Between services TLS is mutual: both sides show a certificate of the mesh's authority. The public
address shows a certificate and asks callers who they are; see common.callers.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvmesh.services.common.errors import ConfigError

TOKEN_VARIABLE = "KVMESH_TOKEN"


@dataclass(frozen=True, slots=True)
class Security:
    """Credentials of one process. The token is kept out of repr, and so out of logs.

    keys: whether there is a key file.
    """

    cert: bytes | None = None
    key: bytes | None = None
    ca: bytes | None = None
    token: str | None = None
    keys: bool = False

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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost is taken as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, security: Security) -> None:
    """Raises ConfigError if `host` can be reached from elsewhere without TLS, a token and keys."""
    if is_loopback(host):
        return
    missing = [
        name
        for name, there in (
            ("a certificate (security.cert)", security.cert),
            ("its key (security.key)", security.key),
            ("the authority (security.ca)", security.ca),
            (f"a token (security.token_file or {TOKEN_VARIABLE})", security.token),
            ("API keys (security.keys_file; 'kvmesh keys new' makes one)", security.keys),
        )
        if not there
    ]
    if missing:
        raise ConfigError(
            f"address {host} can be reached from other machines and needs {', '.join(missing)}; "
            "bind to 127.0.0.1, or set them"
        )


def load_security(
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    token_file: Path | None,
    keys_file: Path | None = None,
) -> Security:
    """Reads the files. KVMESH_TOKEN in the environment wins over `token_file`.

    keys_file: of a mesh; it is read by who needs the keys.

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
    if keys_file is not None and not token:
        raise ConfigError(
            f"security.keys_file needs a token, too (security.token_file or {TOKEN_VARIABLE}): "
            "the mesh's own processes and 'kvmesh' come in with that"
        )
    return Security(
        cert=_read(cert, "security.cert") if cert else None,
        key=_read(key, "security.key") if key else None,
        ca=_read(ca, "security.ca") if ca else None,
        token=token or None,
        keys=keys_file is not None,
    )


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
