"""The `clipkit` command: its groups of commands, and how errors reach the user.

`index.py` and `switch.py` hold the commands on an index, `data.py`, `train.py` and `eval.py` those
on datasets and models; `terminal.py` what they share. Nothing heavy is imported before a command
needs it: `clipkit --help` must not wait for torch, nor a text search for Gradio.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from app.cli import cache, index, models, switch, train
from app.cli.data import data
from app.cli.eval import evaluate
from app.cli.runs import runs
from app.cli.terminal import group
from clipkit import __version__
from clipkit.errors import ClipkitError, InputError
from clipkit.wording import printable

cli = group(
    "clipkit",
    "Search your pictures by text, fine-tune the models, and measure both.",
    "clipkit index ~/Pictures",
    "clipkit search birthday cake",
    "clipkit app --open",
)
index.add_commands(cli)
switch.add_commands(cli)
cli.add_typer(data)
cli.command(epilog=train.EPILOG, cls=train.TrainCommand)(train.train)
cli.add_typer(runs)
cli.add_typer(evaluate)
cli.command(epilog=cache.EPILOG)(cache.cache)
cli.command(epilog=models.EPILOG)(models.models)


def main() -> None:
    """Run the command line: errors are one sentence; exit code 2 for bad input, 1 for a fault."""
    try:
        cli()
    except ClipkitError as error:
        print(f"clipkit: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # such as `clipkit search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@cli.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"clipkit {__version__}")
        raise typer.Exit
