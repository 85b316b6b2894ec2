"""Lightning: which of the values that a module logs under one name is which."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning.pytorch import Trainer

logger = logging.getLogger("trackopt")

_RETURNED = "returned loss"
_OTHER_NAMES = {"step": "{}_step", "epoch": "{}_epoch", "val": "val_{}"}


class LoggedMetrics:
    """The values that a module logs in ``trainer.fit``, each kind under a key of its own.

    A name may stand for three kinds of values: that of a batch, one over the epoch, and a validation's. The first kind
    that uses a name keeps it, and the others are named ``acc_step``, ``acc_epoch`` and ``val_acc``. ``loss`` is always
    that of a batch.

    Args:
        trainer: Its ``fit`` has begun.
        kinds: What ``state_dict`` returned; a resumed run continues with the same keys.

    Attributes:
        is_over: True after the last epoch, when Lightning moves what it shows, and nothing new comes.
        is_partial: True in an epoch that was resumed: what is logged over it is over its rest only, and left out.
    """

    def __init__(self, trainer: Trainer, kinds: Mapping[str, str] | None = None) -> None:
        self.is_over = self.is_partial = False
        self._trainer = trainer
        self._kinds = dict(kinds or {})  # the kind and name of the values, by key
        self._steps: dict[str, Tensor] = {}  # the latest values of batches
        self._shown = dict(trainer.logged_metrics)  # what Lightning showed at the last look; it keeps showing it

    def state_dict(self) -> dict[str, str]:
        """Return the kind and name of the values of each key."""
        return dict(self._kinds)

    def take_returned(self, loss: Any) -> dict[str, Any]:
        """Return the loss that ``training_step`` returned, unless the module itself logs one of each batch."""
        return {"loss": loss} if self._kinds.setdefault("loss", _RETURNED) == _RETURNED else {}

    def take_steps(self) -> dict[str, Tensor]:
        """Return what was logged of batches since the last call."""
        new = {}
        for key, result in () if self.is_over else self._trainer.fit_loop.epoch_loop._results.items():
            value = result._forward_cache
            if not (result.meta.on_step and result.meta.logger and isinstance(value, Tensor)):
                continue
            if self._steps.get(key) is not value:
                self._steps[key] = value
                new[result.meta.forked_name(on_step=True)] = value
        return self._with_keys("step", new)

    def take_means(self) -> dict[str, Tensor]:
        """Return what was logged over the epoch, or by the validation that is running, since the last call.

        Lightning computes these values, which may take all ranks, before it shows them.
        """
        shown = self._shown if self.is_over else dict(self._trainer.logged_metrics)
        of_batches = {value.data_ptr() for value in self._steps.values()}
        new = {
            name: value
            for name, value in shown.items()
            if value.data_ptr() not in of_batches and not _is_same(value, self._shown.get(name))
        }
        self._shown = shown
        kind = "val" if self._trainer.validating else "epoch"
        if self.is_partial and kind == "epoch" and new:
            logger.warning(
                "trackopt: %s: not recorded for the epoch in which the run was resumed, as Lightning has only the rest "
                "of the epoch",
                ", ".join(sorted(new)),
            )
            return {}
        return self._with_keys(kind, new)

    def _with_keys(self, kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys = self._keys(kind, values)
        return {keys[name]: value for name, value in values.items()}

    def _keys(self, kind: str, names: Iterable[str]) -> dict[str, str]:
        """Return the keys of values; those that can keep their name come first."""
        own = {value: key for key, value in self._kinds.items()}
        unnamed = [name for name in names if f"{kind} {name}" not in own]
        for name in sorted(unnamed, key=lambda name: not self._is_free(kind, name)):
            key = name
            while not self._is_free(kind, key):
                key = _OTHER_NAMES[kind].format(key)
            self._kinds[key] = own_name = f"{kind} {name}"
            own[own_name] = key
        return {name: own[f"{kind} {name}"] for name in names}

    def _is_free(self, kind: str, key: str) -> bool:
        return key not in self._kinds and (key != "loss" or kind == "step")


def _is_same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.data_ptr() == other.data_ptr()
