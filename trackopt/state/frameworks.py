"""Which framework wrote a checkpoint, and where that one keeps what a trainer looks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Containers that only one program writes, by the archive's format, and the file that gives each away.
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


@dataclass(frozen=True)
class Framework:
    """A framework, by the keys at the top of its checkpoints.

    Attributes:
        name: As its users say it.
        evidence: The keys that give it away.
        fits: Told the tree, whether it wrote that.
        progress: Dictionaries that say the step and the epoch, besides the top.
    """

    name: str
    evidence: str
    fits: Callable[[dict[str, Any]], bool]
    progress: Callable[[dict[str, Any]], tuple[Any, ...]] = lambda _: ()


def _by_keys(name: str, *keys: str) -> Framework:
    evidence = f"its key{'s' if len(keys) > 1 else ''} {', '.join(keys)}"
    return Framework(name, evidence, lambda tree: all(key in tree for key in keys))


def _in(tree: Any, *path: str) -> Any:
    """What stands at a path through dictionaries, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _holds(tree: Any, key: str) -> bool:
    return isinstance(tree, dict) and key in tree


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else None


def _engines(tree: dict[str, Any]) -> tuple[Any, ...]:
    """States of ignite's engines, with the epoch that the iteration is in the middle or at the end of."""
    engines = []
    for node in tree.values():
        length = _in(node, "epoch_length")
        if _holds(node, "max_epochs") and isinstance(length, int) and length > 0:
            done = _in(node, "iteration")
            engines.append({"epoch": done // length, **node} if isinstance(done, int) else node)
    return tuple(engines)


def _timestamp(tree: dict[str, Any]) -> tuple[Any, ...]:
    """Composer's clock: its batches are optimizer steps."""
    found = _in(tree, "state", "timestamp")
    found = _in(found, "Timestamp") if _holds(found, "Timestamp") else found
    return ({"step": _in(found, "batch"), "epoch": _in(found, "epoch")},)


_FRAMEWORKS = (
    _by_keys("Lightning", "pytorch-lightning_version"),
    Framework("Composer", "its key state.timestamp", lambda tree: _holds(_in(tree, "state"), "timestamp"), _timestamp),
    Framework(
        "MMEngine",
        "its keys message_hub or meta.mmengine_version",
        lambda tree: "message_hub" in tree or _holds(_in(tree, "meta"), "mmengine_version"),
        lambda tree: (_in(tree, "meta"),),
    ),
    Framework(
        "fairseq",
        "its keys optimizer_history or last_optimizer_state",
        lambda tree: "optimizer_history" in tree or "last_optimizer_state" in tree,
        lambda tree: (_last(_in(tree, "optimizer_history")), _in(tree, "extra_state", "train_iterator")),
    ),
    _by_keys("Ultralytics", "train_args", "ema"),
    _by_keys("timm", "arch", "state_dict", "args"),
    _by_keys("torchvision", "model", "optimizer", "lr_scheduler", "epoch", "args"),
    Framework("ignite", "its engine's keys epoch_length, max_epochs", lambda tree: bool(_engines(tree)), _engines),
)
_DIRECTORIES = {
    "Hugging Face Trainer": lambda tree: (_in(tree, "trainer_state"),),
    "DeepSpeed": lambda tree: (_in(tree, "client"),),
}


def recognize(form: str, tree: dict[str, Any]) -> tuple[str | None, str, tuple[Any, ...]]:
    """The framework's name, what it was told from, and the dictionaries in which it counts, first ones first.

    Args:
        form: The archive's format.
        tree: What stands at the top.

    Example:
        >>> recognize("torch zip", {"epoch": 3, "pytorch-lightning_version": "2.6.6"})[0]
        'Lightning'
    """
    if form in _FORMATS:
        return form, _FORMATS[form], (*_DIRECTORIES.get(form, lambda _: ())(tree), tree)
    for one in _FRAMEWORKS:
        if one.fits(tree):
            return one.name, one.evidence, (*one.progress(tree), tree)
    return None, "", (tree,)


def counters(places: tuple[Any, ...]) -> Iterator[tuple[str, str, Any]]:
    """What may say the step or the epoch: ``(which, key, value)``, the likeliest first."""
    for which, keys in (("step", _STEP_KEYS), ("epoch", _EPOCH_KEYS)):
        for place in places:
            for key in keys:
                if isinstance(place, dict) and key in place:
                    yield which, key, place[key]
