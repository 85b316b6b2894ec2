"""The rehearsal in a training process without ``trackopt.wrap``: record every optimizer step through torch's hooks.

The file has the lines of ``probe``. What a step begins with also has the forward passes before it (``forward``), the
learning rates that it uses (``lr``) and the positions of the schedulers (``schedulers``). Nothing here draws a random
number or changes a tensor.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from trackopt.rehearsal import trace
from trackopt.rehearsal.fingerprint import fingerprint, global_rng, learning_rates, optimizer_state, weights
from trackopt.rehearsal.live_objects import LiveObjects, find_objects, scheduler_positions, state_dtypes, tensors_in
from trackopt.rehearsal.untracked_state import UntrackedObject, find_untracked
from trackopt.rehearsal.values import loop_counters, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from trackopt.rundir.environment import ResumeCheckPlan
    from trackopt.utils.types import StateDict

_SCANS = 2  # steps at whose beginning the script's variables are searched
_MAX_INPUTS = 32
_log = logging.getLogger("trackopt")


class _Start:
    """The fingerprints of a training before its first step."""

    def __init__(self, objects: LiveObjects) -> None:
        training = objects.training
        self.objects = objects
        self.weights = weights(training)
        self.optimizer = optimizer_state(training)
        self.parameters = [self.weights[name] for name in training.named_parameters() if name in self.weights]


@dataclass
class _Passes:
    """The number of forward passes of trained models since the latest step, and the fingerprints of all inputs."""

    count: int = 0
    inputs: list[int] = field(default_factory=list)


class StepRecorder:
    """Observes all optimizers of a process, as one run.

    Args:
        plan: The step after which to kill the process.
    """

    def __init__(self, plan: ResumeCheckPlan) -> None:
        self._plan = plan
        self._root = plan.root
        self._kill_at = plan.kill.get(trace.OBSERVED)
        self._objects: LiveObjects | None = None  # from the first step on
        self._found: LiveObjects | None = None  # by the latest search
        self._first_pass: _Start | None = None  # a forward pass changes buffers before the first step
        self._step = self._first = 0
        self._depth = 0  # of nested calls of modules
        self._stepping: Optimizer | None = None
        self._passes = {True: _Passes(), False: _Passes()}  # in training mode, and in evaluation mode
        self._is_training = True
        self._fetched: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._before: StateDict | None = None
        self._untracked: list[UntrackedObject] = []
        self._scans = 0
        self._active = True

    def attach(self) -> None:
        """Observe from now on."""
        register_optimizer_step_pre_hook(self._guard(self._before_step))
        register_optimizer_step_post_hook(self._guard(self._after_step))
        self._wrap(nn.Module, "__call__", self._guard(self._see_call), self._leave_call)
        self._wrap(torch.Tensor, "backward", self._guard(self._see_loss))
        self._wrap(torch, "save", self._guard(self._see_save))
        self._wrap(_BaseDataLoaderIter, "__next__", after=self._guard(self._see_batch))

    def _guard(self, function: Callable[..., None]) -> Callable[..., None]:
        """Nothing that observes may stop a training."""

        def guarded(*args: Any, **kwargs: Any) -> None:
            if not self._active or torch.compiler.is_compiling():
                return
            try:
                function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                self._active = False
                _log.exception("the rehearsal cannot observe this training")
                self._write(failure=f"{type(error).__name__}: {error}")

        return guarded

    def _wrap(
        self,
        owner: Any,
        name: str,
        before: Callable[..., None] = lambda *_, **__: None,
        leave: Callable[[], None] = lambda: None,
        after: Callable[[Any], None] = lambda _: None,
    ) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def observed(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            try:
                result = original(*args, **kwargs)
            finally:
                leave()
            after(result)
            return result

        setattr(owner, name, observed)

    def _see_call(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        """Fingerprint what the outermost module of a forward pass is given, except what the model computed."""
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if is_trained:  # the mode of a loss function is never changed
            self._is_training = module.training
        passes = self._passes[self._is_training]
        is_first = self._before is None or (self._is_training and not passes.inputs)
        if is_first and self._stepping is None:  # not in the closure of a step
            self._before = self._step_inputs()
            if self._objects is None and self._found is not None:
                self._first_pass = _Start(self._found)
        passes.count += is_trained
        tensors = tensors_in((args, kwargs))
        passes.inputs += [fingerprint(tensor) for tensor in tensors if not tensor.requires_grad]

    def _leave_call(self) -> None:
        if self._active and not torch.compiler.is_compiling():
            self._depth -= 1

    def _see_loss(self, loss: torch.Tensor, *_: Any, **__: Any) -> None:
        if loss.numel() == 1:
            self._losses.append(loss.detach())

    def _see_batch(self, batch: Any) -> None:
        self._fetched = [fingerprint(tensor) for tensor in tensors_in(batch)][:_MAX_INPUTS]

    def _see_save(self, *_: Any, **__: Any) -> None:
        if self._objects is not None:
            self._write(saved=self._step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._stepping not in (None, optimizer):  # one optimizer calls another
            return
        if self._objects is None and self._has_probe():
            self._active = False
            return
        self._stepping = optimizer
        if self._before is None or not self._passes[True].count:  # all that was seen may be a validation
            self._before = self._step_inputs()
        objects = self._objects or self._begin()
        if all(optimizer is not each for each in objects.optimizers):  # it was made after the first step
            objects = self._objects = find_objects()
            names = {"weights": list(weights(objects.training)), "optimizer": list(optimizer_state(objects.training))}
            self._write(names=names)
        self._before["lr"] = {str(group): lr for group, lr in enumerate(learning_rates(objects.training))}
        self._before["schedulers"] = scheduler_positions(objects.schedulers)

    def _has_probe(self) -> bool:
        """Return whether the script uses ``wrap``, which records the steps of its own run."""
        return any(file.parent.name != trace.OBSERVED for file in self._root.glob(f"*/{trace.NAME}"))

    def _begin(self) -> LiveObjects:
        """Find the training's objects, and the step whose weights they have."""
        start = _Start(find_objects())
        if self._first_pass is not None and self._first_pass.parameters == start.parameters:  # nothing was loaded since
            start = self._first_pass
        self._objects = objects = start.objects
        digits = trace.join(start.weights.values())
        self._step = self._first = trace.find_step(self._root / trace.OBSERVED, digits)
        self._write(names={"weights": list(start.weights), "optimizer": list(start.optimizer)})
        self._write(
            attempt=self._step,
            weights=digits,
            optimizer=trace.join(start.optimizer.values()),
            dtypes=state_dtypes(objects.training),
            loaders=sorted(loader.num_workers for loader in objects.loaders),
        )
        return objects

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is not self._stepping or self._before is None or self._objects is None:
            return
        training = self._objects.training
        self._stepping = None
        self._step += 1
        passes = self._passes[bool(self._passes[True].count)]  # a validation before the step is not part of it
        forward = {"passes": passes.count, "inputs": passes.inputs[:_MAX_INPUTS], "fetched": self._fetched}
        self._write(
            step=self._step,
            batch=fingerprint(passes.inputs),
            loss=[float(loss) for loss in self._losses],
            before={**self._before, "forward": forward},
            rng=global_rng(),
            weights=trace.join(weights(training).values()),
            optimizer=trace.join(optimizer_state(training).values()),
            lr=learning_rates(training),
        )
        self._passes = {True: _Passes(), False: _Passes()}
        self._losses, self._before = [], None
        if self._step == self._first + 1:
            self._write(dtypes=state_dtypes(training))
        if self._kill_at is not None and self._step >= self._kill_at:
            self._write(killed=self._step)
            self._plan.kill_process_group()

    def _step_inputs(self) -> StateDict:
        """Return what a step begins with, besides the weights and its batch."""
        if self._objects is None or self._scans < _SCANS:
            self._scans += 1
            self._found = found = find_objects()
            self._untracked = find_untracked(found.training, found.loaders, aliases=True)
            self._write(untracked={each.name: {"kind": each.kind, "label": each.label} for each in self._untracked})
        return {
            "rng": global_rng(),
            "untracked": {untracked.name: untracked.state() for untracked in self._untracked},
            "values": {name: repr(count) for name, count in loop_counters().items()} | values(),
        }

    def _write(self, **line: Any) -> None:
        trace.write(self._root / trace.OBSERVED, **line)
