"""Scripts in processes of their own, also on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def run_script(script: Path, *arguments, **environment):
    """Run a python script in a process of its own; it ends by itself or kills itself."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def run_in_pty(script: Path, *arguments, react=lambda seen, process: None, **environment):
    """Run a script with its standard error on a terminal, its standard output not; both, and the exit code.

    ``react`` is told, whenever something appears there, all that has and the process.
    """
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=side,
        text=True,
    )
    os.close(side)
    seen = b""
    while True:
        try:
            seen += os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        react(seen, process)
    os.close(main)
    output = process.communicate(timeout=60)[0]
    return output, seen.decode(), process.returncode
