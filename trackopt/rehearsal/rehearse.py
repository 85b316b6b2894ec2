"""Run a training command uninterrupted, then under SIGKILL, and compare the two bit for bit."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import journal, locations, state
from trackopt.analysis.diff import diff
from trackopt.errors import TrackoptError
from trackopt.rehearsal.diagnosis import Cause, Diagnosis, diagnose
from trackopt.rehearsal.divergence import Divergence, same_series, unchanged_steps
from trackopt.rehearsal.training_command import CommandError, TrainingCommand
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.rundir.environment import UNNAMED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trackopt.rehearsal.trace import Trace

    #: Told what is going on, the steps that are done, and of how many (``None``: that is not known yet).
    Tell = Callable[[str, int, int | None], None]

KILLS = 3
_RANDOM = re.compile(r"(?:^|\.)rng\.(\w+)")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        run: The run's name.
        step: The step after whose record the process died.
        resumed_from: The step that the next attempt went on from; 0 is the beginning.
    """

    run: str
    step: int
    resumed_from: int


@dataclass(frozen=True)
class RunFacts:
    """What was compared of one run.

    Attributes:
        name: Of its directory.
        steps: The last step.
        series: How many.
        points: Of all series.
        parameters: Elements of the model in the final checkpoint.
        buffers: Tensors of the optimizers' state in it.
        schedulers: How many.
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
    """A rehearsal's outcome.

    Attributes:
        command: What was rehearsed.
        seconds: What the uninterrupted training took, and the killed one.
        runs: What the uninterrupted training made.
        kills: In their order.
        verdict: Why it was not exact; ``None`` if it was.
        notes: What a person should know besides.
        scratch: The directory that holds everything; ``None`` where it is deleted.
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
        """Whether the killed and resumed training was the uninterrupted one, bit for bit."""
        return self.verdict is None

    def as_dict(self) -> dict[str, Any]:
        """The facts under the keys of ``rehearse --json``."""
        seconds = dict(zip(("uninterrupted", "killed"), self.seconds, strict=True))
        found = {"exact": self.exact, **asdict(self), "seconds": seconds}
        if self.verdict is not None:
            found["verdict"]["cause"] = self.verdict.cause.as_dict()
        return found


