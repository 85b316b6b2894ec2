"""The observer: two step hooks on a live optimizer that write down what each step used and left behind."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from trackopt.observe.hyperparameters import label, numeric
from trackopt.observe.statistics import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
# Every `step` of every optimizer runs inside this one function: it is how a nested call is recognised.
_STEP = Optimizer.profile_hook_step(lambda *_: None).__code__


class Observer:
    """Watches one optimizer. What the latest step did waits in it until ``take`` asks for it.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; it is neither replaced nor patched.
        prefix: Put before the names of the groups (``"gen."`` where there are several optimizers).
        stats: ``"group"`` for statistics of the gradients and buffers of each parameter group, ``None`` for none.
        stats_every: Take them at steps 1, 1 + n, 1 + 2n, …
        before_first: Called when the optimizer is about to take its very first step.

    Attributes:
        steps: Completed steps. One that a ``GradScaler`` skipped is none.
        evaluations: Calls of the closures that ``step`` was given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        prefix: str = "",
        stats: str | None = "group",
        stats_every: int = 1,
        before_first: Callable[[], None] = lambda: None,
    ):
        self.optimizer = optimizer
        self.steps = self.evaluations = 0
        self._before_first = before_first
        self._overflowed = False
        self._prefix = prefix
        self._stats = stats
        self._every = stats_every
        self._seen = {name: numeric(group) for name, group in self._groups()}
        self._used: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        untraced: Callable[[T], T] = torch.compiler.disable
        # Dynamo must not trace the hooks of a compiled step: they read Python state that changes at every step.
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._before)),
            optimizer.register_step_post_hook(untraced(self._after)),
        ]

    def take(self) -> dict[str, float]:
        """The metrics of the latest step since the last call, by metric name; empty when there was none."""
        latest, self._latest = self._latest, {}
        return latest

    def take_overflow(self) -> bool:
        """Whether a step was skipped because of an overflow since the last call."""
        overflowed, self._overflowed = self._overflowed, False
        return overflowed

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on observing as if it had never stopped."""
        return {"steps": self.steps, "evaluations": self.evaluations, "hyperparameters": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.steps, self.evaluations, self._seen = state["steps"], state["evaluations"], state["hyperparameters"]

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, group in enumerate(self.optimizer.param_groups):
            yield label(index, group, self._prefix), group

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Read the hyperparameters while they are the ones that the step will use: schedulers move them later."""
        if not self.steps:
            self._before_first()
        self._used = {}
        for name, group in self._groups():
            self._used[f"lr/{name}"] = float(group["lr"])
            values = numeric(group)
            before = self._seen.get(name, values)
            if values != before:
                self._used |= {f"hyper/{name}.{key}": v for key, v in values.items() if v != before.get(key)}
            self._seen[name] = values
        return self._with_counted_closure(optimizer, args, kwargs)

    def _with_counted_closure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The step's arguments with a closure that counts its calls; ``None`` if there is none to count."""
        own, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None or _is_nested(optimizer):
            return None

        def counted() -> Any:
            self.evaluations += 1
            return closure()

        return ((own, counted, *rest[1:]), kwargs) if rest else (args, {**kwargs, "closure": counted})

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - torch's signature
        if _is_nested(optimizer):
            return
        if _was_skipped(optimizer):
            self._overflowed = True
            return
        self.steps += 1
        self._latest = dict(self._used)
        if self._stats and (self.steps - 1) % self._every == 0:
            self._latest |= self._measure()

    def _measure(self) -> dict[str, float]:
        buffers: dict[str, list[Tensor]] = {}
        gradients: dict[str, list[Tensor]] = {}
        for name, group in self._groups():
            gradients[f"grad/{name}"] = [p.grad for p in group["params"] if p.grad is not None]
            for parameter in group["params"]:
                for buffer, tensor in _buffers(self.optimizer.state.get(parameter, {})):
                    buffers.setdefault(f"{buffer}/{name}", []).append(tensor)
        statistics, norms = measure(buffers, gradients)
        metrics = {f"{name}.norm": norm for name, norm in norms.items()}
        for name, found in statistics.items():
            metrics |= {f"{name}.{statistic}": value for statistic, value in vars(found).items()}
        return metrics


def _buffers(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a parameter's state that hold a number per element (or per row, as Adafactor's), not counters."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim and (value.is_floating_point() or value.is_complex()):
            yield name, value


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the same optimizer's step called this one: ``super().step()`` in a subclass fires the hooks too."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back
    return depth > 1


def _was_skipped(optimizer: Optimizer) -> bool:
    """A fused optimizer under a GradScaler runs its hooks even when it found an overflow and changed nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
