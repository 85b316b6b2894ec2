"""Servers that go away, hang and come back, locked databases, full disks, and deaths at any moment."""

import contextlib
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import pytest

from tests.helpers.processes import run_script, start_script
from tests.helpers.proxy import proxy
from tests.helpers.stores import mlflow_points, mlflow_run, tensorboard_points, without_warnings
from tests.integration.test_recorder import mlflow_server, wait_until_idle
from trackopt import journal
from trackopt.recorder.child_process import RecorderProcess

pytestmark = [
    pytest.mark.timeout(900),  # servers and recorders start often, and a busy machine takes its time
    pytest.mark.usefixtures("mlflow_store"),
]
HOME = Path(__file__).parents[2]
PARTS = """
import hashlib, sys
import trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], stats=None, sinks=sys.argv[2:])
on = True
while on:
    for _ in range(10):
        run.step(loss=train_step(model, optimizer, scheduler))
    print(run._loop.attempt._recorder._process.pid if run._loop.attempt._recorder else 0, flush=True)
    on = sys.stdin.readline().strip() != "end"
run.close()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HOME))


class Training:
    """A training of several parts, each of which begins when the test says so."""

    def __init__(self, directory, **environment):
        self.directory, self.parts = directory, 0
        self.script = directory.with_name("parts.py")
        self.script.write_text(PARTS)
        self.process = start_script(self.script, directory, "tensorboard", "mlflow", **environment)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def part(self):
        """Wait until a part is trained; the recorder's process."""
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.parts += 1
        return int(line)

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        """Let it close; what it told, after it is seen that training was the same as ever."""
        output, messages = self.process.communicate("end\n", timeout=600)
        assert self.process.returncode == 0, messages
        assert "Traceback" not in messages
        undisturbed = start_script(self.script, "undisturbed")
        expected, errors = undisturbed.communicate("\n" * (self.parts - 1) + "end\n", timeout=600)
        assert undisturbed.returncode == 0, errors
        assert output.split()[-1] == expected.split()[-1]
        assert journal.series(self.directory) == journal.series("undisturbed")
        return messages

    def cursor(self, sink):
        with contextlib.suppress(FileNotFoundError):
            return orjson.loads((self.directory / "recorder.json").read_bytes()).get(sink, {"offset": 0})["offset"]
        return 0

    def failures(self):
        """A number that grows with each."""
        return (self.directory / "recorder.log").read_text().count("Traceback")


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


def assert_everything_once(directory, status="FINISHED"):
    """Every row that MLflow stores and every point that TensorBoard shows is the journal's, and the run is one."""
    expected = journal.series(directory)
    assert mlflow_points(directory) == expected
    shown = tensorboard_points(directory)
    assert shown.keys() == expected.keys()
    for key, points in expected.items():
        assert shown[key] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], key
    client, run = mlflow_run(directory)
    assert run.info.status == status
    assert "trackopt.diverged_at_step" not in run.data.tags
    with without_warnings():
        tag = f"tags.`trackopt.run_id` = '{run.data.tags['trackopt.run_id']}'"
        assert len(client.search_runs([run.info.experiment_id], tag)) == 1


