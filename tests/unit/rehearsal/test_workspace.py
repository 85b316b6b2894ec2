"""The copy of the working directory, and the checkpoints in it."""

import os

import torch
from safetensors.torch import save_file

from trackopt.rehearsal.workspace import copy_directory, find_newest_checkpoint


def test_a_copy_protects_what_a_training_may_overwrite(tmp_path):
    """Small files and checkpoints are copied, large ones are links; what lies beside the directory can be read."""
    source = tmp_path / "beside" / "project"
    (source / "runs" / "old").mkdir(parents=True)
    (source / ".venv").mkdir()
    (source.parent / "data.txt").write_text("data")
    (source / "train.py").write_text("code")
    torch.save({"w": torch.zeros(400_000)}, source / "runs" / "old" / "last.pt")
    (source / "large.csv").write_bytes(bytes(2 << 20))
    (tmp_path / "scratch").mkdir()
    copy = copy_directory(source, tmp_path / "scratch")
    (copy / "runs" / "old" / "last.pt").write_text("overwritten")
    (copy / "train.py").write_text("overwritten")
    assert (source / "runs" / "old" / "last.pt").stat().st_size > 1 << 20
    assert (source / "train.py").read_text() == "code"
    assert (copy / ".." / "data.txt").read_text() == "data"
    assert (copy / ".venv").resolve() == source / ".venv"
    assert [(copy / name).is_symlink() for name in ("large.csv", ".venv", "runs")] == [True, True, False]


def test_a_scratch_directory_within_is_left_out(tmp_path):
    scratch = tmp_path / "scratch" / "a"
    scratch.mkdir(parents=True)
    copy = copy_directory(tmp_path, scratch)
    assert list(copy.iterdir()) == []


def test_the_newest_checkpoint(tmp_path):
    """A file; or a directory if its files are parts of one state. Other files, links and older ones do not count."""
    (tmp_path / "log.txt").write_text("newer than all")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pt")
    os.utime(tmp_path / "old.pt", (5, 5))
    assert find_newest_checkpoint(tmp_path, 100) is None
    for second, name in enumerate(("epoch1.pt", "best.pt"), 200):
        torch.save({"w": torch.zeros(2)}, tmp_path / name)
        os.utime(tmp_path / name, (second, second))
    (tmp_path / "link.pt").symlink_to(tmp_path / "epoch1.pt")
    assert find_newest_checkpoint(tmp_path, 100) == tmp_path / "best.pt"
    directory = tmp_path / "out" / "checkpoint-10"
    directory.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, directory / "model.safetensors")
    torch.save({}, directory / "optimizer.pt")
    torch.save({}, directory / "training_args.bin")
    assert find_newest_checkpoint(tmp_path, 100) in {directory, directory / "training_args.bin"}
    os.utime(directory / "training_args.bin", (300, 300))
    assert find_newest_checkpoint(tmp_path, 100) == directory
