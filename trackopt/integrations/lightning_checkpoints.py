"""Lightning: which checkpoints have been written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.io import CheckpointIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch import Trainer


class CheckpointObserver:
    """Notes each checkpoint that a trainer has completely written, also in the background.

    Args:
        trainer: Its ``CheckpointIO`` does what it did before, until ``remove``.
        key: The callback's entry in the checkpoints, which has their step.
        torn_down: Called after the trainer has torn down its ``CheckpointIO``: no checkpoint comes after that.
    """

    def __init__(self, trainer: Trainer, key: str, torn_down: Callable[[], None]) -> None:
        self._strategy = trainer.strategy
        self._key = key
        self._written: list[tuple[str, int | None]] = []
        self._outer = trainer.strategy.checkpoint_io
        self._wrapper = _innermost_wrapper(self._outer)
        if self._wrapper is None:
            trainer.strategy.checkpoint_io = _ObservedIO(self._outer, self._note, self._forget, torn_down)
        else:
            self._inner = self._wrapper.checkpoint_io
            self._wrapper._checkpoint_io = _ObservedIO(self._inner, self._note, self._forget)
            trainer.strategy.checkpoint_io = _ObservedIO(self._outer, torn_down=torn_down)

    def pop_written(self) -> list[tuple[str, int | None]]:
        """Remove and return the paths of the checkpoints written since the last call, and their steps if known."""
        written = []
        while self._written:
            written.append(self._written.pop(0))
        return written

    def remove(self) -> None:
        """Leave the trainer as it was."""
        if self._wrapper is not None:
            self._wrapper._checkpoint_io = self._inner
        self._strategy.checkpoint_io = self._outer

    def _note(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        own = checkpoint.get("callbacks", {}).get(self._key, {})
        self._written.append((str(path), own.get("step")))

    def _forget(self, path: str | Path) -> None:
        """Forget one that is removed before it was asked for, as the LR finder's own."""
        self._written[:] = [each for each in self._written if each[0] != str(path)]


class _ObservedIO(CheckpointIO):
    """Passes everything on to another ``CheckpointIO``, and calls the observer afterwards."""

    def __init__(
        self,
        inner: CheckpointIO,
        written: Callable[[dict[str, Any], Any], None] = lambda *_: None,
        removed: Callable[[Any], None] = lambda _: None,
        torn_down: Callable[[], None] = lambda: None,
    ) -> None:
        self._inner = inner
        self._written, self._removed, self._torn_down = written, removed, torn_down

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._inner.save_checkpoint(checkpoint, path, storage_options)
        self._written(checkpoint, path)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self._inner.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self._inner.remove_checkpoint(path)
        self._removed(path)

    def teardown(self) -> None:
        try:
            self._inner.teardown()
        finally:
            self._torn_down()


def _innermost_wrapper(checkpoint_io: Any) -> Any:
    """Return the ``CheckpointIO`` that writes through another one, as in the background; ``None`` if none does."""
    wrapper = None
    while getattr(checkpoint_io, "checkpoint_io", None) is not None:
        wrapper, checkpoint_io = checkpoint_io, checkpoint_io.checkpoint_io
    return wrapper
