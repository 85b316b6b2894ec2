"""Check that all ranks run the same training, before a difference makes one of them wait for the others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from trackopt.errors import RunError
from trackopt.training.objects import class_name, versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from _typeshed import DataclassInstance

    from trackopt.distributed.collectives import Collectives
    from trackopt.training.objects import Training

    _Fingerprints = dict[str, tuple[str, int]]


def check_consistency(
    collectives: Collectives,
    training: Training,
    scheduler_configs: Mapping[str, Any],
    options: Sequence[DataclassInstance],
) -> None:
    """Refuse ranks that differ in their script, their objects or their arguments.

    Args:
        collectives: The processes of the training.
        training: The live objects.
        scheduler_configs: The configurations of the schedulers.
        options: The options of ``wrap`` that change the loop.

    Raises:
        RunError: On every rank, for the first difference.
    """
    fingerprints = collectives.all_gather_object(
        _fingerprints(training, scheduler_configs, options) if collectives.world_size > 1 else {}
    )
    collectives.run_on_all(lambda: _compare(fingerprints))


def _compare(fingerprints: list[_Fingerprints]) -> None:
    expected = fingerprints[0]
    for rank, actual in enumerate(fingerprints):
        for key in expected:
            if actual[key] != expected[key]:
                own, first = actual[key][0], expected[key][0]
                how = "in its details" if own == first else f"{own} instead of {first}"
                raise RunError(
                    f"rank {rank} differs from rank 0 in its {key} ({how}); "
                    "start the same script with the same arguments on every rank"
                )


def _fingerprints(
    training: Training, scheduler_configs: Mapping[str, Any], options: Sequence[DataclassInstance]
) -> _Fingerprints:
    """Return what must be equal on all ranks: for each key a readable text and a checksum of the complete value."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    models = {name: [(key, tuple(p.shape)) for key, p in m.named_parameters()] for name, m in training.models.items()}
    names, optimizers, schedulers = training.parameter_names(), training.optimizers, training.schedulers
    return {
        "script": (script.name, crc32(script.read_bytes() if script.is_file() else b"")),
        "versions": _fingerprint(", ".join(versions().values())),
        "model": _fingerprint(", ".join(map(_short_class_name, training.models.values())), models),
        "optimizer": _fingerprint(", ".join(map(_short_class_name, optimizers.values())), names),
        "scheduler": _fingerprint(", ".join(map(_short_class_name, schedulers.values())), scheduler_configs),
        "objects": _fingerprint(", ".join(training.stateful)),
        **{name: _fingerprint(str(value)) for group in options for name, value in vars(group).items()},
    }


def _fingerprint(text: str, *details: Any) -> tuple[str, int]:
    return text, crc32(repr((text, *details)).encode())


def _short_class_name(value: object) -> str:
    return class_name(value).rpartition(".")[2]
