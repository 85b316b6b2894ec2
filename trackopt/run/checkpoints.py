"""The checkpoints of a run: what they hold, besides the objects, of the loop and its telemetry."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.rank_states import RankStates
from trackopt.checkpoint.round_trip import RoundTripCheck
from trackopt.checkpoint.saver import CheckpointSaver
from trackopt.errors import UsageError
from trackopt.run.accumulation import AccumulationWindow
from trackopt.run.data_position import DataPosition
from trackopt.run.pass_mark import PassMark
from trackopt.training import rng
from trackopt.training.objects import versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.checkpoint.resume import PendingRestore
    from trackopt.checkpoint.saver import SaveOptions
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.run.attempt import Attempt
    from trackopt.training.objects import Training
    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")


class RunCheckpoints:
    """Saves and resumes the loop's position and the telemetry together with the objects.

    Args:
        training: The objects.
        store: Where checkpoints go.
        collectives: The ranks of the training.
        attempt: The attempt whose telemetry is saved.
        scheduler_configs: The configuration of each scheduler when the run began.
        optimizer_configs: The settings of each optimizer that the run goes by.
        options: When checkpoints become due by themselves.
        background: Write them in a background thread.

    Attributes:
        position: Where the loop stands in its data.
        saver: What takes them.
        user_state: The user's ``run.state``.
        window: Whether gradients are being accumulated.
    """

    def __init__(
        self,
        training: Training,
        store: CheckpointStore,
        collectives: Collectives,
        attempt: Attempt,
        scheduler_configs: Mapping[str, Any],
        optimizer_configs: Mapping[str, Any],
        options: SaveOptions,
        *,
        background: bool,
    ) -> None:
        self.position = DataPosition(training.stateful)
        self.user_state: dict[str, Any] = {}
        self.saver = CheckpointSaver(training, store, attempt.journal, collectives, options, background=background)
        self._training = training
        self._store = store
        self._collectives = collectives
        self._attempt = attempt
        self._scheduler_configs = scheduler_configs
        self._optimizer_configs = optimizer_configs
        self._group_counts: dict[str, int] = {}  # parameter groups when the epoch began
        self._pending: PendingRestore | None = None
        self._held: RunProgress | None = None
        self._pass_mark: PassMark | None = None
        self._after_loop: tuple[StateDict, StateDict] | None = None  # position and global generators
        self.window = AccumulationWindow(training)
        self._rank_states = RankStates(collectives, training)
        self._round_trip = RoundTripCheck(training)
        self._is_state_checked = False

    def resume(self, pending: PendingRestore, **details: Any) -> None:
        """Restore telemetry and position from a checkpoint that is in the objects already, and mark it in the journal.

        Args:
            pending: The checkpoint.
            **details: What else the marker says.
        """
        progress, attempt = pending.meta.progress, self._attempt
        self._pending = pending
        attempt.telemetry.load_state_dict(progress.telemetry)
        self.position.load_state_dict(
            progress.position, self._on_position_restored, world_size_changed=pending.world_size_changed
        )
        self._restore_user_state(progress.state)
        self.window.keeps_gradients = progress.keeps_gradients
        self.saver.latest = progress
        if progress.run_id == attempt.id:
            if self._collectives.is_rank_zero:
                self._store.folder.discard_after(progress.step)
            details["offset"] = progress.journal_offset
        else:  # the first attempt of this run
            details["params"] = attempt.hyperparameters()
        attempt.mark_resume(progress.step, checkpoint=str(pending.path), **details)
        at = (progress.step, progress.epoch, progress.batch)
        logger.warning("trackopt: resumed %s at step %d (epoch %d, batch %d)", attempt.name, *at)
        self._warn_of_differences(pending)

    def _warn_of_differences(self, pending: PendingRestore) -> None:
        """Say why the resumed run cannot be exactly the uninterrupted one."""
        saved, now = pending.meta.layout.versions.get("torch"), versions()["torch"]
        if saved != now:
            logger.warning(
                "trackopt: saved with torch %s, resumed with torch %s: shuffling, random numbers and rounding may "
                "differ from those of an uninterrupted run",
                saved,
                now,
            )
        if pending.world_size_changed:
            logger.warning(
                "trackopt: saved with world size %d, resumed with %d: weights, optimizers and schedulers are the same, "
                "batches and random numbers are others from here on",
                pending.meta.progress.world_size,
                self._collectives.world_size,
            )
            if any(rank.own for rank in pending.meta.progress.ranks):
                logger.warning(
                    "trackopt: in the checkpoint the ranks differ in the state of models, optimizers or schedulers: "
                    "each rank that was there before continues with its own, the others with rank 0's"
                )

    def begin_loop(self) -> None:
        """Keep the hyperparameters that the script has set since it resumed, and undo what else its set-up changed."""
        if self._pending is not None:
            self._pending.snapshot_hyperparameters()
            self._restore_user_state(self._pending.meta.progress.state)

    def begin_pass(self) -> None:
        """Remember the objects; a validation begins again when it is resumed."""
        self._pass_mark = None
        if not self.position.is_fast_forwarding and self._collectives.world_size == 1:
            attempt = self._attempt
            self._pass_mark = attempt.telemetry.boundary.call(
                "mark of the pass", PassMark.of, self._training, attempt.step, attempt.telemetry.state_dict()
            )

    def begin_epoch(self) -> None:
        """Note the parameter groups: a resume within the epoch runs its first lines again."""
        optimizers = self._training.optimizers
        self._group_counts = {name: len(optimizer.param_groups) for name, optimizer in optimizers.items()}

    def end_step(self, before: int, step: int, *, is_open: bool) -> None:
        """Forget what was kept when the loop was left, and see what is due after a step.

        Args:
            before: The step at which the iteration before ended.
            step: Completed optimizer steps.
            is_open: The run is not being closed.
        """
        if self._held is not None or self._after_loop is not None:
            self.release()
        self.saver.on_step(before, step)
        if is_open and (not self._is_state_checked or self._round_trip.has_stepped or self._collectives.world_size > 1):
            self.saver.preallocate()
            self.check_first_steps()

    def check_first_steps(self) -> None:
        """Warn after a first step if a state cannot be saved, or its own ``state_dict`` does not restore it.

        Raises:
            UsageError: The ranks could not take the checkpoints that become due in this pass.
        """
        if self.saver.saves_by_itself:
            self._refuse_join()
        if not self._is_state_checked:
            self._is_state_checked = True
            self.saver.check_state()
        for line in self._round_trip.run():
            logger.warning("trackopt: %s", line)

    @property
    def is_holding(self) -> bool:
        """True while the next checkpoint is the state that ``hold`` copied."""
        return self._held is not None

    def hold(self) -> None:
        """Copy the state of a pass that is being left: the next checkpoint, unless training continues elsewhere."""
        if self._is_joining():
            return
        with self._collectives.during(f"the copy of the state of step {self._attempt.step}"):
            progress = self._progress()
            if all(self._collectives.all_gather_object(self.saver.hold(progress))):
                self._held = progress
            else:
                self.saver.release()
                self.position.is_unfinished = True  # its state is lost, and the live one is that of a finished pass

    def end_loop(self) -> None:
        """Remember the position, and the global generators, from which an evaluation after the loop may draw."""
        self._after_loop = self.position.state_dict(epoch_done=False), rng.capture()

    def release(self) -> None:
        """Forget what ``hold`` and ``end_loop`` have kept: training has continued."""
        self._held = self._after_loop = None
        self.saver.release()

    def save(self, *, epoch_done: bool = False) -> None:
        """Take a checkpoint now, on all ranks.

        Raises:
            UsageError: A rank may be waiting in ``DDP.join`` for the others, instead of taking part.
        """
        self._refuse_join()
        with self._collectives.during(f"the checkpoint of step {self._attempt.step}"):
            progress, self._held = self._held or self._progress(epoch_done=epoch_done), None
            self._collectives.run_on_all(lambda: self.saver.save(progress))

    def save_final(self) -> None:
        """Take the last checkpoint and wait for it, on all ranks, if rank 0 has anything that is not saved."""
        if self._collectives.broadcast(self.is_holding or self._has_unsaved_progress()):
            progress, self._held = self._held or self._progress(), None
            self._collectives.run_on_all(lambda: self.saver.save_final(progress))

    def close(self) -> None:
        """Remove the hooks, and leave the process group if the ranks are still together."""
        self._round_trip.close()
        if not self._collectives.is_detached:
            self._store.close_group()
            self._collectives.close()

    def _is_joining(self) -> bool:
        """Return True in a pass under ``DDP.join``: a rank without further batches would not take part in a save."""
        is_one_of_several = self.position.in_pass and self._collectives.world_size > 1
        return is_one_of_several and any(ddp._join_config.enable for ddp in self._training.ddp.values())

    def _refuse_join(self) -> None:
        if self._is_joining():
            raise UsageError(
                "no checkpoint can be taken inside DDP.join(), where a rank without further batches waits for the "
                "others: give all ranks the same number of batches (as DistributedSampler does) and leave join() out, "
                "or use save_every=None and call run.save() after run.batches()"
            )

    def _on_position_restored(self) -> None:
        """Undo what the epoch's first lines did, and logged, a second time."""
        assert self._pending is not None  # noqa: S101 - for mypy: there was a checkpoint
        self._pending.reapply()
        self._attempt.telemetry.load_pending(self._pending.meta.progress.telemetry)
        self._restore_user_state(self._pending.meta.progress.state)

    def _restore_user_state(self, state: Mapping[str, Any]) -> None:
        self.user_state.clear()
        self.user_state.update(copy.deepcopy(dict(state)))

    def _has_unsaved_progress(self) -> bool:
        if self.position.is_fast_forwarding or self.position.is_unfinished:
            return False
        saved = self.saver.latest
        if self.saver.due or self._attempt.step != saved.step:
            return True
        position = self.position.state_dict(epoch_done=False)
        return saved.step > 0 and any(position[key] != saved.position[key] for key in ("epoch", "pass", "batch"))

    def _safe_point(self, *, epoch_done: bool) -> tuple[StateDict, StateDict | None, StateDict]:
        """Return where a resumed run continues: position, global generators (``None`` for the live ones), telemetry."""
        telemetry, mark = self._attempt.telemetry.state_dict(), self._pass_mark
        if self.position.in_pass and mark is not None and mark.is_current(self._training, self._attempt.step):
            return *self.position.pass_start(), {**telemetry, **mark.telemetry}
        if self._after_loop is not None:
            return *self._after_loop, telemetry
        return self.position.state_dict(epoch_done=epoch_done), None, telemetry

    def _progress(self, *, epoch_done: bool = False) -> RunProgress:
        """Return where the run stands, for a checkpoint; all ranks call it together."""
        self._attempt.telemetry.flush()
        position, generators, telemetry = self._safe_point(epoch_done=epoch_done)
        several = self._collectives.world_size > 1
        return RunProgress(
            run_id=self._attempt.id,
            name=self._attempt.name,
            step=self._attempt.step,
            epoch=position["epoch"],
            batch=position["batch"],
            attempt=self._attempt.number,
            journal_offset=self._attempt.journal.offset,
            position=position,
            groups=self._group_counts,
            scheduler_configs=self._scheduler_configs,
            optimizer_configs=self._optimizer_configs,
            telemetry=telemetry,
            ranks=self._rank_states.gather(position, telemetry, self.user_state) if several else (),
            state=self.user_state,
            has_gradients=not several and self.window.needs_gradients,
            keeps_gradients=self.window.keeps_gradients,
            rng=generators,
        )
