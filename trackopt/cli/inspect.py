"""``trackopt inspect``: a checkpoint on one screen."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackopt import locations
from trackopt.analysis.summary import Summary, summarize
from trackopt.cli import console
from trackopt.cli.outline import outline
from trackopt.state.models import dtypes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.analysis.summary.statistics import Statistics
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Group, Optimizer
    from trackopt.state.schedulers import Scheduler

_ALL = "*"
_VALUES = ("norm", "mean", "std", "min", "max")
_PLAIN_EXTRAS = 3
_EXTRAS = 12
_STRANGE = 3
_CERTAIN = ("saved", "its keys")


@click.command()
@click.argument("path", required=False)
@click.option(
    "--tensors",
    "pattern",
    is_flag=False,
    flag_value=_ALL,
    metavar="[GLOB]",
    help="List the tensors, or those whose names match, with shape, dtype and size.",
)
@click.option("--stats", is_flag=True, help="Read every tensor: norm, mean, std, min, max, odd values.")
@click.option("--tree", is_flag=True, help="Show everything in the file as an outline.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(path: str | None, pattern: str | None, stats: bool, tree: bool, as_json: bool) -> None:
    r"""What a checkpoint holds, and whether training can go on from it.

    PATH is a file, a run's directory (its newest checkpoint), DIRECTORY@STEP, or runs:/RUN_ID/PATH, an artifact
    of an MLflow run. Neither torch is needed nor is anything in the file run, so a stranger's file can be looked at.

    \b
    Example:
      trackopt inspect runs/digits@400
      trackopt inspect model_best.pth.tar --tensors
      trackopt inspect model.pt --stats --tensors '*.weight'
    """
    if path is None and pattern is not None:
        path, pattern = pattern, _ALL  # `--tensors PATH`: what follows is the path, unless there is another
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    with locations.open(path) as opened:
        with console.progress("reading", shown=stats) as progress:
            summary = summarize(opened, tensors=pattern is not None, statistics=stats, progress=progress)
        if summary.tensors is not None and pattern != _ALL:
            chosen = {name: one for name, one in summary.tensors.items() if fnmatchcase(name, pattern or "")}
            summary = replace(summary, tensors=chosen)
        if as_json:
            console.write_json(summary.as_dict())
        elif tree:
            sys.stdout.writelines(f"{line}\n" for line in outline(opened.tree))
        else:
            console.show(drawn(summary))


def drawn(summary: Summary) -> Iterator[RenderableType]:
    """The lines of the screen."""
    yield _header(summary)
    yield ""
    yield from _state(summary)
    if summary.tensors is not None:
        yield ""
        yield _tensors(summary) if summary.tensors else "  no tensor of such a name"
    elif summary.statistics is not None:
        yield ""
        yield _statistics(summary)
    yield ""
    for one in summary.findings:
        if one.level != "info":
            yield console.finding(one.level, one.text)


def _state(summary: Summary) -> Iterator[RenderableType]:
    """A row for each part of the training state."""
    from rich.text import Text

    state = summary.state
    for model in state.models:
        yield console.row(model.name, _model(model))
    for optimizer in state.optimizers:
        yield from _optimizer(optimizer)
    for scheduler in state.schedulers:
        yield console.row(scheduler.name, _scheduler(scheduler))
    if state.optimizers and not state.schedulers:
        yield console.row("scheduler", ["none saved"])
    also = list(_also(summary))
    if also:
        yield Text("  also        ").append(console.wrap_fields(also, indent=console.LABEL + 2, gap=" · "))
    for one in summary.findings:
        if one.level == "info":
            yield console.row("note", [one.text], style="")


def _header(summary: Summary) -> Text:
    from rich.text import Text

    state = summary.state
    facts = []
    if state.meta is not None:
        facts.append(f'trackopt run "{state.meta.get("name")}"')
    else:
        known = state.framework and state.framework != summary.format
        facts.append(f"{state.framework} ({summary.format})" if known else summary.format)
        facts.append(console.size(summary.bytes))
    facts += [
        f"{name} {value:,}" for name, value in (("step", state.step), ("epoch", state.epoch)) if value is not None
    ]
    if state.meta is not None:
        facts.append(f"saved {console.format_age(state.meta.get('time'))}")
    else:
        facts += [f"{name} {console.number(value)}" for name, value in _scores(state.extras)]
    name = console.sanitize(Path(summary.path).name)
    line = console.wrap_fields([f"{name}   {facts[0]}", *facts[1:]], indent=4, first=0, gap=" · ")
    text = Text(line)
    text.stylize("bold", 0, len(name))
    return text


def _scores(extras: tuple[tuple[str, Any], ...]) -> list[tuple[str, float]]:
    """Losses, accuracies and their like, which say what a stranger's checkpoint is."""
    return list(islice(((name, value) for name, value in extras if isinstance(value, float)), _PLAIN_EXTRAS))


def _model(model: Model) -> list[str]:
    return [
        _count(len(model.tensors), "tensor"),
        _count(model.parameters, "parameter"),
        console.size(model.nbytes),
        ", ".join(dtypes(model.tensors.values())),
        "(an average of the weights)" if model.averaged else "",
        f"(names start with {model.prefix})" if model.prefix else "",
    ]


