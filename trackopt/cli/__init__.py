"""The ``trackopt`` command: parse, call, render, exit code. A new command is one more line in ``_COMMANDS``.

Each command is a module of this package with a click command named ``command``. It is imported on use, so that no
command pays for the imports of another.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import TextIOWrapper

import click

from trackopt import __version__
from trackopt.errors import TrackoptError
from trackopt.utils.packages import explain_missing

#: The commands in the order of the help, each with its one-line help.
_COMMANDS = {
    "inspect": "Show what a checkpoint contains and whether training can resume.",
    "diff": "Show what changed between two checkpoints.",
    "verify": "Verify checksums and structure of checkpoints.",
    "salvage": "Recover the intact tensors of a damaged checkpoint.",
    "ls": "List the runs in a directory, or the checkpoints of a run.",
    "schedule": "Show the learning rate of a schedule over steps, without training.",
    "plot": "Plot loss, learning rate and buffers of runs.",
    "compare": "Compare runs in a table and by their curves.",
    "rehearse": "Prove that a training command can be killed and resume exactly.",
    "sync": "Deliver a run's undelivered records to TensorBoard and MLflow.",
    "ui": "Start TensorBoard and the MLflow UI for the runs in a directory.",
}
_MAX_MESSAGE_LENGTH = 2000  # leaves room for the reason after a long path
_BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as a shell reports it


class _Commands(click.Group):
    """A group that imports a command on use."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command:
        if name not in _COMMANDS:
            from trackopt.utils.suggest import suggest

            raise click.UsageError(f"unknown command {name}; {suggest(name, _COMMANDS)}", context)
        command: click.Command = import_module(f"trackopt.cli.{name}").command
        return _with_verbatim_examples(command)

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _with_verbatim_examples(command: click.Command) -> click.Command:
    r"""Turn the two characters ``\b`` of a raw docstring into the control character that click wants."""
    command.help = (command.help or "").replace("\\b\n", "\b\n")
    return command


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trackopt", message="%(prog)s %(version)s")
@click.pass_context
def group(context: click.Context) -> None:
    r"""Show what an optimizer does, stop and resume training bit for bit, look inside any checkpoint.

    \b
    Example:
      trackopt inspect runs/digits

    Exit codes: 0 done, 1 a negative finding (diff: they differ; verify: damaged; rehearse: not exact), 2 trouble.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_with_verbatim_examples(group)


def main() -> None:
    """Run the command line and exit: 0 done, 1 a negative finding, 2 trouble.

    Errors of trackopt and of the operating system become one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows question marks
    try:
        with explain_missing("this command"):
            code = group.main(prog_name="trackopt", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "trackopt"
        code = _report(f"{error.format_message().rstrip('.')}; see {path} --help")
    except click.ClickException as error:
        code = _report(error.format_message())
    except click.Abort:
        code = 130
    except TrackoptError as error:
        code = _report(str(error))
    except (BrokenPipeError, SystemExit):  # click turns the first into the second, with another code
        _discard_stdout()
        code = _BROKEN_PIPE_EXIT_CODE
    except OSError as error:  # a full disk, a name that is too long, missing permissions
        _discard_stdout()
        code = _report(
            f"{error.filename or 'output'}: {error.strerror or error}; check the path, its disk and permissions"
        )
    sys.exit(code)


def _discard_stdout() -> None:
    """Send stdout to /dev/null, or the interpreter's last flush fails again, with a message."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str) -> int:
    from trackopt.cli.console import sanitize

    click.echo(f"trackopt: {sanitize(message, _MAX_MESSAGE_LENGTH)}", err=True)
    return 2
