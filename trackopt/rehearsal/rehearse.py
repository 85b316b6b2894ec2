"""Run a training command uninterrupted, then under SIGKILL, and compare the two bit for bit."""

from __future__ import annotations

import functools
import random
import shlex
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import locations, state
from trackopt.errors import TrackoptError
from trackopt.rehearsal.comparison import differs_already, find_fault
from trackopt.rehearsal.trace import OBSERVED
from trackopt.rehearsal.training_command import CommandError, TrainingCommand
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.rundir.environment import UNNAMED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trackopt.rehearsal.diagnosis import Diagnosis
    from trackopt.rehearsal.trace import Trace
    from trackopt.utils.types import JsonObject

    #: Called with the current stage, the completed steps, and the total (``None`` if it is not known yet).
    OnProgress = Callable[[str, int, int | None], None]

KILLS = 3


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
        tensors: Tensors of the models, if the training is observed from outside.
    """

    name: str
    steps: int
    series: int
    points: int
    parameters: int = 0
    buffers: int = 0
    schedulers: int = 0
    rng: tuple[str, ...] = ()
    tensors: int = 0


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
    resume_with: Sequence[str] = (),
    on_progress: OnProgress = lambda *_: None,
) -> Rehearsal:
    """Rehearse a training command in a scratch directory, which is kept if it is not exact or fails.

    Args:
        command: Program and arguments, run in a copy of the current directory.
        kills: Number of kills, at random steps spread over the training, after its first checkpoint if there is one.
        at: Kill each of its runs after these steps instead.
        seed: Seed for choosing the random steps.
        resume_with: Words that the command line gets after a kill, if the script does not find its checkpoint itself;
            ``{checkpoint}`` is the newest checkpoint that it wrote.
        on_progress: Called with the progress.

    Raises:
        CommandError: The command fails, makes no step, or ends before a step of ``at``; or its runs cannot be read.
    """
    scratch = Path(tempfile.mkdtemp(prefix="trackopt-rehearsal-"))
    run = functools.partial(_run_uninterrupted, command, on_progress)
    try:
        reference = run(scratch / "uninterrupted")
        total = sum(max(trace.steps, default=0) for trace in reference.traces.values())
        kill_steps = _steps_at(reference, at) if at else _random_steps(reference, kills, seed)
        training = TrainingCommand(command, scratch / "killed", resume_with)
        killed, kill_steps = _run_killed(training, kill_steps, total, on_progress, reference)
        verdict = find_fault(reference, killed, lambda ends: run(scratch / "control", total, ends))
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
    command: Sequence[str],
    on_progress: OnProgress,
    work_dir: Path,
    total: int | None = None,
    ends: Mapping[str, int] | None = None,
) -> TrainingCommand:
    stage = "uninterrupted" if total is None else "uninterrupted, once more"
    on_progress(stage, 0, total)
    training = TrainingCommand(command, work_dir)
    training.start(ends, lambda done: on_progress(stage, done, total))
    training.read()
    if not training.traces:
        raise CommandError(
            f"{shlex.join(command)}: no optimizer step was seen; does the script train with torch, in a Python that "
            "has trackopt?"
        )
    if failure := next(filter(None, (each.failure for each in training.traces.values())), ""):
        raise CommandError(f"{shlex.join(command)}: its steps cannot be recorded ({failure})")
    if not training.runs_in_order():
        raise CommandError(
            f"{shlex.join(command)}: made no step; does the loop call optimizer.step(), and end its iterations with "
            "run.batches() or run.step()?"
        )
    return training


def _run_killed(
    training: TrainingCommand,
    kill_steps: list[tuple[str, int]],
    total: int,
    on_progress: OnProgress,
    reference: TrainingCommand,
) -> tuple[TrainingCommand, list[tuple[str, int]]]:
    """Kill the training at each step, and resume it; once a resume differs, no more. Return it, and the steps."""
    stage = ""

    def report(done: int) -> None:
        on_progress(stage, done, total)

    for number, (run, step) in enumerate(kill_steps):
        stage = f"kill {number + 1} of {len(kill_steps)}, at step {step:,}"
        report(0)
        if not training.start({run: step}, report):
            training.read()
            return training, kill_steps
        if differs_already(reference, training):
            kill_steps = kill_steps[: number + 1]
            break
    stage = "resumed to the end"
    report(0)
    training.start(None, report)
    training.read()
    return training, kill_steps


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


def _list_kills(killed: TrainingCommand, kill_steps: list[tuple[str, int]]) -> tuple[Kill, ...]:
    remaining = {run: iter(trace.kills) for run, trace in killed.traces.items()}
    done = [(run, next(remaining[run], None)) for run, _ in kill_steps if run in remaining]
    return tuple(Kill(run, *pair) for run, pair in done if pair is not None)


def _write_notes(killed: TrainingCommand, kill_steps: list[tuple[str, int]]) -> list[str]:
    kills = _list_kills(killed, kill_steps)
    notes = []
    if len(kills) < len(kill_steps):
        notes.append(f"the training ended before {len(kill_steps) - len(kills)} of the planned kills")
    resumed = any(kill.resumed_from for kill in kills)
    observed = killed.traces.get(OBSERVED)
    if kills and not resumed and observed is not None and observed.first_checkpoint:
        notes.append(
            "every attempt started at step 0, although the training saves something; say how it resumes: "
            "--resume-with '--resume {checkpoint}'"
        )
    elif kills and not resumed:
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
    if trace.name == OBSERVED:
        return replace(facts, tensors=len(trace.names["weights"]))
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
