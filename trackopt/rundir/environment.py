"""The plan that a rehearsal hands to the training processes it starts, in one environment variable."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "TRACKOPT_REHEARSAL"
UNNAMED_PREFIX = "unnamed-"  # begins the name of a run whose script names no directory
KILLED = ".killed"  # the file below ``root`` that marks a kill as the planned one

_unnamed = itertools.count(1)


@dataclass(frozen=True)
class ResumeCheckPlan:
    """The directories of the runs of a training process, and the steps at which it is killed.

    Attributes:
        root: Every run has its directory below it, and nowhere else.
        kill: By the name of a run's directory, the step after whose record the process kills itself.
        observer: The class that records the inputs of every step in the training process, as ``module:name``. The plan
            names it because the training does not know what checks it.
    """

    root: Path
    kill: Mapping[str, int] = field(default_factory=dict)
    observer: str = ""

    def environment(self) -> dict[str, str]:
        """Return the environment variable that hands the plan to a process."""
        return {
            VARIABLE: json.dumps({"root": str(self.root), "kill": dict(self.kill) or None, "observer": self.observer})
        }

    def load_observer(self) -> Any:
        """Import the observer's class."""
        module, _, name = self.observer.partition(":")
        return getattr(import_module(module), name)

    def kill_process_group(self) -> None:
        """Mark the kill as the planned one, and end the process as a crash of the machine would.

        The command that started this process must not run its next line.
        """
        (self.root / KILLED).touch()
        if sys.platform != "win32":  # which has no rehearsals
            os.killpg(0, signal.SIGKILL)

    def directory(self, chosen: str | os.PathLike[str] | None) -> Path:
        """Return the directory that replaces the script's choice; every start of the script gets the same.

        Example:
            >>> ResumeCheckPlan(Path("/tmp/x")).directory("runs/digits")
            PosixPath('/tmp/x/runs-digits')
        """
        parts = Path(chosen).parts if chosen is not None else ()
        name = "-".join(part for part in parts if part not in {"/", ".."})
        return self.root / (name or f"{UNNAMED_PREFIX}{next(_unnamed)}")


def from_environment() -> ResumeCheckPlan | None:
    """Return the plan that this process was started with; ``None`` outside of a rehearsal."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    plan = json.loads(text)
    return ResumeCheckPlan(Path(plan["root"]), plan["kill"] or {}, plan["observer"])
