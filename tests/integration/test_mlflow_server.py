"""A team's server: PostgreSQL, ``mlflow server`` with the artifacts behind it, a recorder that uploads, and readers."""

import collections
import contextlib
import errno
import hashlib
import http.server
import io
import itertools
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

import trackopt
from tests.helpers.proxy import proxy
from tests.helpers.stores import drain, mlflow_run, without_warnings
from tests.helpers.training import make_training, train_step
from tests.integration.test_recorder import mlflow_server
from tests.integration.test_recorder_faults import assert_everything_once, free_port, wait_for
from trackopt import journal, locations, remote
from trackopt.archive.io import sparse_file
from trackopt.checkpoint.partial_load import load_keys
from trackopt.recorder.recorder import Recorder
from trackopt.rundir.identity import read_identity, write_identity

pytestmark = pytest.mark.timeout(900)  # servers start often, and a busy machine takes its time
HOME = Path(__file__).parents[2]
PARTS = """
import sys
import trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], upload_checkpoints=True, keep=100)
while True:
    for _ in range(5):
        run.step(loss=train_step(model, optimizer, scheduler))
    run.save(wait=True)
    print(run._loop.attempt._recorder._process.pid, flush=True)
    if sys.stdin.readline() == "end\\n":
        break
run.close()
"""


