"""Run the trainings in forked processes, end them at random moments, resume them, and compare bit for bit."""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import trackopt
from tests.integration.test_resume import assert_same, final_state
from tests.robustness.loops.shapes import REPORTED, SHAPES
from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EVENTS = ("kill", "terminate", "interrupt", "twice", "raise", "catch", "exit", "stop")
_EXIT_CODES = {"kill": -signal.SIGKILL, "terminate": 143, "interrupt": 130, "raise": 1, "exit": 3}
_TIMEOUT_S = 60
_NEVER = 10**9


@dataclass(frozen=True)
class Plan:
    """What happens to one attempt.

    Attributes:
        event: One of `EVENTS`; empty if it runs to its end.
        at: The moment, counted from 0 in this attempt.
        saves: Iterations of the run at which the script calls ``run.save``, if it does.
    """

    event: str = ""
    at: int = _NEVER
    saves: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of one combination.

    Attributes:
        shape: The name of the training.
        plans: Its attempts.
        verdict: ``exact``, ``reported`` or ``fault``.
        details: What differs, for a fault.
    """

    shape: str
    plans: tuple[Plan, ...]
    verdict: str
    details: str = ""


class CaughtError(Exception):
    """An error that the script catches around its training."""


class Script:
    """What a training calls; one for each attempt."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan
        self._moments = 0
        self.saves = plan.saves

    @property
    def stops(self) -> bool:
        """True once the script has trained for long enough in this attempt, as by ``max_steps``."""
        return self._plan.event == "stop" and self._moments > self._plan.at

    def wrap(self, optimizer: Any, scheduler: Any = None, **options: Any) -> Any:
        """Wrap the objects as every training here does."""
        options = {"save_every": 3, "sinks": (), "progress_bar": False, "dir": self._directory, **options}
        return trackopt.wrap(optimizer, scheduler, **options)

    def moment(self) -> None:
        """Let happen what is planned for this moment."""
        now, self._moments = self._moments, self._moments + 1
        if now != self._plan.at:
            return
        match self._plan.event:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            case "twice":
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            case "raise":
                raise RuntimeError("out of memory")
            case "catch":
                raise CaughtError
            case "exit":
                sys.exit(3)


def run_combination(shape: str, plans: Sequence[Plan], whole: Path, folder: Path) -> Outcome:
    """Run the attempts of one combination, and compare with the uninterrupted run in ``whole``."""
    directory = folder / "run"
    shutil.rmtree(directory, ignore_errors=True)
    said = ""
    for plan in plans:
        code, output = _attempt(shape, directory, plan, folder)
        said += output
        expected = _EXIT_CODES.get(plan.event)
        if code not in {0, expected} and plan.event != "twice":
            return Outcome(shape, tuple(plans), "fault", f"{plan}: exit code {code}\n{output}")
    difference = _difference(whole, directory)
    if difference is None:
        return Outcome(shape, tuple(plans), "exact")
    is_reported = shape in REPORTED and any(
        text in said
        for text in ("use run.enumerate", "take the batches from run.batches", "take them from run.batches")
    )
    return Outcome(shape, tuple(plans), "reported" if is_reported else "fault", f"{difference}\n{said}")


def run_all(
    count: int, seed: int, only: str = "", on_outcome: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Run ``count`` combinations, spread evenly over the shapes.

    Args:
        count: The number of combinations.
        seed: Of the random choice of events and moments.
        only: A part of the names of the shapes to run. Default: all.
        on_outcome: Called with each outcome.
    """
    import torch._dynamo  # noqa: F401 - the first optimizer imports it, in each process

    trackopt.wrap  # noqa: B018 - loads what it needs
    gc.collect()
    gc.freeze()
    shapes = [name for name in SHAPES if only in name]
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="trackopt-loops-"))
    outcomes = []
    try:
        wholes: dict[str, Path] = {}
        for number in range(count):
            shape = shapes[number % len(shapes)]
            if shape not in wholes:
                wholes[shape] = folder / f"whole-{len(wholes)}"
                code, output = _attempt(shape, wholes[shape], Plan(), folder)
                if code:
                    raise RuntimeError(f"{shape}: the uninterrupted run failed\n{output}")
            outcomes.append(run_combination(shape, _draw_plans(draw), wholes[shape], folder))
            on_outcome(outcomes[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _draw_plans(draw: random.Random) -> list[Plan]:
    """Draw one to three attempts that do not end, and the one that does."""
    plans = [
        Plan(draw.choice(EVENTS), draw.randrange(2, 45), tuple(draw.sample(range(28), 2)))
        for _ in range(draw.randint(1, 3))
    ]
    return [*plans, Plan()]


def _attempt(shape: str, directory: Path, plan: Plan, folder: Path) -> tuple[int, str]:
    """Run one attempt in a forked process; return its exit code, negative for a signal, and what it wrote."""
    output = folder / "output.txt"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_as_script(SHAPES[shape], Script(directory, plan), output)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text()


def _run_as_script(train: Callable[[Script], None], script: Script, output: Path) -> None:
    """Do in a forked process what the interpreter does with a script, and end it."""
    atexit._clear()
    code = 0
    with output.open("w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        signal.alarm(_TIMEOUT_S)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        try:
            train(script)
        except CaughtError:
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:  # noqa: BLE001 - as the interpreter does
            code = 1
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as error:
                code = int(error.code or 0)
            sys.last_value = sys.exc_info()[1]
        try:
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001 - as the interpreter does
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def _difference(whole: Path, resumed: Path) -> str | None:
    """Return what differs between two runs; ``None`` if nothing does."""
    try:
        assert_same(final_state(whole), final_state(resumed))
    except AssertionError as error:
        return f"the final checkpoints differ in {str(error).splitlines()[0]}"
    one, two = journal.series(whole), journal.series(resumed)
    for key in one.keys() | two.keys():
        if one.get(key) != two.get(key):
            pairs = zip(one.get(key, []), two.get(key, []), strict=False)
            first = next((a[0] for a, b in pairs if a != b), None)
            return f"the series {key} differs, first at step {first} ({len(one.get(key, []))}, {len(two.get(key, []))})"
    return None
