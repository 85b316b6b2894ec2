"""Made-up traces of rehearsed trainings."""

from trackopt.rehearsal.trace import AttemptStart, Step, Trace


def moment(**changes):
    """One step of a made-up trace."""
    before = {"rng": {"torch": 1}, "untracked": {}, "values": {}} | changes.pop("before", {})
    return Step(
        **{"weights": "0" * 8, "optimizer": "", "lr": [0.1], "rng": {"torch": 2}, "batch": 1, **changes}, before=before
    )


def trace(losses, steps, *starts, **options):
    points = list(enumerate(losses, 1))
    starts = tuple(AttemptStart(step, "0" * 8) for step in starts or (0,))
    names = {"weights": ["w"], "optimizer": []}
    return Trace("run", 0.0, {"loss": points}, dict(enumerate(steps, 1)), starts, (), names, **options)
