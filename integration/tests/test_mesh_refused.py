"""Meshes that cannot start: said at once, by name, and nothing stays behind."""

import shutil
import socket
from pathlib import Path

import pytest
from meshes import mesh_config

from kvmesh.integration.launch import running_mesh
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import MeshConfig, ModelConfig, RouterConfig
from kvmesh.services.common.errors import ConfigError


async def refusal(config: MeshConfig, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        async with running_mesh(config, run_dir) as mesh:
            await mesh.wait_ready()
    assert not (run_dir / "mesh.json").exists()
    return str(caught.value)


async def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_path(ModelConfig()), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    model = ModelConfig(name="broken", path=folder)
    said = await refusal(mesh_config(model=model), tmp_path / "run")
    assert "model.safetensors: is truncated" in said


async def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    model = ModelConfig(name="none", path=tmp_path)
    said = await refusal(mesh_config(model=model), tmp_path / "run")
    assert "holds no config.json" in said


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = mesh_config(router=RouterConfig(port=port))
        said = await refusal(config, tmp_path / "run")
    assert f"cannot listen on 127.0.0.1:{port}" in said
