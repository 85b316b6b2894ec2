"""The entry ``trackopt`` of a checkpoint: where the run stood, and which objects the states belong to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.training.objects import class_name, dtype_name, versions
from trackopt.training.sharding import inner_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from trackopt.training.objects import Training
    from trackopt.utils.types import JsonObject, StateDict

KEY = "trackopt"
FORMAT = 1
TYPES = "types"  # the table of `trackopt.checkpoint.encoding`
CLASSES = "classes"  # the names in the pickle that torch loads only because the training had allowed them
PARAMETER_KEYS = ("param_names", "param_shapes", "param_dtypes", "frozen")  # one value or more for each parameter
_TELEMETRY_KEYS = ("observers", "pending", "turns", "clipping")
T = TypeVar("T")


@dataclass(frozen=True)
class RankState:
    """The state of one rank that differs from rank 0's.

    Attributes:
        rng: Its global random generators.
        stateful: Its states of the user's objects, by keyword.
        position: Its position in the data.
        pending: Its logged metrics that no record holds yet.
        state: Its ``run.state``.
        own: Its values in models, optimizers and schedulers: ``values`` (paths and values), the paths that are
            ``missing`` here, and those that were ``skipped`` for their size.
    """

    rng: Mapping[str, Any]
    stateful: Mapping[str, Any]
    position: StateDict
    pending: Mapping[str, Any]
    state: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> RankState:
        """Read an element of ``ranks``."""
        return cls(entry["rng"], entry["stateful"], **entry["meta"], own=entry.get("own", {}))

    def as_dict(self) -> JsonObject:
        """Return an element of ``ranks``."""
        own = {"position": self.position, "pending": self.pending, "state": self.state}
        entry = {"rng": self.rng, "stateful": self.stateful, "meta": own}
        return entry | ({"own": self.own} if self.own else {})


@dataclass(frozen=True)
class RunProgress:
    """The position of a run.

    Attributes:
        run_id: The run's id.
        name: The run's name.
        step: Completed optimizer steps.
        epoch: The epoch that a resumed loop begins with.
        batch: Batches taken in the current pass over a loader.
        attempt: The number of this attempt.
        journal_offset: Bytes of the journal.
        position: The position in the data, as ``DataPosition.state_dict`` returns it.
        groups: For each optimizer the number of its parameter groups when the epoch began.
        scheduler_configs: For each scheduler the configuration that it was built with.
        optimizer_configs: For each optimizer the settings of its groups; older checkpoints have none.
        telemetry: The state of the telemetry, as ``MetricsCollector.state_dict`` returns it.
        ranks: The states of all ranks but rank 0.
        state: The user's ``run.state``.
        has_gradients: The checkpoint holds gradients, which count for the next step.
        keeps_gradients: Whether the loop keeps gradients after a step; ``None`` if that is not known yet.
        rng: The global random generators; ``None`` for those of the time when the checkpoint is taken.
        time: Unix time.
    """

    run_id: str = ""
    name: str = ""
    step: int = 0
    epoch: int = 0
    batch: int = 0
    attempt: int = 1
    journal_offset: int = 0
    position: StateDict = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    scheduler_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizer_configs: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[RankState] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    has_gradients: bool = False
    keeps_gradients: bool | None = None
    rng: Mapping[str, Any] | None = None
    time: float = field(default_factory=time.time)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return 1 + len(self.ranks)


@dataclass(frozen=True)
class TrainingLayout:
    """The objects that the states of a checkpoint belong to.

    Attributes:
        param_names: For each optimizer and parameter group the names of its parameters, in order.
        param_shapes: Their shapes.
        param_dtypes: Their dtypes.
        frozen: The names of the parameters without gradient.
        models: The names of the models.
        named: Those of the keys ``model``, ``optimizer`` and ``scheduler`` that hold a dict of objects by name.
        optimizer_class: For each optimizer its dotted class.
        scheduler_class: For each scheduler its dotted class.
        versions: The versions of trackopt, torch and python.
    """

    param_names: Mapping[str, list[list[str]]]
    param_shapes: Mapping[str, list[list[tuple[int, ...]]]]
    param_dtypes: Mapping[str, list[list[str]]]
    frozen: Sequence[str]
    models: Sequence[str]
    named: Sequence[str]
    optimizer_class: Mapping[str, str]
    scheduler_class: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, training: Training) -> TrainingLayout:
        """Describe live objects."""
        named = training.named_parameters()
        return cls(
            param_names=training.parameter_names(named),
            param_shapes=_map_parameters(training, lambda parameter: tuple(parameter.shape)),
            param_dtypes=_map_parameters(training, lambda parameter: dtype_name(parameter.dtype)),
            frozen=[name for name, parameter in named.items() if not parameter.requires_grad],
            models=list(training.models),
            named=[
                role for role in ("model", "optimizer", "scheduler") if isinstance(getattr(training, role), Mapping)
            ],
            optimizer_class={key: class_name(inner_optimizer(value)) for key, value in training.optimizers.items()},
            scheduler_class={key: class_name(value) for key, value in training.schedulers.items()},
            versions=versions(),
        )

    @property
    def is_plain(self) -> bool:
        """True if the names are plain texts, and so are saved as they are."""
        names = chain.from_iterable(chain.from_iterable(self.param_names.values()))
        return set(map(type, chain(names, self.frozen, self.param_names))) == {str}


@dataclass(frozen=True)
class CheckpointMeta:
    """The entry ``trackopt`` of a checkpoint.

    Its retention marks stand beside these keys; `trackopt.checkpoint.retention` reads and writes them.
    """

    progress: RunProgress
    layout: TrainingLayout

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CheckpointMeta:
        """Read the entry."""
        keys = ("run_id", "name", "step", "epoch", "batch", "attempt", "journal_offset", "position", "groups", "time")
        progress = RunProgress(
            **{key: entry[key] for key in keys},
            scheduler_configs=entry["settings"],
            optimizer_configs=entry.get("optimizer_settings", {}),
            telemetry={key: entry[key] for key in _TELEMETRY_KEYS if key in entry},
            ranks=[RankState.from_dict(rank) for rank in entry.get("ranks", ())],
            state=entry.get("state", {}),
            keeps_gradients=entry.get("keeps_gradients"),
        )
        return cls(progress, TrainingLayout(**{key: entry[key] for key in TrainingLayout.__dataclass_fields__}))

    def as_dict(self) -> JsonObject:
        """Return the entry; its containers are the live ones."""
        progress = self.progress
        entry = {
            "format": FORMAT,
            "time": progress.time,
            **vars(self.layout),
            "run_id": progress.run_id,
            "name": progress.name,
            "step": progress.step,
            "epoch": progress.epoch,
            "batch": progress.batch,
            "attempt": progress.attempt,
            "journal_offset": progress.journal_offset,
            "position": progress.position,
            "groups": progress.groups,
            "settings": progress.scheduler_configs,
            "optimizer_settings": progress.optimizer_configs,
            "state": progress.state,
            "keeps_gradients": progress.keeps_gradients,
            **progress.telemetry,
        }
        if progress.ranks:
            entry |= {"world": progress.world_size, "ranks": [rank.as_dict() for rank in progress.ranks]}
        return entry

    def of_rank(
        self, position: StateDict, pending: Mapping[str, Any], state: Mapping[str, Any] | None = None
    ) -> CheckpointMeta:
        """Replace what differs between ranks."""
        progress = self.progress
        telemetry, state = {**progress.telemetry, "pending": pending}, progress.state if state is None else state
        return replace(self, progress=replace(progress, position=position, telemetry=telemetry, state=state))


def _map_parameters(training: Training, function: Callable[[nn.Parameter], T]) -> dict[str, list[list[T]]]:
    return {
        key: [[function(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        for key, optimizer in training.optimizers.items()
    }
