"""Credentials of a client from files."""

from pathlib import Path

from kvmesh.services.common.security import Security, load_security


def load_credentials(
    ca: Path | str | None = None,
    token_file: Path | str | None = None,
    cert: Path | str | None = None,
    key: Path | str | None = None,
) -> Security:
    """TLS and a bearer token, each optional.

    ca: PEM of the authority that signed the mesh's certificate; without it there is no TLS.
    token_file: KVMESH_TOKEN in the environment wins. cert, key: a certificate of one's own, which
    only the mesh's inner addresses ask for. Raises ConfigError naming the file.
    """
    cert_path, key_path, ca_path, token_path = (
        Path(path) if path is not None else None for path in (cert, key, ca, token_file)
    )
    return load_security(cert_path, key_path, ca_path, token_path)
