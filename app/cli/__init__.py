"""The `clipkit` command: its groups of commands, and how errors reach the user.

`index.py` and `switch.py` hold the commands on an index, `data.py`, `train.py` and `eval.py` those
on datasets and models; `terminal.py` what they share. Nothing heavy is imported before a command
needs it: `clipkit --help` must not wait for torch, nor a text search for Gradio or for the other
commands.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from app.cli import index, switch
from app.cli.terminal import Commands, group
from clipkit import __version__
from clipkit.errors import ClipkitError, InputError
from clipkit.wording import printable


def commands(called: str | None = None) -> Commands:
    """Return the command line: all of it, or where `called` is a command on an index, only those."""
    cli = group(
        "clipkit",
        "Search your pictures by text, fine-tune the models, and measure both.",
        "clipkit index ~/Pictures",
        "clipkit search birthday cake",
        "clipkit app --open",
    )
    cli.callback(invoke_without_command=True)(_options)
    index.add_commands(cli)
    switch.add_commands(cli)
    if called in {command.callback.__name__ for command in cli.registered_commands}:
        return cli
    from app.cli import cache, export, models, train
    from app.cli.data import data
    from app.cli.eval import evaluate
    from app.cli.runs import runs

    cli.add_typer(data)
    cli.command(epilog=train.EPILOG, cls=train.TrainCommand)(train.train)
    cli.add_typer(runs)
    cli.add_typer(evaluate)
    cli.command(epilog=export.EPILOG)(export.export)
    cli.command(epilog=cache.EPILOG)(cache.cache)
    cli.command(epilog=models.EPILOG)(models.models)
    return cli


def main() -> None:
    """Run the command line: errors are one sentence; exit code 2 for bad input, 1 for a fault."""
    try:
        commands(*sys.argv[1:2])()
    except ClipkitError as error:
        print(f"clipkit: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # such as `clipkit search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"clipkit {__version__}")
        raise typer.Exit


def __getattr__(name: str) -> Any:
    """Build the whole command line, `cli`, for those who call it themselves."""
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    whole = globals()[name] = commands()
    return whole
