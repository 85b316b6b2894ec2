"""Unit tests start no process, so that `make check` is quick; one that must is marked ``integration``."""

import subprocess

import pytest


@pytest.fixture(autouse=True)
def _no_process(request, monkeypatch):
    if request.node.get_closest_marker("integration") is None:

        class Refused(subprocess.Popen):
            def __init__(self, command, *_, **__):
                raise AssertionError(f"a unit test starts {command}; mark it with pytest.mark.integration")

            def __del__(self):
                pass

        monkeypatch.setattr(subprocess, "Popen", Refused)
