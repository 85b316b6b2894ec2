"""The entries of a checkpoint that are worth sorting, wherever they stand, in forms that the sorters know."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor
from trackopt.state.models import find_models
from trackopt.state.optimizers import is_optimizer
from trackopt.state.schedulers import is_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

Entry = tuple[str, Path, Any]

_WORDS = re.compile(r"(?i)optimi[sz]ers?|optims?|opts?|lr|param|schedulers?|scheds?|states?|dict|last|model")


def top_level_entries(tree: dict[str, Any]) -> list[Entry]:
    """What stands at the top, and what stands one level below in a mere folder: its name, path and node."""
    found: list[Entry] = []
    for key, node in tree.items():
        inside = list(_folder(key, node))
        found.extend(inside or [(key, (key,), unflatten(node))])
    return found


def label(key: str, default: str) -> str:
    """What tells an entry apart from others of its kind, as ``"G"`` of ``"optimizer_G_state_dict"``.

    Example:
        >>> label("optimizer_G_state_dict", "optimizer"), label("optim", "optimizer"), label("optimizer_1", "optimizer")
        ('G', 'optimizer', 'optimizer1')
    """
    words = [word for word in re.split(r"[_.\- ]+", key) if word and not _WORDS.fullmatch(word)]
    rest = "_".join(words)
    return default + rest if rest.isdecimal() else rest or default


def _folder(key: str, node: Any) -> Iterator[Entry]:
    """The parts of a dictionary that is nothing itself, but holds an optimizer or a model."""
    if not isinstance(node, dict) or is_optimizer(node) or is_scheduler(node) or find_models(key, (key,), node):
        return
    parts = [(str(name), unflatten(part)) for name, part in node.items()]
    known = [part for name, part in parts if is_optimizer(part) or find_models(name, (name,), part)]
    if known and not all(is_optimizer(part) for _, part in parts):
        for name, part in parts:
            yield name if name not in ("", key) else key, (key, name), part


def unflatten(node: Any) -> Any:
    """An optimizer's state dict from its flattened form, with keys as ``state.WEIGHT.exp_avg``; else the node itself.

    In that form each parameter has hyperparameters of its own; neighbours with the same ones make a group. A
    ``state`` that is empty may have been left out.
    """
    if isinstance(node, dict) and "state" not in node and is_optimizer({"state": {}, **node}):
        return {"state": {}, **node}
    if not isinstance(node, dict) or not node or not all(
        isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in node
    ):  # fmt: skip
        return node
    state: dict[str, Any] = {}
    hyperparameters: dict[str, Any] = {}
    for key, value in node.items():
        kind, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        (state if kind == "state" else hyperparameters).setdefault(name, {})[last] = value
    return {"state": state, "param_groups": _grouped(hyperparameters)}


def _grouped(hyperparameters: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for name, own in hyperparameters.items():
        if groups and _same({key: groups[-1][key] for key in groups[-1] if key != "params"}, own):
            groups[-1]["params"].append(name)
        else:
            groups.append({**own, "params": [name]})
    return groups


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = any(isinstance(value, Tensor) for value in (*one.values(), *other.values()))
    return not tensors and one == other
