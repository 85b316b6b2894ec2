"""The public API as a user's type checker sees it; `make lint` checks this file, nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from typing_extensions import assert_type

import trackopt


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loader: list[torch.Tensor],
) -> None:
    run = trackopt.wrap(
        {"gen": optimizer},
        {"gen": scheduler},
        model={"gen": model},
        dir=Path("runs"),
        save_every=100,
        save_overlap="skip",
        upload_checkpoints=True,
        progress_bar=False,
        sinks=("mlflow",),
    )
    assert_type(run, trackopt.Run)
    with run as entered:
        assert_type(entered, trackopt.Run)
        for epoch in run.epochs(3):
            assert_type(epoch, int)
            batches = run.batches(loader)
            assert_type(batches, Iterator[torch.Tensor])
            for batch in batches:
                assert_type(batch, torch.Tensor)
                run.log(loss=batch.mean(), reduce="mean")
        run.step(loss=1.0)
        run.save(keep=True, metric=0.5)
    assert_type(run.dir, Path)
    assert_type(run.global_step, int)
    assert_type(run.epoch, int)
    assert_type(run.resumed_from, int | None)
    assert_type(run.should_stop, bool)
    assert_type(run.step_counts.closure_calls, int)


def look(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    result = trackopt.restore("runs/digits", model=model, optimizer=optimizer, strict=False)
    assert_type(result, trackopt.RestoreResult)
    assert_type(result.step, int | None)
    assert_type(result.skipped, tuple[str, ...])
    with trackopt.open("checkpoint.pt") as archive:
        assert_type(archive, trackopt.Archive)
        for name, tensor in archive.tensors():
            assert_type(name, str)
            assert_type(tensor.shape, tuple[int, ...])
    found = trackopt.diff("a.pt", "b.pt")
    assert_type(found.equal, bool)


def plan(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    preview = trackopt.preview(scheduler, 100)
    assert_type(preview, trackopt.Preview)
    assert_type(preview.lr, dict[str, list[float]])


def read() -> None:
    assert_type(trackopt.journal.series("runs/digits"), dict[str, list[tuple[int, float]]])
