"""The optimizers' settings that a run goes by, against what the script says at a resume."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trackopt.training.change import apply_change, changed_configs
from trackopt.training.optimizer_config import describe_changes, optimizer_config

if TYPE_CHECKING:
    from trackopt.checkpoint.meta import RunProgress
    from trackopt.training.change import Change
    from trackopt.training.objects import Training
    from trackopt.training.optimizer_config import OptimizerConfig


class OptimizerSettings:
    """The hyperparameters of each parameter group when the run began, with the changes since.

    Args:
        training: The live objects, as the script has just built them.
        change: What the script wants changed.

    Attributes:
        configs: The settings that the run goes by, by optimizer.
        applied: What was changed now, by optimizer and parameter group.
        notices: A line for each optimizer whose script says something else.
    """

    def __init__(self, training: Training, change: Change) -> None:
        self._training = training
        self._change = change
        self._live = {name: optimizer_config(optimizer) for name, optimizer in training.optimizers.items()}
        self._before: Mapping[str, OptimizerConfig] = self._live
        self.configs: Mapping[str, OptimizerConfig] = self._live
        self.applied: dict[str, list[dict[str, Any]]] = {}
        self.notices: list[str] = []

    def begin(self) -> None:
        """Change the objects of a run that starts from the beginning."""
        self._select()
        self.apply_change()

    def resume(self, progress: RunProgress) -> None:
        """Compare with the settings of a checkpoint, before it is restored.

        Raises:
            UsageError: The change cannot be applied to it.
        """
        saved = progress.optimizer_configs or self._from_schedulers(progress.scheduler_configs)
        self._before = {name: copy.deepcopy(saved.get(name, live)) for name, live in self._live.items()}
        self._select()
        for name, live in self._live.items():
            changes = list(describe_changes(self.configs[name], live))
            changed = {key for group in self.applied.get(name, ()) for key in group}
            asked = self._change.keys(self._training, name)
            changes = [each for each in changes if each[1][0] not in changed | asked]
            if changes:
                self.notices.append(self._notice(name, changes))

    def apply_change(self) -> None:
        """Change the restored objects."""
        apply_change(self._training, self._before, self.applied)

    def _select(self) -> None:
        self.applied = self._change.select(self._training, self._before)
        self.configs = changed_configs(self._before, self.applied)

    def _from_schedulers(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, OptimizerConfig]:
        """Return the base LRs of an older checkpoint, which has no settings, from its schedulers."""
        found: dict[str, OptimizerConfig] = {}
        for name, optimizer in self._training.optimizers.items():
            for key, scheduler in self._training.schedulers.items():
                config = configs.get(key) or {}
                if getattr(scheduler, "optimizer", None) is optimizer and "base_lrs.0" in config:
                    found[name] = [
                        {**group, "lr": config.get(f"base_lrs.{index}", group.get("lr"))}
                        for index, group in enumerate(self._live[name])
                    ]
        return found

    def _notice(self, name: str, changes: list[tuple[str, Any]]) -> str:
        new = dict(value for _, value in changes)
        advice = {name: new} if isinstance(self._training.optimizer, Mapping) else new
        return (
            f"{name}: {'; '.join(text for text, _ in changes)}; the run continues with its own: to change it, "
            f"pass change={advice!r} to wrap()"
        )
