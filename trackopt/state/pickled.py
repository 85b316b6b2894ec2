"""Optimizers and schedulers that were pickled as objects, in the form of the state dicts that they would return."""

from __future__ import annotations

from typing import Any

from trackopt.archive.tree import Tensor, UnknownObject

_OTHER_PARTS = frozenset({"optimizer", "defaults"})  # saved with an object, and not in its state dict


class PickledState(dict[str, Any]):
    """The state dict of a pickled object.

    Args:
        values: The entries.
        cls: The object's class, as ``"AdamW"``.
        parameters: Of an optimizer, its parameters in the order of their ids.
    """

    def __init__(self, values: dict[str, Any], cls: str, parameters: tuple[Tensor, ...] = ()) -> None:
        super().__init__(values)
        self.cls = cls
        self.parameters = parameters


def attributes(node: Any) -> dict[str, Any] | None:
    """Return the attributes of an object if nothing else is known of it; None for another node."""
    if not isinstance(node, UnknownObject) or node.args or node.items or node.entries:
        return None
    return node.state if isinstance(node.state, dict) else None


def as_state_dict(node: Any) -> Any:
    """Return the state dict of an object with the attributes of an optimizer or a scheduler; other nodes as they are.

    As in torch's ``Optimizer.state_dict``, an optimizer's parameters become numbers, in the order of its groups.
    """
    state = attributes(node)
    if state is None:
        return node
    cls = node.name.rpartition(".")[2]
    if isinstance(state.get("param_groups"), list) and isinstance(state.get("state"), dict):
        return _optimizer_state(state, cls)
    if "optimizer" in state and "last_epoch" in state:
        return PickledState({key: value for key, value in state.items() if key not in _OTHER_PARTS}, cls)
    return node


def _optimizer_state(state: dict[str, Any], cls: str) -> PickledState:
    ids: dict[Any, int] = {}
    groups = []
    for group in state["param_groups"]:
        parameters = group.get("params") if isinstance(group, dict) else None
        if not isinstance(parameters, list) or not all(isinstance(parameter, Tensor) for parameter in parameters):
            return PickledState(state, cls)
        groups.append({**group, "params": [ids.setdefault(parameter, len(ids)) for parameter in parameters]})
    by_id = {
        ids[key] if isinstance(key, Tensor) and key in ids else key: entry for key, entry in state["state"].items()
    }
    rest = {key: value for key, value in state.items() if key not in _OTHER_PARTS}
    return PickledState({**rest, "state": by_id, "param_groups": groups}, cls, tuple(ids))