def _optimizer(one: Optimizer) -> Iterator[RenderableType]:
    from rich.text import Text

    alone = one.groups[0] if len(one.groups) == 1 else None
    weight = sum(tensor.nbytes for buffer in one.buffers.values() for tensor in buffer.tensors.values())
    facts = [
        f"{_class(one)}{_told(one)}",
        _count(len(one.groups), "group"),
        *(f"{name} {console.number(alone.hyperparameters[name])}" for name in _telling(one.groups) if alone),
        f"state for {len(one.stateful):,} of {_count(len(one.parameters), 'parameter')}"
        if one.stateful
        else f"no state yet for {_count(len(one.parameters), 'parameter')}",
        console.size(weight) if weight else "",
        _steps(one),
    ]
    yield console.row(one.name, facts)
    if alone is None:
        yield _groups(one.groups)
    if one.buffers:
        indent = console.LABEL + 4
        yield Text(" " * indent + console.wrap_fields([_buffers(one)], indent=indent + 2))


def _class(one: Optimizer) -> str:
    momentum = any(group.hyperparameters.get("momentum") for group in one.groups)
    return f"{one.cls or 'of an unknown class'}{' with momentum' if one.cls == 'SGD' and momentum else ''}"


def _told(one: Optimizer | Scheduler) -> str:
    """How the class was found out, where it was not written down."""
    if one.evidence.startswith("saved") or not one.cls:
        return ""
    strange = ", ".join(one.unknown[:_STRANGE]) + (", …" if len(one.unknown) > _STRANGE else "")
    return f" (from its keys, but {strange} is not among them)" if strange else " (from its keys)"


def _buffers(one: Optimizer) -> str:
    having = Counter(buffer for parameter in one.parameters for buffer in parameter.buffers)
    names = [f"{name} for {having[name]:,}" if having[name] < len(one.stateful) else name for name in one.buffers]
    certain = not one.matching or one.matching.startswith(_CERTAIN)
    return f"buffers: {', '.join(names)}{'' if certain else f', named by {one.matching}'}"


def _steps(one: Optimizer) -> str:
    if one.steps is None:
        return ""
    low, high = one.steps
    return f"step {low:,.0f}" if low == high else f"steps {low:,.0f} to {high:,.0f}"


def _groups(groups: tuple[Group, ...]) -> Text:
    names = _telling(groups)
    rows = [
        [
            group.name,
            f"{group.elements:,}" if group.elements is not None else f"{len(group.parameters)} tensors",
            *(console.number(group.hyperparameters.get(name, "")) for name in names),
        ]
        for group in groups
    ]
    return console.table(["group", "parameters", *names], rows, indent=console.LABEL + 4)


def _telling(groups: tuple[Group, ...]) -> list[str]:
    """The hyperparameters that fit a screen and say something: lr always, of the others what is not off."""
    values: dict[str, list[Any]] = {}
    for group in groups:
        for name, value in group.hyperparameters.items():
            values.setdefault(name, []).append(value)
    first = [name for name in ("lr", "momentum", "betas", "weight_decay") if name in values]
    return [name for name in first if name == "lr" or any(values[name])]


def _scheduler(one: Scheduler) -> list[str]:
    agreement = {True: "lr agrees with the optimizer", False: "lr differs from the optimizer's"}
    rates = f"lr {console.number(one.last_lr)}" if one.last_lr else ""
    return [
        f"{one.cls or 'of an unknown class'}{_told(one)}",
        f"last_epoch {one.last_epoch:,}" if one.last_epoch is not None else "",
        rates if one.lr_matches_optimizer is None else agreement[one.lr_matches_optimizer],
    ]


def _also(summary: Summary) -> Iterator[str]:
    state = summary.state
    if state.rng:
        yield f"rng ({', '.join(state.rng)})"
    if state.batch is not None:
        yield f"progress (epoch {console.number(state.epoch)}, batch {state.batch:,})"
    above = dict(_scores(state.extras)) if state.meta is None else {}
    extras = [(name, value) for name, value in state.extras if value is not None and name not in above]
    for name, value in extras[:_EXTRAS]:
        if state.scaler is not None and name == state.scaler[0]:
            yield f"{name} (scale {console.number(state.scaler[1]['scale'])})"
        elif isinstance(value, dict):
            yield f"{name} ({_count(len(value), 'entry', 'entries')})"
        else:
            yield f"{name} {console.number(value)}"
    if len(extras) > _EXTRAS:
        yield f"and {_count(len(extras) - _EXTRAS, 'more entry', 'more entries')}"


def _count(number: int, what: str, several: str = "") -> str:
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def _tensors(summary: Summary) -> Text:
    tensors, measured = summary.tensors or {}, summary.statistics
    shapes = {name: "×".join(map(str, tensor.shape)) or "scalar" for name, tensor in tensors.items()}
    if measured is not None:
        rows = [[name, shapes[name], *_values(measured.get(name))] for name in tensors]
        return console.table(["tensor", "shape", *_VALUES], rows)
    rows = [[name, shapes[name], tensor.dtype, console.size(tensor.nbytes)] for name, tensor in tensors.items()]
    return console.table(["tensor", "shape", "dtype", "size"], rows)


def _statistics(summary: Summary) -> Text:
    """Each model and each buffer as a whole."""
    rows = [[name, *_values(together)] for name, together in summary.merge_statistics().items()]
    return console.table(["values", *_VALUES], rows)


def _values(one: Statistics | None) -> list[str]:
    return [f"{getattr(one, name):.3g}" for name in _VALUES] if one is not None else [""] * len(_VALUES)
