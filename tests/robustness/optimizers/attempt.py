"""One attempt of a training under ``wrap``, to its end or until it is killed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trackopt
from tests.robustness.optimizers import reference
from tests.robustness.optimizers.training import STEPS, take_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from tests.robustness.optimizers.construct import Recipe

HALF = STEPS // 2


@dataclass
class Attempt:
    """One attempt under ``wrap``.

    Attributes:
        error: The exception that ended it, and where.
        said: The warnings of trackopt.
        weights: The weights at its end.
        steps: The step that the run has counted to.
        resumed_from: The step of the checkpoint that it began with.
        statistics: The reference statistics of each step.
    """

    error: str = ""
    said: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    steps: int = 0
    resumed_from: int | None = None
    statistics: dict[int, dict[str, float]] = field(default_factory=dict)


def attempt(
    recipe: Recipe, folder: Path, *, save_every: int | None = None, after: Callable[[trackopt.Run], None] | None = None
) -> Attempt:
    """Train to the end under ``wrap``; ``after`` is called after each step."""
    result, place = Attempt(), "construction"
    try:
        with _warnings(result.said):
            objects = recipe.make()
            place = "wrap"
            run = trackopt.wrap(
                objects.optimizer,
                objects.scheduler,
                model=objects.model,
                dir=folder,
                sinks=(),
                histograms_every=2,
                save_every=save_every,
                progress_bar=False,
            )
            result.resumed_from = run.resumed_from
            for i in range(run.global_step, STEPS):
                place = f"step {i + 1}"
                loss = take_step(objects, i)
                result.statistics[i + 1] = reference.statistics(objects.optimizer)
                run.step(loss=loss)
                if after is not None:
                    after(run)
            result.steps, result.weights = run.global_step, objects.weights()
            place = "close"
            run.close()
    except Exception as error:  # noqa: BLE001 - any failure is an outcome
        result.error = f"{place}: {describe(error)}"
    return result


def killed(recipe: Recipe, folder: Path) -> str:
    """Train in a process that kills itself one step after a checkpoint; return the error that ended it before."""

    def after(run: trackopt.Run) -> None:
        step = next(steps)
        if step == HALF:
            run.save(wait=True)
        elif step > HALF:
            os.kill(os.getpid(), signal.SIGKILL)

    steps = itertools.count(1)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        error = attempt(recipe, folder, after=after).error
        os.write(send, error.encode())
        os._exit(1)
    os.close(send)
    with open(receive, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        error = file.read()
    _, status = os.waitpid(child, 0)
    return error if os.waitstatus_to_exitcode(status) == 1 else ""


def describe(error: Exception) -> str:
    """Return the first line of an error, and the innermost place in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]} ({Path(frame.filename).name}:{frame.lineno})"


class _Collect(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().removeprefix("trackopt: ")
        if message not in self._messages:
            self._messages.append(message)


@contextlib.contextmanager
def _warnings(messages: list[str]) -> Iterator[None]:
    """Collect what trackopt warns of."""
    logger, handler = logging.getLogger("trackopt"), _Collect(messages)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
