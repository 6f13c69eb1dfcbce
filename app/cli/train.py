"""`clipkit train`: fine-tune the towers on your own captions, with a report before and after."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.terminal import command_line, examples, progress_shown, stop_on_signal
from app.paths import features_folder
from clipkit.errors import InputError
from clipkit.wording import duration, printable

if TYPE_CHECKING:
    from clipkit.training import Progress, RunSummary, TrainConfig
    from data_prep.build import Progress as BuildProgress

EPILOG = examples(
    "clipkit train dataset",
    "clipkit train dataset --recipe lora --epochs 4",
    "clipkit train dataset --config run.toml --batch 4096",
    "clipkit train --resume runs/mine",
    "torchrun --nproc-per-node 4 -m app.cli train dataset --recipe full",
    "clipkit train --options",
)

# Every field of TrainConfig is a flag, so that none is listed twice.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="A dataset folder, or captioned pictures in any form that `clipkit data build` reads.",
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
        typer.Option("--model", metavar="SPEC", help="The model to start from. Default: builtin."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of options; flags override it.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Resume a run that was stopped or killed."),
    ] = None,
    generic: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="What the model should not forget: captions or classes. Default: the sample gallery.",
        ),
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not compare the result with the start model.")
    ] = False,
    options: Annotated[
        bool, typer.Option("--options", help="List every option of a run with its default.")
    ] = False,
) -> None:
    """Fine-tune the towers on your own captions, and measure the gain.

    The result is runs/NAME: a checkpoint for `clipkit index --model runs/NAME`, and report.html with
    recall before and after. DATA that is not a dataset yet is built into one first, in runs/.datasets.
    Every option of `--options` is a flag too: --learning-rate 1e-4. Stop with Ctrl-C, go on with
    --resume.
    """
    from clipkit.training import TrainConfig
    from clipkit.training import resume as resume_run
    from clipkit.training import train as train_run

    flags = _flags(arguments or [], TrainConfig)
    if options:
        print("\n".join(_listed(TrainConfig, recipe or "heads")))
        return
    named = {"recipe": recipe, "start": model}
    flags |= {key: value for key, value in named.items() if value is not None}
    if resume is not None and (flags or config is not None):
        raise InputError("--resume goes on with the run's own options; give no others")
    command = command_line()
    with stop_on_signal("stopping after this step; once more to stop at once") as stop:
        if resume is not None:
            with _progress() as show:
                summary = resume_run(resume.expanduser(), on_progress=show, stop=stop)
        else:
            chosen = (
                TrainConfig.from_toml(config, flags)
                if config is not None
                else TrainConfig.from_mapping(flags)
            )
            chosen = replace(chosen, data=_dataset(chosen, command, stop))
            with _progress() as show:
                summary = train_run(chosen, on_progress=show, stop=stop, command=command)
        if _is_first_process():
            _print_summary(summary)
        if summary.stopped:
            raise typer.Exit(130)
        if not no_report and _is_first_process():
            _report(summary, generic, stop)


def _dataset(config: TrainConfig, command: str, stop: threading.Event) -> str:
    """Return config.data if it is a dataset, else the dataset that is built from it, and print which.

    It is built once, in OUT/.datasets, and used again as long as the source is unchanged.
    """
    from clipkit.training import is_dataset
    from data_prep.build import build_once

    data = Path(config.data).expanduser()
    if is_dataset(data):
        return str(data)
    with progress_shown() as show:

        def on_progress(progress: BuildProgress) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            show(progress.phase, progress.done, progress.total or progress.done)

        try:
            folder, built = build_once(
                config.data,
                Path(config.out) / ".datasets",
                command=command,
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            print("stopped before the dataset was built", file=sys.stderr)
            raise typer.Exit(130) from None
    if _is_first_process():
        state = "built before, unchanged"
        if built is not None:
            rejected = sum(sum(reasons.values()) for reasons in built.rejected.values())
            state = f"{sum(built.pictures.values()):,} pictures, {built.captions:,} captions"
            state += f"; {rejected:,} rejected, see rejected.jsonl there" if rejected else ""
        print(f"dataset of {printable(config.data)}: {printable(str(folder))} ({state})")
    return str(folder)


def _flags(arguments: list[str], config: type[TrainConfig]) -> dict[str, Any]:
    """Parse ["photos", "--batch", "64", "--no-flip"] -> {"data": "photos", "batch": 64, "flip": False}.

    Raises InputError for a second dataset and for a flag without its value.
    """
    switches = {item.name for item in fields(config) if item.type == "bool"}
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            if "data" in flags:
                raise InputError(
                    f"{flag!r} is not understood beside dataset {flags['data']!r}; "
                    "options are written --batch 64"
                )
            flags["data"] = flag
            continue
        key, equals, _ = flag[2:].replace("-", "_").partition("=")
        if equals:
            flags[key] = _value(flag.partition("=")[2])
        elif key in switches:
            flags[key] = True
        elif key.removeprefix("no_") in switches:
            flags[key.removeprefix("no_")] = False
        elif rest:
            flags[key] = _value(rest.pop(0))
        else:
            raise InputError(f"{flag} needs a value, such as {flag} 1")
    return flags


def _value(text: str) -> Any:
    """Parse a value as TOML does: a number, true or false, else text."""
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
    """Show a run's progress as a bar, with a line for each evaluation and warning."""
    printed: float | None = None
    with progress_shown() as bar:

        def show(progress: Progress) -> None:
            nonlocal printed
            if progress.phase == "features":
                bar(f"features of {progress.message}", progress.done, progress.total)
                return
            bar(progress.phase, progress.done, progress.total)
            if progress.message:
                print(f"warning: {progress.message}", file=sys.stderr)
            if progress.phase == "training" and progress.mean_recall not in (None, printed):
                printed = progress.mean_recall
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


def _print_summary(summary: RunSummary) -> None:
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
    """Write report.html: the start and the result on held-out pictures, and on generic data."""
    from clipkit.lazy_encoder import LazyEncoder
    from data_prep import gallery
    from eval.compare import training_report
    from eval.data import open_captioned, open_labelled
    from eval.features import FeatureCache, Stopped
    from eval.session import Session

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
        general = open_captioned(generic or str(gallery.folder()))
    except InputError:
        general = open_labelled(str(generic))
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
                general,
                session=Session(FeatureCache(features_folder(None)), on_progress=show, stop=stop),
            )
    except Stopped:
        print("stopped before the report was complete; the checkpoint is complete")
        raise typer.Exit(130) from None
    print("\n".join(result.lines()))
    print(f"report: {printable(str(summary.folder / 'report.html'))}")


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
