"""Hides the packages named in HIDDEN_PACKAGES from a python process and its children; this folder is on PYTHONPATH."""

import os
import sys

_HIDDEN = set(os.environ["HIDDEN_PACKAGES"].split())


class _Hiding:
    """A finder that does not find some packages."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _HIDDEN:
            return None
        return self._finder.find_spec(name, path, target)


sys.meta_path[:] = map(_Hiding, sys.meta_path)
