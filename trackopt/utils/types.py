"""Names for dictionaries whose keys trackopt does not choose."""

from __future__ import annotations

from typing import Any

#: What ``state_dict()`` returns and ``load_state_dict()`` takes.
StateDict = dict[str, Any]

#: One of ``optimizer.param_groups``, live or saved.
ParamGroup = dict[str, Any]

#: One entry of ``optimizer.state``: the buffers of a parameter by name.
ParamState = dict[str, Any]

#: What ``torch.load`` returns of a run's checkpoint: ``model``, ``optimizer``, …, ``trackopt``.
CheckpointTree = dict[str, Any]

#: An object of a JSON document.
JsonObject = dict[str, Any]
