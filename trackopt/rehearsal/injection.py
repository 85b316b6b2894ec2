"""The injection of the observer into a training process that may know nothing of trackopt. Imports no torch.

A ``sitecustomize.py`` on ``PYTHONPATH`` is read by every Python that the command starts. It waits for ``import torch``,
and lets ``observer.StepRecorder`` see the steps of every optimizer.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.rehearsal import trace
from trackopt.rundir import environment

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODULE = "sitecustomize"
_SOURCE = """\
try:
    from trackopt.rehearsal import injection
except ImportError:  # the command has a Python of its own, without trackopt
    pass
else:
    injection.install(__file__)
"""


def prepare_environment(directory: Path, variables: dict[str, str]) -> dict[str, str]:
    """Return the environment of a command that is to be observed.

    Args:
        directory: Where to write ``sitecustomize.py``.
        variables: The environment of the command without it.
    """
    directory.mkdir(exist_ok=True)
    (directory / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(directory), variables.get("PYTHONPATH"))))
    return {**variables, "PYTHONPATH": path}


def install(file: str) -> None:
    """Wait for torch, and run the ``sitecustomize`` that this one hides.

    Args:
        file: The file of this ``sitecustomize``.
    """
    sys.meta_path.insert(0, _TorchFinder())
    directory = str(Path(file).parent)
    sys.path[:] = [entry for entry in sys.path if entry != directory]
    own = sys.modules.pop(_MODULE)
    try:
        importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        sys.modules[_MODULE] = own


class _TorchFinder(MetaPathFinder):
    """Finds ``torch`` as usual, and attaches the observer after it is imported."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _ObservingLoader(spec.loader)
        return spec


class _ObservingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        plan = environment.from_environment()
        if plan is not None and os.environ.get("RANK", "0") == "0":
            try:
                importlib.import_module("trackopt.rehearsal.step_recorder").StepRecorder(plan).attach()
            except Exception as error:  # noqa: BLE001 - an observer ends no training; the rehearsal reports it
                trace.write(plan.root / trace.OBSERVED, failure=f"{type(error).__name__}: {error}")
