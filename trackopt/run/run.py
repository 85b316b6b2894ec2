"""``Run``: what a training script holds. The loop itself stays the user's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.checkpoint.retention import RetentionMarks
from trackopt.checkpoint.saver import SaveRequest
from trackopt.errors import UsageError
from trackopt.run.clipping import clip_grad_norm_

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from torch import Tensor

    from trackopt.run.loop import TrackedLoop
    from trackopt.telemetry.step_counts import StepCounts

T = TypeVar("T")


class Run:
    """A tracked training; made by ``trackopt.wrap``.

    Attributes:
        dir: The run's directory.
        resumed_from: The step of the checkpoint that this attempt resumed from; ``None`` if it started at step 0.
    """

    def __init__(self, loop: TrackedLoop, resumed_from: int | None) -> None:
        self.dir = loop.attempt.directory.path
        self.resumed_from = resumed_from
        self._loop = loop

    @property
    def global_step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return self._loop.attempt.step

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; after the loop, the number of finished epochs."""
        return self._loop.position.epoch

    @property
    def batch(self) -> int:
        """The index of the current batch in its pass over the loader, from 0; correct in a resumed epoch."""
        return max(self._loop.position.batch - 1, 0)

    @property
    def iteration(self) -> int:
        """The completed iterations of the run, over all its attempts: the index of the current one, from 0."""
        return self.step_counts.iterations

    @property
    def state(self) -> dict[str, Any]:
        """A dict for the script's own values, which is saved and restored: ``best_loss``, counters, sums of an epoch.

        It may hold numbers, strings, tensors, ``None``, and lists, tuples and dicts of them. Give each value its start
        by ``run.state.setdefault("best_loss", math.inf)``, or inside the epoch.
        """
        return self._loop.checkpoints.user_state

    @property
    def step_counts(self) -> StepCounts:
        """Iterations, steps, skipped steps and closure calls of the run, over all its attempts."""
        return self._loop.attempt.telemetry.step_counts

    @property
    def should_stop(self) -> bool:
        """True once SIGTERM, SIGINT or SIGUSR1 has asked the training to stop.

        ``batches``, ``epochs`` and ``step`` act on it by themselves, at the end of the iteration. A loop that uses
        none of them, or does something long in between, checks this property, leaves the loop and closes the run.
        With several processes every rank must check it. All of them see True after the same step, which is the next
        one, so check it before a long validation.
        """
        if not self._loop.position.in_pass:
            self._loop.iterations.sync_ranks()
        return self._loop.stop.signal is not None

    def log(self, *, reduce: str | None = None, **metrics: Any) -> None:
        """Log numbers: Python or NumPy numbers, or tensors of one element.

        They belong to the step of this iteration. A key that is logged several times within it (in gradient
        accumulation) is averaged. What is logged after an epoch's last batch, or further down in the code than
        ``run.step``, belongs to the last step. Any thread may log; what other threads log belongs to the next step.

        Args:
            reduce: With several processes, ``"mean"`` records the mean over all ranks, and every rank must log the
                key; by default the value of rank 0 is recorded. A mean that is logged after a pass is recorded with
                the next step, or at the end of the epoch.
            **metrics: The numbers.

        Raises:
            UsageError: A value is not a number.
        """
        if reduce not in {"mean", None}:
            raise UsageError(f"reduce={reduce!r}: choose 'mean' or None")
        is_trailing = reduce is None and self._loop.iterations.is_after_step(sys._getframe(1))
        self._loop.attempt.telemetry.log(metrics, reduced=reduce is not None, is_trailing=is_trailing)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, *, optimizer: str | None = None, **options: Any
    ) -> Tensor:
        """Clip the gradients before the step, as ``torch.nn.utils.clip_grad_norm_`` does, and record their norm.

        ``grad/norm_before_clip`` is the norm, ``grad/clipped_share`` the share of the steps so far with clipped
        gradients; ``grad/<group>.norm`` is measured after it. A ``GradScaler`` that the run was given unscales the
        gradients first. Nothing waits for a device.

        Args:
            max_norm: The largest norm of all gradients together.
            norm_type: The type of the norm.
            optimizer: The name of the optimizer whose gradients are clipped, of several. Default: those of all.
            **options: ``error_if_nonfinite`` and ``foreach``, as torch's function takes them.

        Returns:
            The norm before clipping.

        Raises:
            UsageError: There is no such optimizer.

        Example:
            >>> import tempfile, torch, trackopt
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     with trackopt.wrap(optimizer, model=model, dir=folder, sinks=()) as run:
            ...         for x in torch.ones(3, 2):
            ...             optimizer.zero_grad()
            ...             (100 * model(x).sum()).backward()
            ...             _ = run.clip_grad_norm_(1.0)
            ...             optimizer.step()
            ...             run.step()
            ...     trackopt.journal.series(folder)["grad/clipped_share"]
            [(1, 1.0), (2, 1.0), (3, 1.0)]
        """
        training = self._loop.training
        if optimizer is not None and optimizer not in training.optimizers:
            raise UsageError(f"no optimizer is named {optimizer!r}; choose from {', '.join(training.optimizers)}")
        chosen = training.optimizers.values() if optimizer is None else [training.optimizers[optimizer]]
        norm = clip_grad_norm_(training, chosen, max_norm, norm_type, **options)
        prefix = f"{optimizer}." if optimizer is not None and len(training.optimizers) > 1 else ""
        self._loop.attempt.telemetry.clipping.note(prefix, norm, max_norm)
        return norm

    def step(self, **metrics: Any) -> None:
        """Log ``metrics`` and end the iteration; for loops that do not use ``batches``."""
        if self._loop.position.in_batch:
            raise UsageError("run.step() inside run.batches(): batches() ends each iteration itself, so use run.log()")
        self._loop.attempt.telemetry.log(metrics)
        self._loop.iterations.end_explicit_iteration(sys._getframe(1))
        if not self._loop.position.in_epoch:
            self._loop.iterations.at_safe_point()
        elif self.should_stop:
            self._loop.leave()

    def epochs(self, total: int, start: int = 0) -> Iterator[int]:
        """Yield the numbers of the remaining epochs, of ``total``: ``for epoch in run.epochs(10)``.

        Args:
            total: The number of epochs of the whole training.
            start: The first epoch, for a script that has loaded a checkpoint of its own. A run that resumes continues
                with its own epoch.

        Raises:
            UsageError: ``start`` is negative or larger than ``total``.
        """
        if not 0 <= start <= total:
            raise UsageError(f"run.epochs({total}, start={start}): start must be between 0 and {total}")
        return self._loop.iterations.epochs(total, start)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of one pass; in a resumed epoch, the remaining ones.

        Exact for a ``DataLoader`` with and without workers, with shuffling and random transforms, and for any other
        iterable that yields the same items each time. A warning at the resume names a loader whose workers cannot
        continue exactly; state that a dataset keeps in a worker is not saved, apart from its random generators.
        Asking for the next batch ends the iteration.
        """
        return self._loop.iterations.batches(loader)

    def enumerate(self, loader: Iterable[T], start: int = 0) -> Iterator[tuple[int, T]]:
        """Yield the number of each batch in its pass, and the batch, as ``enumerate(loader)`` does.

        In a resumed epoch the numbers continue where they stopped. Those of ``enumerate(run.batches(loader))`` begin at
        ``start`` again.
        """
        for batch in self.batches(loader):
            yield start + self.batch, batch

    def save(self, *, keep: bool = False, metric: float | None = None, wait: bool = False) -> None:
        """Take a checkpoint between this iteration and the next (or between two epochs, after the batches).

        A resumed run continues exactly from that state. Outside of ``epochs`` it is taken at once.

        The loop waits while the state is copied in memory; a background thread writes the copy. A checkpoint that is
        due before the last one is on the disk waits for it. If it cannot be written, a warning is logged at the next
        step, the journal notes it, and training continues.

        Args:
            keep: Never delete it.
            metric: The value that ``keep_best`` compares, lower is better: a validation loss, or a negated accuracy.
            wait: Return when it is on the disk.
        """
        marks = RetentionMarks(keep, None if metric is None else float(metric))
        self._loop.checkpoints.saver.request(SaveRequest(marks, wait))
        if not self._loop.position.in_epoch:
            self._loop.iterations.at_safe_point()

    def close(self, *, wait: bool = True) -> None:
        """Take a last checkpoint, deliver everything, and release the optimizer and the directory.

        Args:
            wait: Wait until TensorBoard and MLflow have everything; without it, or after Ctrl-C, the rest is delivered
                in the background.

        Raises:
            CheckpointError: The last checkpoint could not be written; all else is done.
            SystemExit: A signal had asked the training to stop.
        """
        self._loop.finish(None, wait=wait)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.finish(error)
