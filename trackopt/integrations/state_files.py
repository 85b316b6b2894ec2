"""The state of an integration in files of its own, so that checkpoints load with and without trackopt.

A file may be older than the checkpoint that it is found with, as when the tracker was removed for a while; therefore it
holds a fingerprint of the parameters that it was saved with.
"""

from __future__ import annotations

import hashlib
import io
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.errors import RunError
from trackopt.training.sharding import has_sharded_parameters
from trackopt.utils.files import atomic_write
from trackopt.utils.text import describe_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trackopt.training.objects import Training
    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")

_VALUES = 16  # of each parameter; any step of an optimizer changes some


def fingerprint(training: Training) -> str:
    """Return a digest of the parameters that the optimizers train, of some values of each; empty if they are sharded.

    The ranks that share sharded parameters must take a file or leave it together.
    """
    if has_sharded_parameters(training):
        return ""
    digest = hashlib.sha256()
    for optimizer in training.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                digest.update(_some_values(parameter))
    return digest.hexdigest()


def count_steps(training: Training) -> int | None:
    """Return the number of steps that the optimizers themselves have counted, as Adam does; ``None`` if none has."""
    counts = [
        int(entry["step"])
        for optimizer in training.optimizers.values()
        for entry in optimizer.state.values()
        if isinstance(entry, dict) and _is_count(entry.get("step"))
    ]
    return max(counts, default=None)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state; a failure is logged, as it does not affect the checkpoint."""
    stream = io.BytesIO()
    torch.save(dict(state), stream)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, stream.getvalue())
    except (OSError, RunError) as error:
        logger.warning("trackopt: the state beside the checkpoint is not saved (%s)", describe_error(error))


def load(path: Path) -> StateDict | None:
    """Read a state; ``None`` where there is none, or one that cannot be read."""
    if not path.is_file():
        return None
    try:
        state: StateDict = torch.load(path, weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many; training continues without it
        logger.warning(
            "trackopt: %s: cannot be read, so the run continues without it (%s)", path, describe_error(error)
        )
        return None
    return state


def _some_values(parameter: Tensor) -> bytes:
    flat = parameter.detach().flatten()
    stride = max(1, flat.numel() // _VALUES)
    return bytes(flat[::stride][: 2 * _VALUES].to("cpu", torch.float64).numpy().tobytes())


def _is_count(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.numel() == 1) or (
        isinstance(value, int) and not isinstance(value, bool)
    )
