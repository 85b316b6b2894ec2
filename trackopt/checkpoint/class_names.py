"""Names of classes in a checkpoint, and the classes that this process has under them; nothing is imported."""

from __future__ import annotations

import sys


def qualified_name(cls: type) -> str:
    """Return a name like ``collections:OrderedDict``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> type | None:
    """Return the class of a qualified name, if its module is imported.

    Example:
        >>> find_class("collections:OrderedDict").__name__, find_class("antigravity:Fly")
        ('OrderedDict', None)
    """
    module, _, path = name.partition(":")
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # getattr(found, part) could run code, and import
    return found if isinstance(found, type) else None
