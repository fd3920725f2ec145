from pathlib import Path

import pytest

from kvmesh.services.common.config import MeshConfig, load_config, parse_config
from kvmesh.services.common.errors import ConfigError


def test_defaults_are_a_disaggregated_mesh() -> None:
    config = load_config(None)
    assert [w.role for w in config.workers] == ["prefill", "decode"]
    assert config.kvcache.shards == 2
    assert config.host == "127.0.0.1"


def test_json_round_trip_is_exact() -> None:
    config = parse_config({"workers": [{"role": "both", "count": 3}]}, "inline")
    assert MeshConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"router": {"prot": 1}}, "unknown key 'router.prot', did you mean 'port'?"),
        ({"ruoter": {}}, "unknown key 'ruoter', did you mean 'router'?"),
        ({"workers": [{"rol": "both"}]}, "unknown key 'workers.0.rol', did you mean 'role'?"),
        ({"kvcache": {"zzz": 1}}, "known keys: shards, max_bytes, backend, device_bytes, replicas"),
        ({"router": {"port": 70000}}, "router.port = 70000"),
        ({"workers": []}, "workers = []"),
        ({"model": {"codec": "k9v9"}}, "model.codec = 'k9v9'"),
    ],
)
def test_wrong_key_or_value_is_named(data: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "mesh.toml")
    assert str(caught.value).startswith("mesh.toml: ")
    assert expected in str(caught.value)


def test_unreadable_and_invalid_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("router = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)
