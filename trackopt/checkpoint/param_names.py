"""Match the names of parameters, in front of which wrappers and outer modules put prefixes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The parts that DataParallel, DDP, torch.compile and FSDP put into names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


def match_names(saved: Iterable[str], live: Iterable[str]) -> dict[str, str]:
    """Return the live name of each saved name that has one.

    Equal names match; then names that differ by wrappers; then, if live names are left, names that differ by one
    common prefix (a ``LightningModule``'s ``model.``).

    Example:
        >>> match_names(["module.fc.weight"], ["fc.weight"]), match_names(["net.fc.weight", "head.bias"], ["fc.weight"])
        ({'module.fc.weight': 'fc.weight'}, {'net.fc.weight': 'fc.weight'})
    """
    saved, live = list(saved), list(live)
    if set(live) <= set(saved):
        return {name: name for name in live}
    own = {_strip_wrappers(name): name for name in live}
    if len(own) < len(live):
        return {name: name for name in live if name in set(saved)}
    stripped = {_strip_wrappers(name): name for name in saved}
    prefix = _common_prefix(stripped, own)
    unprefixed = {name.removeprefix(prefix): full for name, full in stripped.items() if name.startswith(prefix)}
    return {unprefixed[name]: full for name, full in own.items() if name in unprefixed}


def _strip_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(saved: Iterable[str], live: Iterable[str]) -> str:
    """Return the prefix with which most saved names are live names; of several, the shortest."""
    live = set(live)
    count: Counter[str] = Counter()
    for name in saved:
        parts = name.split(".")
        count.update(".".join(parts[:i]) + "." * bool(i) for i in range(len(parts)) if ".".join(parts[i:]) in live)
    most = max(count.values(), default=0)
    return min((prefix for prefix, matches in count.items() if matches == most), key=len, default="")
