"""Turn the tree of a checkpoint into facts about it. Nothing here prints."""

from typing import Any

#: A JSON object: facts under the keys that a command's ``--json`` documents.
JsonObject = dict[str, Any]
