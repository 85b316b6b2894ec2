"""``wrap``: make a run of the user's live objects, in its directory, resumed from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch.nn.parallel import DistributedDataParallel

from trackopt import remote
from trackopt.checkpoint.meta import KEY, CheckpointMeta
from trackopt.checkpoint.optimizer_settings import OptimizerSettings
from trackopt.checkpoint.rank_states import select_rank_state
from trackopt.checkpoint.reader import load_unverified
from trackopt.checkpoint.resume import PendingRestore, find_resume_checkpoint
from trackopt.checkpoint.retention import Retention
from trackopt.checkpoint.saver import SaveOptions
from trackopt.checkpoint.store import CheckpointStore
from trackopt.distributed.consistency import check_consistency
from trackopt.distributed.gloo import current_collectives
from trackopt.errors import RunError, UsageError
from trackopt.run.loop import TrackedLoop
from trackopt.run.options import SINKS, validate_options
from trackopt.run.run import Run
from trackopt.run.signals import STOP_SIGNALS
from trackopt.rundir import environment
from trackopt.rundir.directory import ReadOnlyRunDirectory, RunDirectory
from trackopt.telemetry.options import StatsOptions
from trackopt.training.change import Change
from trackopt.training.objects import Training
from trackopt.training.scheduler_config import scheduler_config
from trackopt.training.sharding import is_sharded
from trackopt.utils.log import log_warnings
from trackopt.utils.mlflow_uri import default_tracking

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from torch import nn
    from torch.optim import Optimizer

    from trackopt.distributed.collectives import Collectives
    from trackopt.training.objects import Generator, Stateful
    from trackopt.utils.mlflow_uri import MLflowTarget
    from trackopt.utils.types import CheckpointTree

T = TypeVar("T")
logger = logging.getLogger("trackopt")


def wrap(
    optimizer: Optimizer | Mapping[str, Optimizer],
    scheduler: Any = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    dir: str | os.PathLike[str] | None = None,  # noqa: A002 - the word that torch and TensorBoard users expect
    resume: str | os.PathLike[str] = "auto",
    save_every: int | timedelta | None = None,
    save_overlap: str = "wait",
    keep: int = 3,
    keep_best: int = 0,
    keep_every: int | None = None,
    stats: str | None = "group",
    stats_every: int = 1,
    histograms_every: int = 0,
    sinks: Sequence[str] = SINKS,
    mlflow_every: int = 1,
    upload_checkpoints: bool = False,
    experiment: str | None = None,
    mlflow_run: str | None = None,
    name: str | None = None,
    progress_bar: bool = True,
    stop_signals: Sequence[str] = STOP_SIGNALS,
    strict: bool = True,
    change: Mapping[str, Any] | None = None,
    **stateful: Stateful | Generator,
) -> Run:
    """Track a training, so that it can be stopped and resumed anywhere.

    The objects are neither replaced nor patched. If ``dir`` holds an earlier attempt of the same run, its newest
    checkpoint is restored into them here, before the loop begins.

    Args:
        optimizer: Any torch optimizer, or a dict of them by name; also as Accelerate prepared them.
        scheduler: Its LR scheduler, or a dict by name.
        model: The module, or a dict by name. Without it, checkpoints hold no weights.
        dir: The run's directory. Default: a new ``runs/<date-time>``, which can be resumed only by naming it.
            ``TRACKOPT_DIR`` in the environment overrides it.
        resume: ``"auto"`` (the newest valid checkpoint in ``dir``, else start at step 0), ``"must"``, ``"never"``
            (refuses a directory that holds a run), the path of a checkpoint, or the ``runs:/…`` URI of a checkpoint
            among the artifacts of an MLflow run.
        save_every: Optimizer steps, or a ``timedelta``, between two checkpoints. Default: only at ``run.save()``
            and ``run.close()``.
        save_overlap: What to do when ``save_every`` makes a checkpoint due while the last one is still being written:
            ``"wait"`` for it, which blocks the loop, or ``"skip"`` the new one.
        keep: Number of newest checkpoints to keep.
        keep_best: Number of checkpoints with the lowest ``run.save(metric=…)`` to keep. Default: none.
        keep_every: Keep forever the first checkpoint of every ``keep_every`` optimizer steps. Default: none.
        stats: ``"group"`` for statistics of the parameters, gradients and buffers of each parameter group,
            ``"param"`` for those of each parameter, ``None`` for none.
        stats_every: Compute statistics at every n-th step, and the true update at every tenth of these.
        histograms_every: Compute histograms of gradients and buffers at every n-th step; 0 for none.
        sinks: Where the journal is delivered: ``"tensorboard"``, ``"mlflow"``, both or none.
        mlflow_every: Log every n-th step to MLflow (steps 1, 1 + n, …), and the last step of each epoch and of the run.
            The journal and TensorBoard have every step.
        upload_checkpoints: Upload each checkpoint to the artifacts of the MLflow run, where none is deleted. Its URI
            is then ``runs:/<run id>/checkpoints/step-…``.
        experiment: MLflow experiment. Default: the one that ``mlflow.set_experiment``, ``MLFLOW_EXPERIMENT_ID`` or
            ``MLFLOW_EXPERIMENT_NAME`` has set, else that of the active MLflow run, else MLflow's own default.
        mlflow_run: The MLflow run to log into: ``"active"`` for the one that ``mlflow.start_run`` has begun, or an id.
            The script ends it. Default: a new run, which is nested below an active one.
        name: The run's name. Default: the directory's.
        progress_bar: Show the progress of ``epochs`` and ``batches``: two lines on a terminal, one line a minute
            elsewhere.
        stop_signals: The signals after which the training saves and stops. ``()`` leaves them to the script: its own
            handlers, and its ``except KeyboardInterrupt``.
        strict: Require a checkpoint to match the objects in every name, shape, dtype, class and setting. With
            ``False`` the matching part is loaded, and a warning lists the rest.
        change: Hyperparameters to change from here on, such as ``{"lr": 1e-3, "weight_decay": 0.1}``, in all parameter
            groups; with several optimizers such a dict by name. Another ``lr`` scales the schedule. A later resume
            keeps the change, and does not apply it twice.
        **stateful: Other objects with ``state_dict`` and ``load_state_dict`` (a ``GradScaler``, an EMA model), and
            random generators of torch, NumPy or Python. Each is saved and restored under its keyword.

    Returns:
        The run; close it when the loop is done, or use it as a context manager.

    Raises:
        UsageError: An argument is invalid.
        RunError: The directory is in use, belongs to something else, or cannot be written.
        CheckpointError: ``resume`` requires a checkpoint and there is no valid one, or (``MismatchError``) it does not
            match the objects. Nothing was changed, on disk or in the objects.

    Example:
        >>> import tempfile, torch, trackopt
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with trackopt.wrap(optimizer, model=model, dir=folder, sinks=()) as run:
        ...         for _ in run.epochs(1):
        ...             for x in run.batches(torch.ones(3, 2)):
        ...                 optimizer.zero_grad()
        ...                 loss = model(x).square().mean()
        ...                 loss.backward()
        ...                 optimizer.step()
        ...                 run.log(loss=loss)
        ...     run.global_step
        3
    """
    collectives = current_collectives()
    if not collectives.is_rank_zero:
        logger.setLevel(logging.ERROR)  # rank 0 logs the warnings
    training = Training(_unwrap_ddp(model), optimizer, scheduler, stateful, _ddp_modules(model))
    retention = Retention(keep, keep_best, keep_every)
    stats_options = StatsOptions(stats, stats_every, histograms_every)
    save_options = SaveOptions(save_every, save_overlap)
    changes = Change(change)

    def validate() -> None:
        if not training.optimizers:
            raise UsageError("wrap() was given no optimizer; pass one, or a dict of them by name")
        training.validate()
        validate_options(
            save_options,
            stats_options,
            retention,
            sinks,
            mlflow_every=mlflow_every,
            upload_checkpoints=upload_checkpoints,
            stop_signals=stop_signals,
        )
        changes.validate(training)

    collectives.run_on_all(validate)
    scheduler_configs = {name: scheduler_config(each) for name, each in training.schedulers.items()}
    check_consistency(collectives, training, scheduler_configs, [save_options, stats_options, changes])
    settings = OptimizerSettings(training, changes)
    directory = _open_directory(collectives, dir)

    def make_loop(store: CheckpointStore) -> TrackedLoop:
        destinations = (*sinks, "artifacts") if upload_checkpoints else sinks
        return TrackedLoop(
            training,
            directory,
            store,
            collectives,
            scheduler_configs=scheduler_configs,
            settings=settings,
            save_options=save_options,
            stats_options=stats_options,
            progress_bar=progress_bar,
            stop_signals=stop_signals,
            sinks=destinations if environment.from_environment() is None else (),
            mlflow_every=mlflow_every,
        )

    try:
        group = current_collectives() if is_sharded(training) else None
        store = CheckpointStore(directory.checkpoints, retention, group)
        checkpoint = _find_checkpoint(collectives, directory, store, resume)
        pending, skipped = _restore(collectives, training, checkpoint, settings, strict=strict)
        _initialize_directory(collectives, directory, name, partial(default_tracking, experiment, mlflow_run))
        loop = _run_on_all(collectives, lambda: make_loop(store))
    except BaseException:
        directory.release()
        raise
    log_warnings(f"not restored: {problem}" for problem in skipped)
    log_warnings(settings.notices)
    try:
        _run_on_all(collectives, lambda: loop.start(pending))
    except BaseException as error:
        loop.close("FAILED", error)
        raise
    return Run(loop, None if pending is None else pending.meta.progress.step)


def _open_directory(collectives: Collectives, chosen: str | os.PathLike[str] | None) -> RunDirectory:
    """Open and lock the run's directory on rank 0; the other ranks get its path and identity."""
    directory = _run_on_all(collectives, lambda: RunDirectory(chosen) if collectives.is_rank_zero else None)
    own = (Path(), None) if directory is None else (directory.path, directory.saved_identity)
    path, identity = collectives.broadcast(own)
    return directory or ReadOnlyRunDirectory(path, identity)


