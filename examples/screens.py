"""The screens that the READMEs show: real commands on a terminal of 80 columns, each drawn as an SVG.

python examples/screens.py    # after examples/optimizers.py; `make pictures` does both
"""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
SCREENS = {
    "schedule": 'trackopt schedule "CosineAnnealingLR(T_max=40, eta_min=0.2)" "StepLR(50, gamma=0.5)" --lr 0.5',
    "compare": "trackopt compare runs/optimizers/*/",
    "inspect": "trackopt inspect runs/digits",
    "diff": "trackopt diff runs/digits@400 runs/digits@450",
}
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # nothing from elsewhere


def run_in_pty(command, directory):
    """Return what a command writes to a terminal, with colours."""
    main, side = pty.openpty()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "80", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, shell=True, cwd=directory, env=environment, stdout=side, stderr=side)  # noqa: S602
    os.close(side)
    written = b""
    while True:
        try:
            written += os.read(main, 65536)
        except OSError:  # the other side is closed
            break
    os.close(main)
    if process.wait() not in {0, 1}:
        sys.exit(f"{command}\n{written.decode()}")
    return written.decode()


def frame(written):
    """Return the two progress lines near the end of a training, without cursor movements."""
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-ln-z]", "", written.replace("\r\n", "\n").replace("\r", "\n"))
    found = re.findall(r"^digits  epoch.*it/s.*\n.*saved at.*$", text, flags=re.MULTILINE)
    return found[len(found) * 2 // 3]


def picture(name, title, written):
    """Write the SVG."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(written.replace("\r", "").rstrip()), end="\n\n")  # or the last line is cut off below
    svg = console.export_svg(title=title, code_format=FORMAT, unique_id=name)
    (HERE / "pictures" / f"{name}.svg").write_text(svg, encoding="utf-8")
    print(f"picture: {name}.svg")


def main():
    optimizers = Path("runs/optimizers").absolute()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").mkdir()
        (Path(folder) / "runs" / "optimizers").symlink_to(optimizers)
        picture("training", "python train.py", frame(run_in_pty(f"python {HERE.absolute()}/digits.py", folder)))
        for name, command in SCREENS.items():
            picture(name, "trackopt", f"$ {command}\n{run_in_pty(command, folder)}")


if __name__ == "__main__":
    main()
