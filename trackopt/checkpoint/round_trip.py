"""Check after an optimizer's first step that its own ``load_state_dict`` restores what its ``state_dict`` returns."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.checkpoint.optimizer_copy import STATE_HOOKS, STEP_HOOKS, copy_optimizer, is_copyable
from trackopt.checkpoint.optimizer_state import load_optimizer_state
from trackopt.training import rng
from trackopt.training.nested import walk
from trackopt.training.sharding import is_sharded
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    from trackopt.training.objects import Training

    _Pairs = list[tuple[Optimizer, Optimizer]]

_MAX_BYTES = 256 << 20  # of the parameters and the state of one optimizer, which are copied
_NUMBERS = (int, float, complex)
_PLAIN = (type(None), *_NUMBERS, str, bytes, Tensor)
_SEQUENCES = (list, tuple, deque)
_NO_ATTRIBUTES_OF_ITS_OWN = frozenset({"state", "param_groups", "defaults", *STEP_HOOKS, *STATE_HOOKS})


class RoundTripCheck:
    """Loads the state of each optimizer into a copy that has not made the first step, and compares the two.

    A hook makes the copy right before the first step. Neither the optimizer nor a random generator is changed, and no
    error is raised. Torch's own optimizers are not checked, nor are sharded and large ones.

    Args:
        training: The live objects.
    """

    def __init__(self, training: Training) -> None:
        optimizers = [] if is_sharded(training) else list(training.optimizers.values())
        self._pending = {id(each): each for each in optimizers if not _is_torch_class(each)}
        self._copies: dict[int, _Pairs] = {}
        self._models = training.models
        untraced: Callable[..., Any] = torch.compiler.disable  # Dynamo must not trace the hook of a compiled step
        hook = untraced(self._before_step)
        self._handles = [each.register_step_pre_hook(hook) for each in self._pending.values()]

    @property
    def has_stepped(self) -> bool:
        """True if an optimizer has made its first step since the last call of ``run``."""
        return bool(self._copies)

    def run(self) -> list[str]:
        """Check the optimizers that have made their first step since the last call; return a line for each fault."""
        if not self._copies:
            return []
        copies, self._copies = self._copies, {}
        lines = [_isolated(_find_fault, pairs) for pairs in copies.values() if pairs]
        for key in copies:
            del self._pending[key]
        if not self._pending:
            self.close()
        return [line for line in lines if line]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - torch's signature
        if id(optimizer) in self._pending and id(optimizer) not in self._copies:
            self._copies[id(optimizer)] = _isolated(self._copy, optimizer) or []

    def _copy(self, optimizer: Optimizer) -> _Pairs:
        if _nbytes(optimizer) > _MAX_BYTES or not is_copyable(optimizer):
            return []
        return copy_optimizer(optimizer, [part for model in self._models.values() for part in model.modules()])


def _is_torch_class(optimizer: Optimizer) -> bool:
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def _nbytes(optimizer: Optimizer) -> int:
    return sum(part.numel() * part.element_size() for part in walk(optimizer) if isinstance(part, Tensor))


def _isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function without an effect on random generators or warnings; return ``None`` if it fails."""
    generators = rng.capture()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments)
    except Exception:  # noqa: BLE001 - code of the optimizer's, which may not be made for copies
        return None
    finally:
        rng.restore(generators)


def _find_fault(pairs: _Pairs) -> str:
    """Load the state of an optimizer into its copy of before the step; return a line if that does not restore it."""
    optimizer, copied = pairs[0]
    if _nbytes(optimizer) > _MAX_BYTES:
        return ""
    name, states = type(optimizer).__name__, [live.state_dict() for live, _ in pairs]
    attributes = list(_changed_attributes(pairs))
    try:
        load_optimizer_state(copied, copy.deepcopy(states[0]))
        restored = [part.state_dict() for _, part in pairs]
    except Exception as error:  # noqa: BLE001 - any code of the optimizer's
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name} cannot load its own state_dict() ({reason}); a run cannot be resumed from its checkpoints"
    lost = {entry for state, other in zip(states, restored, strict=True) for entry in _differences(state, other)}
    named = {entry.partition(".")[0] for entry in lost}
    lost |= {key for now, then, key in attributes if key not in named and _differs(now[key], then.get(key))}
    if not lost:
        return ""
    return f"state_dict() of {name} does not restore {join_names(map(repr, lost))}; a resumed run may differ"


