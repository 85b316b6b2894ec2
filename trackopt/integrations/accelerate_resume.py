"""Accelerate: checkpoints of earlier versions, and what ``accelerator.load_state`` does not restore."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import RandomSampler

from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from trackopt.utils.types import StateDict

_REGISTERED = re.compile(r"custom_checkpoint_(\d+)\.pkl")
_LEGACY_KEYS = {"run_id", "step", "journal_offset"}


class LegacyState:
    """Takes the state of a tracker that was registered for checkpointing, as earlier versions did.

    Accelerate loads only as many registered objects as a checkpoint has.
    """

    def __init__(self, accelerator: Accelerator, index: int) -> None:
        self._registered = accelerator._custom_objects
        self._state: StateDict = {}
        self._registered.insert(index, self)

    @classmethod
    def find(cls, accelerator: Accelerator, folder: str) -> LegacyState | None:
        """Stand in for the tracker in a checkpoint that has its state among the registered objects."""
        matches = {
            int(match[1]): path for path in Path(folder).iterdir() if (match := _REGISTERED.fullmatch(path.name))
        }
        if len(matches) == len(accelerator._custom_objects) + 1:
            for index, path in sorted(matches.items()):
                if _is_legacy(path):
                    return cls(accelerator, index)
        return None

    def state_dict(self) -> StateDict:
        """Return what was loaded."""
        return self._state

    def load_state_dict(self, state: StateDict) -> None:
        """Take what the checkpoint holds."""
        self._state = state

    def remove(self) -> StateDict:
        """Leave the registered objects as they were; return what was loaded."""
        self._registered[:] = [each for each in self._registered if each is not self]
        return self._state


class LoaderPositions:
    """Restores the order in which the prepared loaders yield, and the random generators within a pass.

    A shuffling sampler draws its order from its generator when a pass begins, so the state before the pass is the one
    before the latest change. A sampler without a generator gets one, as Accelerate does it with several processes.

    Args:
        accelerator: Its loaders are prepared.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._before: list[list[Any]] = []  # the states before the latest change, of each loader's generators
        self._latest: list[list[Any]] = []
        self._random: StateDict | None = None  # of the global generators, for the next iteration
        for index, loader in enumerate(accelerator._dataloaders):
            sampler = row_sampler(loader)
            if isinstance(sampler, RandomSampler) and sampler.generator is None and sampler_seed(loader) is None:
                sampler.generator = torch.Generator().manual_seed(torch.initial_seed() + index)
        self._observe()

    def before_iteration(self) -> None:
        """Note the generators of the loaders; after a resume within a pass, restore the global ones."""
        self._observe()
        active = self._accelerator.gradient_state.active_dataloader
        for loader in self._accelerator._dataloaders:
            if active is not loader and _is_rest_of(active, loader):  # its passes are counted by the other one
                loader.iteration = active.iteration + 1
        if self._random is not None:
            rng.restore(self._random)
            self._random = None

    def state_dict(self) -> StateDict:
        """Return the positions of all loaders."""
        self._observe()
        gradient_state = self._accelerator.gradient_state
        active, is_over = gradient_state.active_dataloader, bool(gradient_state.end_of_dataloader)
        loaders = []
        for index, loader in enumerate(self._accelerator._dataloaders):
            is_active = active is loader or _is_rest_of(active, loader)
            states = (self._before if is_active and not is_over else self._latest)[index]
            iteration = getattr(active if is_active else loader, "iteration", 0) + (is_active and is_over)
            loaders.append({"generators": states, "iteration": iteration, "seed": sampler_seed(loader)})
        return {"loaders": loaders, "random": None if active is None or is_over else rng.capture()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the loaders; a checkpoint that was saved without their positions leaves them as they are."""
        if state is None:
            return
        for loader, saved in zip(self._accelerator._dataloaders, state["loaders"], strict=False):
            rng.restore_all(rng.find_generators(loader), saved["generators"])
            if hasattr(loader, "iteration"):
                loader.iteration = saved["iteration"]
            if saved["seed"] is not None and sampler_seed(loader) is not None:
                row_sampler(loader).initial_seed = saved["seed"]
        self._random = state["random"]
        self._before, self._latest = [], []
        self._observe()

    def _observe(self) -> None:
        for index, loader in enumerate(self._accelerator._dataloaders):
            states = [rng.state_of(each) for each in rng.find_generators(loader)]
            if index == len(self._latest):
                self._latest.append(states)
                self._before.append(states)
            elif not _are_equal(states, self._latest[index]):
                self._before[index], self._latest[index] = self._latest[index], states


def row_sampler(loader: Any) -> Any:
    """Return the sampler of single rows of a loader, if it has one."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


def _is_rest_of(active: Any, loader: Any) -> bool:
    """Return True if ``active`` was made of ``loader`` by ``accelerate.skip_first_batches``."""
    sampler = row_sampler(loader)
    return (
        active is not None and sampler is not None and row_sampler(active) is sampler and hasattr(active, "iteration")
    )


def sampler_seed(loader: Any) -> int | None:
    """Return the seed of Accelerate's ``SeedableRandomSampler``, if the loader has one."""
    seed = getattr(row_sampler(loader), "initial_seed", None)
    return None if seed is None else int(seed)


def _are_equal(states: list[Any], others: list[Any]) -> bool:
    return len(states) == len(others) and all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(states, others, strict=True)
    )


def _is_legacy(path: Path) -> bool:
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # noqa: BLE001 - an object of the user's, which is not looked at
        return False
    return isinstance(state, dict) and state.keys() >= _LEGACY_KEYS
