"""What each rank saves of its own: the state in which it differs from rank 0.

A checkpoint holds the models, optimizers and schedulers of rank 0. On other ranks they are the same, unless a script
gives each rank its own learning rate or loss, or leaves parameters or buffers without synchronization. Each save
compares them by checksum, and saves for each rank what differs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trackopt.checkpoint.checksums import checksum_of_state, checksums, nbytes, summarize
from trackopt.checkpoint.meta import KEY, CheckpointMeta, RankState
from trackopt.checkpoint.resharding import decode_key
from trackopt.checkpoint.snapshot import object_states, state_of
from trackopt.errors import UsageError
from trackopt.training import rng
from trackopt.training.sharding import contains_dtensor, is_zero
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from trackopt.distributed.collectives import Collectives
    from trackopt.training.objects import Training
    from trackopt.utils.types import CheckpointTree, StateDict

    Path = tuple[Any, ...]

_MAX_TENSOR_BYTES = 256 << 20  # of all ranks together, as each rank receives them

logger = logging.getLogger("trackopt")


class RankStates:
    """Gathers, at each save, the states of all ranks but rank 0 that differ from rank 0's.

    The first save compares every element. Later ones compare samples of large tensors, and take what has differed once
    for different.

    Args:
        collectives: The ranks.
        training: The live objects.
    """

    def __init__(self, collectives: Collectives, training: Training) -> None:
        self._collectives = collectives
        self._training = training
        self._different: set[Path] = set()  # where this rank has differed from rank 0
        self._is_first = True
        self._reported = False

    def gather(
        self, position: StateDict, telemetry: Mapping[str, Any], user_state: Mapping[str, Any]
    ) -> Sequence[RankState]:
        """Return the states; all ranks must make the same call."""
        stateful = self._states_of_objects()
        object_sums = {name: checksum_of_state(state) for name, state in stateful.items()}
        values, sums = self._values_with_checksums()
        mine = (object_sums, summarize(sums), bool(self._different))
        ranks = self._collectives.all_gather_object(mine)
        expected = ranks[0][0]
        differ = any(summary != ranks[0][1] or known for _, summary, known in ranks)
        state = RankState(
            rng.capture(),
            {name: value for name, value in stateful.items() if object_sums[name] != expected.get(name)},
            position,
            telemetry["pending"],
            user_state,
            self._own_values(values, sums) if differ else {},
        )
        return self._collectives.all_gather_object(state)[1:]

    def _states_of_objects(self) -> dict[str, Any]:
        """Return the states of the user's objects, but not of modules, which are compared tensor by tensor."""
        states = {
            name: _state_or_error(value)
            for name, value in self._training.stateful.items()
            if not isinstance(value, nn.Module)
        }
        return {name: _to_cpu(state) for name, state in states.items() if not contains_dtensor(state)}

    def _values_with_checksums(self) -> tuple[dict[Path, Any], dict[Path, bytes]]:
        """Return the values in the other states by path; none if a state cannot be read, which its save reports."""
        complete, self._is_first = self._is_first, False
        try:
            values = self._values()
            return values, checksums(values, complete=complete)
        except Exception:  # noqa: BLE001 - the user's code; the other ranks wait for this one
            return {}, {}

    def _values(self) -> dict[Path, Any]:
        """Return the values in the other states by path, without those that several ranks hold together."""
        states = object_states(self._training)
        for name, value in self._training.stateful.items():
            if isinstance(value, nn.Module):
                states[name] = value.state_dict()
        excluded = {*_broadcast_buffers(self._training), *_zero_states(self._training)}
        return {path: value for path, value in _flatten(states, excluded) if not contains_dtensor(value)}

    def _own_values(self, values: dict[Path, Any], sums: dict[Path, bytes]) -> StateDict:
        """Return this rank's values that differ from rank 0's, and the paths that only rank 0 has."""
        expected = self._collectives.broadcast(sums)
        own: dict[Path, Any] = {}
        missing: list[list[Any]] = []
        if expected and values and not self._collectives.is_rank_zero:
            self._different |= {path for path, own_sum in sums.items() if own_sum != expected.get(path)}
            own = {path: value for path, value in values.items() if path in self._different}
            missing = [list(path) for path in expected if path not in sums]
        skipped = self._report_trained(own)
        if skipped:  # its state of a parameter may be among them
            missing = []
        saved = [[list(path), _copy(value)] for path, value in own.items() if path not in skipped]
        state = {"values": saved, "missing": missing, "skipped": [list(path) for path in skipped]}
        return {key: value for key, value in state.items() if value}

    def _report_trained(self, own: Mapping[Path, Any]) -> set[Path]:
        """Report parameters and optimizer tensors that differ; return those that are too large to be saved."""
        buffers = _buffers(self._training)
        trained = [path for path, value in own.items() if isinstance(value, Tensor) and path not in buffers]
        size = sum(nbytes(own[path]) for path in trained)
        ranks = self._collectives.all_gather_object((size, trained[:2], len(trained)))
        fits = sum(size for size, *_ in ranks) <= _MAX_TENSOR_BYTES
        self._report(ranks, fits=fits)
        return set() if fits else set(trained)

    def _report(self, ranks: Sequence[tuple[int, Sequence[Path], int]], *, fits: bool) -> None:
        """Log once that trained tensors differ between the ranks, and what a resume makes of it."""
        first = next((rank for rank, (*_, count) in enumerate(ranks) if count), None)
        if first is None or self._reported:
            return
        self._reported = True
        size, names, count = ranks[first]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        what = f"rank {first} differs from rank 0 in {join_names('.'.join(map(str, path)) for path in names)}{more}"
        if fits:
            logger.warning(
                "trackopt: %s; each rank's own values are saved and resumed, all other readers get rank 0's. If the "
                "ranks train one model, synchronize it (DistributedDataParallel) and give them the same settings",
                what,
            )
        else:
            logger.warning(
                "trackopt: %s (%.0f MB), which is too large to be saved for each rank: a resumed run continues with "
                "rank 0's values on all ranks; synchronize the model (DistributedDataParallel), or save it yourself",
                what,
                size / 1e6,
            )


