"""Records for TensorBoard's plugins: the charts of Custom Scalars and the table of HParams."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MarginChartContent,
    MultilineChartContent,
)
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from trackopt import journal
from trackopt.journal.columns import ColumnReader
from trackopt.recorder.sinks.tensorboard_events import encode_plugin_summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_MEAN, _STD = ".mean", ".std"
_LOSS_PATTERN = re.compile("(?i)^[^/]*loss[^/]*$")
_LR_PATTERN = "^lr/"


def find_buffers(metrics: Mapping[str, float]) -> Iterator[str]:
    """Yield the buffers, like ``exp_avg/group0``, whose mean and standard deviation are in a record."""
    for key in metrics:
        name = key.removesuffix(_MEAN)
        if name != key and "/" in name and name + _STD in metrics:
            yield name


def compute_margin(buffer: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the two margin series of a buffer: its mean minus and plus one standard deviation."""
    lower, upper = _margin_keys(buffer)
    mean, std = metrics[buffer + _MEAN], metrics[buffer + _STD]
    return {lower: mean - std, upper: mean + std}


def encode_layout(time: float, buffers: Iterable[str]) -> bytes:
    """Return the record with the Custom Scalars charts: losses, learning rates, and a margin chart per buffer."""
    lines = [
        Chart(title=title, multiline=MultilineChartContent(tag=[pattern]))
        for title, pattern in (("loss", _LOSS_PATTERN.pattern), ("learning rate", _LR_PATTERN))
    ]
    categories = [
        Category(title="loss and learning rate", chart=lines),
        Category(title="buffers", chart=[_make_margin_chart(buffer) for buffer in buffers]),
    ]
    text = Layout(category=categories).SerializeToString()
    return encode_plugin_summary(time, "custom_scalars", "custom_scalars__config__", text=text)


def encode_hparams_start(time: float, group: str, params: Mapping[str, Any]) -> bytes:
    """Return the record with a run's hyperparameters; values that are neither number nor string are omitted."""
    info = SessionStartInfo(group_name=group, start_time_secs=time)
    for key, value in params.items():
        if isinstance(value, str):
            info.hparams[key].string_value = value
        elif isinstance(value, (int, float)):
            info.hparams[key].number_value = value
    return _encode_hparams(time, "session_start_info", info)


def encode_hparams_end(time: float) -> bytes:
    """Return the record that marks a run as finished."""
    return _encode_hparams(time, "session_end_info", SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time))


def summarize_losses(path: Path) -> journal.Line:
    """Return a record of a run's last step that holds the best and final value of each loss.

    HParams shows the first five series by name, so these names begin with a capital letter.

    Args:
        path: The journal.
    """
    reader = ColumnReader(path, lambda key: _LOSS_PATTERN.match(key) is not None)
    reader.update()
    columns = reader.build()
    scalars = {}
    for key, series in columns.series.items():
        scalars[f"Result/final {key}"] = float(series.values[-1])
        finite = [value for value in series.values.tolist() if math.isfinite(value)]
        if finite:
            scalars[f"Result/best {key}"] = min(finite)
    return journal.Line(int(columns.steps[-1]) if len(columns.steps) else 0, columns.time, scalars)


def _margin_keys(buffer: str) -> tuple[str, str]:
    stem = f"margin/{buffer.replace('/', '.')}"
    return f"{stem}.mean-std", f"{stem}.mean+std"


def _make_margin_chart(buffer: str) -> Chart:
    lower, upper = _margin_keys(buffer)
    series = MarginChartContent.Series(value=buffer + _MEAN, lower=lower, upper=upper)
    return Chart(title=f"{buffer}: mean ± std", margin=MarginChartContent(series=[series]))


def _encode_hparams(time: float, kind: str, info: SessionStartInfo | SessionEndInfo) -> bytes:
    content = HParamsPluginData(**{kind: info}).SerializeToString(deterministic=True)  # hyperparameters are a map
    return encode_plugin_summary(time, "hparams", f"_hparams_/{kind}", content=content)
