"""Shared by the commands: common options, examples in the help, progress bar, Ctrl-C, sizes."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer

from clipkit.wording import duration

LINE_SECONDS = 10  # between two lines of progress where stderr is not a terminal

IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        envvar="CLIPKIT_INDEX",
        help="The index's folder. Default: clipkit/index in your user data folder.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="Where to compute: auto, cpu, cuda, cuda:1, mps.")
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="auto, float32, bfloat16 or float16; CLIPKIT_PRECISION overrides auto.",
    ),
]


def examples(*commands: str) -> str:
    """Return the epilog of a command's help: one example a line."""
    return "\n\n".join(["Examples:", *commands])


def group(name: str, help: str, *commands: str) -> typer.Typer:
    """Return an empty group of commands, whose help ends with the example `commands`."""
    return typer.Typer(
        name=name,
        help=help,
        epilog=examples(*commands),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )


def command_line() -> str:
    """Return the running command as it can be typed again."""
    return shlex.join(["clipkit", *sys.argv[1:]])


class ShowProgress(Protocol):
    """Show how far the work `what` is: `done` of `total` (0: unknown), and a short note."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def stop_on_signal(
    message: str = "stopping after this batch; press Ctrl-C again to stop at once",
) -> Iterator[threading.Event]:
    """Set the event on Ctrl-C or SIGTERM, so that the run ends soundly; a second one ends it at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler)
        print(f"\n{message}", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_shown() -> Iterator[ShowProgress]:
    """Show progress on stderr: a bar for each kind of work, with the time left.

    Where stderr is not a terminal, a line every LINE_SECONDS.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def show(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal last_line
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None, note=note)
            bars.update(tasks[what], completed=done, total=total or None, note=note)
            if not console.is_terminal and time.monotonic() - last_line > LINE_SECONDS:
                last_line = time.monotonic()
                of = f" of {total:,}" if total else ""
                task = next(task for task in bars.tasks if task.id == tasks[what])
                left = task.time_remaining
                parts = ("" if left is None else f"{duration(left)} left", note)
                print(", ".join((f"{what}: {done:,}{of}", *filter(None, parts))), file=sys.stderr)

        yield show


def size(count: float) -> str:
    """Return a number of bytes as people read it: 1234567 -> "1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
