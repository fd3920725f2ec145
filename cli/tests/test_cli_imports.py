"""What docs/architecture.md says of imports holds."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "backends", "services", "integration", "cli")
# What decides: no gRPC, clock, thread or device in it.
PURE = (
    *("kvcache/store", "kvcache/keys", "kvcache/placement"),
    *("router/core", "router/index", "router/cost", "router/bill"),
    *("router/admission", "router/membership"),
    *("worker/scheduler", "worker/holdings", "worker/exports", "worker/sequence"),
    *("worker/sampler", "worker/blocks", "worker/device_use", "worker/virtual"),
)
IMPURE = {"asyncio", "grpc", "onnxruntime", "os", "socket", "sqlite3", "threading", "time"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sources(folder: str) -> list[Path]:
    found = [p for p in (ROOT / folder / "kvmesh").rglob("*.py") if "_pb2" not in p.name]
    assert found
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_one_way(floor: str):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    barred = {f"kvmesh.{name}" for name in above}
    if floor in ("kernels", "backends"):
        barred |= {"kvmesh.client", "kvmesh.v1", "kvmesh.oip"}
    for path in sources(floor):
        up = {m for m in imports(path) if ".".join(m.split(".")[:2]) in barred}
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_services_know_only_the_faces_of_others():
    """Another service's client, or a pure part of it that both sides must agree on."""
    faces = {"client", "keys", "core"}
    for path in sources("services"):
        parts = path.relative_to(ROOT / "services/kvmesh").parts
        if parts[0] != "services":
            continue
        for module in imports(path):
            names = module.split(".")
            if names[:2] != ["kvmesh", "services"] or names[2] in (parts[1], "common"):
                assert names[:2] != ["kvmesh", "client"], f"{path} imports kvmesh.client"
                continue
            assert parts[1] != "common", f"{path.relative_to(ROOT)} imports {module}"
            assert set(names[3:4]) & faces, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", PURE)
def test_what_decides_has_no_clock_and_no_device(name: str):
    path = ROOT / f"services/kvmesh/services/{name}.py"
    wrong = {m for m in imports(path) if m.split(".")[0] in IMPURE or m.endswith("_grpc")}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"
