"""Bring a checkpoint's entries into the forms that the readers of models, optimizers and schedulers know."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor, children
from trackopt.state.models import find_models
from trackopt.state.optimizers import is_optimizer
from trackopt.state.pickled import as_state_dict, attributes
from trackopt.state.schedulers import is_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Entry = tuple[str, Path, Any]
_Group = dict[str, Any]

_WORDS = re.compile(r"(?i)optimi[sz]ers?|optims?|opts?|lr|param|schedulers?|scheds?|states?|dict|last|model")


def top_level_entries(tree: dict[str, Any]) -> list[Entry]:
    """Return the entries at the top, and those one level below in a plain folder: name, path and node."""
    entries: list[Entry] = []
    for key, node in tree.items():
        entries.extend(list(_nested_entries(key, node)) or [(key, (key,), unflatten(node))])
    return entries


def distinct_names(parts: Sequence[tuple[str, Path]]) -> list[str]:
    """Return a name for each part of a kind; where several have one, it stays with the only one nearest to the top.

    Args:
        parts: The name and the path of each.

    Example:
        >>> distinct_names([("model", ("state_dict",)), ("model", ("hyper_parameters", "net"))])
        ['model', 'hyper_parameters.net']
    """
    at_depth = Counter((name, len(path)) for name, path in parts)
    least: dict[str, int] = {}
    for name, depth in at_depth:
        least[name] = min(depth, least.get(name, depth))
    return [
        name if len(path) == least[name] and at_depth[name, len(path)] == 1 else ".".join(path) for name, path in parts
    ]


def make_label(key: str, default: str) -> str:
    """Return the part of a key that distinguishes entries of one kind, as ``"G"`` of ``"optimizer_G_state_dict"``.

    Example:
        >>> [make_label(key, "optimizer") for key in ("optimizer_G_state_dict", "optim", "optimizer_1")]
        ['G', 'optimizer', 'optimizer1']
    """
    words = [word for word in re.split(r"[_.\- ]+", key) if word and not _WORDS.fullmatch(word)]
    rest = "_".join(words)
    return default + rest if rest.isdecimal() else rest or default


def _nested_entries(key: str, node: Any) -> Iterator[Entry]:
    """Yield the parts of a dictionary, or of an object, that only contains an optimizer or a model."""
    is_wrapper = attributes(node) is not None and as_state_dict(node) is node
    if not (is_wrapper or isinstance(node, dict)):
        return
    if is_optimizer(node) or is_scheduler(node) or find_models(key, (key,), node):
        return
    parts = [(str(name), unflatten(part)) for name, part in (children(node) if is_wrapper else node.items())]
    known = [name for name, part in parts if is_optimizer(part) or find_models(name, (name,), part)]
    if known and not all(is_optimizer(part) for _, part in parts):
        for name, part in parts:
            is_the_content = is_wrapper and known == [name]  # as the weights of a pickled EMA
            yield key if is_the_content or name in ("", key) else name, (key, name), part


def unflatten(node: Any) -> Any:
    """Return an optimizer's state dict from a pickled one, or from the form with keys as ``state.WEIGHT.exp_avg``.

    In that form each parameter has hyperparameters of its own; neighbours with the same ones make a group. An
    empty ``state`` may be missing. A pickled scheduler becomes its state dict; other nodes are returned as they are.
    """
    node = as_state_dict(node)
    if isinstance(node, dict) and "state" not in node and is_optimizer({"state": {}, **node}):
        return {"state": {}, **node}
    if not isinstance(node, dict) or not node or not all(
        isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in node
    ):  # fmt: skip
        return node
    state: dict[str, Any] = {}
    hyperparameters: dict[str, _Group] = {}
    for key, value in node.items():
        kind, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        (state if kind == "state" else hyperparameters).setdefault(name, {})[last] = value
    return {"state": state, "param_groups": _make_groups(hyperparameters)}


def _make_groups(hyperparameters: dict[str, _Group]) -> list[_Group]:
    groups: list[_Group] = []
    for name, values in hyperparameters.items():
        if groups and _is_same_group({key: groups[-1][key] for key in groups[-1] if key != "params"}, values):
            groups[-1]["params"].append(name)
        else:
            groups.append({**values, "params": [name]})
    return groups


def _is_same_group(a: _Group, b: _Group) -> bool:
    has_tensors = any(isinstance(value, Tensor) for value in (*a.values(), *b.values()))
    return not has_tensors and a == b