def sync(directory):
    command = [sys.executable, "-m", "trackopt", "sync", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_at_the_start_in_the_middle_and_at_the_end(tmp_path):
    """It is killed and started again on its port while the training goes on; what it missed at the end, sync brings."""
    port, folder = free_port(), tmp_path / "server"
    with Training(tmp_path / "run", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") as training:
        training.part()
        wait_for(lambda: training.failures() > 0)
        with mlflow_server(port, folder):
            training.go_on()
            training.part()
            wait_for(lambda: training.cursor("mlflow") > 0)
        training.go_on()
        training.part()
        before = training.failures()
        wait_for(lambda: training.failures() > before)
        with mlflow_server(port, folder):
            training.go_on()
            training.part()
            wait_for(lambda: training.cursor("mlflow") == (training.directory / journal.NAME).stat().st_size)
            assert mlflow_points(training.directory) == journal.series(training.directory)
        messages = training.end()
        assert messages.count("the mlflow sink works again") == 2, messages
        assert messages.count("the mlflow sink fails") == 3, messages
        with mlflow_server(port, folder):
            done = sync(training.directory)
            assert (done.returncode, done.stdout) == (0, "run: everything is delivered\n"), done.stderr
            assert_everything_once(training.directory)


def losing_answers(port, asked):
    """A way to the server that breaks when the server has done what ``asked`` accepts, before its answer arrives."""

    def forward(client, server):
        lost = []

        def ask():
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    lost.extend([True] * asked(data))
                    server.sendall(data)
                server.shutdown(socket.SHUT_RDWR)

        asking = threading.Thread(target=ask)
        asking.start()
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not lost:
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        asking.join()

    return proxy(port, forward)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    with mlflow_server(port, tmp_path_factory.mktemp("server")):
        yield port


def test_answers_that_never_arrive_double_nothing(server, tmp_path):
    """The server does what it is asked, run and rows, but the recorder cannot know, and asks for all of it again."""
    lost = {b"runs/create": 0, b"runs/log-batch": 0}

    def asked(data):
        for request, count in lost.items():
            if request in data and count < 2:
                lost[request] += 1
                return True
        return False

    with contextlib.ExitStack() as stack:
        port = stack.enter_context(losing_answers(server, asked))
        training = stack.enter_context(Training(tmp_path / "run", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}"))
        training.part()
        wait_for(lambda: min(lost.values()) == 2)
        training.go_on()
        training.part()
        messages = training.end()
        assert "the mlflow sink works again" in messages
        assert_everything_once(training.directory)


def test_a_disk_that_is_full_for_tensorboard_leaves_mlflow_alone(server, tmp_path):
    """Event files that cannot be written are told; when they can again, TensorBoard has every point."""
    with Training(tmp_path / "run", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server}") as training:
        recorder = training.part()
        wait_for(lambda: training.cursor("tensorboard") > 0)
        unlimited = resource.prlimit(recorder, resource.RLIMIT_FSIZE)
        resource.prlimit(recorder, resource.RLIMIT_FSIZE, (600, unlimited[1]))
        training.go_on()
        training.part()
        wait_for(lambda: training.failures() > 0)
        resource.prlimit(recorder, resource.RLIMIT_FSIZE, unlimited)
        size = (training.directory / journal.NAME).stat().st_size
        wait_for(lambda: training.cursor("mlflow") == size)
        training.go_on()
        training.part()
        messages = training.end()
        assert messages.count("the tensorboard sink fails") == 1
        assert messages.count("the tensorboard sink works again") == 1
        assert "mlflow sink" not in messages
        assert_everything_once(training.directory)


def test_a_database_that_is_locked_is_waited_for(tmp_path):
    """Another process holds it exclusively for longer than SQLite waits."""
    with Training(tmp_path / "run") as training:
        training.part()
        wait_for(lambda: training.cursor("mlflow") > 0)
        with contextlib.closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")) as database:
            database.execute("BEGIN EXCLUSIVE")
            training.go_on()
            training.part()
            wait_for(lambda: training.failures() > 0)
        messages = training.end()
        assert messages.count("the mlflow sink fails") == 1
        assert_everything_once(training.directory)


KILLED = """
import contextlib, hashlib, os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import trackopt
from tests.helpers.training import make_training, train_step

directory, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)


def train(report):
    model, optimizer, scheduler = make_training()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=5)
    os.write(report, b"%9d\\n" % run._loop.attempt._recorder._process.pid)
    hands_over = chance.random() < 0.5
    for epoch in run.epochs(30):
        for _ in run.batches(range(10)):
            run.log(loss=train_step(model, optimizer, scheduler))
            os.write(report, b".")
            if hands_over and chance.random() < 0.2:
                hands_over = False
                run._loop.attempt._recorder._replace_starving()
        run.log(accuracy=epoch / 30)
    run.close()
    print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(), flush=True)


chance = random.Random(seed)
for attempt in range(kills + 1):  # torch is imported once, and each attempt is a fork
    receive, report = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        train(report)
        os._exit(0)
    os.close(report)
    with os.fdopen(receive, "rb", buffering=0) as reports:
        recorder = int(reports.read(10))
        if attempt < kills:
            for _ in range(chance.randint(0, 14)):
                reports.read(1)
            time.sleep(chance.uniform(0, 0.004))
            os.kill(child, signal.SIGKILL)
            if chance.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):  # another one has taken its place
                    os.kill(recorder, signal.SIGKILL)
        else:
            while reports.read(4096):
                pass
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if attempt < kills else 0)
"""


def test_after_twenty_random_kills_nothing_shows_them(tmp_path):
    """Recorders are killed and replaced as well, each at any moment.

    MLflow's rows, TensorBoard's points, the journal's series and the weights are those of a run never killed."""
    seed = random.randrange(2**32)
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    weights = []
    for name, kills in (("killed", 20), ("whole", 0)):
        done = run_script(script, tmp_path / name, kills, seed)
        assert done.returncode == 0, (seed, done.stderr)
        assert "fails" not in done.stderr, (seed, done.stderr)
        weights.append(done.stdout)
        assert_everything_once(tmp_path / name)
    assert sum(line.event == "resume" for line in journal.read(tmp_path / "killed" / journal.NAME)) == 20
    assert weights[0] == weights[1], seed
    assert journal.series(tmp_path / "killed") == journal.series(tmp_path / "whole"), seed
    assert mlflow_points(tmp_path / "killed") == mlflow_points(tmp_path / "whole"), seed
    assert tensorboard_points(tmp_path / "killed") == tensorboard_points(tmp_path / "whole"), seed


DELIVERED = """
import os, random, select, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from trackopt.recorder import delivery, recorder

delivery._MAX_BATCH_RECORDS = 40
directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def cursors():
    file = directory / "recorder.json"
    return file.read_bytes() if file.exists() else b""


for name in ("tensorboard", "mlflow"):  # the backends are imported once, and each delivery is a fork
    recorder._load_sink(name, directory)
chance = random.Random(seed)
reached = set()
for kill in range(kills + 1):
    ended, end = os.pipe()
    child = os.fork()
    if not child:
        with recorder.Recorder(directory, print) as one:
            one.drain()
        os._exit(0)
    os.close(end)
    if kill < kills:
        steps, stood = chance.randint(0, 4), cursors()
        while steps and not select.select([ended], [], [], 0.001)[0]:
            if cursors() != stood:
                steps, stood = steps - 1, cursors()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ended)
    reached.add(cursors())
print(len(reached))
"""


def test_a_recorder_killed_anywhere_in_its_delivery_doubles_and_loses_nothing(tmp_path, record_property):
    """Twenty-five times, over a journal of several attempts."""
    seed = random.randrange(2**32)
    directory = tmp_path / "run"
    script = tmp_path / "train.py"
    script.write_text(KILLED.replace("save_every=5)", "save_every=5, stats=None)"))
    assert run_script(script, directory, 2, seed).returncode == 0
    wait_until_idle(directory)  # the recorder of the last attempt may outlive it
    identity = orjson.loads((directory / "run.json").read_bytes())
    identity["mlflow"].pop("run_id")
    (directory / "run.json").write_bytes(orjson.dumps({**identity, "id": "other"}))
    for made in (directory / "recorder.json", *directory.glob("events*")):
        made.unlink()
    step = max(line.step for line in journal.read(directory / journal.NAME))
    writer = journal.Journal(directory / journal.NAME)
    for _ in range(4):
        writer.mark("resume", step, offset=writer.offset)
        for number in range(step + 1, step + 801):
            writer.record(number, {"loss": 1 / number, "lr/group0": 0.1, "grad/group0.norm": number})
        step += 790
    writer.mark("close", step, status="FINISHED")
    writer.close()
    script.write_text(DELIVERED)
    done = run_script(script, directory, 25, seed)
    assert done.returncode == 0, (seed, done.stderr)
    record_property("tally", f"a recorder killed 25 times: its cursors stood at {done.stdout.strip()} places")
    assert_everything_once(directory)


def test_a_recorder_that_is_killed_is_started_anew_while_the_training_goes_on(tmp_path):
    """It is told once; the next one goes on where the first one stood."""
    with Training(tmp_path / "run") as training:
        first = training.part()
        wait_for(lambda: training.cursor("mlflow") > 0)
        os.kill(first, signal.SIGKILL)
        now = first
        while now == first:
            training.go_on()
            now = training.part()
            time.sleep(0.1)
        messages = training.end()
        assert messages.count("the recorder exited with code -9") == 1, messages
        assert_everything_once(training.directory)


def test_a_recorder_that_keeps_dying_is_left_until_the_end(tmp_path):
    """It is told when the first dies, when no more are started, and when the last one dies too."""
    process, messages = RecorderProcess(tmp_path), []  # no run is there
    while len(messages) < 2:
        process._process.wait()
        messages += process._maybe_restart(min(process._restart_at, time.monotonic() + 50))
    assert "it is restarted" in messages[0]
    assert "it is not restarted until the run closes" in messages[1]
    process._maybe_restart(process._restart_at)
    assert process._has_exited()
    *_, last = process.finish(wait=True)
    assert f"to deliver the missing records, run `trackopt sync {tmp_path}`" in last
    # One that gets no processor at the end is replaced, so there may be two more.
    assert 7 <= (tmp_path / "recorder.log").read_text().count("trackopt.errors.RunError:") <= 9


def test_a_server_that_hangs_holds_up_the_end_for_a_while_and_tells(tmp_path):
    """It takes the connection and answers nothing: training ends well, and hears what is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_TIMEOUT": "6"}
        with Training(tmp_path / "run", **environment) as training:
            training.part()
            messages = training.end()
    assert messages.count("the mlflow sink fails") == 1, messages
    assert messages.count("press Ctrl-C to let it continue in the background") == 1, messages
    assert tensorboard_points(training.directory)["loss"] == [
        (step, pytest.approx(value, rel=1e-6)) for step, value in journal.series(training.directory)["loss"]
    ]


def test_a_training_that_dies_before_it_heard_a_message_is_delivered(tmp_path):
    """The recorder's socket says "connection reset" then, and not "end of file"."""
    with Training(tmp_path / "run", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}") as training:
        training.part()
        wait_for(lambda: training.failures() > 0)
    wait_for(lambda: b'"finished":true' in (training.directory / "recorder.json").read_bytes())
    assert len(tensorboard_points(training.directory)["loss"]) == 10
