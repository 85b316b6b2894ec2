"""What is left of a damaged file becomes a new one, which torch loads with nothing but the values that were whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.checkpoints import saved, trained
from trackopt import integrity
from trackopt.errors import ArchiveError, UsageError
from trackopt.salvage import salvage

if TYPE_CHECKING:
    from pathlib import Path


def test_a_whole_file_is_the_same_again(tmp_path: Path) -> None:
    tree = trained()
    tree["more"] = [torch.arange(3, dtype=torch.bfloat16), torch.ones(2, 3).T, torch.tensor(1 + 2j).conj(), b"\xff\0",
                    torch.nn.Parameter(torch.ones(1)), torch.zeros(0), torch.ones(2).to(torch.float8_e4m3fn),
                    torch.ones(2, dtype=torch.uint16), -1, 1 << 80, None, "é", (1, [2.5])]  # fmt: skip
    path = saved(tree, tmp_path / "t.pt")
    done = salvage(path, tmp_path / "new.pt")
    assert done.lost == ()
    old, new = (torch.load(one, weights_only=True) for one in (path, tmp_path / "new.pt"))
    torch.testing.assert_close(new["model"], dict(old["model"]), rtol=0, atol=0)
    assert new["optimizer"]["param_groups"] == old["optimizer"]["param_groups"]
    for a, b in zip(old["more"], new["more"], strict=True):
        assert type(a) is type(b)
        assert torch.equal(a.float(), b.float()) if isinstance(a, torch.Tensor) and not a.is_complex() else True
    assert new["more"][2].item() == 1 - 2j
    assert new["more"][3] == b"\xff\0"
    assert new["more"][8:] == old["more"][8:]
    assert integrity.check(tmp_path / "new.pt") == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.99])
def test_of_a_truncated_file_the_whole_tensors_are_kept(share: float, tmp_path: Path) -> None:
    tree = {f"w{i}": torch.full((5000,), float(i)) for i in range(10)} | {"epoch": 3}
    path = saved(tree, tmp_path / "t.pt")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    done = salvage(path, tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True, mmap=True)
    assert new.pop("epoch") == 3
    assert 0 < len(new) == done.tensors < 11
    assert {*new, *done.lost} == set(tree) - {"epoch"}
    assert all(torch.equal(value, tree[name]) for name, value in new.items())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    raw = path.read_bytes()
    with pytest.raises(UsageError, match="there already"):
        salvage(path, path)
    assert path.read_bytes() == raw


def test_where_nothing_is_left_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(saved(trained(), path).read_bytes()[:200])
    with pytest.raises(ArchiveError, match="not whole"):
        salvage(path, tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
