"""Checkpoints that are large for their structure: reading takes what they need, and no limit is in the way."""

import zipfile
from pathlib import Path

import pytest
import torch

import trackopt
from tests.helpers.checkpoints import peak, zipped
from trackopt import CheckpointError, journal
from trackopt.analysis.verify import UNCHECKED, verify
from trackopt.archive.formats import legacy
from trackopt.archive.io.zip_writer import central_directory, constant_records, plan_entries
from trackopt.archive.unpickler import limits
from trackopt.archive.unpickler.limits import Limits
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.checkpoint.pickler import dump_tree
from trackopt.errors import ArchiveLimitError


def optimizer_state(count):
    """AdamW's, whose tensors have a storage each."""
    state = {
        index: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
        for index in range(count)
    }
    return {"state": state, "param_groups": [{"params": list(state), "lr": 0.1}]}


@pytest.mark.parametrize(
    "tree",
    [
        {"order": list(range(100_000))},
        {"order": tuple(range(70_000, 170_000))},
        {"flags": [None, True] * 50_000},
        {"names": [f"layer.{index}" for index in range(20_000)]},
        {"words": ["Ж" * 40 for _ in range(20_000)]},
        {"shapes": [[(3, 4), []] for _ in range(20_000)], "table": [{} for _ in range(20_000)]},
        {"metrics": {f"m{index}": {"sum": 0.5, "count": index} for index in range(20_000)}},
        {"optimizer": optimizer_state(2000)},
    ],
    ids="-".join,
)
def test_what_is_saved_stays_below_the_limits(tree):
    """Also without the least limits: so a list of ten million numbers and 40,000 parameters are read."""
    data = dump_tree(tree).data
    size = len(data)
    proportional = Limits(size, 40 * size, size)
    assert Limits.for_size(10**12) == Limits(10**12, (200 << 20) + 40 * (10**12 - 16_000_000), 10**12)
    assert unpickle(data, legacy.load_nested, limits=proportional).end == size


def test_a_compressed_pickle_has_the_limits_of_its_compressed_size(tmp_path):
    """A short file cannot take long: that is no damage, but it is not read."""
    pickle = b"\x80\x02(" + b"J\0\0\1\0" * 6_000_000 + b"l."
    assert Limits.for_size(len(pickle)).memory > 41 * 6_000_000 > Limits().memory
    path = zipped(pickle, tmp_path / "packed.pt", method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveLimitError, match="not checked: its pickle is larger than the reader's limits"):
        trackopt.open(path)
    (report,) = verify(path)
    assert (report.status, report.salvageable) == (UNCHECKED, "")
    assert "damaged" not in report.problems[0]


def test_a_large_pickle_with_holes_takes_no_memory(tmp_path):
    """A file of 3 GB without content: it is read in pieces, up to the first byte that is no operation."""
    path = tmp_path / "holes.pt"
    entries = plan_entries(3 << 30, [])
    contents = [b"\x80\x02", *constant_records(), bytes(40)]
    with path.open("wb") as file:
        for entry, content in zip(entries, contents, strict=True):
            file.seek(entry.header)
            file.write(entry.local_header())
            file.write(content)
            file.seek(entry.stop)
            file.write(entry.data_descriptor(0))
        file.write(central_directory(entries, [0] * len(entries)))
    program = (
        "import sys, trackopt\ntry:\n    trackopt.open(sys.argv[1])\n"
        "except trackopt.ArchiveError as e:\n    assert 'unknown operation' in str(e), e"
    )
    assert peak(program, path) < 128 << 10


def test_a_checkpoint_beyond_the_limits_is_not_passed_over(tmp_path, monkeypatch, run_cli):
    """The run's own is resumed from. Of others, `wrap` says what to do; `ls` shows that it was not checked."""
    weight = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)

    def wrapped(**options):
        return trackopt.wrap(optimizer, model=weight, dir=tmp_path, sinks=(), save_every=1, **options)

    with wrapped() as run:
        for _ in range(2):
            weight(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            run.step()
    newest = tmp_path / "checkpoints/step-00000002.pt"
    monkeypatch.setattr(limits.Limits, "for_size", classmethod(lambda cls, *sizes: Limits(operations=9)))
    with pytest.raises(CheckpointError, match=r"not checked: .* move it away to resume from the one before"):
        wrapped(resume=newest)
    with wrapped() as run:
        assert run.resumed_from == 2
    names = sorted(path.name for path in Path(tmp_path, "checkpoints").glob("step*"))
    assert names == ["step-00000001.pt", "step-00000002.pt"]
    assert "not checked" in run_cli("ls", tmp_path).out
    assert journal.series(tmp_path)
