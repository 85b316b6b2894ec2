"""``trackopt salvage``: recover the intact tensors of a damaged checkpoint."""

from __future__ import annotations

import click

from trackopt.analysis.salvage.salvage import salvage
from trackopt.cli import console

_MAX_LOST = 10


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(source: str, target: str, as_json: bool) -> None:
    r"""Recover the intact tensors of a damaged checkpoint into a new file that torch.load accepts.

    SRC is a truncated or damaged file of torch.save; it is not modified. DST must not exist. Every tensor in DST has
    a valid checksum; lost tensors are listed.

    \b
    Example:
      trackopt salvage broken.pt rescued.pt
    """
    result = salvage(source, target)
    if as_json:
        console.write_json(result.as_dict())
        return
    count = result.tensors + len(result.lost_tensors)
    summary = f"{result.target}: {result.tensors:,} of {count:,} saved, {console.format_size(result.bytes)}"
    lines = [console.render_finding("ok", summary)]
    if result.lost_tensors:
        lines.append(console.render_finding("warning", f"lost: {len(result.lost_tensors):,}"))
        lines += [console.render_indented(name) for name in result.lost_tensors[:_MAX_LOST]]
        if len(result.lost_tensors) > _MAX_LOST:
            lines.append(
                console.render_indented(f"and {len(result.lost_tensors) - _MAX_LOST:,} more; --json lists all")
            )
    console.show(lines)
