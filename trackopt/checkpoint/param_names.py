"""Names of parameters: the same one may have two, since wrappers and modules around it put something in front."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What DataParallel, DDP, torch.compile and FSDP put into names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


def match_names(saved: Iterable[str], live: Iterable[str]) -> dict[str, str]:
    """The live name of each saved name, where it has one.

    Equal names go together; then those that differ by wrappers; then, where that leaves live names without a partner,
    those that differ by one prefix for all (a ``LightningModule``'s ``model.``).

    Example:
        >>> match_names(["module.fc.weight"], ["fc.weight"]), match_names(["net.fc.weight", "head.bias"], ["fc.weight"])
        ({'module.fc.weight': 'fc.weight'}, {'net.fc.weight': 'fc.weight'})
    """
    saved, live = list(saved), list(live)
    if set(live) <= set(saved):
        return {name: name for name in live}
    here = {_strip_wrappers(name): name for name in live}
    if len(here) < len(live):
        return {name: name for name in live if name in set(saved)}
    there = {_strip_wrappers(name): name for name in saved}
    prefix = _common_prefix(there, here)
    shifted = {name.removeprefix(prefix): own for name, own in there.items() if name.startswith(prefix)}
    return {shifted[name]: own for name, own in here.items() if name in shifted}


def _strip_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(saved: Iterable[str], live: Iterable[str]) -> str:
    """What stands in front of the live names in most of the saved ones; the shortest, where several do."""
    live = set(live)
    count: Counter[str] = Counter()
    for name in saved:
        parts = name.split(".")
        count.update(".".join(parts[:i]) + "." * bool(i) for i in range(len(parts)) if ".".join(parts[i:]) in live)
    most = max(count.values(), default=0)
    return min((prefix for prefix, found in count.items() if found == most), key=len, default="")