def _changed_attributes(pairs: _Pairs) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Yield the attributes that the step has changed: those of the optimizer, those of the copy, and the name.

    Caches are not among them: they are empty or missing before the first step.
    """
    known = _memory(*([live.param_groups, getattr(live, "state", None)] for live, _ in pairs))
    for live, copied in pairs:
        for key, now in vars(live).items():
            then = vars(copied).get(key, getattr(type(live), key, None))
            is_own = key not in _NO_ATTRIBUTES_OF_ITS_OWN and known.isdisjoint(_memory(now))
            if is_own and _is_same_kind(now, then) and _differs(now, then):
                yield vars(live), vars(copied), key


def _memory(*values: Any) -> set[int]:
    """Return the addresses of the memory of the tensors in some values."""
    tensors = [part for part in walk(values) if isinstance(part, Tensor) and part.layout is torch.strided]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _is_same_kind(now: Any, then: Any) -> bool:
    """Return whether both are numbers, texts, tensors, generators, or containers that are not empty; a flag is none."""
    if isinstance(now, bool) or isinstance(then, bool):
        return False
    if isinstance(now, (dict, *_SEQUENCES)):
        return type(now) is type(then) and bool(now) and bool(then)
    if rng.is_generator(now):
        return rng.is_generator(then)
    return any(isinstance(now, kind) and isinstance(then, kind) for kind in (_NUMBERS, str, Tensor))


def _differs(saved: Any, restored: Any) -> bool:
    return next(_differences(saved, restored), None) is not None


def _differences(saved: Any, restored: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names of what is missing or different in a restored state."""
    if rng.is_generator(saved) and rng.is_generator(restored):
        saved, restored = rng.state_of(saved), rng.state_of(restored)
    if isinstance(saved, dict) and isinstance(restored, dict):
        for key, value in saved.items():
            below = (*path, key) if isinstance(key, str) else path  # all parameters have the same entries
            if isinstance(key, Tensor):
                continue
            if key in restored or (isinstance(value, dict) and value):
                yield from _differences(value, restored.get(key, {}), below)
            else:
                yield _entry_name(below)
    elif isinstance(saved, _SEQUENCES) and isinstance(restored, _SEQUENCES) and len(saved) == len(restored):
        for value, other in zip(saved, restored, strict=True):
            yield from _differences(value, other, path)
    elif not _is_same_value(saved, restored):
        yield _entry_name(path)


def _entry_name(path: tuple[str, ...]) -> str:
    return ".".join(path[1:] if path[:1] in (("state",), ("param_groups",)) and path[1:] else path) or "its entries"


def _is_same_value(saved: Any, restored: Any) -> bool:
    """Return whether two leaves are the same, bit for bit; objects of other classes are not compared."""
    if isinstance(saved, Tensor) and isinstance(restored, Tensor):
        return (saved.shape, saved.dtype) == (restored.shape, restored.dtype) and torch.equal(
            _as_bytes(saved), _as_bytes(restored).to(saved.device)
        )
    if not isinstance(saved, (*_PLAIN, dict, *_SEQUENCES)):
        return True
    both_nan = isinstance(saved, _NUMBERS) and saved != saved and restored != restored
    return type(saved) is type(restored) and (both_nan or bool(saved == restored))


def _as_bytes(tensor: Tensor) -> Tensor:
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.contiguous().reshape(-1).view(torch.uint8)
