"""Run a training command uninterrupted, then under SIGKILL, and compare the two bit for bit."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import journal, locations, state
from trackopt.analysis.diff import diff
from trackopt.errors import TrackoptError
from trackopt.rehearsal.diagnosis import Cause, Diagnosis, diagnose
from trackopt.rehearsal.divergence import Divergence, same_series, unused_generators
from trackopt.rehearsal.training_command import CommandError, TrainingCommand
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.rundir.environment import UNNAMED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trackopt.rehearsal.trace import Trace
    from trackopt.utils.types import JsonObject

    #: Called with the current stage, the completed steps, and the total (``None`` if it is not known yet).
    OnProgress = Callable[[str, int, int | None], None]

KILLS = 3
_RANDOM = re.compile(r"(?:^|\.)rng\.(\w+)")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        run: The run's name.
        step: The step after whose record the process was killed.
        resumed_from: The step from which the next attempt resumed; 0 is the start.
    """

    run: str
    step: int
    resumed_from: int


@dataclass(frozen=True)
class RunFacts:
    """The extent of the comparison of one run.

    Attributes:
        name: The name of its directory.
        steps: The last step.
        series: Number of series.
        points: Number of points in all series.
        parameters: Elements of the model in the final checkpoint.
        buffers: Tensors of the optimizers' state in it.
        schedulers: Number of schedulers in it.
        rng: The generators in it.
    """

    name: str
    steps: int
    series: int
    points: int
    parameters: int = 0
    buffers: int = 0
    schedulers: int = 0
    rng: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        command: The rehearsed command.
        seconds: Duration of the uninterrupted training, and of the killed one.
        runs: The runs of the uninterrupted training.
        kills: The kills, in order.
        verdict: Why it was not exact; ``None`` if it was exact.
        notes: Further remarks for the user.
        scratch: The directory with all files; ``None`` if it is deleted.
    """

    command: tuple[str, ...]
    seconds: tuple[float, float]
    runs: tuple[RunFacts, ...]
    kills: tuple[Kill, ...]
    verdict: Diagnosis | None
    notes: tuple[str, ...]
    scratch: str | None = None

    @property
    def exact(self) -> bool:
        """True if the killed and resumed training equals the uninterrupted one bit for bit."""
        return self.verdict is None

    def as_dict(self) -> JsonObject:
        """Return the result under the keys of ``rehearse --json``."""
        seconds = dict(zip(("uninterrupted", "killed"), self.seconds, strict=True))
        result = {"exact": self.exact, **asdict(self), "seconds": seconds}
        if self.verdict is not None:
            result["verdict"]["cause"] = self.verdict.cause.as_dict()
        return result


def rehearse(
    command: Sequence[str],
    *,
    kills: int = KILLS,
    at: Sequence[int] = (),
    seed: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> Rehearsal:
    """Rehearse a training command in a scratch directory, which is kept if it is not exact or fails.

    Args:
        command: Program and arguments, run in the current directory; it calls ``trackopt.wrap``.
        kills: Number of kills, at random steps spread over the training, after its first checkpoint if there is one.
        at: Kill each of its runs after these steps instead.
        seed: Seed for choosing the random steps.
        on_progress: Called with the progress.

    Raises:
        CommandError: The command fails, does not call ``wrap``, makes no step, or ends before a step of ``at``; or its
            runs cannot be read.
    """
    scratch = Path(tempfile.mkdtemp(prefix="trackopt-rehearsal-"))
    try:
        reference = _run_uninterrupted(command, scratch / "uninterrupted", on_progress)
        total = sum(max(trace.steps, default=0) for trace in reference.traces.values())
        kill_steps = _steps_at(reference, at) if at else _random_steps(reference, kills, seed)
        killed = _run_killed(command, scratch / "killed", kill_steps, total, on_progress)
        verdict = _diagnose(
            reference, killed, lambda: _run_uninterrupted(command, scratch / "control", on_progress, total)
        )
    except CommandError as error:
        if error.output_tail:
            raise CommandError(f"{error}; see {scratch}", error.output_tail) from error
        shutil.rmtree(scratch)
        raise
    except TrackoptError as error:
        raise CommandError(f"{error}; see {scratch}") from error
    except KeyboardInterrupt:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    result = Rehearsal(
        command=tuple(command),
        seconds=(reference.seconds, killed.seconds),
        runs=tuple(_read_facts(reference.root / name, trace) for name, trace in reference.traces.items()),
        kills=_list_kills(killed, kill_steps),
        verdict=verdict,
        notes=tuple(_write_notes(killed, kill_steps)),
    )
    if not result.exact:
        return replace(result, scratch=str(scratch))
    shutil.rmtree(scratch)
    return result


def _run_uninterrupted(
    command: Sequence[str], work_dir: Path, on_progress: OnProgress, total: int | None = None
) -> TrainingCommand:
    stage = "uninterrupted" if total is None else "uninterrupted, once more"
    on_progress(stage, 0, total)
    training = TrainingCommand(command, work_dir, lambda done: on_progress(stage, done, total))
    training.start()
    training.read()
    if not training.traces:
        if any(training.root.glob(f"*/{journal.NAME}")):  # of a framework's callback
            raise CommandError(
                f"{shlex.join(command)}: a framework saves and resumes its run, which rehearse cannot follow; "
                "rehearse a loop with trackopt.wrap(), or compare a resumed run with `trackopt compare`"
            )
        raise CommandError(f"{shlex.join(command)}: made no run; does the script call trackopt.wrap()?")
    if not training.runs_in_order():
        raise CommandError(
            f"{shlex.join(command)}: made no step; does the loop call optimizer.step(), and end its iterations with "
            "run.batches() or run.step()?"
        )
    return training


def _run_killed(
    command: Sequence[str], work_dir: Path, kill_steps: list[tuple[str, int]], total: int, on_progress: OnProgress
) -> TrainingCommand:
    stage = ""
    training = TrainingCommand(command, work_dir, lambda done: on_progress(stage, done, total))
    for number, (run, step) in enumerate(kill_steps):
        stage = f"kill {number + 1} of {len(kill_steps)}, at step {step:,}"
        on_progress(stage, 0, total)
        if not training.start({run: step}):
            break
    else:
        stage = "resumed to the end"
        on_progress(stage, 0, total)
        training.start()
    training.read()
    return training


def _steps_at(reference: TrainingCommand, at: Sequence[int]) -> list[tuple[str, int]]:
    """List the first step from each of ``at`` on, in each run that reaches it."""
    steps = reference.runs_in_order()
    last = max(step for _, step in steps)
    if max(at) > last:
        raise CommandError(f"--at {max(at)}: the training ends at step {last:,}")
    wanted = set()
    for run in reference.traces:
        own = [step for name, step in steps if name == run]
        wanted |= {(run, min(step for step in own if step >= target)) for target in at if own and own[-1] >= target}
    return [pair for pair in steps if pair in wanted]


def _random_steps(reference: TrainingCommand, kills: int, seed: int) -> list[tuple[str, int]]:
    """Choose a random step in each of ``kills`` equal parts of the training."""
    steps = reference.runs_in_order()
    saved = {run: trace.first_checkpoint or 0 for run, trace in reference.traces.items()}
    candidates = [(run, step) for run, step in steps if step > saved[run] > 0] or steps
    rng, kills, count = random.Random(seed), min(kills, len(candidates)), len(candidates)  # noqa: S311 - no secret
    parts = [candidates[count * i // kills : count * (i + 1) // kills] for i in range(kills)]
    return [rng.choice(part) for part in parts]


def _diagnose(
    reference: TrainingCommand, killed: TrainingCommand, run_control: Callable[[], TrainingCommand]
) -> Diagnosis | None:
    """Find out why the killed training differs from the uninterrupted one; ``None`` if it does not."""
    if reference.traces.keys() != killed.traces.keys():
        names = ", ".join(sorted(reference.traces.keys() ^ killed.traces.keys())[:3])
        seen = f"each start of the command chose another directory ({names}), so there was nothing to resume"
        return Diagnosis(True, None, Cause("directory", seen, "give wrap() the same dir at every start"))
    if all(_same(reference, killed, run) for run in reference.traces):
        return None
    control = run_control()
    for run in reference.traces:
        if run in control.traces and not _same(reference, control, run):
            return _compare(reference, control, run, None)
    run = next(run for run in reference.traces if not _same(reference, killed, run))
    return _compare(reference, killed, run, control.traces.get(run))


def _compare(a: TrainingCommand, b: TrainingCommand, run: str, control: Trace | None) -> Diagnosis:
    diagnosis = diagnose(a.traces[run], b.traces[run], control)
    if diagnosis is not None:
        return diagnosis
    path = _changed_paths(a, b, run)[0]
    cause = Cause(
        "state",
        f"every step was the same, but {path} in the final checkpoint is not",
        f"check that load_state_dict() of {path.partition('.')[0]} restores everything that its state_dict() returns",
    )
    return Diagnosis(control is not None, Divergence(run, None, tensor=path), cause)


def _same(a: TrainingCommand, b: TrainingCommand, run: str) -> bool:
    return same_series(a.traces[run], b.traces[run]) and not _changed_paths(a, b, run)


def _changed_paths(a: TrainingCommand, b: TrainingCommand, run: str) -> list[str]:
    """List what differs in the final checkpoints, without generators that nothing drew from: they have no effect."""
    directories = [training.root / run for training in (a, b)]
    saved = [bool(list_checkpoints(directory)) for directory in directories]
    if not all(saved):
        return ["the final checkpoint"] if any(saved) else []
    unused = unused_generators(a.traces[run]) & unused_generators(b.traces[run])
    paths = [change.path for change in diff(*directories).changes]
    return [path for path in paths if not ((match := _RANDOM.search(path)) and match.group(1) in unused)]


def _list_kills(killed: TrainingCommand, kill_steps: list[tuple[str, int]]) -> tuple[Kill, ...]:
    remaining = {run: iter(trace.kills) for run, trace in killed.traces.items()}
    done = [(run, next(remaining[run], None)) for run, _ in kill_steps if run in remaining]
    return tuple(Kill(run, *pair) for run, pair in done if pair is not None)


def _write_notes(killed: TrainingCommand, kill_steps: list[tuple[str, int]]) -> list[str]:
    kills = _list_kills(killed, kill_steps)
    notes = []
    if len(kills) < len(kill_steps):
        notes.append(f"the training ended before {len(kill_steps) - len(kills)} of the planned kills")
    if kills and not any(kill.resumed_from for kill in kills):
        notes.append(
            "there was no checkpoint when it was killed, so every attempt started at step 0; train longer, or save "
            "more often (save_every)"
        )
    if any(run.startswith(UNNAMED_PREFIX) for run in killed.traces):
        notes.append("wrap() was given no dir: outside of a rehearsal the same command starts a new run; name one")
    return notes


def _read_facts(directory: Path, trace: Trace) -> RunFacts:
    points = sum(map(len, trace.series.values()))
    facts = RunFacts(trace.name, max(trace.steps, default=0), len(trace.series), points)
    if not list_checkpoints(directory):
        return facts
    with locations.open(directory) as opened:
        training = state.read(opened)
    return replace(
        facts,
        parameters=sum(model.parameters for model in training.weights),
        buffers=sum(len(buffer.tensors) for optimizer in training.optimizers for buffer in optimizer.buffers.values()),
        schedulers=len(training.schedulers),
        rng=training.rng,
    )
