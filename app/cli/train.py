"""`clipkit train`: the towers learn from your own captions, and a report proves what it brought."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.terminal import duration, printable, progress_shown, stop_on_signal
from app.paths import features_folder
from clipkit.errors import InputError

if TYPE_CHECKING:
    from clipkit.training import Progress, RunSummary, TrainConfig

EPILOG = (
    "Examples:  clipkit train dataset   ·   clipkit train dataset --recipe lora --epochs 4   ·   "
    "clipkit train dataset --config run.toml --batch 4096   ·   clipkit train --resume runs/mine   ·   "
    "torchrun --nproc-per-node 4 -m app.cli train dataset --recipe full   ·   clipkit train --options"
)

# Every option of a run is a flag, without being listed twice.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATASET", show_default=False, help="As `clipkit data build` writes it."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="heads: the last layers, on features computed once (minutes); lit: the text tower; "
            "lora: adapters in both; full: everything. Default: heads."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SPEC", help="Where to start. Default: builtin."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of options; flags win.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with a run that was stopped or killed."),
    ] = None,
    generic: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="What the model should not forget: captions or classes. Default: the sample gallery.",
        ),
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Leave out the comparison with the start.")
    ] = False,
    options: Annotated[
        bool, typer.Option("--options", help="List every option of a run, and its default.")
    ] = False,
) -> None:
    """Fine-tune the towers on your own captions, and prove what it brought.

    The result is runs/NAME: a checkpoint for `clipkit index --model runs/NAME`, and report.html with
    recall before and after. Every option of `--options` is a flag too: --learning-rate 1e-4. Stop
    with Ctrl-C, go on with --resume.
    """
    from clipkit.training import TrainConfig
    from clipkit.training import resume as resume_run
    from clipkit.training import train as train_run

    given = _flags(arguments or [], TrainConfig)
    if options:
        print("\n".join(_listed(TrainConfig, recipe or "heads")))
        return
    told = {"recipe": recipe, "start": model}
    given |= {key: value for key, value in told.items() if value is not None}
    with stop_on_signal("stopping after this step; once more to stop at once") as stop:
        with _progress() as show:
            if resume is not None:
                if given or config is not None:
                    raise InputError("--resume goes on with the run's own options; give no others")
                summary = resume_run(resume.expanduser(), on_progress=show, stop=stop)
            else:
                command = shlex.join(["clipkit", *sys.argv[1:]])
                chosen = (
                    TrainConfig.from_toml(config, given)
                    if config is not None
                    else TrainConfig.from_mapping(given)
                )
                summary = train_run(chosen, on_progress=show, stop=stop, command=command)
        if _is_first_process():
            _told(summary)
        if summary.stopped:
            raise typer.Exit(130)
        if not no_report and _is_first_process():
            _report(summary, generic, stop)


def _flags(arguments: list[str], config: type[TrainConfig]) -> dict[str, Any]:
    """["photos", "--batch", "64", "--no-flip"] -> {"data": "photos", "batch": 64, "flip": False}"""
    switches = {item.name for item in fields(config) if item.type == "bool"}
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            if "data" in given:
                raise InputError(
                    f"{flag!r} is not understood beside dataset {given['data']!r}; "
                    "options look like --batch 64"
                )
            given["data"] = flag
            continue
        key, equals, _ = flag[2:].replace("-", "_").partition("=")
        if equals:
            given[key] = _value(flag.partition("=")[2])
        elif key in switches:
            given[key] = True
        elif key.removeprefix("no_") in switches:
            given[key.removeprefix("no_")] = False
        elif rest:
            given[key] = _value(rest.pop(0))
        else:
            raise InputError(f"{flag} needs a value, such as {flag} 1")
    return given


def _value(text: str) -> Any:
    """As TOML would read it: a number, true or false, else a text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _listed(config: type[TrainConfig], recipe: str) -> Iterator[str]:
    from clipkit.training import RECIPES

    if recipe not in RECIPES:
        raise InputError(f"recipe is {recipe!r}; use one of {', '.join(RECIPES)}")
    yield f"defaults of recipe {recipe}; in a TOML file a line is: batch = 1024"
    for item in fields(config):
        default = RECIPES[recipe].get(item.name, item.default)
        shown = "" if default in ("", ...) or "MISSING" in repr(default) else f" [{default}]"
        yield f"  --{item.name.replace('_', '-'):<26} {item.metadata['help']}{shown}"


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A run's progress as a bar, and a line for each evaluation and warning."""
    said: float | None = None
    with progress_shown() as bar:

        def show(progress: Progress) -> None:
            nonlocal said
            if progress.phase == "features":
                bar(f"features of {progress.message}", progress.done, progress.total)
                return
            bar(progress.phase, progress.done, progress.total)
            if progress.message:
                print(f"warning: {progress.message}", file=sys.stderr)
            if progress.phase == "training" and progress.mean_recall not in (None, said):
                said = progress.mean_recall
                print(_line(progress), file=sys.stderr)

        yield show


def _line(progress: Progress) -> str:
    loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
    left = "" if progress.eta_seconds is None else f", {duration(progress.eta_seconds)} left"
    recall, best = progress.mean_recall or 0.0, progress.best_recall or 0.0
    return (
        f"step {progress.done:,} of {progress.total:,}{loss}, "
        f"mean recall {recall:.1%} (best {best:.1%}){left}"
    )


def _told(summary: RunSummary) -> None:
    for note in summary.notes:
        print(note)
    place = printable(str(summary.folder))
    if summary.stopped:
        print(f"stopped after step {summary.steps:,}; go on with: clipkit train --resume {place}")
        return
    if summary.before and summary.after:
        for name, before in summary.before.items():
            print(f"  {name:<22} {before:6.1%} -> {summary.after[name]:6.1%}")
    print(f"{summary.steps:,} steps in {duration(summary.seconds)}; checkpoint: {place}")
    print(f"use it: clipkit index FOLDER --model {place}")


def _report(summary: RunSummary, generic: str | None, stop: Any) -> None:
    """Before and after on pictures that training did not see, and on what should not be forgotten."""
    from clipkit.lazy_encoder import LazyEncoder
    from data_prep import gallery
    from eval.data import open_captioned, open_labelled
    from eval.features import FeatureCache, Stopped
    from eval.training_report import training_report

    facts = json.loads((summary.folder / "config.json").read_text(encoding="utf-8"))
    config = facts["config"]
    try:
        own = open_captioned(config["data"])
    except InputError as error:
        print(f"no report: {error}")
        return
    if own.split not in ("test", "validation"):
        print("no report: the dataset has neither a test nor a validation split to compare on")
        return
    try:
        kept = open_captioned(generic or str(gallery.folder()))
    except InputError:
        kept = open_labelled(str(generic))
    encoders = [
        LazyEncoder(spec, device=config["device"])
        for spec in (config["start"], str(summary.folder))
    ]
    try:
        with progress_shown() as show:
            result = training_report(
                summary.folder,
                encoders,
                own,
                kept,
                cache=FeatureCache(features_folder(None)),
                on_progress=show,
                stop=stop,
            )
    except Stopped:
        print("stopped before the report was complete; the checkpoint is whole")
        raise typer.Exit(130) from None
    print("\n".join(result.lines()))
    print(f"report: {printable(str(summary.folder / 'report.html'))}")


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
