"""Recognize the framework that wrote a checkpoint, and find its step and epoch counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Containers that only one program writes, by the archive's format, and the files that identify each.
_FORMATS = {
    "Hugging Face Trainer": "its file trainer_state.json",
    "Accelerate": "its files random_states or optimizer.bin",
    "DeepSpeed": "its files mp_rank or zero_pp_rank",
    "DCP": "its file .metadata",
}
_STEP_KEYS = (
    "global_step", "global_steps", "step", "iteration", "iter", "it", "n_iter", "current_iter", "num_updates",
    "total_it", "steps", "current_step", "train_step",
)  # fmt: skip
_EPOCH_KEYS = ("epoch", "current_epoch", "last_epoch", "epochs", "epoch_idx", "epoch_num")


Tree = dict[str, Any]


@dataclass(frozen=True)
class Framework:
    """A framework, recognized by the keys at the top of its checkpoints.

    Attributes:
        name: As its users write it.
        evidence: The keys that identify it.
        matches: Returns True for a tree that it wrote.
        counters: Returns the dictionaries besides the top that may hold the step and the epoch.
    """

    name: str
    evidence: str
    matches: Callable[[Tree], bool]
    counters: Callable[[Tree], tuple[Any, ...]] = lambda _: ()


def _framework_by_keys(name: str, *keys: str) -> Framework:
    evidence = f"its key{'s' if len(keys) > 1 else ''} {', '.join(keys)}"
    return Framework(name, evidence, lambda tree: all(key in tree for key in keys))


def _get_path(tree: Any, *path: str) -> Any:
    """Return the value at a path through dictionaries, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _has_key(tree: Any, key: str) -> bool:
    return isinstance(tree, dict) and key in tree


def _last_item(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else None


def _ignite_engines(tree: Tree) -> tuple[Any, ...]:
    """Return the states of ignite's engines, each with the epoch that its iteration is in or has just completed."""
    engines = []
    for node in tree.values():
        length = _get_path(node, "epoch_length")
        if _has_key(node, "max_epochs") and isinstance(length, int) and length > 0:
            iteration = _get_path(node, "iteration")
            engines.append({"epoch": iteration // length, **node} if isinstance(iteration, int) else node)
    return tuple(engines)


def _composer_timestamp(tree: Tree) -> tuple[Any, ...]:
    """Return Composer's counters; its batches are optimizer steps."""
    timestamp = _get_path(tree, "state", "timestamp")
    timestamp = _get_path(timestamp, "Timestamp") if _has_key(timestamp, "Timestamp") else timestamp
    return ({"step": _get_path(timestamp, "batch"), "epoch": _get_path(timestamp, "epoch")},)


_FRAMEWORKS = (
    _framework_by_keys("Lightning", "pytorch-lightning_version"),
    Framework(
        "Composer",
        "its key state.timestamp",
        lambda tree: _has_key(_get_path(tree, "state"), "timestamp"),
        _composer_timestamp,
    ),
    Framework(
        "MMEngine",
        "its keys message_hub or meta.mmengine_version",
        lambda tree: "message_hub" in tree or _has_key(_get_path(tree, "meta"), "mmengine_version"),
        lambda tree: (_get_path(tree, "meta"),),
    ),
    Framework(
        "fairseq",
        "its keys optimizer_history or last_optimizer_state",
        lambda tree: "optimizer_history" in tree or "last_optimizer_state" in tree,
        lambda tree: (
            _last_item(_get_path(tree, "optimizer_history")),
            _get_path(tree, "extra_state", "train_iterator"),
        ),
    ),
    _framework_by_keys("Ultralytics", "train_args", "ema"),
    _framework_by_keys("timm", "arch", "state_dict", "args"),
    _framework_by_keys("torchvision", "model", "optimizer", "lr_scheduler", "epoch", "args"),
    Framework(
        "ignite",
        "its engine's keys epoch_length, max_epochs",
        lambda tree: bool(_ignite_engines(tree)),
        _ignite_engines,
    ),
)
_DIRECTORY_COUNTERS = {
    "Hugging Face Trainer": lambda tree: (_get_path(tree, "trainer_state"),),
    "DeepSpeed": lambda tree: (_get_path(tree, "client"),),
}


def recognize(archive_format: str, tree: Tree) -> tuple[str | None, str, tuple[Any, ...]]:
    """Return the framework's name, the evidence for it, and the dictionaries of its counters, most reliable first.

    Args:
        archive_format: The archive's format.
        tree: The top level.

    Example:
        >>> recognize("torch zip", {"epoch": 3, "pytorch-lightning_version": "2.6.6"})[0]
        'Lightning'
    """
    if archive_format in _FORMATS:
        counters = _DIRECTORY_COUNTERS.get(archive_format, lambda _: ())(tree)
        return archive_format, _FORMATS[archive_format], (*counters, tree)
    for framework in _FRAMEWORKS:
        if framework.matches(tree):
            return framework.name, framework.evidence, (*framework.counters(tree), tree)
    return None, "", (tree,)


def find_counters(dictionaries: tuple[Any, ...]) -> Iterator[tuple[str, str, Any]]:
    """Yield what may be the step or the epoch as ``(kind, key, value)``, the likeliest first."""
    for kind, keys in (("step", _STEP_KEYS), ("epoch", _EPOCH_KEYS)):
        for dictionary in dictionaries:
            for key in keys:
                if isinstance(dictionary, dict) and key in dictionary:
                    yield kind, key, dictionary[key]
