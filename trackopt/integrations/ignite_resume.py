"""ignite: the states of the recording beside the checkpoints, and what an engine does not restore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import DeterministicEngine, Events
from ignite.engine.deterministic import ReproducibleBatchSampler
from ignite.utils import manual_seed

from trackopt.integrations import run_choice, state_files
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ignite.engine import Engine

    from trackopt.training.objects import Training
    from trackopt.utils.types import StateDict

_FOLDER = "ignite"  # in the run's directory


class SavedStates:
    """The states of the recording, one for each checkpoint, in the run's directory.

    ignite does not say which checkpoint was loaded, so a state is found by the engine's iteration and the parameters.

    Args:
        training: The objects that the engine trains.

    Attributes:
        latest: The state that was taken last in this process.
    """

    def __init__(self, training: Training) -> None:
        self.latest: StateDict | None = None
        self._training = training
        self._folder: Path | None = None

    def take(self, telemetry: StateDict, iteration: int, position: StateDict | None) -> StateDict:
        """Return the state after an iteration of the engine."""
        parameters = state_files.fingerprint(self._training)
        self.latest = {
            "telemetry": telemetry,
            "iteration": iteration,
            "fingerprint": parameters,
            "position": position,
        }
        return self.latest

    def save(self, checkpoints: Sequence[Path], state: StateDict) -> None:
        """Write the state of new checkpoints."""
        if self._folder is None:
            return
        for checkpoint in checkpoints:
            state_files.save(self._folder / checkpoint.name, state)

    def remove(self, checkpoints: Sequence[Path]) -> None:
        """Remove the states of checkpoints that ignite has removed."""
        if self._folder is None:
            return
        for checkpoint in checkpoints:
            (self._folder / checkpoint.name).unlink(missing_ok=True)

    def find(self, directory: Path, iteration: int) -> StateDict | None:
        """Return the state of the checkpoint that was loaded; ``None`` if it was saved without the recording.

        Args:
            directory: The directory that was asked for; other runs of it are next to it.
            iteration: The engine's; 0 if no checkpoint was loaded, or one that does not have the engine.
        """
        files = [file for each in run_choice.directories(directory) for file in _files(each / _FOLDER)]
        saved = [self.latest, *map(state_files.load, files)]
        parameters = state_files.fingerprint(self._training)
        for state in saved:
            if state and state["fingerprint"] == parameters and iteration in {0, state["iteration"]}:
                return state
        return None

    def keep_in(self, directory: Path) -> None:
        """Write the states of further checkpoints into the directory of a run."""
        self._folder = directory / _FOLDER


class DataPosition:
    """Restores the random generators and the position in the data, where an engine starts the pass over again.

    Args:
        trainer: The engine.
    """

    def __init__(self, trainer: Engine) -> None:
        self._trainer = trainer
        self._pass_start: StateDict = {}  # the generators before the latest pass over the data
        self._fetched = 0  # batches of the pass
        self._resumed: StateDict | None = None
        self._handles: list[Any] = []

    def start(self, state: Mapping[str, Any] | None) -> None:
        """Follow the passes of a run of the engine, from a state if it resumes."""
        for handle in self._handles:
            handle.remove()
        self._resumed = None if state is None else dict(state)
        if state is not None:
            self._restore(state["random"])
            if state["seed"] is not None:  # of a DeterministicEngine
                self._trainer.state.seed = state["seed"]
        self._is_new_run = True
        self._handles = [
            self._trainer.add_event_handler(event, handler)
            for event, handler in (
                (Events.EPOCH_STARTED, self._before_first_pass),
                (Events.GET_BATCH_STARTED, self._move_to_position),
                (Events.DATALOADER_STOP_ITERATION, self._before_pass),
                (Events.TERMINATE_SINGLE_EPOCH, self._before_pass),
                (Events.GET_BATCH_COMPLETED, self._count_batch),
            )
        ]

    def state_dict(self) -> StateDict:
        """Return the position: what was drawn since the pass began, and the generators then and now."""
        return {
            "pass_start": self._pass_start,
            "fetched": self._fetched,
            "random": self._capture(),
            "seed": getattr(self._trainer.state, "seed", None),
        }

    def _before_first_pass(self) -> None:
        if self._is_new_run:
            self._is_new_run = False
            if isinstance(self._trainer, DeterministicEngine):  # which does so before its first pass
                passes = self._trainer.state.iteration // max(1, _length(self._trainer.state.dataloader) or 1)
                manual_seed(self._trainer.state.seed + passes)
            self._before_pass()

    def _before_pass(self, *_: Any, **__: Any) -> None:
        self._pass_start, self._fetched = self._capture(), 0

    def _count_batch(self) -> None:
        self._fetched += 1

    def _move_to_position(self) -> None:
        """Replace the pass that the engine has begun, before its first batch, by the one of the checkpoint."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        loader, fetched = self._trainer.state.dataloader, state["fetched"]
        if fetched == _length(loader) and not rng.find_generators(loader):  # the next batch begins another pass
            self._restore(self._pass_start)
            self._trainer.set_data(loader)
            return
        if isinstance(getattr(loader, "batch_sampler", None), ReproducibleBatchSampler):
            loader.batch_sampler.start_iteration = None  # it would skip these batches once more
        self._restore(state["pass_start"])
        self._trainer.set_data(_Rest(loader, fetched))
        self._trainer.state.dataloader = loader
        self._pass_start, self._fetched = state["pass_start"], fetched
        self._restore(state["random"])

    def _capture(self) -> StateDict:
        loader = self._trainer.state.dataloader
        return {"global": rng.capture(), "loader": [rng.state_of(each) for each in rng.find_generators(loader)]}

    def _restore(self, state: Mapping[str, Any]) -> None:
        rng.restore(state["global"])
        rng.restore_all(rng.find_generators(self._trainer.state.dataloader), state["loader"])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _length(loader: Any) -> int | None:
    """Return the number of batches of a pass, if it is known before."""
    try:
        return len(loader)
    except TypeError:
        return None


class _Rest:
    """The batches of a pass over a loader, but for the first."""

    def __init__(self, loader: Any, skipped: int) -> None:
        self._loader = loader
        self._skipped = skipped

    def __iter__(self) -> Iterator[Any]:
        batches: Iterator[Any] = iter(self._loader)
        for _ in range(self._skipped):
            next(batches)
        return batches
