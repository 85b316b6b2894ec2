"""The description of a run in MLflow: its directory, and the commands that resume, reproduce and inspect it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.rundir.identity import RunIdentity

_MAX_COMMAND_CHARS = 2000  # MLflow takes 8,000 for the whole description


def run_description(directory: Path, identity: RunIdentity) -> str:
    """Return a run's description in Markdown. It contains no environment variables of the run.

    Args:
        directory: The run's directory.
        identity: The contents of its ``run.json``.
    """
    change_directory = f"cd {shlex.quote(identity.working_directory)}"
    command = identity.command
    if len(command) > _MAX_COMMAND_CHARS:
        command = f"{command[:_MAX_COMMAND_CHARS]} …"
    run, fresh, parent = (
        shlex.quote(str(path)) for path in (directory, directory.with_name(f"{directory.name}-again"), directory.parent)
    )
    return "\n".join(
        [
            f"The training **{identity.name}**, logged at every step by trackopt from `{directory}`.",
            *_code_block("Resume it from its newest checkpoint:", change_directory, f"TRACKOPT_DIR={run} {command}"),
            *_code_block(
                "Reproduce it from the start, in a fresh directory:",
                change_directory,
                f"TRACKOPT_DIR={fresh} {command}",
            ),
            *_code_block("Inspect it:", f"trackopt inspect {run}", f"trackopt plot {run}", f"trackopt ui {parent}"),
        ]
    )


def _code_block(heading: str, *lines: str) -> list[str]:
    return ["", heading, "", "```", *lines, "```"]
