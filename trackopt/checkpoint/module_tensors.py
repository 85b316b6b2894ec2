"""The tensors of a module's ``state_dict``, without the cost of building it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state", "named_parameters", "named_modules")


@dataclass
class ModuleTensors:
    """What ``state_dict(keep_vars=True)`` of a module holds.

    Attributes:
        names: The names of its tensors, in order.
        tensors: The live tensors.
        versions: The version of each layer, by name.
    """

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    versions: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleTensors | None:
        """Collect the tensors of a module; ``None`` if it or a module in it changes how a state dict is made."""
        found = cls()
        classes: set[type] = set()
        if not found._collect(module, "", classes):
            return None
        is_usual = all(getattr(each, name) is getattr(nn.Module, name) for each in classes for name in _METHODS)
        return found if is_usual else None

    def _collect(self, module: nn.Module, prefix: str, classes: set[type]) -> bool:
        own = vars(module)
        if module._state_dict_hooks or module._state_dict_pre_hooks or any(name in own for name in _METHODS):
            return False
        classes.add(type(module))
        self.versions[prefix[:-1]] = module._version
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.names.append(prefix + name)
                self.tensors.append(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self.names.append(prefix + name)
                self.tensors.append(buffer)
        return all(
            self._collect(child, f"{prefix}{name}.", classes)
            for name, child in module._modules.items()
            if child is not None
        )
