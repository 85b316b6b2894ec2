"""The options of what is measured at a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StatsOptions:
    """The statistics that are taken of the optimizers, and their intervals.

    Attributes:
        stats: ``"group"`` for statistics of the parameters, gradients and buffers of each parameter group,
            ``"param"`` for those of each parameter, ``None`` for none.
        stats_every: Take statistics at steps 1, 1 + n, 1 + 2n, …; the true update at every tenth of these.
        histograms_every: Take histograms at steps 1, 1 + n, 1 + 2n, …; 0 for none.
    """

    stats: str | None = "group"
    stats_every: int = 1
    histograms_every: int = 0
