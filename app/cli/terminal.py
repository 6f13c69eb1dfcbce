"""What the commands share on a terminal: progress, Ctrl-C, sizes."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal(
    words: str = "stopping after this batch; once more to stop at once",
) -> Iterator[threading.Event]:
    """Ctrl-C or a polite kill ends the run after the current batch; a second one ends it at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler)
        print(f"\n{words}", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_shown() -> Iterator[Callable[[str, int, int], None]]:
    """show(what, done, total): a bar for each kind of work, with its time left (total 0: unknown);
    where there is no terminal, a line every ten seconds."""
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
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def show(what: str, done: int, total: int) -> None:
            nonlocal last_line
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)
            if not console.is_terminal and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                of = f" of {total:,}" if total else ""
                print(f"{what}: {done:,}{of}", file=sys.stderr)

        yield show


def size(count: float) -> str:
    """Bytes as people read them: 1234567 -> "1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
