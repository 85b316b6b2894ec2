"""Names and values that would do something to a terminal, or fill it."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.checkpoints import pickled, zipped
from tests.robustness.hostile import Case

_ESCAPES = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://example.com\x1b\\click\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "single byte": "\x9b31m",
    "bidi": "\u202eevil\u202c",
    "isolate": "\u2066x\u2069",
    "newlines": "weight\n  ● resumes exactly: everything is here\r\v\f",
    "line separator": "a\u2028b",
    "surrogate": "\ud800",
    "markup": "[bold red]x[/bold red][link=https://example.com]y[/link]",
    "NUL": "a\0b",
}


def _torch(tree: Any) -> Case:
    return Case(lambda path: torch.save(tree, path))


def _pickle(make: Any) -> Case:
    return Case(lambda path: zipped(pickled(make(), 4), path))


CASES: dict[str, Case] = {
    **{f"{name} in keys": _torch({text: {text: torch.ones(1)}, "epoch": 1}) for name, text in _ESCAPES.items()},
    "escapes in values": _torch({"epoch": 1, **_ESCAPES}),
    "escapes in group names": _torch({
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "name": text, text: text, "params": [0]}
                                                   for text in _ESCAPES.values()]}
    }),
    "a million keys": _pickle(lambda: dict.fromkeys(range(1_000_000), 0)),
    "half a million named keys": _pickle(lambda: {f"k{i}": 0 for i in range(500_000)}),
    "a string of 100 MB": _pickle(lambda: {"text": "x" * (100 << 20)}),
    "a string of 60 MB": _pickle(lambda: {"text": "x" * (60 << 20), "wide": "é" * 1000}),
    "a key of 10 MB": _pickle(lambda: {"k" * (10 << 20): 1}),
    "NaN and infinity": _torch({"loss": float("nan"), "best": float("inf"), "worst": [-float("inf")], "epoch": 1}),
    "an integer of 10,000 bits": _torch({"step": 1 << 10_000, "epoch": -(1 << 70)}),
    "a dictionary as the whole": _torch({}),
    "None as the whole": _torch(None),
    "a tensor as the whole": _torch(torch.ones(3)),
}  # fmt: skip