def _find_checkpoint(
    collectives: Collectives, directory: RunDirectory, store: CheckpointStore, resume: str | os.PathLike[str]
) -> tuple[Path, CheckpointTree] | None:
    """Find the checkpoint to resume from on rank 0, and read it on each rank; ``None`` to start at step 0."""
    found = _run_on_all(
        collectives, lambda: find_resume_checkpoint(directory, store, resume) if collectives.is_rank_zero else None
    )
    path = collectives.broadcast(None if found is None else str(_make_absolute(found[0])))
    if path is None:
        return None
    return _run_on_all(collectives, lambda: found or (Path(path), load_unverified(Path(path))))


def _restore(
    collectives: Collectives,
    training: Training,
    checkpoint: tuple[Path, CheckpointTree] | None,
    settings: OptimizerSettings,
    *,
    strict: bool,
) -> tuple[PendingRestore | None, list[str]]:
    """Put a checkpoint into the objects; also return what was skipped because it does not fit."""
    if checkpoint is None:
        collectives.run_on_all(settings.begin)
        return None, []
    path, contents = checkpoint
    tree = select_rank_state(contents, training, collectives)
    meta = CheckpointMeta.from_dict(tree[KEY])
    collectives.run_on_all(lambda: settings.resume(meta.progress))
    pending = PendingRestore(training, path, meta, settings, collectives=collectives, strict=strict)
    return pending, _run_on_all(collectives, partial(pending.apply, tree))


