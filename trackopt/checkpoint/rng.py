"""The random number generators of python, NumPy and torch, as plain values that any reader can load."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The state of every global generator; CUDA's once the training uses it."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        # NumPy's own objects are refused by `weights_only=True`
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put the global generators where ``capture`` found them; devices that are not here any more are passed over."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def capture_generators(loader: object) -> list[torch.Tensor]:
    """The states of the generators that a ``DataLoader`` and its samplers draw from, beside the global ones."""
    return [generator.get_state() for generator in _generators(loader)]


def restore_generators(loader: object, states: list[torch.Tensor]) -> None:
    """Put a loader's own generators where ``capture_generators`` found them."""
    for generator, state in zip(_generators(loader), states, strict=False):
        generator.set_state(state)


def _generators(loader: object) -> Iterator[torch.Generator]:
    seen: set[int] = set()
    for owner in _owners(loader):
        for value in vars(owner).values():
            if isinstance(value, torch.Generator) and id(value) not in seen:
                seen.add(id(value))
                yield value


def _owners(loader: object) -> Iterator[object]:
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if hasattr(owner, "__dict__"):
            yield owner
            if isinstance(inner := getattr(owner, "sampler", None), torch.utils.data.Sampler):
                yield inner
