"""The random number generators of python, NumPy and torch, as plain values that any reader can load."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def capture() -> dict[str, Any]:
    """The state of every global generator; CUDA's once the training uses it."""
    numpy = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": random.getstate(),
        # NumPy's own objects are refused by `weights_only=True`
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it so
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put the global generators where ``capture`` found them; devices that are not here any more are passed over."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state((numpy["bit_generator"], key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
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
