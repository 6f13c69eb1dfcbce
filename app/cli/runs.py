"""`clipkit runs`: list training runs with what each brought, and open a run's report."""

from __future__ import annotations

import json
import re
import webbrowser
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from app.cli.terminal import JsonOption, examples, group
from clipkit.errors import InputError
from clipkit.wording import percent, printable

if TYPE_CHECKING:
    from typer._click import Context

RECALL = "text_to_image/R@1"
OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "mixed": "better and worse",
    "same": "no difference",
    "": "not compared",
}


class _ListByDefault(TyperGroup):
    """Take `clipkit runs [FOLDER]` for `clipkit runs list [FOLDER]`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs = group(
    "runs",
    "List training runs with what each brought, newest first; open a run's report.",
    "clipkit runs",
    "clipkit runs open",
)
runs.info.cls = _ListByDefault


@dataclass(frozen=True, slots=True)
class Run:
    """A training run, as far as its folder says."""

    folder: Path
    created_at: str  # UTC, ISO
    recipe: str
    start: str
    data: str  # the dataset's folder
    pictures: int  # trained on
    finished: bool  # if not, it can be resumed
    step: int  # the last one, or the one to resume from
    steps: int | None  # planned; None if the run's version did not write it
    split: str = ""  # that before and after were measured on: test, or validation; empty: none
    before: float | None = None  # text to image R@1
    after: float | None = None
    outcome: str = ""  # a key of OUTCOMES
    test_data: str = ""  # fingerprint: figures of runs that share it compare
    best: bool = False  # the highest `after` of two runs or more with the same test data


def runs_in(folder: Path) -> list[Run]:
    """Read the runs in a folder, the newest first. Raises InputError if there is none."""
    found = [run for path in folder.glob("*/config.json") if (run := _run(path.parent)) is not None]
    if not found:
        raise InputError(
            f"no training runs in {folder}; name their folder, or start one: clipkit train DATA"
        )
    shared = Counter(run.test_data for run in found if run.test_data)
    highest: dict[str, float] = {}
    for run in found:
        if shared[run.test_data] > 1 and run.after is not None:
            highest[run.test_data] = max(run.after, highest.get(run.test_data, 0.0))
    found = [replace(run, best=run.after == highest.get(run.test_data, -1.0)) for run in found]
    return sorted(found, key=lambda run: (run.created_at, run.folder.name), reverse=True)


def _run(folder: Path) -> Run | None:
    """Read a run's folder; None if config.json is not a run's."""
    facts, summary, verdict = (
        _content(folder / f"{name}.json") for name in ("config", "summary", "verdict")
    )
    try:
        config = facts["config"]
        run = Run(
            folder,
            str(facts.get("created_at", "")),
            str(config["recipe"]),
            str(config["start"]),
            str(config["data"]),
            int(facts["data"]["pictures"]),
            bool(summary),
            int(summary.get("steps", _resumable_step(folder))),
            facts.get("steps"),
        )
        if verdict:
            keys = ("split", "before", "after", "outcome")
            fields = {key: verdict[key] for key in keys}
            return replace(run, **fields, test_data=verdict["fingerprint"])
        if RECALL in (summary.get("before") or {}):  # methods without captions have another measure
            before, after = summary["before"][RECALL], summary["after"][RECALL]
            return replace(run, split="validation", before=before, after=after)
        return run
    except (KeyError, TypeError, ValueError):
        return None


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _resumable_step(folder: Path) -> int:
    names = (path.parent.name for path in folder.glob("checkpoints/step_*/training_state.pt"))
    return max((int(n[5:]) for n in names if re.fullmatch(r"step_\d+", n)), default=0)


@runs.command("list", epilog=examples("clipkit runs", "clipkit runs list /data/runs --json"))
def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The folder of runs.", show_default=True)
    ] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List training runs, newest first: data, state, and the gain in text to image R@1.

    A star marks the highest R@1 among runs with the same test data.
    """
    found = runs_in(folder.expanduser())
    if as_json:
        print(json.dumps([{**asdict(run), "folder": str(run.folder)} for run in found], indent=2))
    else:
        _print(found)


@runs.command("open", epilog=examples("clipkit runs open", "clipkit runs open mine"))
def open_report(
    name: Annotated[
        str,
        typer.Argument(metavar="[NAME]", help="A run's name or folder. Default: the newest."),
    ] = "",
    folder: Annotated[Path, typer.Option("--in", metavar="DIR", help="The folder of runs.")] = Path(
        "runs"
    ),
    path_only: Annotated[bool, typer.Option("--print", help="Only print the path.")] = False,
) -> None:
    """Open a run's report in the browser, and print its path."""
    folder = folder.expanduser()
    if name:
        run = folder / name if (folder / name).is_dir() else Path(name).expanduser()
        if not (run / "config.json").is_file():
            known = ", ".join(other.folder.name for other in runs_in(folder)[:8])
            raise InputError(f"no run {name!r} in {folder}; there are {known}")
    else:
        reported = (r.folder for r in runs_in(folder) if (r.folder / "report.html").is_file())
        run = next(reported, runs_in(folder)[0].folder)
    report = (run / "report.html").absolute()
    if not report.is_file():
        raise InputError(f"{run} has no report yet; make it with: clipkit train --resume {run}")
    print(printable(str(report)))
    if not path_only:
        webbrowser.open(report.as_uri())


def _print(found: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, right in (("run", 0), ("started", 0), ("recipe", 0), ("data", 0), ("pictures", 1),
                        ("R@1", 1), ("result", 0)):  # fmt: skip
        wrapped = name in ("run", "data", "result")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not wrapped)
    for run in found:
        star = " *" if run.best else ""
        cells = (
            f"{run.folder.name}{star}", _local(run.created_at), run.recipe,
            _data_name(run.data), f"{run.pictures:,}", _gain(run), _state(run),
        )  # fmt: skip
        table.add_row(*(Text(printable(cell)) for cell in cells))
    # Where nobody looks, no cell is broken over lines.
    console.print(table, width=None if console.is_terminal else 240)
    print()
    if any(run.best for run in found):
        print("* the highest R@1 of runs with the same test data; a test tells whether by chance:")
        print("  clipkit eval compare RUN RUN --data DATASET")
    if len({run.test_data for run in found if run.split}) > 1:
        print("Runs with other test data, or none, do not compare by R@1.")
    unfinished = next((run for run in found if not run.finished), None)
    if unfinished is not None:
        print(f"go on with one: clipkit train --resume {printable(str(unfinished.folder))}")
    print("open a report: clipkit runs open NAME")


def _local(created_at: str) -> str:
    """Return a UTC time as "28 Nov 04:22" here."""
    try:
        return f"{datetime.fromisoformat(created_at).astimezone():%d %b %H:%M}"
    except ValueError:
        return created_at


def _gain(run: Run) -> str:
    if run.before is None or run.after is None:
        return "–"
    return f"{percent(run.before).removesuffix(' %')} → {percent(run.after)}"


def _state(run: Run) -> str:
    if run.finished:
        note = " (validation)" if run.split == "validation" else ""
        return OUTCOMES.get(run.outcome, run.outcome) + note
    return f"unfinished, step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")


def _data_name(data: str) -> str:
    """Return a dataset's name; of one that `clipkit train` built without the hash behind it."""
    path = Path(data)
    return path.name.rpartition("-")[0] if path.parent.name == ".datasets" else path.name
