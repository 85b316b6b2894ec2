"""``trackopt diff``: what changed between two checkpoints, as a story first."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from trackopt import archive, difference
from trackopt.cli import screen, story

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.difference import Change, Difference, Numbers

_TOP = 10
_FEW = 3
_BAR = 24
_DECADES = 6  # what a bar stands for, below 1
_ULPS = 10**6  # more of them say nothing
_LONG = 256 << 20  # bytes from which a bar is shown
_KINDS = {"value": "values changed", "shape": "shapes changed", "dtype": "dtypes changed"}
_CASTS = {"equal": "the values are equal", "rounded": "equal after the cast", None: ""}
_FOLLOWS_THE_STEP = ("trackopt.position.", "trackopt.observers.", "trackopt.pending.")
_SAID = ("step", "epoch", "batch", "last_epoch", "_last_lr", "_step_count", "global_step")
_NUMBERS = ("max |Δ|", "rel L2", "cosine", "elements")
_DIFFER = 1


def _renames(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [(old, new) for old, sign, new in (text.partition("=") for text in given) if sign and old]
    if len(pairs) < len(given):
        raise click.BadParameter("it is OLD=NEW, as in --map encoder=backbone")
    return dict(pairs)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--resume", is_flag=True, help="Say whether B, loaded into A's training, continues the same run.")
@click.option("--stat", is_flag=True, help="One line for each module and each kind of buffer.")
@click.option("--tensors", is_flag=True, help="List every change, not just the largest.")
@click.option("--top", default=_TOP, metavar="N", show_default=True, type=click.IntRange(0), help="Rows of each list.")
@click.option("--only", multiple=True, metavar="GLOB", help="Compare these paths or parameters alone, as 'head.*'.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave these out.")
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    callback=_renames,
    help="Parameters of A, or the beginnings of their names, that B calls otherwise.",
)
@click.option("--atol", default=0.0, metavar="X", type=click.FloatRange(0), help="Call |a - b| up to this equal …")
@click.option(
    "--rtol", default=0.0, metavar="X", type=click.FloatRange(0), help="… plus this times the larger of |a|, |b|."
)
@click.option("--fast", is_flag=True, help="Take records with the same size and CRC-32 as equal, unread.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(a: str, b: str, resume: bool, stat: bool, tensors: bool, top: int, as_json: bool, **terms: Any) -> int:
    r"""What changed between two checkpoints.

    A and B are files, runs' directories (their newest checkpoints) or DIRECTORY@STEP, of any formats. Every
    value is compared, bit for bit: parameters by name, whatever wrappers put in front, optimizer state by its
    parameter. What only says which run wrote a file, and when, is no difference.

    \b
    Example:
      trackopt diff runs/digits@400 runs/digits@450
      trackopt diff runs/digits@450 elsewhere.pt --resume
      trackopt diff before.pt after.safetensors --only 'head.*' --tensors

    Exit codes: 0 nothing differs, 1 something does, 2 trouble; with --resume: 0 the same run, 1 not, 2 trouble.
    """
    if resume + stat + tensors > 1:
        raise click.UsageError("--resume, --stat and --tensors are three screens: choose one")
    if resume and (terms["only"] or terms["ignore"]):
        raise click.UsageError("--resume looks at the whole checkpoints: leave out --only and --ignore")
    with (
        archive.open(a) as one,
        archive.open(b) as other,
        screen.progress("comparing", shown=one.bytes + other.bytes > _LONG) as progress,
    ):
        found = difference.diff(one, other, progress=progress, **terms)
    if as_json:
        screen.write_json(found.as_dict())
    else:
        chosen = (_stat if stat else _resumed if resume else _everything if tensors else _screen)(found, top)
        screen.show(_framed(found, chosen))
    if resume and found.resume is not None:
        return 0 if found.resume.continues else _DIFFER
    return 0 if found.equal else _DIFFER


def _framed(found: Difference, inside: Iterator[RenderableType]) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(story.headline(found), style="bold")
    yield ""
    yield from inside
    yield from story.notes(found)
    if found.ignored:
        names = ", ".join(path.removeprefix("trackopt.") for path in found.ignored)
        told = f"not counted, since it only says who wrote the file: {names}"
        yield Text("  " + screen.flow([told], indent=4, first=2), style="dim")


def _screen(found: Difference, top: int, *, everything: bool = False) -> Iterator[RenderableType]:
    if found.equal:
        yield _equal(found)
        return
    told = list(story.lines(found))
    yield from told
    if told:
        yield ""
    yield from _tensors(found, top, everything=everything)
    hidden = [] if everything else _following(found)
    yield from _others(found, hidden, top, everything=everything)
    yield _count(found, hidden, hint="" if everything else "--tensors shows all")


def _everything(found: Difference, top: int) -> Iterator[RenderableType]:
    return _screen(found, top, everything=True)


def _resumed(found: Difference, _: int) -> Iterator[RenderableType]:
    told = list(story.lines(found))
    yield from told
    if told:
        yield ""
    if found.resume is not None:
        yield from story.verdict(found.resume)


def _stat(found: Difference, _: int) -> Iterator[RenderableType]:
    if found.equal:
        yield _equal(found)
        return
    rows = [
        [one.name, _bar(one.numbers), f"{one.changed:,} of {one.tensors:,}", _far(one.numbers)]
        for one in found.tally.modules.values()
        if one.changed
    ]
    if rows:
        yield screen.table(["module", "10⁻⁶ … 1", "changed", "rel L2"], rows, left=2)
        yield ""
    yield _count(found, hidden=(), hint="")


def _bar(numbers: Numbers) -> str:
    """How far it moved, as the logarithm of the relative L2."""
    far = numbers.rel_l2
    if not (far > 0 and math.isfinite(far)):
        return "" if far == 0 else "+" * _BAR
    return "+" * min(_BAR, max(1, math.ceil(_BAR * (1 + math.log10(far) / _DECADES))))


def _far(numbers: Numbers) -> str:
    return f"{numbers.rel_l2:.3g}" if numbers.differing else ""


def _equal(found: Difference) -> RenderableType:
    tally = found.tally
    same = tally.tensors["same"]
    how = ", bit for bit" if not (tally.close or tally.unread) else ""
    text = f"the same{how}: {same:,} tensors and {found.same - same:,} other values"
    if tally.close:
        text += f"; {tally.close:,} of the tensors differ by less than the tolerance"
    if tally.unread:
        text += f"; {tally.unread:,} of the tensors by size and checksum alone"
    return screen.finding("ok", text)


def _tensors(found: Difference, top: int, *, everything: bool) -> Iterator[RenderableType]:
    changed = [change for change in found.changes if change.kind == "tensor"]
    if not everything:
        most = _most_changed(changed)
        yield from _table("most changed", most[:top])
        if most[top:]:
            yield f"  … and {len(most[top:]):,} more"
        yield from [""] if most else []
        return
    tables: dict[str, list[Change]] = {}
    for change in changed:
        role = change.role
        tables.setdefault(f"{role.owner} {role.buffer}".strip() if role else change.part, []).append(change)
    for title, members in tables.items():
        yield from _table(title, members)
        yield ""


def _table(title: str, changes: list[Change]) -> Iterator[RenderableType]:
    counted = any(one.numbers and one.numbers.ulp is not None and one.numbers.ulp < _ULPS for one in changes)
    if changes:
        heads = [title, *_NUMBERS, *(["ulp"] if counted else [])]
        yield screen.table(heads, ([_name(one), *_numbers(one, counted)] for one in changes))


def _name(change: Change) -> str:
    return change.role.parameter if change.role and change.role.parameter else change.path


def _most_changed(tensors: list[Change]) -> list[Change]:
    """The weights by how far they moved; where none did, whatever else changed, random states aside."""
    weights = [change for change in tensors if change.role and change.role.kind == "weight"]
    others = [change for change in tensors if not _is_random(change)]
    return sorted(weights or others, key=_distance, reverse=True)


def _distance(change: Change) -> float:
    far = change.numbers.rel_l2 if change.numbers else math.nan
    return math.inf if math.isnan(far) else far


def _numbers(change: Change, counted: bool) -> list[str]:
    numbers = change.numbers
    if numbers is None:
        return []
    cosine = "" if numbers.cosine is None else f"{numbers.cosine:.4f}"
    cells = [f"{numbers.max_abs:.3g}", f"{numbers.rel_l2:.3g}", cosine, screen.share(numbers.share)]
    return [*cells, _steps(numbers.ulp)] if counted else cells


def _steps(ulp: int | None) -> str:
    return f"{ulp:,}" if ulp is not None and ulp < _ULPS else ""


def _following(found: Difference) -> list[Change]:
    """What a run notes for itself at every step: between two steps it differs as a matter of course."""
    moved_on = found.story.step[0] != found.story.step[1]
    return [one for one in found.changes if moved_on and one.path.startswith(_FOLLOWS_THE_STEP)]


def _others(found: Difference, hidden: list[Change], top: int, *, everything: bool) -> Iterator[RenderableType]:
    """What is no tensor with other values: added, removed, reshaped, cast, and plain values."""
    others = [change for change in found.changes if change.kind != "tensor"]
    if everything:
        rows = [[one.path, _value(one)] for one in others]
    else:
        unsaid = set(map(id, hidden))
        rows = _folded(found, [one for one in others if id(one) not in unsaid])
    shown = rows if everything else rows[:top]
    if shown:
        yield screen.table(["other changes", ""], shown, left=2)
        if len(shown) < len(rows):
            yield f"  … and {len(rows) - len(shown):,} more"
        yield ""


def _folded(found: Difference, changes: Iterable[Change]) -> list[list[str]]:
    """What the story has not said; what only one has, and many changes of a kind in one place, are one row."""
    groups: dict[tuple[str, str, str], list[Change]] = {}
    for change in changes:
        if not _is_told(change):
            lone = len(found.tally.parts[change.part]) == 1 and change.kind in ("added", "removed")
            in_model = change.role is not None and change.role.kind in ("weight", "average", "statistic")
            place = change.part if lone or in_model else ".".join(change.path.split(".")[:2])
            cast = f"{change.a.dtype} → {change.b.dtype}, {_cast(change)}" if change.kind == "dtype" else ""
            groups.setdefault((place, change.kind, cast), []).append(change)
    rows = []
    for (place, kind, cast), members in groups.items():
        if len(members) <= _FEW:
            rows += [[change.path, _value(change)] for change in members]
        elif kind in ("added", "removed"):
            rows.append([place, f"{kind}: {_contents(members)}"])
        else:
            rows.append([place, f"{len(members):,} {_KINDS[kind]}{cast and f': {cast}'}"])
    return rows


def _contents(changes: list[Change]) -> str:
    tensors = sum(change.is_tensor for change in changes)
    counts = ((tensors, "tensor"), (len(changes) - tensors, "other value" if tensors else "value"))
    return " and ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts if count)


def _is_random(change: Change) -> bool:
    return change.role is not None and change.role.kind == "rng"


def _is_told(change: Change) -> bool:
    """Whether the story has said it: progress, hyperparameters, the schedulers' positions, the generators."""
    above, _, last = change.path.rpartition(".")
    setting = ".param_groups." in f".{above}." and last not in ("params", "order")
    return change.kind == "value" and (_is_random(change) or setting or last in _SAID)


