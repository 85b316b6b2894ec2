"""The pictures of the examples: panels of curves side by side."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # to a file, without a window
from matplotlib import pyplot


def curves(file, panels, *, log=()):
    """Draw panels, as ``{title: {label: [(x, y), …]}}``; those named in ``log`` with a logarithmic axis."""
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axes, (title, lines) in zip(all_axes[0], panels.items(), strict=True):
        for index, (label, points) in enumerate(lines.items()):
            under = len(lines) == 2 and index == 0  # drawn broader, so that it shows where the other one covers it
            axes.plot(*zip(*points, strict=True), label=label, linewidth=4 if under else 1.4, alpha=0.5 if under else 1)
        axes.set(title=title, xlabel="step", yscale="log" if title in log else "linear")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    figure.tight_layout()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    print(f"picture: {file}")
