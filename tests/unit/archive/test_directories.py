"""Checkpoints that are directories: layouts that are made by hand, and what goes wrong in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

import trackopt
from tests.helpers.checkpoints import recognized, saved, trained
from trackopt import state
from trackopt.analysis.verify import verify
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.metadata import Metadata


def indexed(directory: Path, **places: str) -> Path:
    """An index that says in which file each weight is."""
    path = directory / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files of weights and their index."""
    saved({"a": torch.arange(3.0)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    saved({"b": torch.ones(2, 2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    indexed(tmp_path, a="pytorch_model-00001-of-00002.bin", b="pytorch_model-00002-of-00002.bin")
    return tmp_path


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A distributed checkpoint of one process."""
    tree = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, "epoch": 4}
    with pytest.warns(UserWarning, match=r"single process|disabled"):
        dcp.save(tree, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.mark.parametrize("place", ["", "pytorch_model.bin.index.json"])
def test_weights_in_several_files_are_one_state_dict(sharded: Path, place: str) -> None:
    with trackopt.open(sharded / place) as archive:
        assert list(archive.tree) == ["a", "b"]
        assert archive.read(archive.tree["a"]).tolist() == [0, 1, 2]
        assert len({tensor.storage.key for _, tensor in archive.tensors()}) == 2
        assert state.read(archive).models[0].parameters == 7
        assert not archive.problems


@pytest.mark.parametrize("name", ["../out.bin", "/etc/hostname", "link.bin", "loop.bin", "a\0b", "", "x" * 300])
def test_no_index_leads_out_of_its_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    saved({"a": torch.ones(1)}, tmp_path / "out.bin")
    (inside / "link.bin").symlink_to(tmp_path / "out.bin")
    (inside / "loop.bin").symlink_to(inside / "loop.bin")
    with pytest.raises(ArchiveError) as error:
        trackopt.open(indexed(inside, a=name))
    assert "\n" not in str(error.value)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    saved({"w": torch.ones(2)}, tmp_path / "blobs" / "123")
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/123")
    with trackopt.open(snapshot) as archive:
        assert list(archive.tree) == ["w"]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ArchiveError, match=r"00002-of-00002\.bin' is missing"):
        trackopt.open(sharded)


def test_a_weight_that_is_not_where_the_index_says_is_a_problem(sharded: Path) -> None:
    first, second = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    indexed(sharded, a=first, b=first, c=second)
    with trackopt.open(sharded) as archive:
        assert list(archive.tree) == ["a"]
        assert [line.partition(": ")[2] for line in archive.problems] == [
            f"'b' is not in {first!r} (2 such weights)",
            "1 weights in its files are not in it",
        ]


@pytest.mark.parametrize("text", ["", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_an_index_that_makes_no_sense_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArchiveError) as error:
        trackopt.open(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.linux
def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(ArchiveError, match="no regular file"):
        trackopt.open(tmp_path)


def test_a_directory_with_none_of_the_layouts_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArchiveError, match="no checkpoint in this directory"):
        trackopt.open(tmp_path)


def test_no_file_stays_open(sharded: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    trackopt.open(sharded).close()
    (sharded / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK\3\4 garbage")
    with pytest.raises(ArchiveError):
        trackopt.open(sharded)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_unreadable_file_beside_the_weights_is_a_problem(tmp_path: Path) -> None:
    ours = trained()
    saved(ours["model"], tmp_path / "pytorch_model.bin")
    saved(ours["optimizer"], tmp_path / "optimizer.bin")
    (tmp_path / "scheduler.bin").write_bytes(b"")
    with trackopt.open(tmp_path) as archive:
        assert [line.partition(":")[0] for line in archive.problems] == ["scheduler.bin"]
        assert state.read(archive).optimizers[0].matching == "order against the model"


@pytest.mark.parametrize("name", ["manifest.json", "training.pt", ".metadata"])
def test_a_stranger_s_file_of_a_name_of_ours_changes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ArchiveError, match="no checkpoint in this directory"):
        trackopt.open(tmp_path)
    assert [one.status for one in verify(tmp_path)] == ["unreadable"]
    saved({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with trackopt.open(tmp_path) as archive:
        assert (archive.format, list(archive.tree)) == ("Hugging Face model", ["w"])


@pytest.mark.parametrize("name", ["training.pt", "manifest.json"])
def test_of_a_sharded_checkpoint_what_is_missing_is_told(distributed: Path, name: str) -> None:
    (distributed / ".metadata").unlink()
    (distributed / name).write_bytes(b"{}")
    (checked,) = verify(distributed)
    assert (checked.status, checked.format) == ("damaged", "DCP")
    assert "'.metadata' is missing" in checked.problems[0]


def test_deepspeed_by_its_layout(tmp_path: Path) -> None:
    ours, tag = trained(), tmp_path / "global_step7"
    tag.mkdir()
    (tmp_path / "latest").write_text("global_step7\n")
    flat = {"state": {0: {"step": 7, "exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9)}},
            "param_groups": [{**ours["optimizer"]["param_groups"][0], "params": [0]}]}  # fmt: skip
    model = {"module": ours["model"], "lr_scheduler": ours["scheduler"], "optimizer": None, "global_steps": 7}
    saved(model, tag / "mp_rank_00_model_states.pt")
    for rank in range(2):
        shard = {"optimizer_state_dict": {"base_optimizer_state": flat, "zero_stage": 1}, "ds_version": "0.16"}
        saved(shard, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    with trackopt.open(tmp_path) as archive:
        found = state.read(archive)
    assert (found.framework, found.step) == ("DeepSpeed", 7)
    assert [one.cls for one in found.optimizers] == [recognized("AdamW")] * 2
    assert [one.cls for one in found.schedulers] == ["StepLR"]
    assert found.models[0].tensors.keys() == ours["model"].keys()


def test_a_distributed_checkpoint_of_one_process(distributed: Path) -> None:
    with trackopt.open(distributed) as archive:
        assert archive.read(archive.tree["model"]["w"]).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert archive.read(archive.tree["model"]["b"]).tolist() == [1, 1]
        assert (state.read(archive).epoch, archive.problems) == (4, ())


def info(metadata: Metadata, name: str) -> Any:
    return next(value for key, value in metadata.storage_data.items() if key.fqn == name)


def chunk(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.w"].chunks[0]


def put(target: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(target, name, value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: put(info(m, "model.w"), relative_path="../../etc/hostname"),
        lambda m: put(info(m, "model.w"), relative_path="/etc/hostname"),
        lambda m: put(info(m, "model.w"), relative_path="gone.distcp"),
        lambda m: put(info(m, "model.w"), offset=-4),
        lambda m: put(info(m, "model.w"), offset=1 << 60),
        lambda m: put(info(m, "model.w"), length=1 << 62),
        lambda m: put(info(m, "epoch"), offset=3),
        lambda m: put(m.state_dict_metadata["model.w"], size=(2,)),
        lambda m: put(m.state_dict_metadata["model.w"].properties, dtype="float32"),
        lambda m: put(m, state_dict_metadata=[1]),
        lambda m: put(m.state_dict_metadata["model.w"], size=(1,) * 99),
    ],
)
def test_metadata_that_lie_are_one_line(distributed: Path, spoil: Callable[[Metadata], None]) -> None:
    respoiled(distributed, spoil)
    with pytest.raises(ArchiveError) as error:
        trackopt.open(distributed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: put(m.state_dict_metadata["model.w"], size=(1 << 40, 3)),
        lambda m: put(chunk(m), sizes=torch.Size((1, 3))),
        lambda m: put(chunk(m), offsets=torch.Size((1, 0))),
        lambda m: m.state_dict_metadata["model.w"].chunks.clear(),
        lambda m: put(m, storage_data=7),
        lambda m: [put(index, offset=3, fqn=[1]) for index in m.storage_data],
        lambda m: m.planner_data.update({"epoch": ("model", "w", "deeper")}),
    ],
)
def test_parts_that_do_not_fit_are_told_and_not_read(distributed: Path, spoil: Callable[[Metadata], None]) -> None:
    respoiled(distributed, spoil)
    with trackopt.open(distributed) as archive:
        assert archive.problems
        if "epoch" in archive.tree:
            with pytest.raises(ArchiveError):
                next(archive.chunks(archive.tree["model"]["w"]))


def respoiled(directory: Path, spoil: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    spoil(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, 4))


def test_a_run_directory_is_still_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    saved(trained(), tmp_path / "checkpoints" / "step-00000003.pt")
    shutil.copy(tmp_path / "checkpoints" / "step-00000003.pt", tmp_path / "pytorch_model.bin")
    with trackopt.open(tmp_path) as archive:
        assert archive.path.name == "step-00000003.pt"
