"""Run directories of strangers: whatever they hold, each command answers in words, soon, and writes nowhere else."""

import os
import random

import orjson
import pytest

from trackopt import TrackoptError
from trackopt.errors import RunError

RECORDS = b"".join(b'{"step":%d,"time":%d.5,"metrics":{"loss":%d.25}}\n' % (step, step, step) for step in range(1, 30))
IDENTITY = {
    "format": 1,
    "id": "x" * 32,
    "name": "a\x1b[2J\x1b]8;;http://x\x07k\n[red]b[/red]",
    "created": 1.0,
    "command": "x",
    "working_directory": "/",
    "mlflow": {"tracking_uri": "http://user:secret@127.0.0.1:9/", "experiment": "\x1b[31mDefault"},
    "attempt": 1,
    "sinks": ["tensorboard"],
}
JOURNALS = {
    "empty": b"",
    "bytes": random.Random(0).randbytes(5000),
    "deep": b"[" * 100_000 + b"\n" + b'{"a":' * 100_000 + b"\n",
    "huge": b'{"step":1e30,"time":1,"metrics":{"loss":1}}\n{"step":-5,"time":1e300,"metrics":{"loss":1e308}}\n'
    b'{"step":3,"time":-1e308,"metrics":{"loss":-1e308}}\n{"step":4611686018427387904,"time":1,"metrics":{"loss":3}}\n',
    "types": b'{"step":"a","time":1}\n{"step":1,"time":1,"metrics":[1]}\n{"step":2,"time":1,"metrics":{"loss":null}}\n'
    b'{"event":7,"step":1,"time":1}\n{"event":"close","step":1,"time":1,"status":[1]}\n'
    b'{"event":"start","step":1,"time":1,"params":[1]}\n{"event":"resume","step":1,"time":1,"offset":{}}\n',
    "params": b'{"event":"start","step":0,"time":1,"params":{"optimizer":{"a":[1]},"lr":null,"a.b":1e400}}\n' + RECORDS,
    "returns": RECORDS + b"".join(b'{"event":"resume","step":%d,"time":2.0,"offset":%d}\n' % (i % 7, i * 3)
                                  for i in range(300)),
    "keys": b"".join(b'{"step":%d,"time":1,"metrics":{"lr/%d":1,"loss":2}}\n' % (step, step) for step in range(300)),
}  # fmt: skip
IDENTITIES = {"empty": b"", "object": b"{}", "list": b"[1, 2]", "deep": b"[" * 100_000,
              "types": orjson.dumps({**IDENTITY, "name": 7}), "null": orjson.dumps({**IDENTITY, "mlflow": None}),
              "attempt": orjson.dumps({**IDENTITY, "attempt": "x"}), "sinks": orjson.dumps({**IDENTITY, "sinks": [1]}),
              "uri": orjson.dumps({**IDENTITY, "mlflow": {"tracking_uri": 1, "experiment": 2}})}  # fmt: skip
FILES = ("run.json", "metrics.jsonl", "recorder.json", "recorder.log", ".lock", ".run.json.lock")
COMMANDS = (["ls"], ["plot"], ["plot", "--json"], ["compare"], ["compare", "--json"], ["verify"], ["inspect"])


def make(directory, identity=None, journal=RECORDS):
    directory.mkdir(parents=True)
    (directory / "run.json").write_bytes(orjson.dumps(IDENTITY) if identity is None else identity)
    (directory / "metrics.jsonl").write_bytes(journal)
    return directory


def ask(run_cli, *arguments):
    """What a command prints; an error is one line."""
    printed, error = "", ""
    try:
        printed = "".join(run_cli(*arguments))
    except TrackoptError as caught:
        error = str(caught)
    assert "\n" not in error
    printed += error
    if "--json" not in arguments:
        assert "\x1b" not in printed
    return printed


@pytest.mark.parametrize("kind", JOURNALS)
def test_any_journal_is_answered(kind, tmp_path, run_cli):
    run = make(tmp_path / "runs" / "one", journal=JOURNALS[kind])
    for command in COMMANDS:
        ask(run_cli, *command, run)
    assert "one" in ask(run_cli, "ls", run.parent)
    ask(run_cli, "diff", run, run)


@pytest.mark.parametrize("kind", IDENTITIES)
def test_any_description_is_answered(kind, tmp_path, run_cli):
    """`sync` and `ui` refuse one that is not a run's; what needs only the journal draws it."""
    run = make(tmp_path / "runs" / "one", IDENTITIES[kind])
    for command in COMMANDS:
        ask(run_cli, *command, run)
    assert "29 steps" in ask(run_cli, "plot", run)
    ask(run_cli, "ls", run.parent)
    for command, place in (("sync", run), ("ui", run.parent)):
        with pytest.raises(RunError, match=r"not a run's description|contains no run"):
            run_cli(command, place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused_at_once(name, tmp_path, run_cli):
    """No command waits for somebody to write into it."""
    run = make(tmp_path / "runs" / "one")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for command in COMMANDS:
        ask(run_cli, *command, run)
    if name == "metrics.jsonl":
        assert "not a regular file" in ask(run_cli, "verify", run)
    ask(run_cli, "ls", run.parent)
    assert "regular file" in ask(run_cli, "sync", run)


def test_nothing_is_written_through_a_link(tmp_path, run_cli):
    """`sync` appends to a log and replaces descriptions; a link would lead it to a file of the user's."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for number, name in enumerate(("recorder.log", ".run.json.part", ".recorder.json.part", ".lock")):
        run = make(tmp_path / f"run-{number}")
        (run / name).symlink_to(mine)
        with pytest.raises(RunError, match="not a regular file"):
            run_cli("sync", run)
        assert mine.read_text() == "mine"


def test_sync_says_where_it_sends(tmp_path, run_cli, capsys):
    """Before it does, without the password, and without obeying the name."""
    run = make(tmp_path / "run", orjson.dumps({**IDENTITY, "sinks": ["mlflow"]}))
    (run / "recorder.log").symlink_to(tmp_path)
    with pytest.raises(RunError):
        run_cli("sync", run)
    assert capsys.readouterr().err == ""  # nothing would be sent
    (run / "recorder.log").unlink()
    (run / "metrics.jsonl").unlink()
    with pytest.raises((TrackoptError, OSError)):
        run_cli("sync", run)
    told = capsys.readouterr().err
    assert "run: sending to MLflow at http://127.0.0.1:9/ (experiment " in told.splitlines()[0]
    assert "secret" not in told
    assert "\x1b" not in told


@pytest.mark.parametrize("seed", range(25))
def test_changed_bytes_end_no_command_in_a_traceback(seed, tmp_path, run_cli):
    """A run whose files were changed at random."""
    chance = random.Random(seed)
    marker = b'{"event":"resume","step":3,"time":40.5,"offset":200,"params":{"optimizer":"SGD","lr":0.1}}\n'
    run = make(tmp_path / "one", journal=RECORDS + marker + RECORDS)
    (run / "recorder.json").write_bytes(b'{"tensorboard":{"offset":10,"finished":false,"sent":{"loss":3}}}')
    for name in ("run.json", "metrics.jsonl", "recorder.json"):
        content = bytearray((run / name).read_bytes())
        for _ in range(chance.randrange(1, 30)):
            content[chance.randrange(len(content))] = chance.choice(b'{}[]",:0-9eE.\\\0\nx\xff')
        (run / name).write_bytes(content)
    for command in COMMANDS:
        ask(run_cli, *command, run)
    ask(run_cli, "ls", tmp_path)