@pytest.fixture(scope="module")
def postgres():
    """The address of a PostgreSQL server that runs as long as these tests; it must not be root's."""
    programs = [*map(str, Path("/usr/lib/postgresql").glob("*/bin")), "/usr/local/bin", "/usr/bin"]
    initdb, server = (shutil.which(name, path=":".join(programs)) for name in ("initdb", "postgres"))
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed")
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and has no user of its own here")
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")  # short, for a socket; and where not only root may look
    who = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data = f"{folder}/data"
    create = [*who, initdb, "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--no-locale"]
    subprocess.run(create, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    command = [*who, server, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    with (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    wait_for(lambda: Path(folder, ".s.PGSQL.5432").exists() or process.poll() is not None)
    assert process.poll() is None, Path(folder, "log").read_text()
    yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    process.send_signal(signal.SIGINT)  # a fast shutdown
    process.wait()
    shutil.rmtree(folder)


class Team:
    """A server that can be stopped and started again."""

    def __init__(self, folder, store):
        self.folder, self.store, self.port = folder, store, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._running = contextlib.ExitStack()

    def start(self):
        self._running.enter_context(mlflow_server(self.port, self.folder, self.store))

    def stop(self):
        self._running.close()

    def uploads(self):
        """How often each checkpoint was taken, by name."""
        puts = re.findall(r'"PUT /\S*/(step-\S+) HTTP/1.1" 200', (self.folder / "server.log").read_text())
        return {name: puts.count(name) for name in puts}


@pytest.fixture(scope="module")
def team(postgres, tmp_path_factory):
    team = Team(tmp_path_factory.mktemp("team"), postgres)
    team.start()
    yield team
    team.stop()


@pytest.fixture(autouse=True)
def _environment(monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    if "team" in request.fixturenames:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("team").address)


def command(*words):
    words = [sys.executable, "-m", "trackopt", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def cursor(directory):
    with contextlib.suppress(FileNotFoundError):
        return orjson.loads((directory / "recorder.json").read_bytes()).get("artifacts", {"offset": 0})["offset"]
    return 0


def events(directory):
    """The steps of the checkpoints that the journal tells of."""
    return [line.step for line in journal.read(directory / journal.NAME) if line.event == "checkpoint"]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_everything_is_there_once_though_server_and_recorder_die(team, tmp_path):
    """The server is stopped and started in the middle, the recorder killed; then a checkpoint goes back in exactly."""
    directory = tmp_path / "run"
    words = [sys.executable, "-c", PARTS, str(directory)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as training:

        def part(word=b"on\n"):
            training.stdin.write(word)
            training.stdin.flush()
            return int(training.stdout.readline())

        training.stdout.readline()
        wait_for(lambda: team.uploads().get("step-00000005.pt"))
        team.stop()
        recorder = part()
        part()
        failures = directory / "recorder.log"
        wait_for(lambda: failures.read_text().count("Traceback") >= 2)
        os.kill(recorder, signal.SIGKILL)
        team.start()
        while part() == recorder:
            time.sleep(0.5)
        _, messages = training.communicate(b"end\n")
    assert training.returncode == 0, messages
    assert "Traceback" not in messages.decode()
    assert_everything_once(directory)
    names = {f"step-{step:08d}.pt" for step in events(directory)}
    assert team.uploads() == dict.fromkeys(names, 1)
    client, run = mlflow_run(directory)
    with without_warnings():
        listed = [one.path for one in client.list_artifacts(run.info.run_id, "checkpoints")]
    assert sorted(listed) == sorted(f"checkpoints/{name}" for name in names)
    for name in names:
        (stored,) = team.folder.rglob(name)
        assert digest(stored.read_bytes()) == digest((directory / "checkpoints" / name).read_bytes())
    _read_back(directory, run.info.run_id)


def _read_back(directory, run_id):
    """From the address: restored, resumed and shown, as from the file."""
    shutil.copytree(directory / "checkpoints", "kept")
    shutil.rmtree(directory)
    model, optimizer, scheduler = make_training()
    with without_warnings():
        found = trackopt.restore(
            f"runs:/{run_id}/checkpoints/step-00000010.pt", model=model, optimizer=optimizer, scheduler=scheduler
        )
    assert found.step == 10
    saved = torch.load("kept/step-00000010.pt")
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, saved["optimizer"]["state"][index][key])
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    )
    assert scheduler.state_dict()["last_epoch"] == saved["scheduler"]["last_epoch"]
    model, optimizer, scheduler = make_training()
    with without_warnings():
        run = trackopt.wrap(optimizer, scheduler, model=model, dir="on", resume=f"runs:/{run_id}@10", sinks=())
    for _ in range(5):
        run.step(loss=train_step(model, optimizer, scheduler))
    run.close()
    (begun,) = [line for line in journal.read(run.dir / journal.NAME) if line.event == "resume"]
    assert begun.details["checkpoint"] == f"runs:/{run_id}/checkpoints/step-00000010.pt"
    with trackopt.open("on/checkpoints/step-00000015.pt") as a, trackopt.open("kept/step-00000015.pt") as b:
        pairs = [
            (one, two) for (name, one), (_, two) in zip(a.tensors(), b.tensors(), strict=True) if "rng" not in name
        ]
        assert all((a.read(one) == b.read(two)).all() for one, two in pairs)
    shown = command("inspect", f"runs:/{run_id}")
    newest = max(Path("kept").glob("step-*"))
    assert shown.stdout.splitlines()[0].split()[0] == newest.name
    assert shown.stdout.splitlines()[1:-1] == command("inspect", newest).stdout.splitlines()[1:-1]
    assert command("diff", f"runs:/{run_id}", newest).returncode == 0


@contextlib.contextmanager
def counting(port, *, whole=False):
    """A way to the server on which the bytes that come back are counted; perhaps one that knows no ranges."""
    count = [0]

    def pipe(source, target, *, back):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                count[0] += len(data) * back
                target.sendall(data if back or not whole else data.replace(b"\r\nRange:", b"\r\nRanges:"))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def forward(client, server):
        there = threading.Thread(target=pipe, args=(client, server), kwargs={"back": False})
        there.start()
        pipe(server, client, back=True)
        there.join()

    with proxy(port, forward) as own_port:
        yield f"http://127.0.0.1:{own_port}", count


def wide():
    """A model of 8 MB and its optimizer, one step old."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000))
    return model, torch.optim.AdamW(model.parameters())


def test_only_what_is_asked_for_is_fetched_and_checked(team, tmp_path, monkeypatch, run_cli):
    """Of 24 MB the structure is a small part, the model a third; damage elsewhere in it does not matter."""
    from mlflow import MlflowClient

    model, optimizer = wide()
    with trackopt.wrap(optimizer, model=model, dir="big", sinks=()) as run:
        run.step(loss=_stepped(model, optimizer))
    file = tmp_path / "big/checkpoints/step-00000001.pt"
    size = file.stat().st_size
    with without_warnings():
        client = MlflowClient(team.address)
        run_id = client.create_run("0").info.run_id
        client.log_artifact(run_id, str(file), "checkpoints")
    address = f"runs:/{run_id}/checkpoints/step-00000001.pt"
    with counting(team.port) as (way, count), without_warnings():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way)
        assert '"step": 1' in run_cli("inspect", address, "--json").out
        assert count[0] < size / 50
        fresh, _ = wide()
        torch.nn.init.zeros_(fresh[0].weight)
        trackopt.restore(address, model=fresh)
        assert count[0] < size / 2
        assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
    with counting(team.port, whole=True) as (way, count), without_warnings():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way)
        with trackopt.open(address) as opened:
            assert not opened.remote
            assert opened.bytes == size
        assert count[0] > size
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.address)
    (stored,) = [one for one in team.folder.rglob(file.name) if run_id in str(one)]
    with locations.open(file) as opened:
        moment = opened.tree["optimizer"]["state"][0]["exp_avg"]
        value = opened.read(moment).tobytes()
    with without_warnings(), trackopt.open(address) as opened:
        stored.write_bytes(stored.read_bytes())
        with pytest.raises(trackopt.ArchiveError, match="was replaced while it was read"):
            opened.read(opened.tree["optimizer"]["state"][0]["exp_avg"])
    data = bytearray(stored.read_bytes())
    data[data.index(value) + 1000] ^= 1
    stored.write_bytes(data)
    with without_warnings():
        trackopt.restore(address, model=fresh)
        with pytest.raises(trackopt.CheckpointError, match="has the checksum"):
            trackopt.restore(address, optimizer=torch.optim.AdamW(fresh.parameters()))


def _stepped(model, optimizer):
    loss = model(torch.ones(1, 1000)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_a_directory_is_fetched_as_a_whole(team, tmp_path):
    """As torch.distributed.checkpoint writes them."""
    from mlflow import MlflowClient
    from torch.distributed import checkpoint

    weight = torch.randn(3, 4)
    with without_warnings():
        checkpoint.save({"model": {"weight": weight}}, checkpoint_id="step-00000007", no_dist=True)
        client = MlflowClient(team.address)
        run_id = client.create_run("0").info.run_id
        client.log_artifacts(run_id, "step-00000007", "checkpoints/step-00000007")
        with trackopt.open(f"runs:/{run_id}@7") as opened:
            ((_, tensor),) = opened.tensors()
            assert opened.read(tensor).tolist() == weight.tolist()


def test_the_newest_is_one_that_is_complete(team, tmp_path):
    """A directory whose upload goes on, or broke off, is passed by; of two of the same step the file is taken."""
    from mlflow import MlflowClient

    with without_warnings():
        client = MlflowClient(team.address)
        run_id = client.create_run("0").info.run_id

        def newest_behind(name):
            file = tmp_path / Path(name).name
            file.write_bytes(b"x")
            client.log_artifact(run_id, str(file), str(Path("checkpoints", name).parent))
            return remote.complete_uri(f"runs:/{run_id}").name

        assert newest_behind("step-00000001.pt") == "step-00000001.pt"
        for name in ("__0_0.distcp", "training.pt", ".metadata"):
            assert newest_behind(f"step-00000002/{name}") == "step-00000001.pt"
        with pytest.raises(trackopt.ArchiveError, match=r"no such checkpoint is among .*; there are 1$"):
            trackopt.open(f"runs:/{run_id}@2")
        assert newest_behind("step-00000002/manifest.json") == "step-00000002"
        assert newest_behind("step-00000002.pt") == "step-00000002.pt"


class Refusal(http.server.BaseHTTPRequestHandler):
    """Knows runs whose numbers are three digits; answers what is asked for their artifacts with that, else 403."""

    def do_GET(self):
        run = re.search(r"(?:run_id|path)=(\d{3})\b", self.path)
        if not (run and "runs/get" in self.path):
            self.send_error(int(run[1]) if run else 403)
            return
        info = {"run_id": run[1], "experiment_id": "0", "artifact_uri": f"mlflow-artifacts:/{run[1]}"}
        body = orjson.dumps({"run": {"info": info}})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def forbidding():
    with http.server.HTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://someone:se@cret@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_refuses_is_told_in_one_line(team, forbidding, monkeypatch):
    """The command line exits with 2. No password is shown, and no store is made where there is none."""
    run = "0" * 32
    cases = [
        (team.address, f"runs:/{run}/checkpoints/step-00000001.pt", "has no such run or file"),
        (team.address, f"runs:/{run}/../x", "invalid URI"),
        (team.address, f"runs:/{run}@7/x", "invalid URI"),
        (forbidding, f"runs:/{run}", "refuses it"),
        (forbidding, "runs:/401", r"refuses it \(401 Unauthorized\)"),
        (forbidding, "runs:/404", "has no such run or file"),
        (forbidding, "runs:/501", r"refuses it \(501 Not Implemented\)"),
        (f"http://127.0.0.1:{free_port()}", f"runs:/{run}@7", "does not answer"),
        ("", f"runs:/{run}", "there is no MLflow store here"),
    ]
    for uri, address, said in cases:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with without_warnings(), pytest.raises(trackopt.ArchiveError, match=said) as refused:
            trackopt.restore(address, model=torch.nn.Linear(1, 1))
        assert str(refused.value).startswith(f"{address}: ")
        assert "cret" not in str(refused.value)
    done = command("inspect", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"trackopt: {refused.value}\n"
    assert not Path("mlruns").exists()


def test_uploads_that_come_late(tmp_path):
    """They bring what is left, a directory too, tell what retention let go, and leave out an abandoned future."""
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=(), save_every=2, keep=1) as run:
        for _ in range(6):
            run.step(loss=train_step(model, optimizer, scheduler))
    directory = run.dir
    (directory / "checkpoints/step-00000009").mkdir()
    (directory / "checkpoints/step-00000009/a.distcp").write_bytes(b"shard")
    writer = journal.Journal(directory / journal.NAME)
    writer.mark("checkpoint", 9, path="checkpoints/step-00000009")
    writer.mark("checkpoint", 12, path="checkpoints/step-00000012.pt")
    writer.mark("resume", 9)
    writer.mark("close", 9, status="FINISHED")
    writer.close()
    identity = orjson.loads((directory / "run.json").read_bytes())
    (directory / "run.json").write_bytes(orjson.dumps({**identity, "sinks": ["mlflow", "artifacts"]}))
    messages = drain(directory)
    assert [line.partition(": deleted by `keep`")[0] for line in messages] == [
        "checkpoints/step-00000002.pt and 1 more"
    ]
    _, mlflow = mlflow_run(directory)
    stored = Path(mlflow.info.artifact_uri) / "checkpoints"
    assert sorted(str(one.relative_to(stored)) for one in stored.rglob("*")) == [
        *("step-00000006.pt", "step-00000009", "step-00000009/a.distcp")
    ]
    with without_warnings(), trackopt.open(f"runs:/{mlflow.info.run_id}/checkpoints/step-00000006.pt") as opened:
        assert opened.path == stored / "step-00000006.pt"  # a store that is a directory here is read in place
    (directory / "checkpoints/step-00000010.pt").write_bytes(bytes(50_000_000))
    (directory / "checkpoints/step-00000011.pt").write_bytes(b"the last")
    writer = journal.Journal(directory / journal.NAME)
    with without_warnings(), Recorder(directory, notify=pytest.fail) as recorder:
        writer.mark("checkpoint", 10, path="checkpoints/step-00000010.pt")
        recorder.deliver()
        writer.mark("checkpoint", 11, path="checkpoints/step-00000011.pt")  # while an upload is on its way
        assert recorder.drain() == []
    writer.close()
    assert (stored / "step-00000010.pt").stat().st_size == 50_000_000
    assert (stored / "step-00000011.pt").read_bytes() == b"the last"


def test_each_outage_of_the_artifacts_is_told_and_its_end(tmp_path):
    """While steps are logged, so that there is always more for the next upload."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=1) as run:
        run.step(loss=train_step(model, optimizer))
    directory = run.dir
    write_identity(directory, replace(read_identity(directory), sinks=("mlflow", "artifacts")))
    assert drain(directory) == []
    _, mlflow = mlflow_run(directory)
    stored = Path(mlflow.info.artifact_uri) / "checkpoints"
    writer = journal.Journal(directory / journal.NAME)
    messages = []

    def told_of(words):
        writer.record(2, {"loss": 1.0})
        recorder.deliver()
        return messages and words in messages[-1]

    with without_warnings(), Recorder(directory, notify=messages.append) as recorder:
        for name in ("step-00000002.pt", "step-00000003.pt"):
            shutil.rmtree(stored)
            stored.touch()  # no directory can be made there
            (directory / "checkpoints" / name).write_bytes(b"a checkpoint")
            writer.mark("checkpoint", 2, path=f"checkpoints/{name}")
            wait_for(lambda: told_of("the artifacts sink fails"))
            stored.unlink()
            wait_for(lambda: told_of("the artifacts sink works again"))
            assert (stored / name).read_bytes() == b"a checkpoint"
    writer.close()
    assert len(messages) == 4


def test_artifacts_need_the_mlflow_sink():
    model, optimizer, _ = make_training()
    with pytest.raises(trackopt.UsageError, match="add 'mlflow' to sinks"):
        trackopt.wrap(optimizer, model=model, dir="run", sinks=("tensorboard",), upload_checkpoints=True)


def test_a_part_is_what_torch_finds_there(tmp_path):
    """With the types that a `state_dict` had; what was not asked for has no bytes, and is left out."""
    model, optimizer, _ = make_training()
    model.register_buffer("counts", torch.arange(5).to(torch.uint16))  # torch has no storage of that type
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    noise = np.random.default_rng(0)
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=(), noise=noise) as run:
        run.step(loss=train_step(model, optimizer, scheduler))
    path = locations.resolve(run.dir)
    whole = torch.load(path)
    with locations.open(path) as opened:
        for keys in ({"model", "noise"}, {"optimizer", "scheduler", "trackopt"}):
            part = load_keys(opened, opened.source, keys)
            assert part.keys() == keys
            for key in keys:
                assert pickled(part[key]) == pickled(whole[key])
    assert type(part["scheduler"]["milestones"]) is collections.Counter


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_copy_is_filled_where_it_is_read():
    """Whatever is read where, it is the original's bytes, and none of them is fetched twice."""
    drawn = random.Random(0)
    data = drawn.randbytes(3_000_000)
    fetched = []

    def fetch(start, stop):
        fetched.append((start, stop))
        return data[start:stop]

    file = sparse_file.SparseFile(len(data), fetch, contextlib.nullcontext)
    for _ in range(200):
        start, length = drawn.randrange(len(data) + 10), drawn.choice([1, 100, 20_000, 300_000])
        assert file.read(start, length) == data[start : start + length]
    fetched.sort()
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(fetched))
    assert all(stop - start <= 8 << 20 for start, stop in fetched)
    file.close()


def test_a_copy_has_no_holes_where_the_disk_is_full():
    """A write that comes short is gone on with, and one that fails is told, as often as it is tried."""
    data = random.Random(0).randbytes(1_000_000)
    messages = []

    @contextlib.contextmanager
    def telling():
        try:
            yield
        except OSError as error:
            messages.append(error.strerror)
            raise trackopt.ArchiveError("no room") from error

    file = sparse_file.SparseFile(len(data), lambda start, stop: data[start:stop], telling)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(trackopt.ArchiveError, match="no room"):
                file.read(0, 900_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert messages == [os.strerror(errno.EFBIG)] * 2
    assert file.read(0, len(data)) == data
    file.close()
