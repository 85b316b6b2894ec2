"""Weights: which part of a tree is a model's state dict, and what it holds."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive import tree
from trackopt.archive.tree import Path, Tensor, UnknownObject

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Ends of names that are buffers of a module, which no optimizer moves.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_AVERAGE = re.compile(r"(?i)(?<![a-z])(ema|swa|averaged?|avg)(?![a-z])")
_COUNT = "n_averaged"  # in the state dict of torch's AveragedModel
#: Parts of names under which modules keep what is no tensor: extra state, packed weights of quantized layers.
_BESIDES = frozenset({"_extra_state", "_packed_params", "_all_weight_values"})
_MODULE = frozenset({"_parameters", "_buffers", "_modules"})
_FLOATING = ("float", "bfloat", "complex")
_QUANTIZED = ("qint", "quint")


@dataclass(frozen=True)
class Model:
    """A state dict of weights.

    Attributes:
        name: ``"model"``, or its own where there are several.
        path: Where it stands in the tree.
        tensors: By name, in the order they were saved.
    """

    name: str
    path: Path
    tensors: dict[str, Tensor]

    @property
    def trainable(self) -> dict[str, Tensor]:
        """What looks like a parameter: floating, and no running statistic; of a pickled module what is one."""
        told = {name: tensor for name, tensor in self.tensors.items() if tensor.is_parameter}
        return told or {
            name: tensor
            for name, tensor in self.tensors.items()
            if tensor.dtype.startswith(_FLOATING) and not name.endswith(_BUFFERS)
        }

    @property
    def parameters(self) -> int:
        """Elements of its parameters, quantized ones too; what is tied counts once."""
        quantized = [tensor for tensor in self.tensors.values() if tensor.dtype.startswith(_QUANTIZED)]
        return sum(tensor.elements for tensor in unique([*self.trainable.values(), *quantized]))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; what is tied counts once."""
        return sum(tensor.nbytes for tensor in unique(self.tensors.values()))

    @property
    def averaged(self) -> bool:
        """Whether it is a running average of the weights rather than what is trained, by its name or its count."""
        return _COUNT in self.tensors or bool(_AVERAGE.search(self.name))

    @property
    def prefix(self) -> str:
        """``"module."`` or the like, where every name starts with it."""
        for prefix in ("module.", "_orig_mod.", "model."):
            if self.tensors and all(name.startswith(prefix) for name in self.tensors):
                return prefix
        return ""


def dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Elements by dtype, most first."""
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.elements
    return dict(count.most_common())


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without those that show the same memory again."""
    return list(unique_names({str(index): tensor for index, tensor in enumerate(tensors)}).values())


def unique_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their first names, without those that show the same memory again."""
    seen = set()
    found = {}
    for name, tensor in tensors.items():
        place = (tensor.storage.key, tensor.offset, tensor.shape, tensor.stride)
        if place not in seen:
            seen.add(place)
            found[name] = tensor
    return found


def is_state_dict(node: Any) -> bool:
    """Whether a node is a flat dictionary of names to tensors (what modules keep besides them aside)."""
    if not isinstance(node, dict) or not node or not all(isinstance(key, str) for key in node):
        return False
    others = [key for key, value in node.items() if not isinstance(value, Tensor | tree.TensorSubclass)]
    return len(others) < len(node) and all(_BESIDES.intersection(key.split(".")) for key in others)


def is_module(node: Any) -> bool:
    """Whether a node describes a whole pickled module."""
    return isinstance(node, UnknownObject) and isinstance(node.state, dict) and set(node.state) >= _MODULE


def find_models(key: str, path: Path, node: Any) -> tuple[Model, ...]:
    """The models in one entry of a checkpoint: itself, or a dictionary of several; none if it is neither."""
    if is_state_dict(node) or is_module(node):
        tensors = {".".join(below): tensor for below, tensor in tree.tensors(node)}
        usual = key in ("model", "model_state_dict", "state_dict", "net", "model_state", "network")
        return (Model("model" if usual else key, path, tensors),)
    if isinstance(node, dict) and node and all(is_state_dict(value) or is_module(value) for value in node.values()):
        return tuple(
            model for name, value in node.items() for model in find_models(str(name), (*path, str(name)), value)
        )
    return ()
