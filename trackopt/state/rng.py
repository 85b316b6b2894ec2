"""List the random generators whose states a checkpoint holds, with one name for each in all frameworks."""

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
_NOT_GENERATORS = frozenset({"step"})
_IGNITE_KEY = "rng_states"
_IGNITE_ORDER = ("python", "torch", "numpy")  # of the list under that key in the state of a DeterministicEngine


def is_rng_key(key: str) -> bool:
    """Return True if an entry of this key holds states of random generators."""
    return any(word in key.lower() for word in _WORDS)


def list_engine_generators(engine: Any) -> list[str]:
    """Return the generators whose states the state of ignite's engine holds.

    Example:
        >>> list_engine_generators({"iteration": 4, "rng_states": [(3, (), None), b""]})
        ['python', 'torch']
    """
    states = engine.get(_IGNITE_KEY) if isinstance(engine, dict) else None
    return list(_IGNITE_ORDER[: len(states)]) if isinstance(states, list | tuple) else []


def list_generators(key: str, node: Any) -> list[str]:
    """Return the generators whose states an entry holds; for several processes those of the first."""
    if isinstance(node, list | tuple) and node and isinstance(node[0], dict):
        node = node[0]
    if isinstance(node, dict):
        return [_NAMES.get(str(part), str(part)) for part in node if part not in _NOT_GENERATORS]
    return [key]
