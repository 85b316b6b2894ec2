"""Which random generators' states a checkpoint holds, under one name each whoever wrote them."""

from __future__ import annotations

from typing import Any

_WORDS = ("rng", "random_state")
_NAMES = {
    "random_state": "python",
    "numpy_random_seed": "numpy",
    "torch_manual_seed": "torch",
    "torch_cuda_manual_seed": "cuda",
    "cpu": "torch",
}
_NO_GENERATORS = frozenset({"step"})


def is_rng_key(key: str) -> bool:
    """Whether an entry holds states of random generators, by its key."""
    return any(word in key.lower() for word in _WORDS)


def generators(key: str, node: Any) -> list[str]:
    """The generators whose states an entry holds; of several processes those of the first."""
    if isinstance(node, list | tuple) and node and isinstance(node[0], dict):
        node = node[0]
    if isinstance(node, dict):
        return [_NAMES.get(str(part), str(part)) for part in node if part not in _NO_GENERATORS]
    return [key]
