"""What TensorBoard is told beside the series themselves: the charts of its custom scalars, and the table of HPARAMS.

The messages are those of TensorBoard's ``layout.proto`` and ``plugin_data.proto``, encoded like the events.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trackopt import journal
from trackopt.recorder.sinks import tensorboard_events
from trackopt.recorder.sinks.tensorboard_events import field

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_MEAN, _STD = ".mean", ".std"
_LOSS = re.compile("(?i)^[^/]*loss[^/]*$")
_RATES = "^lr/"
_SUCCESS = b"\x08\x01"


def buffers(metrics: Mapping[str, float]) -> Iterator[str]:
    """The buffers whose mean and standard deviation a record holds, like ``exp_avg/group0``."""
    for key in metrics:
        name = key.removesuffix(_MEAN)
        if name != key and "/" in name and name + _STD in metrics:
            yield name


def bounds(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The ends of a buffer's margin: one standard deviation below its mean, and above."""
    low, high = _ends(name)
    mean, std = metrics[name + _MEAN], metrics[name + _STD]
    return {low: mean - std, high: mean + std}


def layout(when: float, names: Iterable[str]) -> bytes:
    """The record that lays out the custom scalars: losses, learning rates, and a margin chart for each buffer."""
    lines = [_chart("loss", 0x12, field(0x0A, _LOSS.pattern.encode()))]
    lines.append(_chart("learning rate", 0x12, field(0x0A, _RATES.encode())))
    margins = [_chart(f"{name}: mean ± std", 0x1A, field(0x0A, _series(name))) for name in names]
    content = _category("loss and learning rate", lines) + _category("buffers", margins)
    return tensorboard_events.plugin_summary(when, "custom_scalars", "custom_scalars__config__", text=content)


def session_start(when: float, group: str, params: Mapping[str, Any]) -> bytes:
    """The record with a run's hyperparameters."""
    known = {key: value for key, value in sorted(params.items()) if isinstance(value, (str, int, float))}
    entries = (field(0x0A, field(0x0A, key.encode()) + field(0x12, _value(value))) for key, value in known.items())
    info = b"".join(entries) + field(0x22, group.encode()) + b"\x29" + struct.pack("<d", when)
    return tensorboard_events.plugin_summary(when, "hparams", "_hparams_/session_start_info", content=field(0x1A, info))


def session_end(when: float) -> bytes:
    """The record that says that a run came to its end."""
    info = _SUCCESS + b"\x11" + struct.pack("<d", when)
    return tensorboard_events.plugin_summary(when, "hparams", "_hparams_/session_end_info", content=field(0x22, info))


def results(path: Path, *, resumed: bool) -> tuple[int, float, dict[str, float]]:
    """The last step of a journal, its time, and what came of the run: the best and the last value of each loss.

    HPARAMS shows the first five series by their names, and so these begin with a capital letter.

    Args:
        path: The journal.
        resumed: Whether there may be records that do not count; a journal without needs next to no memory.
    """
    step, when, found = 0, 0.0, dict[str, float]()
    lines = _losses(path)
    for line in journal.effective(lines) if resumed else (line for line in lines if line.event is None):
        step, when = line.step, line.time
        for key, value in line.metrics.items():
            found[f"Result/final {key}"] = value
            if math.isfinite(value):
                found[f"Result/best {key}"] = min(value, found.get(f"Result/best {key}", math.inf))
    return step, when, found


def _losses(path: Path) -> Iterator[journal.Line]:
    """The lines with nothing but the losses."""
    for line in journal.read(path):
        losses = {key: value for key, value in line.metrics.items() if _LOSS.match(key)}
        yield replace(line, metrics=losses, histograms={})


def _ends(name: str) -> tuple[str, str]:
    stem = f"margin/{name.replace('/', '.')}"
    return f"{stem}.mean-std", f"{stem}.mean+std"


def _series(name: str) -> bytes:
    keys = (name + _MEAN, *_ends(name))
    return b"".join(field(number, key.encode()) for number, key in zip((0x0A, 0x12, 0x1A), keys, strict=True))


def _chart(title: str, kind: int, content: bytes) -> bytes:
    return field(0x12, field(0x0A, title.encode()) + field(kind, content))


def _category(title: str, charts: Iterable[bytes]) -> bytes:
    return field(0x12, field(0x0A, title.encode()) + b"".join(charts))


def _value(value: str | float) -> bytes:
    return field(0x1A, value.encode()) if isinstance(value, str) else b"\x11" + struct.pack("<d", value)
