"""``trackopt inspect``: show a checkpoint on one screen."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackopt import locations
from trackopt.analysis.summary import Summary, summarize
from trackopt.archive.tree import children, config_content
from trackopt.cli import console
from trackopt.cli.outline import format_outline
from trackopt.state.models import count_dtypes
from trackopt.utils.text import matches_glob

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.analysis.summary.statistics import TensorStatistics
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Group, Optimizer
    from trackopt.state.schedulers import Scheduler

_ALL_NAMES = "*"
_STATISTICS = ("norm", "mean", "std", "min", "max")
_MAX_SCORES = 3
_MAX_EXTRAS = 12
_MAX_UNKNOWN_KEYS = 3
_CERTAIN_EVIDENCE = ("saved", "its keys")


@click.command()
@click.argument("path", required=False)
@click.option(
    "--tensors",
    "pattern",
    is_flag=False,
    flag_value=_ALL_NAMES,
    metavar="[GLOB]",
    help="List the tensors, or those whose path, or the end of it, matches, with shape, dtype and size.",
)
@click.option("--stats", is_flag=True, help="Read every tensor: norm, mean, std, min, max, NaN and infinite values.")
@click.option("--tree", is_flag=True, help="Show everything in the file as an outline.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(path: str | None, pattern: str | None, stats: bool, tree: bool, as_json: bool) -> None:
    r"""Show what a checkpoint contains and whether training can resume from it.

    PATH is a file, a run's directory (its newest checkpoint), DIRECTORY@STEP, or runs:/RUN_ID/PATH, an artifact
    of an MLflow run. Does not import torch or execute code from the file, so untrusted checkpoints are safe to inspect.

    \b
    Example:
      trackopt inspect runs/digits@400
      trackopt inspect model_best.pth.tar --tensors
      trackopt inspect model.pt --stats --tensors '*.weight'
    """
    if path is None and pattern is not None:
        path, pattern = pattern, _ALL_NAMES  # `--tensors PATH` without a GLOB
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    with locations.open(path) as opened:
        with console.progress_bar("reading", shown=stats) as progress:
            summary = summarize(opened, tensors=pattern is not None, statistics=stats, progress=progress)
        if summary.tensors is not None and pattern != _ALL_NAMES:
            selected = {name: tensor for name, tensor in summary.tensors.items() if matches_glob(name, pattern or "")}
            summary = replace(summary, tensors=selected)
        if as_json:
            console.write_json(summary.as_dict())
        elif tree:
            sys.stdout.writelines(f"{line}\n" for line in format_outline(opened.tree))
        else:
            console.show(render(summary))


def render(summary: Summary) -> Iterator[RenderableType]:
    """Render the screen."""
    yield _render_header(summary)
    yield ""
    yield from _render_state(summary)
    if summary.tensors is not None:
        yield ""
        if summary.tensors:
            yield from _render_tensors(summary)
        else:
            yield "  no tensor matches"
    elif summary.statistics is not None:
        yield ""
        yield from _render_statistics(summary)
    yield ""
    for finding in summary.findings:
        if finding.level != "info":
            yield console.render_finding(finding.level, finding.text)


def _render_state(summary: Summary) -> Iterator[RenderableType]:
    """Render one row for each part of the training state."""
    from rich.text import Text

    state = summary.state
    for model in state.models:
        yield console.render_row(model.name, _describe_model(model))
    for optimizer in state.optimizers:
        yield from _render_optimizer(optimizer)
    for scheduler in state.schedulers:
        yield console.render_row(scheduler.name, _describe_scheduler(scheduler))
    if state.optimizers and not state.schedulers:
        yield console.render_row("scheduler", ["none saved"])
    also = list(_list_extras(summary))
    if also:
        yield Text("  also        ").append(console.wrap_fields(also, indent=console.LABEL_WIDTH + 2, gap=" · "))
    for finding in summary.findings:
        if finding.level == "info":
            yield console.render_row("note", [finding.text], style="")


def _render_header(summary: Summary) -> Text:
    from rich.text import Text

    state = summary.state
    fields = []
    if state.meta is not None:
        fields.append(f'trackopt run "{state.meta.get("name")}"')
    else:
        is_framework = state.framework and state.framework != summary.format
        fields.append(f"{state.framework} ({summary.format})" if is_framework else summary.format)
        fields.append(console.format_size(summary.bytes))
    fields += [
        f"{name} {value:,}" for name, value in (("step", state.step), ("epoch", state.epoch)) if value is not None
    ]
    if state.meta is not None:
        fields.append(f"saved {console.format_age(state.meta.get('time'))}")
    else:
        fields += [f"{name} {console.format_number(value)}" for name, value in _list_scores(state.extras)]
    name = console.sanitize(Path(summary.path).name)
    line = console.wrap_fields([f"{name}   {fields[0]}", *fields[1:]], indent=4, first=0, gap=" · ")
    text = Text(line)
    text.stylize("bold", 0, len(name))
    return text


def _list_scores(extras: tuple[tuple[str, Any], ...]) -> list[tuple[str, float]]:
    """Return the first losses, accuracies and other floats, which characterize a foreign checkpoint."""
    return list(islice(((name, value) for name, value in extras if isinstance(value, float)), _MAX_SCORES))


def _describe_model(model: Model) -> list[str]:
    return [
        _format_count(len(model.tensors), "tensor"),
        _format_count(model.parameters, "parameter"),
        console.format_size(model.nbytes),
        ", ".join(count_dtypes(model.tensors.values())),
        "(an average of the weights)" if model.averaged else "",
        f"(names start with {model.prefix})" if model.prefix else "",
    ]


def _render_optimizer(optimizer: Optimizer) -> Iterator[RenderableType]:
    from rich.text import Text

    only_group = optimizer.groups[0] if len(optimizer.groups) == 1 else None
    nbytes = sum(tensor.nbytes for buffer in optimizer.buffers.values() for tensor in buffer.tensors.values())
    fields = [
        f"{_describe_class(optimizer)}{_describe_evidence(optimizer)}",
        _format_count(len(optimizer.groups), "group"),
        *(
            f"{name} {console.format_number(only_group.hyperparameters[name])}"
            for name in _displayed_hyperparameters(optimizer.groups)
            if only_group
        ),
        f"state for {len(optimizer.stateful):,} of {_format_count(len(optimizer.parameters), 'parameter')}"
        if optimizer.stateful
        else f"no state yet for {_format_count(len(optimizer.parameters), 'parameter')}",
        console.format_size(nbytes) if nbytes else "",
        _describe_steps(optimizer),
    ]
    yield console.render_row(optimizer.name, fields)
    if only_group is None:
        yield from _render_groups(optimizer.groups)
    if optimizer.buffers:
        indent = console.LABEL_WIDTH + 4
        yield Text(" " * indent + console.wrap_fields([_describe_buffers(optimizer)], indent=indent + 2))


def _describe_class(optimizer: Optimizer) -> str:
    momentum = any(group.hyperparameters.get("momentum") for group in optimizer.groups)
    return f"{optimizer.cls or 'unknown class'}{' with momentum' if optimizer.cls == 'SGD' and momentum else ''}"


def _describe_evidence(part: Optimizer | Scheduler) -> str:
    """Describe how the class was inferred; empty if the file names it."""
    if part.evidence.startswith("saved") or not part.cls:
        return ""
    unknown = ", ".join(part.unknown[:_MAX_UNKNOWN_KEYS]) + (", …" if len(part.unknown) > _MAX_UNKNOWN_KEYS else "")
    return f" (from its keys, but {unknown} is not among them)" if unknown else " (from its keys)"


def _describe_buffers(optimizer: Optimizer) -> str:
    counts = Counter(buffer for parameter in optimizer.parameters for buffer in parameter.buffers)
    names = [
        f"{name} for {counts[name]:,}" if counts[name] < len(optimizer.stateful) else name for name in optimizer.buffers
    ]
    is_certain = not optimizer.matching or optimizer.matching.startswith(_CERTAIN_EVIDENCE)
    return f"buffers: {', '.join(names)}{'' if is_certain else f', named by {optimizer.matching}'}"


def _describe_steps(optimizer: Optimizer) -> str:
    if optimizer.steps is None:
        return ""
    low, high = optimizer.steps
    return f"step {low:,.0f}" if low == high else f"steps {low:,.0f} to {high:,.0f}"


def _render_groups(groups: tuple[Group, ...]) -> Iterator[RenderableType]:
    names = _displayed_hyperparameters(groups)
    rows = [
        [
            group.name,
            f"{group.elements:,}" if group.elements is not None else f"{len(group.parameters)} tensors",
            *(console.format_number(group.hyperparameters.get(name, "")) for name in names),
        ]
        for group in groups
    ]
    return console.render_table(["group", "parameters", *names], rows, indent=console.LABEL_WIDTH + 4)


def _displayed_hyperparameters(groups: tuple[Group, ...]) -> list[str]:
    """Return the hyperparameters to display: lr always, the other common ones unless they are zero."""
    values: dict[str, list[Any]] = {}
    for group in groups:
        for name, value in group.hyperparameters.items():
            values.setdefault(name, []).append(value)
    first = [name for name in ("lr", "momentum", "betas", "weight_decay") if name in values]
    return [name for name in first if name == "lr" or any(values[name])]


def _describe_scheduler(scheduler: Scheduler) -> list[str]:
    agreement = {True: "lr agrees with the optimizer", False: "lr differs from the optimizer's"}
    rates = f"lr {console.format_number(scheduler.last_lr)}" if scheduler.last_lr else ""
    return [
        f"{scheduler.cls or 'unknown class'}{_describe_evidence(scheduler)}",
        f"last_epoch {scheduler.last_epoch:,}" if scheduler.last_epoch is not None else "",
        rates if scheduler.lr_matches_optimizer is None else agreement[scheduler.lr_matches_optimizer],
    ]


def _list_extras(summary: Summary) -> Iterator[str]:
    state = summary.state
    if state.rng:
        yield f"rng ({', '.join(state.rng)})"
    if state.batch is not None:
        yield f"progress (epoch {console.format_number(state.epoch)}, batch {state.batch:,})"
    scores = dict(_list_scores(state.extras)) if state.meta is None else {}
    extras = [
        extra
        for name, value in state.extras
        if value is not None and name not in scores
        for extra in _list_settings(name, value)
    ]
    for name, value in extras[:_MAX_EXTRAS]:
        if state.scaler is not None and name == state.scaler[0]:
            yield f"{name} (scale {console.format_number(state.scaler[1]['scale'])})"
        elif isinstance(value, dict):
            yield f"{name} ({_format_count(len(value), 'entry', 'entries')})"
        else:
            yield f"{name} {console.format_number(value)}"
    if len(extras) > _MAX_EXTRAS:
        yield f"and {_format_count(len(extras) - _MAX_EXTRAS, 'more entry', 'more entries')}"


def _list_settings(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values in a container of settings, each under its path; another entry as it is."""
    content = config_content(value)
    if isinstance(content, dict):
        for key, setting in children(content):
            yield from _list_settings(f"{name}.{key}", setting)
    else:
        yield name, value if content is None else content


