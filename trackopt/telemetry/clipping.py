"""The norms of gradients before they were clipped, and the share of steps with clipped ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trackopt.utils.types import StateDict


class Clipping:
    """What `note` was told since the latest step; numbers stay on their devices."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Tensor, float]] = {}  # by prefix: the norm and its limit
        self._clipped: dict[str, tuple[float | Tensor, int]] = {}  # the steps with clipped gradients, and all

    def note(self, prefix: str, norm: Tensor, max_norm: float) -> None:
        """Note a norm. Of several before a step the latest counts: earlier ones belong to skipped steps."""
        self._latest[prefix] = (norm.detach().clone(), max_norm)

    def pop(self) -> dict[str, float | Tensor]:
        """Return the metrics of a step: ``grad/norm_before_clip`` and ``grad/clipped_share``, of all steps so far."""
        metrics: dict[str, float | Tensor] = {}
        for prefix, (norm, max_norm) in self._latest.items():
            clipped, count = self._clipped.get(prefix, (0.0, 0))
            clipped = clipped + (norm > max_norm).to(norm.dtype)
            self._clipped[prefix] = (clipped, count + 1)
            metrics |= {f"grad/{prefix}norm_before_clip": norm, f"grad/{prefix}clipped_share": clipped / (count + 1)}
        self._latest = {}
        return metrics

    def state_dict(self) -> StateDict:
        """Return the counts; call it between steps."""
        return {prefix: [float(clipped), count] for prefix, (clipped, count) in self._clipped.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._clipped = {prefix: (clipped, count) for prefix, (clipped, count) in state.items()}
        self._latest = {}
