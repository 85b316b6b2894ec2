"""CRC-32 fingerprints of the inputs and results of a step: weights, optimizer state, batches, random states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trackopt.archive.io.checksums import crc32
from trackopt.checkpoint.snapshot import state_of
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trackopt.training.objects import Training

_MAX_DEPTH = 8  # levels of containers and objects; a cycle must end


def fingerprint(value: Any, start: int = 0, depth: int = _MAX_DEPTH) -> int:
    """Compute the CRC-32 of a value's content: tensors, arrays, plain values, containers, attributes of objects.

    Args:
        value: Any value; if its content cannot be read, its class counts.
        start: The fingerprint of the preceding values.
        depth: The number of levels to descend.

    Example:
        >>> fingerprint({"x": torch.ones(2)}) == fingerprint({"x": torch.ones(2)})
        True
        >>> fingerprint([1.0, 2.0]) == fingerprint([2.0, 1.0])
        False
    """
    if isinstance(value, torch.Tensor):
        return int(crc32(_bytes(value), crc32(f"{value.dtype}{tuple(value.shape)}".encode(), start)))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return int(crc32(value.tobytes(), start))
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex, np.generic)):
        return int(crc32(repr(value).encode(errors="surrogatepass"), start))
    if isinstance(value, (list, tuple)) and all(type(part) is int for part in value):  # a generator's 624 numbers
        return int(crc32(repr(value).encode(), start))
    if isinstance(value, np.ndarray):
        value = value.tolist()
    crc = int(crc32(type(value).__qualname__.encode(), start))
    for part in _parts(value) if depth else ():
        crc = fingerprint(part, crc, depth - 1)
    return crc


def weights(training: Training) -> dict[str, int]:
    """Fingerprint every tensor of the models, and every other parameter that an optimizer updates."""
    models = training.models
    fingerprints: dict[str, int] = {}
    seen: set[int] = set()
    for model, module in models.items():
        seen |= {id(parameter) for parameter in module.parameters()}
        for name, tensor in module.state_dict().items():
            fingerprints[name if len(models) == 1 else f"{model}.{name}"] = fingerprint(tensor)
    for name, _, parameter in _parameters(training):
        if id(parameter) not in seen:
            fingerprints[name] = fingerprint(parameter)
    return fingerprints


def buffer_names(training: Training) -> set[str]:
    """Return the names that `weights` has for the buffers of the models."""
    models = training.models
    return {
        name if len(models) == 1 else f"{model}.{name}"
        for model, module in models.items()
        for name, _ in module.named_buffers()
    }


def optimizer_state(training: Training) -> dict[str, int]:
    """Fingerprint the optimizers' state of each parameter, by its name."""
    return {name: fingerprint(dict(state)) for name, state, _ in _parameters(training)}


def tracked_objects(training: Training) -> dict[str, int]:
    """Fingerprint the state of the objects that were handed to the run by keyword, entry by entry."""
    fingerprints: dict[str, int] = {}
    for name, stateful in training.stateful.items():
        try:
            state = state_of(stateful)
        except Exception:  # noqa: BLE001, S112 - the user's state_dict() may raise anything; saving it reports that
            continue
        if isinstance(state, Mapping) and not rng.is_generator(stateful):
            fingerprints |= {f"{name}.{key}": fingerprint(part) for key, part in state.items()}
        else:
            fingerprints[name] = fingerprint(state)
    return fingerprints


def learning_rates(training: Training) -> list[float]:
    """Return the current learning rate of every parameter group."""
    groups = [group for optimizer in training.optimizers.values() for group in optimizer.param_groups]
    return [float(group["lr"]) for group in groups if "lr" in group]


def global_rng() -> dict[str, int]:
    """Fingerprint the state of each global generator."""
    return {name: fingerprint(state) for name, state in rng.capture().items()}


def _parameters(training: Training) -> Iterable[tuple[str, Mapping[Any, Any], torch.Tensor]]:
    several = len(training.optimizers) > 1
    names = training.parameter_names()
    for key, optimizer in training.optimizers.items():
        for group, own in zip(optimizer.param_groups, names[key], strict=True):
            for parameter, name in zip(group["params"], own, strict=True):
                yield f"{key}.{name}" if several else name, optimizer.state.get(parameter, {}), parameter


def _bytes(tensor: torch.Tensor) -> Any:
    plain = tensor.detach().resolve_conj()
    if plain.is_quantized:
        plain = plain.int_repr()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return list(getattr(value, "__dict__", {}).values())