def rehearse(
    command: Sequence[str],
    *,
    kills: int = KILLS,
    at: Sequence[int] = (),
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Rehearsal:
    """Rehearse a training command in a scratch directory, which is kept where something is wrong.

    Args:
        command: Program and arguments, as they would be run in the current directory; it calls ``trackopt.wrap``.
        kills: How often to kill it, at random steps all over it, but behind its first checkpoint if there is one.
        at: Kill it after these steps instead, of each of its runs.
        seed: Of the random steps.
        tell: Told how far it is.

    Raises:
        CommandError: The command fails, does not call ``wrap``, makes no step, or ends before a step of ``at``; or
            what it made cannot be read.
    """
    scratch = Path(tempfile.mkdtemp(prefix="trackopt-rehearsal-"))
    try:
        whole = _uninterrupted(command, scratch / "uninterrupted", tell)
        chosen = _at(whole, at) if at else _random(whole, kills, seed)
        killed = _killed(command, scratch / "killed", chosen, _total(whole), tell)
        verdict = _verdict(whole, killed, lambda: _uninterrupted(command, scratch / "again", tell, _total(whole)))
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
    found = Rehearsal(
        command=tuple(command),
        seconds=(whole.seconds, killed.seconds),
        runs=tuple(_facts(whole.root / name, one) for name, one in whole.traces.items()),
        kills=_kills(killed, chosen),
        verdict=verdict,
        notes=tuple(_notes(killed, chosen)),
    )
    if not found.exact:
        return replace(found, scratch=str(scratch))
    shutil.rmtree(scratch)
    return found


def _uninterrupted(command: Sequence[str], home: Path, tell: Tell, total: int | None = None) -> TrainingCommand:
    what = "uninterrupted" if total is None else "uninterrupted, once more"
    tell(what, 0, total)
    training = TrainingCommand(command, home, lambda done: tell(what, done, total))
    training.start()
    training.read()
    if not training.traces:
        if any(training.root.glob(f"*/{journal.NAME}")):  # of a framework's callback
            raise CommandError(
                f"{shlex.join(command)}: its run is saved and resumed by a framework, which rehearse cannot follow; "
                "rehearse a loop with trackopt.wrap(), or see in `trackopt compare` whether a resumed run is as another"
            )
        raise CommandError(f"{shlex.join(command)}: made no run; does the script call trackopt.wrap()?")
    if not training.runs_in_order():
        raise CommandError(
            f"{shlex.join(command)}: made no step; does the loop call optimizer.step(), and end its iterations by "
            "run.batches() or run.step()?"
        )
    return training


def _killed(
    command: Sequence[str], home: Path, chosen: list[tuple[str, int]], total: int, tell: Tell
) -> TrainingCommand:
    stage = ""
    training = TrainingCommand(command, home, lambda done: tell(stage, done, total))
    for number, (run, step) in enumerate(chosen):
        stage = f"kill {number + 1} of {len(chosen)}, at step {step:,}"
        tell(stage, 0, total)
        if not training.start({run: step}):
            break
    else:
        stage = "resumed to the end"
        tell(stage, 0, total)
        training.start()
    training.read()
    return training


def _total(training: TrainingCommand) -> int:
    return sum(max(one.steps, default=0) for one in training.traces.values())


def _at(whole: TrainingCommand, at: Sequence[int]) -> list[tuple[str, int]]:
    steps = whole.runs_in_order()
    last = max(step for _, step in steps)
    if max(at) > last:
        raise CommandError(f"--at {max(at)}: the training ends at step {last:,}")
    wanted = set()
    for run in whole.traces:
        own = [step for name, step in steps if name == run]
        wanted |= {(run, min(step for step in own if step >= each)) for each in at if own and own[-1] >= each}
    return [pair for pair in steps if pair in wanted]


def _random(whole: TrainingCommand, kills: int, seed: int) -> list[tuple[str, int]]:
    """A random step in each of as many equal parts of the training."""
    steps = whole.runs_in_order()
    saved = {run: one.first_checkpoint or 0 for run, one in whole.traces.items()}
    behind = [(run, step) for run, step in steps if step > saved[run] > 0] or steps
    draw, kills = random.Random(seed), min(kills, len(behind))  # noqa: S311 - no secret
    parts = [behind[len(behind) * i // kills : len(behind) * (i + 1) // kills] for i in range(kills)]
    return [draw.choice(part) for part in parts]


def _verdict(
    whole: TrainingCommand, killed: TrainingCommand, run_control: Callable[[], TrainingCommand]
) -> Diagnosis | None:
    """Why the killed training is not the uninterrupted one; ``None`` if it is."""
    if whole.traces.keys() != killed.traces.keys():
        names = ", ".join(sorted(whole.traces.keys() ^ killed.traces.keys())[:3])
        seen = f"each start of the command chose another directory ({names}), so there was nothing to resume"
        return Diagnosis(True, None, Cause("directory", seen, "give wrap() the same dir at every start"))
    if all(_same(whole, killed, run) for run in whole.traces):
        return None
    control = run_control()
    for run in whole.traces:
        if run in control.traces and not _same(whole, control, run):
            return _compare(whole, control, run, None)
    run = next(run for run in whole.traces if not _same(whole, killed, run))
    return _compare(whole, killed, run, control.traces.get(run))


def _compare(a: TrainingCommand, b: TrainingCommand, run: str, control: Trace | None) -> Diagnosis:
    found = diagnose(a.traces[run], b.traces[run], control)
    if found is not None:
        return found
    path = _changes(a, b, run)[0]
    cause = Cause(
        "state",
        f"every step was the same, but {path} in the final checkpoint is not",
        f"see whether the load_state_dict() behind {path.partition('.')[0]} takes all that its state_dict() returns",
    )
    return Diagnosis(control is not None, Divergence(run, None, tensor=path), cause)


def _same(a: TrainingCommand, b: TrainingCommand, run: str) -> bool:
    return same_series(a.traces[run], b.traces[run]) and not _changes(a, b, run)


def _changes(a: TrainingCommand, b: TrainingCommand, run: str) -> list[str]:
    """What differs in the final checkpoints. A generator that nothing drew from decides nothing: it is left out."""
    places = [training.root / run for training in (a, b)]
    saved = [bool(list_checkpoints(place)) for place in places]
    if not all(saved):
        return ["the final checkpoint"] if any(saved) else []
    still = unchanged_steps(a.traces[run]) & unchanged_steps(b.traces[run])
    paths = [change.path for change in diff(*places).changes]
    return [path for path in paths if not ((found := _RANDOM.search(path)) and found.group(1) in still)]


def _kills(killed: TrainingCommand, chosen: list[tuple[str, int]]) -> tuple[Kill, ...]:
    left = {run: iter(one.kills) for run, one in killed.traces.items()}
    done = [(run, next(left[run], None)) for run, _ in chosen if run in left]
    return tuple(Kill(run, *pair) for run, pair in done if pair is not None)


def _notes(killed: TrainingCommand, chosen: list[tuple[str, int]]) -> list[str]:
    kills = _kills(killed, chosen)
    notes = []
    if len(kills) < len(chosen):
        notes.append(f"the training ended before {len(chosen) - len(kills)} of the planned kills")
    if kills and not any(kill.resumed_from for kill in kills):
        notes.append(
            "no checkpoint was there when it was killed, so every attempt began anew; train longer, or save more often "
            "(save_every)"
        )
    if any(run.startswith(UNNAMED_PREFIX) for run in killed.traces):
        notes.append("wrap() was given no dir: outside of a rehearsal the same command begins a new run; name one")
    return notes


def _facts(place: Path, one: Trace) -> RunFacts:
    points = sum(map(len, one.series.values()))
    facts = RunFacts(one.name, max(one.steps, default=0), len(one.series), points)
    if not list_checkpoints(place):
        return facts
    with locations.open(place) as opened:
        found = state.read(opened)
    return replace(
        facts,
        parameters=sum(model.parameters for model in found.weights),
        buffers=sum(len(buffer.tensors) for optimizer in found.optimizers for buffer in optimizer.buffers.values()),
        schedulers=len(found.schedulers),
        rng=found.rng,
    )
