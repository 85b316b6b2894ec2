"""``trackopt salvage``: the intact part of a damaged file, as a new one."""

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
    r"""Write what is whole of a damaged checkpoint to a new file, which torch loads.

    SRC is a file of torch.save that was cut short or damaged; it stays as it is. DST must not be there yet.
    Every tensor in it has its right checksum; what is lost is listed.

    \b
    Example:
      trackopt salvage broken.pt rescued.pt
    """
    result = salvage(source, target)
    if as_json:
        console.write_json(result.as_dict())
        return
    count = result.tensors + len(result.lost_tensors)
    told = f"{result.target}: {result.tensors:,} of {count:,} saved, {console.format_size(result.bytes)}"
    lines = [console.render_finding("ok", told)]
    if result.lost_tensors:
        lines.append(console.render_finding("warning", f"lost: {len(result.lost_tensors):,}"))
        lines += [console.render_indented(name) for name in result.lost_tensors[:_MAX_LOST]]
        if len(result.lost_tensors) > _MAX_LOST:
            lines.append(
                console.render_indented(f"and {len(result.lost_tensors) - _MAX_LOST:,} more; --json lists all")
            )
    console.show(lines)