def _format_count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _render_tensors(summary: Summary) -> Iterator[RenderableType]:
    tensors, measured = summary.tensors or {}, summary.statistics
    shapes = {name: "×".join(map(str, tensor.shape)) or "scalar" for name, tensor in tensors.items()}
    if measured is None:
        rows = [
            [name, shapes[name], tensor.dtype, console.format_size(tensor.nbytes)] for name, tensor in tensors.items()
        ]
        yield from console.render_table(["tensor", "shape", "dtype", "size"], rows)
        return
    shown = {name: measured[name] for name in tensors}
    special = [kind for kind in ("nan", "inf") if any(getattr(row, kind) for row in shown.values())]
    rows = [
        [_name_with_unit(name, row), shapes[name], *_format_statistics(row), *_format_counts(row, special)]
        for name, row in shown.items()
    ]
    yield from console.render_table(["tensor", "shape", *_STATISTICS, *special], rows)
    yield from _render_reasons(shown)


def _render_statistics(summary: Summary) -> Iterator[RenderableType]:
    """Render the statistics of each model and each kind of buffer."""
    merged = summary.merge_statistics()
    rows = [[_name_with_unit(name, row), *_format_statistics(row)] for name, row in merged.items()]
    yield from console.render_table(["values", *_STATISTICS], rows)
    yield from _render_reasons(merged)


def _name_with_unit(name: str, statistics: TensorStatistics) -> str:
    return f"{name} ({statistics.unit})" if statistics.unit else name


def _render_reasons(rows: Mapping[str, TensorStatistics]) -> Iterator[RenderableType]:
    """Render why cells are empty, or cover a part of the tensors."""
    for name, statistics in rows.items():
        if statistics.reason:
            yield console.render_indented(f"{name}: {statistics.reason}")


def _format_statistics(statistics: TensorStatistics) -> list[str]:
    if statistics.reason and not statistics.count:
        return ["–"] * len(_STATISTICS)
    return [f"{getattr(statistics, name):.3g}" for name in _STATISTICS]


def _format_counts(statistics: TensorStatistics, kinds: list[str]) -> list[str]:
    return [f"{count:,}" if (count := getattr(statistics, kind)) else "" for kind in kinds]
