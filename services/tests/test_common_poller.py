import os

import pytest

from kvmesh.services.common.poller import DIRECT, VARIABLE, choose_poller


def test_a_poller_is_chosen_unless_the_environment_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict[str, str]())
    choose_poller()
    assert os.environ[VARIABLE] == DIRECT
    os.environ[VARIABLE] = "mine"
    choose_poller()
    assert os.environ[VARIABLE] == "mine"
