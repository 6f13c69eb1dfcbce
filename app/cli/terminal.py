"""Shared by the commands: options and their values, help, progress bar, Ctrl-C, sizes."""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args

import typer
from platformdirs import user_cache_path, user_data_path
from typer.core import TyperCommand, TyperGroup

from clipkit.errors import InputError, check_choice, check_limits
from clipkit.training.config import Precision
from clipkit.wording import duration

LINE_SECONDS = 10  # between two lines of progress where stderr is not a terminal
MORE = "More options"  # the panel of options that are rarely needed


# ---- options: a wrong value is refused with the same sentence by every command, before any work


def number(
    name: str,
    *,
    help: str,
    kind: Callable[[str], float] = int,
    default: str | None = None,
    more: bool = False,
    panel: str | None = None,
    **limits: float,
) -> Any:
    """Return a numeric option. `default` says in words what is done without it, `limits` are those
    of `check_limits`, `more` puts it into that panel, `panel` into another one."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} is {text!r}; it must be {what}") from None
        check_limits(name, value, **limits)
        return value

    return typer.Option(
        name,
        metavar="N",
        parser=parse,
        help=help,
        show_default=default or True,
        rich_help_panel=MORE if more else panel,
    )


def choice(name: str, choices: Iterable[str] | Callable[[], list[str]], **more: Any) -> Any:
    """Return an option that takes one of `choices`, which the shell completes."""
    values = choices if callable(choices) else lambda: list(choices)

    def parse(text: str) -> str:
        check_choice(name, text, values())
        return text

    return typer.Option(name, **{"metavar": "NAME", **more}, parser=parse, autocompletion=values)


def model_option(name: str = "--model", *, help: str, **more: Any) -> Any:
    """Return an option that names a model, which the shell completes."""
    return typer.Option(name, **{"metavar": "SPEC", **more}, autocompletion=model_specs, help=help)


def default_folder(folder: Path) -> str:
    """Return a folder as the help shows it, with ~ for the user's home."""
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _device(text: str) -> str:
    """Check a device's name. Only a name that needs it waits for torch."""
    if text not in ("auto", "cpu"):
        from clipkit.towers import choose_device

        choose_device(text)
    return text


def model_specs() -> list[str]:
    """Return the models that the shell completes: the built-in one, and the runs in ./runs."""
    from clipkit.checkpoint import RUN_RESULT

    return ["builtin", *(str(path.parent) for path in sorted(Path("runs").glob(f"*/{RUN_RESULT}")))]


IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        envvar="CLIPKIT_INDEX",
        help="The index's folder.",
        show_default=default_folder(user_data_path("clipkit") / "index"),
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        envvar="CLIPKIT_CACHE",
        help="The feature cache; see clipkit cache.",
        show_default=default_folder(user_cache_path("clipkit") / "features"),
        rich_help_panel=MORE,
    ),
]
device_option: Any = typer.Option(
    "--device",
    metavar="NAME",
    parser=_device,
    autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
    help="Where to compute: auto, cpu, cuda, cuda:1, mps.",
    rich_help_panel=MORE,
)
DeviceOption = Annotated[str, device_option]
PrecisionOption = Annotated[
    str,
    choice(
        "--precision",
        get_args(Precision),
        help="auto, float32, bfloat16 or float16; CLIPKIT_PRECISION overrides auto.",
        rich_help_panel=MORE,
    ),
]


def runtimes() -> list[str]:
    """Return what --runtime takes."""
    from clipkit.runtimes import RUNTIMES

    return ["auto", "torch", *RUNTIMES]


