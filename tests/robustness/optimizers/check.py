"""What is done with one optimizer class or scheduler, and what came of it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import signal
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import trackopt
from tests.robustness.optimizers import reference
from tests.robustness.optimizers.training import STEPS, Objects, step_scheduler
from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tests.robustness.optimizers.construct import Recipe

_HALF = STEPS // 2


@dataclass
class Outcome:
    """What came of one class.

    Attributes:
        name: Of the class, or of the configuration.
        recipe: How it was stepped, on which network.
        runnable: It trains without trackopt, twice to the same bits.
        equal: It trains to the same bits under ``wrap``, and every step is counted.
        resumed: Killed and resumed under ``wrap``, it trains to the same bits.
        round_trips: So it does with plain ``torch.save`` and ``torch.load``.
        announced: What trackopt says in the first attempt about resuming it, or why it refuses the class.
        statistics: Recorded numbers that were compared with a float64 computation.
        kills: Processes that were killed.
        errors: What failed, with the place.
    """

    name: str
    recipe: str = ""
    runnable: bool = False
    equal: bool = False
    resumed: bool = False
    round_trips: bool = False
    announced: list[str] = field(default_factory=list)
    statistics: int = 0
    kills: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def has_own_fault(self) -> bool:
        """Whether the class loses state by itself."""
        return self.runnable and not self.resumed and not self.round_trips

    @property
    def is_fault(self) -> bool:
        """Whether trackopt disturbs the class, measures it wrongly, or loses its state without a word."""
        if not self.runnable:
            return False
        is_refused = not self.round_trips and any(line.startswith("wrap:") for line in self.announced)
        is_disturbed = not self.equal and not is_refused
        return is_disturbed or self.is_wrong or not (self.resumed or self.announced)

    @property
    def is_wrong(self) -> bool:
        """Whether a recorded number is not that of a float64 computation."""
        return any(error.startswith("float64") for error in self.errors)


def check(name: str, recipes: Iterable[Recipe], folder: Path) -> Outcome:
    """Train with the first recipe that works: alone, under ``wrap``, killed and resumed, and resumed by plain torch."""
    outcome = Outcome(name)
    recipe, expected = _first_that_trains(recipes, outcome)
    if recipe is None:
        return outcome
    whole = _attempt(recipe, folder / "whole", save_every=_HALF)
    outcome.announced = [line for line in whole.said if "resume" in line or "checkpoint" in line]
    if whole.error:
        outcome.errors.append(f"wrapped: {whole.error}")
        if whole.error.startswith("wrap:"):
            outcome.announced.append(whole.error)
    if whole.weights and (not whole.error or outcome.announced):  # an announced class ends with an error at `close`
        outcome.equal = _is_equal(whole, expected, outcome)
    _compare_statistics(whole, folder / "whole", outcome)
    outcome.resumed = _resumes(recipe, folder / "killed", expected, outcome)
    outcome.round_trips = _round_trips(recipe, expected, outcome)
    return outcome


@dataclass
class _Attempt:
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


def _attempt(
    recipe: Recipe, folder: Path, *, save_every: int | None = None, after: Callable[[trackopt.Run], None] | None = None
) -> _Attempt:
    """Train to the end under ``wrap``; ``after`` is called after each step."""
    attempt, place = _Attempt(), "construction"
    try:
        with _warnings(attempt.said):
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
            attempt.resumed_from = run.resumed_from
            for i in range(run.global_step, STEPS):
                place = f"step {i + 1}"
                loss = _step(objects, i)
                attempt.statistics[i + 1] = reference.statistics(objects.optimizer)
                run.step(loss=loss)
                if after is not None:
                    after(run)
            attempt.steps, attempt.weights = run.global_step, objects.weights()
            place = "close"
            run.close()
    except Exception as error:  # noqa: BLE001 - any failure is an outcome
        attempt.error = f"{place}: {_describe(error)}"
    return attempt


def _first_that_trains(recipes: Iterable[Recipe], outcome: Outcome) -> tuple[Recipe | None, list[Tensor]]:
    """Return the first recipe that changes the weights, twice to the same bits, and the weights at the end."""
    found = []
    for recipe in recipes:
        label = f"{recipe.step.__name__}, {recipe.network}"
        try:
            begin = recipe.make().weights()
            ends = [_train(recipe.make()) for _ in range(2)]
        except Exception as error:  # noqa: BLE001
            found.append(_describe(error))
            continue
        if not _same(*ends):
            found.append("other bits at each run")
        elif _same(begin, ends[0]):
            found.append("changes nothing")
        else:
            outcome.recipe, outcome.runnable = label, True
            return recipe, ends[0]
    outcome.errors.append(f"alone: {'; '.join(dict.fromkeys(found))}")
    return None, []


def _is_equal(whole: _Attempt, expected: Sequence[Tensor], outcome: Outcome) -> bool:
    is_same = _same(whole.weights, expected)
    if not is_same:
        outcome.errors.append("wrapped: other bits")
    if whole.steps != STEPS:
        outcome.errors.append(f"wrapped: {whole.steps} steps counted of {STEPS}")
    return is_same and whole.steps == STEPS


def _compare_statistics(whole: _Attempt, folder: Path, outcome: Outcome) -> None:
    if not (folder / "metrics.jsonl").exists():
        return
    records = {line.step: line.metrics for line in journal.read(folder / "metrics.jsonl") if line.metrics}
    wrong = []
    for step, expected in whole.statistics.items():
        recorded = records.get(step, {})
        outcome.statistics += len(expected.keys() & recorded.keys())
        wrong += reference.mismatches(expected, recorded)
    if wrong:
        outcome.errors.append(f"float64 statistics: {len(wrong)} differ, first {wrong[0]}")


def _resumes(recipe: Recipe, folder: Path, expected: Sequence[Tensor], outcome: Outcome) -> bool:
    """Return whether a run that was killed after a checkpoint trains to the same bits."""
    if error := _killed(recipe, folder):
        outcome.errors.append(f"first attempt: {error}")
        return False
    outcome.kills += 1
    again = _attempt(recipe, folder)
    if again.error:
        outcome.errors.append(f"resumed: {again.error}")
    elif again.resumed_from is None:
        outcome.errors.append("resumed: from no checkpoint")
    elif not _same(again.weights, expected):
        outcome.errors.append(f"resumed: other bits; said {[line for line in again.said if 'resumed' not in line]}")
    else:
        return True
    return False


def _killed(recipe: Recipe, folder: Path) -> str:
    """Train in a process that kills itself one step after a checkpoint; return the error that ended it before."""

    def after(run: trackopt.Run) -> None:
        taken = len(attempt)
        attempt.append(None)
        if taken == _HALF - 1:
            run.save(wait=True)
        elif taken == _HALF:
            os.kill(os.getpid(), signal.SIGKILL)

    attempt: list[None] = []
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        error = _attempt(recipe, folder, after=after).error
        os.write(send, error.encode())
        os._exit(1)
    os.close(send)
    with open(receive, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        error = file.read()
    _, status = os.waitpid(child, 0)
    return error if os.waitstatus_to_exitcode(status) == 1 else ""


def _round_trips(recipe: Recipe, expected: Sequence[Tensor], outcome: Outcome) -> bool:
    """Return whether plain ``torch.save`` and ``torch.load`` resume to the same bits."""
    try:
        objects = recipe.make()
        _train(objects, 0, _HALF)
        buffer = io.BytesIO()
        torch.save([*(each.state_dict() for each in _stateful(objects)), *_rng_state()], buffer)
        buffer.seek(0)
        objects = recipe.make()
        *states, torch_rng, python_rng, numpy_rng = torch.load(buffer, weights_only=False)
        for each, state in zip(_stateful(objects), states, strict=True):
            each.load_state_dict(state)
        torch.set_rng_state(torch_rng)
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)
        weights = _train(objects, _HALF)
    except Exception as error:  # noqa: BLE001
        outcome.errors.append(f"torch.save and torch.load: {_describe(error)}")
        return False
    if same := _same(weights, expected):
        return same
    outcome.errors.append("torch.save and torch.load: other bits")
    return False


def _stateful(objects: Objects) -> list[Any]:
    """Return the objects in the order in which they must be loaded."""
    return [each for each in (objects.model, objects.optimizer, objects.scheduler) if each is not None]


def _rng_state() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _train(objects: Objects, begin: int = 0, end: int = STEPS) -> list[Tensor]:
    for i in range(begin, end):
        _step(objects, i)
    return objects.weights()


def _step(objects: Objects, i: int) -> Tensor:
    loss = objects.step(objects, i)
    if objects.scheduler is not None:
        step_scheduler(objects.scheduler, i)
    return loss


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether all bits are the same, those of NaN too."""
    pairs = list(zip(some, others, strict=True))
    return bool(pairs) and all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.to_dense().contiguous().flatten()
    return (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).view(torch.uint8)


def _describe(error: Exception) -> str:
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
