"""``trackopt salvage``: the intact part of a damaged file, as a new one."""

from __future__ import annotations

import click

from trackopt.analysis.salvage.salvage import salvage
from trackopt.cli import console

_SHOWN = 10


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
    done = salvage(source, target)
    if as_json:
        console.write_json(done.as_dict())
        return
    count = done.tensors + len(done.lost_tensors)
    told = f"{done.target}: {done.tensors:,} of {count:,} saved, {console.size(done.bytes)}"
    lines = [console.finding("ok", told)]
    if done.lost_tensors:
        lines.append(console.finding("warning", f"lost: {len(done.lost_tensors):,}"))
        lines += [console.indented(name) for name in done.lost_tensors[:_SHOWN]]
        if len(done.lost_tensors) > _SHOWN:
            lines.append(console.indented(f"and {len(done.lost_tensors) - _SHOWN:,} more; --json lists all"))
    console.show(lines)
