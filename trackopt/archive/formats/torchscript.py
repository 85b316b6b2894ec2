"""The modules of a TorchScript archive: its pickle holds their attributes, its code says what each of them is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import MODULE_KEYS, Tensor, UnknownObject

if TYPE_CHECKING:
    from trackopt.archive.io.zip_reader import Zip

_MAX_CODE_BYTES = 16 << 20  # of all classes
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[([^\]]*)\]\n  __buffers__ = \[([^\]]*)\]$", re.MULTILINE
)
_NAME = re.compile(r'"([^"]*)"')

#: The parameters and the buffers that each class declares.
Declarations = dict[str, tuple[frozenset[str], frozenset[str]]]


def read_declarations(zipped: Zip) -> Declarations:
    """Return what the classes in an archive's code declare, by their full names.

    The code is searched as text. Code beyond some megabytes is not.

    Raises:
        ArchiveError: A record of it is damaged.
    """
    declared: Declarations = {}
    size = 0
    for name, record in zipped.records.items():
        _, folder, module = name.partition("/code/")
        if not folder or not module.endswith(".py"):
            continue
        size += record.size
        if size > _MAX_CODE_BYTES:
            break
        prefix = module.removesuffix(".py").replace("/", ".")
        for match in _CLASS.finditer(zipped.read(record).decode("utf-8", "replace")):
            names = [frozenset(_NAME.findall(match[group])) for group in (2, 3)]
            declared[f"{prefix}.{match[1]}"] = (names[0], names[1])
    return declared


def as_modules(node: Any, declared: Declarations) -> Any:
    """Return an object of a declared class, and those below it, with the attributes of a pickled ``nn.Module``."""
    return _Modules(declared).convert(node)


class _Modules:
    def __init__(self, declared: Declarations) -> None:
        self._declared = declared
        self._converted: dict[int, UnknownObject] = {}  # a module may be shared

    def convert(self, node: Any) -> Any:
        if not self._is_module(node):
            return node
        if id(node) not in self._converted:
            self._converted[id(node)] = replace(node, state=self._state(node))
        return self._converted[id(node)]

    def _is_module(self, node: Any) -> bool:
        return isinstance(node, UnknownObject) and node.name in self._declared and isinstance(node.state, dict)

    def _state(self, node: UnknownObject) -> dict[str, Any]:
        parameters, buffers = self._declared[node.name]
        registries: dict[str, dict[str, Any]] = {key: {} for key in MODULE_KEYS}
        rest = {}
        for name, value in node.state.items():
            if name in parameters:
                registries["_parameters"][name] = _as_parameter(value)
            elif name in buffers:
                registries["_buffers"][name] = value
            elif self._is_module(value):
                registries["_modules"][name] = self.convert(value)
            else:
                rest[name] = value
        return registries | rest


def _as_parameter(value: Any) -> Any:
    return replace(value, is_parameter=True) if isinstance(value, Tensor) else value
