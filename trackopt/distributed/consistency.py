"""Whether every rank runs the same training: a difference is told before it lets one of them wait for the others."""

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
        collectives: This process among those of the training.
        training: Its objects.
        scheduler_configs: The settings of its schedulers.
        options: The options of ``wrap`` that decide what the loop does.

    Raises:
        RunError: On every rank, the first difference that there is.
    """
    found = collectives.all_gather_object(
        _fingerprints(training, scheduler_configs, options) if collectives.world_size > 1 else {}
    )
    collectives.run_on_all(lambda: _compare(found))


def _compare(found: list[_Fingerprints]) -> None:
    first = found[0]
    for rank, other in enumerate(found):
        for what in first:
            if other[what] != first[what]:
                here, there = first[what][0], other[what][0]
                how = "in its insides" if here == there else f"{there}, and not {here}"
                raise RunError(
                    f"rank {rank} differs from rank 0 in its {what} ({how}); "
                    "start the same script with the same arguments on every rank"
                )


def _fingerprints(
    training: Training, scheduler_configs: Mapping[str, Any], options: Sequence[DataclassInstance]
) -> _Fingerprints:
    """What must be the same, in a word that a reader understands and as a checksum of all of it."""
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
        **{name: _fingerprint(str(value)) for each in options for name, value in vars(each).items()},
    }


def _fingerprint(word: str, *rest: Any) -> tuple[str, int]:
    return word, crc32(repr((word, *rest)).encode())


def _short_class_name(thing: object) -> str:
    return class_name(thing).rpartition(".")[2]