def select_rank_state(tree: CheckpointTree, training: Training, collectives: Collectives) -> CheckpointTree:
    """Return the tree of a checkpoint as this rank restores it; the given tree is changed.

    A rank that did not exist when the checkpoint was saved keeps the generators that the script gave it.
    """
    if collectives.is_rank_zero:
        return tree
    meta = CheckpointMeta.from_dict(tree[KEY])
    progress = meta.progress
    if collectives.rank < progress.world_size:
        own = progress.ranks[collectives.rank - 1]
        _merge(tree, own.own)
        meta = meta.of_rank(own.position, own.pending, own.state)
        return {**tree, **own.stateful, "rng": own.rng, KEY: meta.as_dict()}
    here = {"rng": rng.capture(), "handed": {}, "own": {"generators": []}}
    position = {key: here if key.endswith("_start") and value else value for key, value in progress.position.items()}
    generators = {name: rng.state_of(value) for name, value in training.stateful.items() if rng.is_generator(value)}
    meta = meta.of_rank({**position, "own": {}}, progress.telemetry["pending"])
    return {**tree, **generators, "rng": here["rng"], KEY: meta.as_dict()}


def remove_paths(tree: CheckpointTree, paths: Sequence[Sequence[Any]]) -> CheckpointTree:
    """Return a tree without the values at some paths; containers on the way are copied."""
    removed = {tuple(path) for path in paths}

    def without(value: Any, path: Path) -> Any:
        if not isinstance(value, dict) or not any(each[: len(path)] == path for each in removed):
            return value
        return {key: without(child, (*path, key)) for key, child in value.items() if (*path, key) not in removed}

    return without(tree, ()) if removed else tree


def _merge(tree: CheckpointTree, own: Mapping[str, Any]) -> None:
    """Put a rank's own values in the place of rank 0's."""
    for path in own.get("missing", ()):
        _remove(tree, list(map(decode_key, path)))
    for path, value in own.get("values", ()):
        *outer, last = map(decode_key, path)
        container: Any = tree
        for key in outer:
            container = container.setdefault(key, {})
        container[last] = value


def _remove(tree: Any, path: Sequence[Any]) -> None:
    """Remove the value at a path, and the dicts that are empty without it: a parameter may have no state at all."""
    key, *rest = path
    if rest and key in tree:
        _remove(tree[key], rest)
    if not rest or tree.get(key) == {}:
        tree.pop(key, None)


def _flatten(value: Any, excluded: Collection[Path], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield what is not a dict, and its path."""
    if path in excluded:
        return
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _flatten(child, excluded, (*path, key))
    else:
        yield path, value


def _model_path(training: Training, name: str) -> Path:
    return ("model", name) if isinstance(training.model, Mapping) else ("model",)


def _buffers(training: Training) -> set[Path]:
    """Return the paths of all buffers."""
    modules = {name: value for name, value in training.stateful.items() if isinstance(value, nn.Module)}
    paths = {(role, name) for role, module in modules.items() for name, _ in module.named_buffers()}
    for model, module in training.models.items():
        paths |= {(*_model_path(training, model), name) for name, _ in module.named_buffers()}
    return paths


def _broadcast_buffers(training: Training) -> Iterator[Path]:
    """Yield the paths of the buffers that DDP replaces by rank 0's at the next forward pass."""
    for name, ddp in training.ddp.items():
        if ddp.will_sync_module_buffers():  # type: ignore[no-untyped-call]  # torch leaves it so
            yield from ((*_model_path(training, name), buffer) for buffer, _ in ddp.module.named_buffers())


def _zero_states(training: Training) -> Iterator[Path]:
    """Yield the paths of states of which each rank keeps a part by design."""
    for name, optimizer in training.optimizers.items():
        if is_zero(optimizer):
            yield ("optimizer", name, "state") if isinstance(training.optimizer, Mapping) else ("optimizer", "state")


def _state_or_error(value: Any) -> Any:
    """Return an object's state; an error in place of it, which the save reports, so that no other rank waits."""
    try:
        return state_of(value)
    except Exception as error:  # noqa: BLE001 - the user's code
        return UsageError(str(error))


def _copy(value: Any) -> Any:
    """Return a value with its tensors on the CPU, without the memory that they share with others."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), value)


def _to_cpu(state: Any) -> Any:
    return tree_map_only(Tensor, Tensor.cpu, state)
