"""Finding backends by name, and saying why not."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvmesh.backends import registry
from kvmesh.backends.base import ModelOptions
from kvmesh.backends.cpu import backend as cpu
from kvmesh.backends.errors import BackendUnavailable

HERE = Path()


class Absent:
    """A third party's backend whose device is not there."""

    def probe(self) -> str | None:
        return "no such device; plug one in"


@pytest.fixture
def third_parties(monkeypatch):
    def install(**values: str) -> None:
        found = [EntryPoint(name, value, registry.GROUP) for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)

    return install


def test_cpu_is_built_in_and_runs():
    assert registry.list_backends()["cpu"] is None


def test_third_party_is_listed_with_its_reason(third_parties, monkeypatch):
    monkeypatch.setattr(cpu, "Absent", Absent, raising=False)
    third_parties(other=f"{cpu.__name__}:Absent", broken="no_such_module:Backend")
    listed = registry.list_backends()
    assert listed["cpu"] is None
    assert listed["other"] == "no such device; plug one in"
    assert "ModuleNotFoundError" in str(listed["broken"])
    with pytest.raises(BackendUnavailable, match="other: no such device"):
        registry.open_model("other", HERE, ModelOptions())


def test_a_package_cannot_take_over_a_built_in_name(third_parties):
    third_parties(cpu="no_such_module:Backend")
    assert isinstance(registry.create_backend("cpu"), cpu.CpuBackend)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(BackendUnavailable, match=r"'tpu'; known names: auto, blackwell, cpu"):
        registry.create_backend("tpu")


def test_auto_reports_all_failures_together(monkeypatch):
    monkeypatch.setattr(registry, "_AUTO_ORDER", ("first", "cpu"))
    monkeypatch.setattr(cpu, "_NEEDED", ("numba", "no_such_library"))
    with pytest.raises(BackendUnavailable) as caught:
        registry.open_model("auto", HERE, ModelOptions())
    assert list(caught.value.failures) == ["first", "cpu"]
    assert "no backend is named 'first'" in str(caught.value)
    assert "no_such_library cannot be imported; install kvmesh[cpu]" in str(caught.value)
    with pytest.raises(BackendUnavailable, match="no_such_library"):
        cpu.CpuBackend().open(HERE, ModelOptions())


def test_both_runtimes_installed_is_a_conflict(monkeypatch):
    monkeypatch.setattr(cpu, "_installed", lambda distribution: True)
    assert "uninstall one" in str(cpu.CpuBackend().probe())