RuntimeOption = Annotated[
    str,
    choice(
        "--runtime",
        runtimes,
        help="What computes a model that clipkit export wrote: onnx, openvino, or auto: onnx.",
        rich_help_panel=MORE,
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=MORE)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")]
WorkersOption = Annotated[
    int | None,
    number("--workers", help="Decode threads.", default="one per core", low=1, more=True),
]
MegapixelsOption = Annotated[
    float,
    number("--max-megapixels", help="Skip larger pictures.", kind=float, above=0, more=True),
]


# ---- commands and their help


def examples(*commands: str) -> str:
    """Return the epilog of a command's help: one example a line."""
    return "Examples:\n\n" + "\n".join(commands)


class Help:
    """Format help: shared by commands and groups of commands."""

    help: str | None

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; neither a switch nor an argument shows a type in the help."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            descriptor = getattr(param, "type_descriptor", None)
            if descriptor is not None and (convert := _conversion(descriptor)) is not None:
                param._runtime_param = _Conversion(convert)
            if param.param_type_name == "argument":
                param.display_type_rich = lambda **_: None
            elif param.is_flag:
                param.metavar = ""
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, its paragraphs fitted to the terminal and not to the source's lines."""
        paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        super().format_help(ctx, formatter)  # type: ignore[misc]


class _Conversion:
    """The conversion of an option's text to its value, in place of Typer's, which imports pydantic: a
    third of the time until a command begins."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ARG002
        if param.multiple or param.nargs == -1:
            return tuple(map(self._convert, value or ()))
        return None if value is None else self._convert(value)


def _conversion(descriptor: Any) -> Callable[[Any], Any] | None:
    """Return an option's parser, or its type; None leaves the conversion to Typer."""
    if descriptor.parameter_info.parser is not None:
        parser: Callable[[Any], Any] = descriptor.parameter_info.parser
        return parser
    kind = get_args(descriptor.annotation)[0] if descriptor.is_list else descriptor.annotation
    return kind if kind in (str, Path, bool) else None  # a switch is a bool already, or None


class Command(Help, TyperCommand):
    """A command."""


class Group(Help, TyperGroup):
    """A group of commands."""


class Commands(typer.Typer):
    """A Typer application whose commands are of the class Command."""

    def command(self, name: str | None = None, *, cls: Any = Command, **options: Any) -> Any:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, cls=cls, **options)


def group(name: str, help: str, *commands: str) -> Commands:
    """Return an empty group of commands, whose help ends with the example `commands`."""
    return Commands(
        name=name,
        cls=Group,
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


class Stop(threading.Event):
    """Set by Ctrl-C or SIGTERM. `exit_code` is what shells report for it: 130 or 143."""

    exit_code = 128 + signal.SIGINT


@contextmanager
def stop_on_signal(
    message: str = "stopping after this batch; press Ctrl-C again to stop at once",
    *,
    safe_to_kill: bool = False,
) -> Iterator[Stop]:
    """Set the event on Ctrl-C or SIGTERM, so that the run ends soundly; a second one ends it at once.

    With `safe_to_kill` the second one kills the process, in the middle of a computation too.
    """
    stop = Stop()

    def handle(number: int, _frame: object) -> None:
        if not stop.is_set():
            stop.exit_code = 128 + number
        stop.set()
        for other in before:
            signal.signal(other, signal.SIG_DFL if safe_to_kill else signal.default_int_handler)
        with suppress(RuntimeError):  # stderr was being written to
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hid it
            print(f"{show_cursor}\n{message}", file=sys.stderr)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_shown(*, quiet: bool = False) -> Iterator[ShowProgress]:
    """Show progress on stderr: a bar for each kind of work, with the time left; nothing if `quiet`.

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
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bars:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def show(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal last_line
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None, note=note)
            bars.update(tasks[what], completed=done, total=total or None, note=note)
            if quiet or console.is_terminal:
                return
            if time.monotonic() - last_line > LINE_SECONDS:
                last_line = time.monotonic()
                of = f" of {total:,}" if total else ""
                task = next(task for task in bars.tasks if task.id == tasks[what])
                left = task.time_remaining
                parts = ("" if not left else f"{duration(left)} left", note)
                print(", ".join((f"{what}: {done:,}{of}", *filter(None, parts))), file=sys.stderr)

        yield show


def size(count: float) -> str:
    """Return a number of bytes as people read it: 1234567 -> "1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
