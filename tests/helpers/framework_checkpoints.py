"""Scripts that write real checkpoints with real frameworks.

Each takes the directory to write to, and prints as JSON what it told the framework, or was told by it. They
run in processes of their own: the frameworks warn, and their import takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


def live_facts(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, **progress: float) -> dict[str, Any]:
    """What is true of live objects, in the terms of `inspect --json`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "parameters": [
            {
                "name": names[id(parameter)],
                "group": f"group{index}",
                "shape": list(parameter.shape),
                "buffers": [key for key, value in optimizer.state[parameter].items() if _is_buffer(value, parameter)],
            }
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ],
        "scheduler": type(scheduler).__name__,
        "last_epoch": scheduler.last_epoch,
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        **progress,
    }


def _is_buffer(value: Any, parameter: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape
