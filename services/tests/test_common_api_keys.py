"""Keys, their file, and who a caller is."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from kvmesh.services.common.api_keys import (
    KeyDocument,
    KeyTable,
    Tenant,
    add_key,
    empty_document,
    key_id,
    parse_document,
    revoke_key,
)
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.errors import ConfigError, Forbidden, Unauthenticated
from kvmesh.services.common.key_file import POLL_S, KeyFile, changing, read_document

DAY = 1_700_000_000


def two_tenants() -> tuple[KeyDocument, str, str]:
    document, acme = add_key(empty_document(), "acme", {"concurrency": 2}, DAY)
    document, beta = add_key(document, "beta", {}, DAY)
    return document, acme, beta


def bearer(key: str) -> list[tuple[str, str]]:
    return [("other", "x"), ("authorization", f"Bearer {key}")]


def test_a_key_finds_its_tenant_and_nothing_else_does() -> None:
    document, acme, beta = two_tenants()
    table = KeyTable(document)
    found = table.find(acme)
    assert found is not None and (found.name, found.limits.concurrency) == ("acme", 2)
    other = table.find(beta)
    assert other is not None and other.name == "beta"
    mixed = "_".join((*acme.split("_")[:2], beta.split("_", 2)[2]))
    for wrong in ("", "_", acme[:-1], acme + "a", acme.upper(), mixed, "kvm_x_y", "a" * 100_000):
        assert table.find(wrong) is None


def test_keys_are_random_and_only_their_hashes_are_kept() -> None:
    document, acme, beta = two_tenants()
    text = document.model_dump_json()
    for key in (acme, beta):
        assert key.split("_", 2)[2] not in text
        assert len(key.split("_", 2)[2]) >= 43  # 256 bits in base 64
    # The same key under another file's secret has another hash.
    again, _ = add_key(empty_document(), "acme", {}, DAY)
    moved = again.model_copy(update={"keys": document.keys, "tenants": document.tenants})
    assert KeyTable(moved).find(acme) is None


def test_a_revoked_key_is_none_and_the_others_stay() -> None:
    document, acme, beta = two_tenants()
    document = revoke_key(document, key_id(acme), DAY + 1)
    again = revoke_key(document, key_id(acme), DAY + 2)
    assert again == document and document.keys[0].revoked == DAY + 1
    assert KeyTable(document).find(acme) is None
    assert KeyTable(document).find(beta) is not None
    with pytest.raises(ConfigError, match="no key has the id 'absent'"):
        revoke_key(document, "absent", DAY)


def test_a_further_key_keeps_the_limits_that_are_not_named() -> None:
    document, _, _ = two_tenants()
    document, second = add_key(document, "acme", {"tokens_per_minute": 9}, DAY)
    found = KeyTable(document).find(second)
    assert found is not None
    assert (found.limits.concurrency, found.limits.tokens_per_minute) == (2, 9)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "a\n", "ä"])
def test_a_name_that_cannot_be_a_label_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="tenant"):
        add_key(empty_document(), name, {}, DAY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"secret": "short"}, "secret"),
        ({"color": 1}, "color"),
        ({"tenants": {"acme": {"concurrency": 0}, "beta": {}}}, "concurrency"),
        ({"tenants": {"beta": {}}}, "is of 'acme', who is no tenant"),
    ],
)
def test_a_wrong_file_is_refused_without_its_secrets(
    change: dict[str, object], message: str
) -> None:
    document, _, _ = two_tenants()
    data = {**document.model_dump(exclude_none=True), **change}
    with pytest.raises(ConfigError, match=message) as caught:
        parse_document(json.dumps(data), "keys.json")
    assert document.secret not in str(caught.value) and "short" not in str(caught.value)
    assert "keys.json" in str(caught.value)


def test_the_same_id_twice_is_refused() -> None:
    document, _, _ = two_tenants()
    twice = document.model_copy(update={"keys": (*document.keys, document.keys[0])})
    with pytest.raises(ConfigError, match="is there twice"):
        parse_document(twice.model_dump_json(), "keys.json")


def test_salts_differ_by_tenant_by_secret_and_by_what_the_caller_chose() -> None:
    acme = Tenant("acme", secret=b"s" * 32)
    salts = [
        acme.salt(""), acme.salt("x"), Tenant("beta", secret=b"s" * 32).salt(""),
        Tenant("acme", secret=b"t" * 32).salt(""), Tenant("acm", secret=b"s" * 32).salt("e"),
    ]  # fmt: skip
    assert len(set(salts)) == 5
    assert acme.salt("x") == replace(acme).salt("x")
    # A caller who names another tenant's salt gets his own tenant's salt of that name.
    assert Tenant("beta", secret=b"s" * 32).salt(acme.salt("")) not in salts
    assert "ssss" not in repr(acme)


def test_the_file_is_the_owners_alone_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    with changing(path) as held:
        held[0], key = add_key(held[0], "acme", {}, DAY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(RuntimeError), changing(path) as held:
        held[0], _ = add_key(held[0], "acme", {}, DAY)
        raise RuntimeError
    assert path.read_bytes() == before
    assert KeyTable(read_document(path)).find(key) is not None
    with pytest.raises(ConfigError, match="keys new"):
        read_document(tmp_path / "absent")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, document: KeyDocument | str) -> None:
    """Replaces the file, always with another signature."""
    text = document if isinstance(document, str) else document.model_dump_json()
    part = path.with_suffix(".part")
    part.write_text(text)
    os.utime(part, ns=(0, path.stat().st_mtime_ns + 1 if path.exists() else 0))
    part.chmod(0o600)
    part.replace(path)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    document, acme, beta = two_tenants()
    write(path, document)
    keys = KeyFile(path, clock)
    write(path, revoke_key(document, key_id(acme), DAY))
    assert keys.table().find(acme) is not None  # not looked at yet
    clock.now += POLL_S
    assert keys.table().find(acme) is None and keys.table().find(beta) is not None


def test_a_file_that_became_wrong_or_went_away_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    document, acme, beta = two_tenants()
    write(path, document)
    keys = KeyFile(path, clock)
    write(path, "{")
    for _ in range(3):  # said once
        clock.now += POLL_S
        assert keys.table().find(acme) is not None
    assert keys.failures == 1 and "stay as they were" in caplog.text
    path.unlink()
    clock.now += POLL_S
    assert keys.table().find(acme) is not None and keys.failures == 2
    write(path, revoke_key(document, key_id(acme), DAY))
    clock.now += POLL_S
    assert keys.table().find(acme) is None and keys.table().find(beta) is not None
    assert document.secret not in caplog.text


def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    write(path, two_tenants()[0])
    path.chmod(0o644)
    KeyFile(path)
    assert "chmod 600" in caplog.text


def test_callers(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    document, acme, beta = two_tenants()
    tenants = {**document.tenants, "beta": document.tenants["beta"].model_copy(
        update={"disabled": True}
    )}  # fmt: skip
    write(path, document.model_copy(update={"tenants": tenants}))
    nobody = Callers()
    assert nobody.open and nobody.identify(None) is None

    token = Callers("s3cret")
    assert not token.open and token.identify(bearer("s3cret")) is None
    assert token.identify([("authorization", b"bearer s3cret")]) is None
    for wrong in (bearer("s3cre"), [("authorization", "s3cret")], [], None, bearer("ä")):
        with pytest.raises(Unauthenticated, match="Bearer <token>"):
            token.identify(wrong)

    both = Callers("s3cret", KeyFile(path))
    assert both.identify(bearer("s3cret")) is None
    tenant = both.identify([("authorization", f"Bearer {acme}".encode())])
    assert tenant is not None and tenant.name == "acme"
    with pytest.raises(Unauthenticated, match="API key"):
        both.identify(bearer(acme + "x"))
    with pytest.raises(Forbidden, match="beta is disabled"):
        both.identify(bearer(beta))
