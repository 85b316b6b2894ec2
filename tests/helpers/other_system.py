"""The standard library of another operating system, for the package only: ``TRACKOPT_SYSTEM`` is windows or macos.

Importing this module takes away what that system lacks from every import in trackopt's own modules; torch, pytest and
the tests keep what they were installed with. Typeshed, which mypy brings, says what each system has.
"""

from __future__ import annotations

import ast
import builtins
import fcntl
import functools
import importlib.util
import os
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

VARIABLE = "TRACKOPT_SYSTEM"
_PLATFORMS = {"windows": "win32", "macos": "darwin"}
system = os.environ.get(VARIABLE)


def _locking(descriptor: int, mode: int, count: int) -> None:
    """Lock bytes from the current position on, as ``msvcrt.locking`` does without waiting."""
    assert (mode, count) == (2, 1)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) > os.fstat(descriptor).st_size  # a locked byte cannot be read there
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(*error.args) from None


def _peek_named_pipe(handle: int) -> tuple[int, int]:
    return struct.unpack("i", fcntl.ioctl(handle, termios.FIONREAD, b"\0" * 4))[0], 0


#: What the package uses of Windows alone.
_WINDOWS = {
    "msvcrt": {"LK_NBLCK": 2, "locking": _locking, "get_osfhandle": int},
    "_winapi": {"PeekNamedPipe": _peek_named_pipe},
    "subprocess": dict.fromkeys(("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW", "IDLE_PRIORITY_CLASS"), 0),
}


class _Module:
    """A module without some of its names, and with others."""

    def __init__(self, module: ModuleType, missing: frozenset[str], added: Mapping[str, Any]) -> None:
        vars(self).update(added, _module=module, _missing=missing)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r} on {system}")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"excepthook", "exit"}:  # the interpreter and the script read them from the module
            setattr(self._module, name, value)
            return
        raise AttributeError(f"patch the module {self._module.__name__} itself, not the package's")


def _names(body: Sequence[ast.stmt], namespace: dict[str, Any]) -> Iterator[str]:
    """Yield the names that a stub defines where its conditions hold."""
    for node in body:
        if isinstance(node, ast.If):
            condition = compile(ast.Expression(node.test), "stub", "eval")
            yield from _names(node.body if eval(condition, namespace) else node.orelse, namespace)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name == alias.asname)


@functools.cache
def _missing_names(name: str) -> tuple[frozenset[str], bool]:
    """Return which names of a module the other system lacks, and whether it has any of them."""
    stubs = Path(importlib.util.find_spec("mypy").submodule_search_locations[0], "typeshed", "stdlib")
    stub = next((path for path in (stubs / f"{name}.pyi", stubs / name / "__init__.pyi") if path.exists()), None)
    if stub is None:
        return frozenset(), True
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    here, there = (
        {*_names(body, {"sys": SimpleNamespace(platform=each, version_info=sys.version_info), "TYPE_CHECKING": False})}
        for each in ("linux", _PLATFORMS[system])
    )
    return frozenset(here - there), bool(there) or not here


@functools.cache
def _module(name: str) -> Any:
    """Return a module of the standard library as the other system has it.

    Raises:
        ModuleNotFoundError: It has no such module.
    """
    added = _WINDOWS.get(name, {}) if system == "windows" else {}
    if name == "sys":
        added = {"platform": _PLATFORMS[system]}
    missing, exists = _missing_names(name)
    if not exists and not added:
        raise ModuleNotFoundError(f"No module named {name!r} on {system}", name=name)
    module = SimpleNamespace(__name__=name) if name in ("msvcrt", "_winapi") else _import(name)
    return _Module(module, missing, added) if missing or added else module


_import = builtins.__import__


def _import_there(name: str, *arguments: Any, **keywords: Any) -> Any:
    importer = arguments[0] if arguments else keywords.get("globals")
    package = (importer or {}).get("__package__") or ""
    if package.partition(".")[0] == "trackopt" and name in sys.stdlib_module_names:
        return _module(name)
    return _import(name, *arguments, **keywords)


if system is not None:
    assert not any(name.partition(".")[0] == "trackopt" for name in sys.modules), "import this before trackopt"
    builtins.__import__ = _import_there
