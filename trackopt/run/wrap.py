"""``wrap``: from the user's live objects to a run, by way of its directory and the checkpoint that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch.nn.parallel import DistributedDataParallel

from trackopt import remote
from trackopt.checkpoint.resume import PendingRestore, find_resume_checkpoint, select_rank_state
from trackopt.checkpoint.retention import Retention
from trackopt.checkpoint.store import CheckpointStore, load_unverified
from trackopt.distributed.collectives import Collectives, current_collectives
from trackopt.distributed.consistency import check_consistency
from trackopt.errors import RunError, UsageError
from trackopt.run.options import SINKS, validate_options
from trackopt.run.run import Run
from trackopt.rundir import environment
from trackopt.rundir.directory import ReadOnlyRunDirectory, RunDirectory
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

    from trackopt.training.objects import Generator, Stateful

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
    upload_checkpoints: bool = False,
    experiment: str | None = None,
    name: str | None = None,
    progress_bar: bool = True,
    strict: bool = True,
    **stateful: Stateful | Generator,
) -> Run:
    """Track a training, and make it one that can be stopped and started anywhere.

    The objects stay what they are; nothing is replaced or patched. If ``dir`` holds an earlier attempt of the same
    run, the state of its newest checkpoint is put into them here, before the loop begins.

    Args:
        optimizer: Any torch optimizer, or a dict of them by name; also as Accelerate prepared them.
        scheduler: Its LR scheduler, or a dict by name.
        model: The module, or a dict by name; without it checkpoints hold no weights.
        dir: The run's directory. Default: a fresh ``runs/<date-time>``, which can be resumed only by naming it.
            ``TRACKOPT_DIR`` in the environment goes before it.
        resume: ``"auto"`` (the newest sound checkpoint in ``dir``, else from the start), ``"must"``, ``"never"``
            (refuses a directory that holds a run), or the path of a checkpoint, or its address among the artifacts of
            an MLflow run.
        save_every: Optimizer steps, or a ``timedelta``, between two checkpoints. Default: only at ``run.save()``
            and ``run.close()``.
        save_overlap: What becomes of a checkpoint that ``save_every`` makes due while the one before it is still on its
            way to the disk: it can ``"wait"`` for that, and the loop with it, or ``"skip"`` its turn.
        keep: How many of the newest checkpoints to keep.
        keep_best: How many to keep of those with the lowest ``run.save(metric=…)``. Default: none.
        keep_every: Keep for good the first checkpoint in each stretch of so many optimizer steps. Default: none.
        stats: ``"group"`` for statistics of the parameters, gradients and buffers of each parameter group,
            ``"param"`` for those of each parameter, ``None`` for none.
        stats_every: Take them at every n-th step; what the step really changed, at every tenth of these.
        histograms_every: Take histograms of gradients and buffers at every n-th step; 0 for none.
        sinks: Where the journal goes: ``"tensorboard"``, ``"mlflow"``, both or none.
        upload_checkpoints: Upload each checkpoint to the artifacts of the MLflow run, where all of them stay. Its
            address is then ``runs:/<run id>/checkpoints/step-…``.
        experiment: MLflow's experiment. Default: ``MLFLOW_EXPERIMENT_NAME``, else MLflow's own default.
        name: The run's name. Default: the directory's.
        progress_bar: Show the progress of ``epochs`` and ``batches``: on a terminal in two lines that stay, elsewhere
            in a line a minute.
        strict: Whether a checkpoint must fit the objects in every name, shape, dtype, class and setting. With
            ``False`` what fits is loaded, and the rest is listed in a warning.
        **stateful: Whatever else has ``state_dict`` and ``load_state_dict`` (a ``GradScaler``, an EMA model), and
            random generators of torch, NumPy or python; saved and restored under its keyword.

    Returns:
        The run; close it when the loop is done, or use it as a context manager.

    Raises:
        UsageError: An argument makes no sense.
        RunError: The directory is taken, foreign, or cannot be written.
        CheckpointError: There is no sound checkpoint where one must be, or (``MismatchError``) it does not fit.
            Nothing was changed then, on disk or in the objects.

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
        logger.setLevel(logging.ERROR)  # rank 0 tells whatever there is to tell
    training = Training(_unwrap_ddp(model), optimizer, scheduler, stateful)
    retention = Retention(keep, keep_best, keep_every)
    measuring: dict[str, Any] = {"stats": stats, "stats_every": stats_every, "histograms_every": histograms_every}
    saving: dict[str, Any] = {"save_every": save_every, "save_overlap": save_overlap}
    collectives.run_on_all(
        lambda: _check(
            training, **saving, retention=retention, sinks=sinks, upload_checkpoints=upload_checkpoints, **measuring
        )
    )
    destinations = (*sinks, "artifacts") if upload_checkpoints else sinks
    built = {name: scheduler_config(each) for name, each in training.schedulers.items()}
    check_consistency(collectives, training, built, {**saving, **measuring})
    directory = _open_directory(collectives, dir)
    try:
        store = CheckpointStore(
            directory.checkpoints, retention, current_collectives() if is_sharded(training) else None
        )
        found, resumption, left_out = _find_checkpoint(collectives, directory, store, resume), None, []
        if found is not None:
            tree = select_rank_state(found[1], training, collectives)
            resumption = PendingRestore(training, found[0], tree["trackopt"], collectives=collectives, strict=strict)
            left_out = _run_on_all(collectives, partial(resumption.apply, tree))
        if not directory.identity:
            _run_on_all(
                collectives,
                lambda: directory.initialize(name, default_tracking(experiment)) if collectives.is_rank_zero else None,
            )
            directory.identity = collectives.broadcast(directory.identity)
        run = _run_on_all(
            collectives,
            lambda: Run(
                training,
                directory,
                store,
                collectives,
                scheduler_configs=built,
                save_options=saving,
                stats_options=measuring,
                progress_bar=progress_bar,
                sinks=destinations if environment.from_environment() is None else (),
            ),
        )
    except BaseException:
        directory.release()
        raise
    log_warnings(f"left as it is here: {problem}" for problem in left_out)
    try:
        _run_on_all(collectives, lambda: run._start(resumption))
    except BaseException as error:
        run._close("FAILED", error)
        raise
    return run


