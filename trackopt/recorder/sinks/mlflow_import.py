"""Import MLflow in less time and memory."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

# MLflow supports installations without these (as `mlflow-skinny`), and delivers nothing through them. They take a
# tenth of the time of its import, and 70 MB.
_UNNEEDED = ("pandas", "pyarrow", "scipy")


def import_mlflow() -> None:
    """Import MLflow as if packages for data frames were not installed; they can be imported afterwards."""
    if "mlflow" in sys.modules:
        return
    hidden = [name for name in _UNNEEDED if name not in sys.modules]
    modules: MutableMapping[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # the import of a name whose module is None fails
    try:
        importlib.import_module("mlflow")
    except ImportError:  # another version may need one of them
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
            del sys.modules[name]
    finally:
        for name in hidden:
            del sys.modules[name]
