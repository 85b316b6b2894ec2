"""Hugging Face's Trainer: what ``trainer.train(resume_from_checkpoint=…)`` does not restore."""

from __future__ import annotations

import base64
import io
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler

from trackopt.integrations.accelerate_resume import row_sampler, sampler_seed
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")


class DataPosition:
    """Restores the random generators for each batch of the data.

    The Trainer restores them after it has fetched the first batches of a resumed training, but its loader fetches one
    batch ahead: random transforms of the next batches are drawn too early or too late.

    Args:
        loader: The loader of the training, whose epoch has not begun.
        saved: What ``state`` returned when the checkpoint was taken.
    """

    def __init__(self, loader: Any, saved: str | None) -> None:
        self._loader = loader = getattr(loader, "base_dataloader", loader)  # Accelerate's passes everything on to it
        self._resumed: StateDict | None = None if saved is None else _decode(saved)
        self._pass_start: StateDict = {}
        self._batches = 0  # of the pass that were trained on
        self._latest: tuple[int, StateDict] = (-1, {})  # the batch fetched last, and the generators before it
        self._fetched: StateDict | None = None  # the generators after the fetch of the batches of a resumed step
        if self._resumed is not None and self._resumed["seed"] is not None and sampler_seed(loader) is not None:
            row_sampler(loader).initial_seed = self._resumed["seed"]
        if getattr(loader, "num_workers", 0) or not isinstance(getattr(loader, "batch_sampler", None), BatchSampler):
            self._resumed = None
            logger.warning(
                "trackopt: exact=True restores the random transforms of a loader without workers over a dataset with a "
                "length; those of this loader are not exact"
            )
            return
        if self._resumed is not None and self._resumed["batches"] >= len(loader):  # the Trainer begins another pass
            self._restore(self._resumed["random"])
            self._resumed = None
        self._collate = loader.collate_fn
        loader.collate_fn = self._collate_batch
        vars(loader)["batch_sampler"] = _ObservedBatches(loader.batch_sampler, self)  # a loader refuses to set it

    def state(self) -> str:
        """Return the position as text: Trainers keep the states of callbacks as JSON."""
        index, before = self._latest
        state = {"pass_start": self._pass_start, "index": index, "before": before, "random": self._capture()}
        return _encode(state | {"batches": self._batches, "seed": sampler_seed(self._loader)})

    def begin_pass(self) -> None:
        """Note the generators before the order of the pass is drawn, or restore them."""
        self._batches = 0
        if self._resumed is not None:
            self._batches = self._resumed["batches"]
            self._restore(self._resumed["pass_start"])
        self._pass_start = self._capture()

    def before_batch(self, index: int) -> None:
        """Note the generators before a batch is fetched, or restore those of the checkpoint."""
        if self._resumed is not None:
            if index == self._resumed["index"]:
                self._restore(self._resumed["before"])
            elif index == self._resumed["index"] + 1:
                self._restore(self._resumed["random"])
        self._latest = index, self._capture()

    def begin_step(self) -> None:
        """Restore the generators that the Trainer has set back to the checkpoint."""
        if self._fetched is not None and self._resumed is not None:
            self._restore(self._fetched)
        self._resumed = self._fetched = None

    def end_batch(self) -> None:
        """Count a batch that was trained on."""
        self._batches += 1

    def _collate_batch(self, rows: Any) -> Any:
        batch = self._collate(rows)
        if self._resumed is not None and self._latest[0] > self._resumed["index"]:
            self._fetched = self._capture()
        return batch

    def _capture(self) -> StateDict:
        return {"global": rng.capture(), "loader": [rng.state_of(each) for each in self._generators()]}

    def _restore(self, state: StateDict) -> None:
        rng.restore(state["global"])
        rng.restore_all(self._generators(), state["loader"])

    def _generators(self) -> list[Any]:
        parts = [getattr(self._loader, name, None) for name in ("dataset", "sampler")]
        return rng.find_generators(parts)


class _ObservedBatches(BatchSampler):
    """The batches of another sampler, which are fetched when they are asked for."""

    def __init__(self, inner: BatchSampler, position: DataPosition) -> None:
        self._inner = inner
        self._position = position

    def __iter__(self) -> Iterator[Any]:
        self._position.begin_pass()
        for index, batch in enumerate(self._inner):
            self._position.before_batch(index)
            yield batch

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_inner"], name)


def _encode(state: StateDict) -> str:
    stream = io.BytesIO()
    torch.save(state, stream)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _decode(text: str) -> StateDict:
    state: StateDict = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
