"""Counts of the iterations and steps of a training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCounts:
    """Counts that are easily confused with each other.

    Attributes:
        iterations: Completed iterations of the inner loop: micro-batches, where gradients are accumulated.
        steps: Optimizer steps that changed parameters, of all optimizers together.
        skipped: Iterations whose step a ``GradScaler`` skipped because of an overflow.
        closure_calls: Calls of closures: LBFGS makes several per step.
    """

    iterations: int
    steps: int
    skipped: int
    closure_calls: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts under the keys of the journal's ``close`` marker."""
        return {
            "iterations": self.iterations,
            "steps": self.steps,
            "skipped": self.skipped,
            "evaluations": self.closure_calls,
        }