def _value(change: Change) -> str:
    if change.kind in ("added", "removed"):
        what = change.b if change.kind == "added" else change.a
        return f"{change.kind}: {screen.number(what)}"
    if change.kind == "shape":
        return f"shape {list(change.a.shape)} → {list(change.b.shape)}"
    if change.kind == "dtype":
        return f"dtype {change.a.dtype} → {change.b.dtype}, {_cast(change)}".rstrip(", ")
    return f"{screen.number(change.a)} → {screen.number(change.b)}"


def _cast(change: Change) -> str:
    if change.cast == "different" and change.numbers is not None:
        return f"and the values differ: rel L2 {change.numbers.rel_l2:.3g}"
    return _CASTS[change.cast]


def _count(found: Difference, hidden: Sequence[Change], hint: str) -> Text:
    from rich.text import Text

    kinds = found.tally.tensors - Counter(change.kind for change in hidden if change.is_tensor)
    added, removed, total = kinds["added"], kinds["removed"], kinds.total()
    changed = total - added - removed - kinds["same"]
    text = f"  {changed:,} of {total - added:,} tensors changed, {added:,} added, {removed:,} removed"
    return Text(f"{text}{' ' * max(3, min(10, screen.width() - len(text) - len(hint)))}{hint}".rstrip())