def _initialize_directory(
    collectives: Collectives, directory: RunDirectory, name: str | None, target: Callable[[], MLflowTarget]
) -> None:
    """Write ``run.json`` in the directory of a new run."""
    if directory.saved_identity is not None:
        return
    _run_on_all(
        collectives,
        lambda: directory.initialize(name, target()) if collectives.is_rank_zero else None,
    )
    directory.saved_identity = collectives.broadcast(directory.saved_identity)


def _make_absolute(path: Path) -> Path:
    return path if remote.is_remote(path) else path.absolute()


def _run_on_all(collectives: Collectives, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; an error of the file system becomes a `RunError`."""

    def convert_errors() -> T:
        try:
            return action()
        except OSError as error:
            path = error.filename or "the run's directory"
            raise RunError(f"{path}: cannot be used ({error.strerror}); check the disk and the permissions") from error

    return collectives.run_on_all(convert_errors)


def _ddp_modules(model: Any) -> dict[str, DistributedDataParallel]:
    models = model if isinstance(model, Mapping) else {"model": model}
    return {name: each for name, each in models.items() if isinstance(each, DistributedDataParallel)}


def _unwrap_ddp(model: Any) -> Any:
    """Return the modules inside DDP, which puts ``module.`` in front of every parameter name."""
    if isinstance(model, Mapping):
        return {name: _unwrap_ddp(each) for name, each in model.items()}
    return model.module if isinstance(model, DistributedDataParallel) else model
