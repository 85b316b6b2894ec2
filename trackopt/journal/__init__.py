"""The journal: one JSON line per step in the append-only file ``metrics.jsonl``.

It is the only file that telemetry writes in the training process; everything else (TensorBoard, MLflow, plots) is
derived from it. A line is one ``write(2)``, so it survives the death of the process. There are two kinds of lines:

* records, ``{"step": 1, "time": 1763717000.1, "metrics": {"loss": 0.69, "lr/group0": 0.1}}``
* markers, ``{"event": "start", "step": 0, "time": …, …}``. The events are ``start``, ``resume``, ``checkpoint``,
  ``checkpoint_failed``, ``nonfinite``, ``measurement_failed``, ``stop`` and ``close``; readers ignore others.

``measurement_failed`` says that a part of the telemetry ends at this step, because it failed: ``{"part": "statistics",
"error": "RuntimeError: …", "optimizer": "optimizer", "optimizer_class": "AdamW"}``. A part that concerns no optimizer,
such as the scheduler check, lacks the last two keys.

A ``resume`` marker at step k means that training went back to step k: later records of earlier attempts are superseded.
With ``"starts_over": true`` another training begins at step 0, and MLflow has it as a run of its own.
The *effective* series are the others. Non-finite numbers are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``,
since JSON has no such numbers.

The last field of each line is its checksum, ``"crc":"1a2b3c4d"``: the CRC-32 of all bytes before the field's comma.
Readers skip a line whose checksum is wrong. Lines of earlier versions have none.
"""

from trackopt.journal.history import checkpoint_offset, effective, superseded
from trackopt.journal.lines import NAME, DamagedLine, Histogram, Line, decode
from trackopt.journal.reading import describe_damage, read, read_backwards, series
from trackopt.journal.writer import Journal

__all__ = [
    "NAME",
    "DamagedLine",
    "Histogram",
    "Journal",
    "Line",
    "checkpoint_offset",
    "decode",
    "describe_damage",
    "effective",
    "read",
    "read_backwards",
    "series",
    "superseded",
]
