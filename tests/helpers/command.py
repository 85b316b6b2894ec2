"""The command line as a process of its own would run it into a pipe, but in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from trackopt import cli
from trackopt.cli import console

ESCAPE = "\x1b"
_NOT_INHERITED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")


def trackopt(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``trackopt …``; what it wrote to standard output and error, which are files, and its exit code.

    With ``COLUMNS`` it wraps lines as on a terminal of that width; into a pipe it does not.
    """
    variables = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    words = ["trackopt", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        with (
            files[0].open("w", encoding="utf-8") as out,
            files[1].open("w", encoding="utf-8") as err,
            Path(os.devnull).open(encoding="utf-8") as nothing,
            mock.patch.multiple(sys, argv=words, stdin=nothing, stdout=out, stderr=err),
            mock.patch.dict(os.environ, {**variables, **environment}, clear=True),
            mock.patch.object(console, "_UNLIMITED_WIDTH", int(environment.get("COLUMNS", console._UNLIMITED_WIDTH))),
        ):
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        return subprocess.CompletedProcess(words, code, *(file.read_text(encoding="utf-8") for file in files))


def fails(*arguments: object) -> str:
    """The one line on stderr of a command that ends with 2 and says nothing on stdout."""
    done = trackopt(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("trackopt: ")
    return done.stderr
