"""Find the state dicts of models in a checkpoint's tree."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive import tree
from trackopt.archive.tree import Path, Tensor, UnknownObject

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Suffixes of a module's buffers, which no optimizer updates.
_BUFFER_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")
_AVERAGE = re.compile(r"(?i)(?<![a-z])(ema|swa|averaged?|avg)(?![a-z])")
_AVERAGED_COUNT_KEY = "n_averaged"  # in the state dict of torch's AveragedModel
_ARGUMENTS_PATH = ("hyper_parameters",)
#: Name parts of entries that are not tensors: extra state, packed weights of quantized layers.
_NON_TENSOR_PARTS = frozenset({"_extra_state", "_packed_params", "_all_weight_values"})
_USUAL_KEYS = ("model", "model_state_dict", "state_dict", "net", "model_state", "network")
_FLOATING = ("float", "bfloat", "complex")
_QUANTIZED = ("qint", "quint")


@dataclass(frozen=True)
class Model:
    """A state dict of weights.

    Attributes:
        name: ``"model"``, or its own where there are several.
        path: Its path in the tree.
        tensors: By name, in the order they were saved.
    """

    name: str
    path: Path
    tensors: dict[str, Tensor]

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters of a pickled module; in other formats floating tensors that are not running statistics."""
        parameters = {name: tensor for name, tensor in self.tensors.items() if tensor.is_parameter}
        floating = self.without_statistics.items()
        return parameters or {name: tensor for name, tensor in floating if tensor.dtype.startswith(_FLOATING)}

    @property
    def without_statistics(self) -> dict[str, Tensor]:
        """The tensors that are not running statistics of a module."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith(_BUFFER_SUFFIXES)}

    @property
    def parameters(self) -> int:
        """Elements of its parameters, quantized ones too; tied parameters count once."""
        return sum(tensor.elements for tensor in unique_tensors(self.optimized.values()))

    @property
    def optimized(self) -> dict[str, Tensor]:
        """What training has changed, quantized or not: its tensors without buffers."""
        trainable = self.trainable
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name in trainable or tensor.dtype.startswith(_QUANTIZED)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; tied tensors count once."""
        return sum(tensor.nbytes for tensor in unique_tensors(self.tensors.values()))

    @property
    def averaged(self) -> bool:
        """True if it is a running average of the trained weights, by its name or its count."""
        return _AVERAGED_COUNT_KEY in self.tensors or bool(_AVERAGE.search(self.name))

    @property
    def trained(self) -> bool:
        """False for an average, and for a module that Lightning saved as an argument of the constructor."""
        return not self.averaged and self.path[:1] != _ARGUMENTS_PATH

    @property
    def prefix(self) -> str:
        """``"module."`` or another wrapper's prefix, if every name starts with it."""
        for prefix in ("module.", "_orig_mod.", "model."):
            if self.tensors and all(name.startswith(prefix) for name in self.tensors):
                return prefix
        return ""


def count_dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Count the elements by dtype, most first."""
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.elements
    return dict(count.most_common())


def unique_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors without repeated views of the same memory."""
    return list(unique_names({str(index): tensor for index, tensor in enumerate(tensors)}).values())


def unique_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under their first names, without repeated views of the same memory."""
    names: dict[Any, str] = {}
    for name, tensor in tensors.items():
        names.setdefault((tensor.storage.key, tensor.offset, tensor.shape, tensor.stride), name)
    return {name: tensors[name] for name in names.values()}


def is_state_dict(node: Any) -> bool:
    """Return True if a node is a flat dictionary of names to tensors, and what modules keep besides tensors."""
    if not isinstance(node, dict) or not node or not all(isinstance(key, str) for key in node):
        return False
    non_tensors = [key for key, value in node.items() if not isinstance(value, Tensor | tree.TensorSubclass)]
    return len(non_tensors) < len(node) and all(_NON_TENSOR_PARTS.intersection(key.split(".")) for key in non_tensors)


def is_module(node: Any) -> bool:
    """Return True if a node is a pickled module."""
    return isinstance(node, UnknownObject) and isinstance(node.state, dict) and set(node.state) >= set(tree.MODULE_KEYS)


def find_models(key: str, path: Path, node: Any) -> tuple[Model, ...]:
    """Return the models in one entry of a checkpoint: one, several in a dictionary, or none."""
    if is_state_dict(node) or is_module(node):
        tensors = {".".join(below): tensor for below, tensor in tree.tensors(node)}
        return (Model("model" if key in _USUAL_KEYS else key, path, tensors),)
    if isinstance(node, dict) and node and all(is_state_dict(value) or is_module(value) for value in node.values()):
        return tuple(
            model for name, value in node.items() for model in find_models(str(name), (*path, str(name)), value)
        )
    return ()
