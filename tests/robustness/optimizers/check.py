"""What is done with one optimizer class or scheduler, and what came of it."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.robustness.optimizers import reference
from tests.robustness.optimizers.attempt import HALF, attempt, describe, killed
from tests.robustness.optimizers.training import STEPS, train
from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from tests.robustness.optimizers.attempt import Attempt
    from tests.robustness.optimizers.construct import Recipe
    from tests.robustness.optimizers.training import Objects


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
    whole = attempt(recipe, folder / "whole", save_every=HALF)
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


def _first_that_trains(recipes: Iterable[Recipe], outcome: Outcome) -> tuple[Recipe | None, list[Tensor]]:
    """Return the first recipe that changes the weights, twice to the same bits, and the weights at the end."""
    found = []
    for recipe in recipes:
        label = f"{recipe.step.__name__}, {recipe.network}"
        try:
            begin = recipe.make().weights()
            ends = [train(recipe.make()) for _ in range(2)]
        except Exception as error:  # noqa: BLE001 - any failure is an outcome
            found.append(describe(error))
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


def _is_equal(whole: Attempt, expected: Sequence[Tensor], outcome: Outcome) -> bool:
    is_same = _same(whole.weights, expected)
    if not is_same:
        outcome.errors.append("wrapped: other bits")
    if whole.steps != STEPS:
        outcome.errors.append(f"wrapped: {whole.steps} steps counted of {STEPS}")
    return is_same and whole.steps == STEPS


def _compare_statistics(whole: Attempt, folder: Path, outcome: Outcome) -> None:
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
    if error := killed(recipe, folder):
        outcome.errors.append(f"first attempt: {error}")
        return False
    outcome.kills += 1
    again = attempt(recipe, folder)
    if again.error:
        outcome.errors.append(f"resumed: {again.error}")
    elif again.resumed_from is None:
        outcome.errors.append("resumed: from no checkpoint")
    elif not _same(again.weights, expected):
        outcome.errors.append(f"resumed: other bits; said {[line for line in again.said if 'resumed' not in line]}")
    else:
        return True
    return False


def _round_trips(recipe: Recipe, expected: Sequence[Tensor], outcome: Outcome) -> bool:
    """Return whether plain ``torch.save`` and ``torch.load`` resume to the same bits."""
    try:
        objects = recipe.make()
        train(objects, 0, HALF)
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
        weights = train(objects, HALF)
    except Exception as error:  # noqa: BLE001 - any failure is an outcome
        outcome.errors.append(f"torch.save and torch.load: {describe(error)}")
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


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether all bits are the same, those of NaN too."""
    pairs = list(zip(some, others, strict=True))
    return bool(pairs) and all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.to_dense().contiguous().flatten()
    return (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).view(torch.uint8)