def _check(training: Training, **options: Any) -> None:
    if not training.optimizers:
        raise UsageError("wrap() was given no optimizer; pass one, or a dict of them by name")
    training.validate()
    validate_options(**options)


def _open_directory(collectives: Collectives, chosen: str | os.PathLike[str] | None) -> RunDirectory:
    """The run's directory, held by rank 0; the others learn from it which one that is."""
    directory = _run_on_all(collectives, lambda: RunDirectory(chosen) if collectives.is_rank_zero else None)
    path, identity = collectives.broadcast(("", {}) if directory is None else (str(directory.path), directory.identity))
    return directory or ReadOnlyRunDirectory(Path(path), identity)


def _find_checkpoint(
    collectives: Collectives, directory: RunDirectory, store: CheckpointStore, resume: str | os.PathLike[str]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that rank 0 found, read by each rank; ``None`` where the run begins anew."""
    found = _run_on_all(
        collectives, lambda: find_resume_checkpoint(directory, store, resume) if collectives.is_rank_zero else None
    )
    path = collectives.broadcast(None if found is None else str(_make_absolute(found[0])))
    if path is None:
        return None
    return _run_on_all(collectives, lambda: found or (Path(path), load_unverified(Path(path))))


def _make_absolute(path: Path) -> Path:
    return path if remote.is_remote(path) else path.absolute()


def _run_on_all(collectives: Collectives, action: Callable[[], T]) -> T:
    """Do it on every rank; what a disk refuses is told as any other trouble with the run's directory."""

    def told() -> T:
        try:
            return action()
        except OSError as error:
            place = error.filename or "the run's directory"
            raise RunError(f"{place}: cannot be used ({error.strerror}); check the disk and the permissions") from error

    return collectives.run_on_all(told)


def _unwrap_ddp(model: Any) -> Any:
    """Modules as one process would have them: DDP puts ``module.`` in front of every name."""
    if isinstance(model, Mapping):
        return {name: _unwrap_ddp(each) for name, each in model.items()}
    return model.module if isinstance(model, DistributedDataParallel) else model
