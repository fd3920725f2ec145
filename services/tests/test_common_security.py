from pathlib import Path

import pytest

from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.security import (
    Security,
    check_binding,
    is_loopback,
    load_security,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    check_binding(host, Security())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_addresses_need_tls_a_token_and_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="needs a certificate"):
        check_binding(host, Security())
    with pytest.raises(ConfigError, match="needs a token"):
        check_binding(host, Security(cert=b"c", key=b"k", ca=b"a"))
    with pytest.raises(ConfigError, match="needs API keys"):
        check_binding(host, Security(cert=b"c", key=b"k", ca=b"a", token="t"))
    check_binding(host, Security(cert=b"c", key=b"k", ca=b"a", token="t", keys=True))


def test_a_token_is_never_in_the_repr() -> None:
    assert "s3cret" not in repr(Security(token="s3cret"))


def test_files_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMESH_TOKEN", raising=False)
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert load_security(None, None, None, file).token == "from-file"
    monkeypatch.setenv("KVMESH_TOKEN", "from-env")
    assert load_security(None, None, None, file).token == "from-env"
    monkeypatch.delenv("KVMESH_TOKEN")
    with pytest.raises(ConfigError, match="keys_file needs a token"):
        load_security(None, None, None, None, tmp_path / "keys.json")
    assert load_security(None, None, None, file, tmp_path / "keys.json").keys
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        load_security(None, None, None, file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_security(None, None, None, tmp_path / "absent")
    with pytest.raises(ConfigError, match="go together"):
        load_security(file, None, None, None)
    with pytest.raises(ConfigError, match=r"security\.ca is needed"):
        load_security(file, file, None, None)
