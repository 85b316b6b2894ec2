"""What MLflow says about a run: where it is, and the command lines that resume it, repeat it and show it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST = 2000  # letters of a command line; MLflow takes 8,000 for the whole


def run_description(directory: Path, identity: dict[str, Any]) -> str:
    """A run's description, in Markdown. Of its environment it tells nothing.

    Args:
        directory: The run's directory.
        identity: What its ``run.json`` says.
    """
    home = f"cd {shlex.quote(identity['working_directory'])}"
    command = identity["command"]
    if len(command) > _LONGEST:
        command = f"{command[:_LONGEST]} …"
    there, again, above = (
        shlex.quote(str(path)) for path in (directory, directory.with_name(f"{directory.name}-again"), directory.parent)
    )
    return "\n".join(
        [
            f"The training **{identity['name']}**, logged at every step by trackopt from `{directory}`.",
            *_code_block("Resume it from its newest checkpoint:", home, f"TRACKOPT_DIR={there} {command}"),
            *_code_block("Reproduce it from the start, in a fresh directory:", home, f"TRACKOPT_DIR={again} {command}"),
            *_code_block("Look at it:", f"trackopt inspect {there}", f"trackopt plot {there}", f"trackopt ui {above}"),
        ]
    )


def _code_block(head: str, *lines: str) -> list[str]:
    return ["", head, "", "```", *lines, "```"]
