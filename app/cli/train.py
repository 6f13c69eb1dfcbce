"""`clipkit train`: fine-tune the towers on your own captions, with a report before and after."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from app.cli.terminal import (
    MORE,
    Command,
    QuietOption,
    choice,
    command_line,
    device_option,
    examples,
    model_specs,
    number,
    progress_shown,
    stop_on_signal,
)
from app.paths import features_folder
from clipkit.errors import InputError
from clipkit.training.config import RECIPES, TrainConfig
from clipkit.wording import duration, printable

if TYPE_CHECKING:
    from clipkit.training import Progress, RunSummary
    from data_prep.build import Progress as BuildProgress

EPILOG = examples(
    "clipkit train dataset",
    "clipkit train dataset --recipe lora --epochs 4",
    "clipkit train dataset --config run.toml --batch 4096",
    "clipkit train --resume runs/mine",
    "torchrun --nproc-per-node 4 -m app.cli train dataset --recipe full",
    "clipkit train --options",
)

# The options that `clipkit train --help` shows; `--options` lists them all.
SHOWN = "epochs batch learning_rate name out device precision".split()
# These have options of another name or kind.
_OWN = {"data": "DATA", "start": "--model", "recipe": "--recipe"}


class TrainCommand(Command):
    """`train`: its help leaves out the options that are rarely needed, completion does not."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        left_out = {item.name for item in fields(TrainConfig)} - {*SHOWN, *_OWN}
        for param in self.params:
            param.hidden = param.name in left_out
        super().format_help(ctx, formatter)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add every field of TrainConfig to a command's options, which it gets as `flags`.

    Typer reads them from the function's signature. One that was not given is not in `flags`: its
    default depends on the recipe or the configuration file.
    """
    hints = get_type_hints(TrainConfig)
    flags = [
        Parameter(
            item.name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[hints[item.name] | None, _option(item, hints[item.name])],
        )
        for item in fields(TrainConfig)
        if item.name not in _OWN
    ]
    own = signature(command, eval_str=True).parameters.values()
    parameters = [p for p in own if p.name != "flags"] + flags

    @wraps(command)
    def run(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        command(**values, flags={name: v for name, v in given.items() if v is not None})

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _option(item: Field[Any], kind: Any) -> Any:
    """Return the option of a field of TrainConfig."""
    if item.name == "device":
        return device_option
    flag = f"--{item.name.replace('_', '-')}"
    text = item.metadata["help"]
    help = f"{text[0].upper()}{text[1:]}."
    default = "by recipe" if item.default is MISSING else str(item.default)
    if kind is bool:
        return typer.Option(f"{flag}/--no-{flag[2:]}", help=help, show_default=default)
    if kind in (int, float):
        return number(flag, help=help, kind=kind, default=default, **item.metadata["limits"])
    if choices := get_args(kind):
        return choice(flag, choices, help=help, show_default=default, rich_help_panel=MORE)
    if item.name == "loss":
        return choice(flag, _losses, help=help, show_default=default)
    metavar = "DIR" if item.name == "out" else "NAME"
    return typer.Option(flag, metavar=metavar, help=help, show_default=default or True)


def _losses() -> list[str]:
    from clipkit.losses import LOSSES

    return ["auto", *LOSSES]


@with_flags
def train(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="A dataset folder, or captioned pictures in any form that `clipkit data build` reads.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        choice(
            "--recipe",
            RECIPES,
            help="heads: the last layers, on features computed once (minutes); lit: the text tower; "
            "lora: adapters in both; full: everything.",
            show_default="heads",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SPEC",
            autocompletion=model_specs,
            help="The model to start from.",
            show_default="builtin",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of options; flags override it.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            autocompletion=lambda: model_specs()[1:],
            help="Resume a run that was stopped or killed.",
        ),
    ] = None,
    generic: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="What the model should not forget: captions or classes.",
            show_default="the sample gallery",
        ),
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not compare the result with the start model.")
    ] = False,
    options: Annotated[
        bool, typer.Option("--options", help="List every option of a run with its default.")
    ] = False,
    quiet: QuietOption = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Fine-tune the towers on your own captions, and measure the gain.

    The result is runs/NAME: a checkpoint for `clipkit index --model runs/NAME`, and report.html with
    recall before and after. DATA that is not a dataset yet is built into one first, in runs/.datasets.
    Stop with Ctrl-C, go on with --resume. `clipkit train --options` lists thirty more options.
    """
    if options:
        for line in _listed(recipe or "heads"):
            print(fill(line, get_terminal_size().columns, subsequent_indent=" " * 31))
        return
    from clipkit.towers import choose_device
    from clipkit.training import resume as resume_run
    from clipkit.training import train as train_run

    named = {"data": data, "recipe": recipe, "start": model}
    flags |= {key: value for key, value in named.items() if value is not None}
    if resume is not None and (flags or config is not None):
        raise InputError("--resume goes on with the run's own options; give no others")
    command = command_line()
    with stop_on_signal("stopping after this step; once more to stop at once") as stop:
        if resume is not None:
            with _progress(quiet) as show:
                summary = resume_run(resume.expanduser(), on_progress=show, stop=stop)
        else:
            chosen = (
                TrainConfig.from_toml(config, flags)
                if config is not None
                else TrainConfig.from_mapping(flags)
            )
            choose_device(chosen.device)  # a configuration file's, too, before a dataset is built
            chosen = replace(chosen, data=_dataset(chosen, command, stop, quiet))
            with _progress(quiet) as show:
                summary = train_run(chosen, on_progress=show, stop=stop, command=command)
        if _is_first_process():
            _print_summary(summary)
        if summary.stopped:
            raise typer.Exit(130)
        if not no_report and _is_first_process():
            _report(summary, generic, stop, quiet)


def _dataset(config: TrainConfig, command: str, stop: threading.Event, quiet: bool) -> str:
    """Return config.data if it is a dataset, else the dataset that is built from it, and print which.

    It is built once, in OUT/.datasets, and used again as long as the source is unchanged.
    """
    from clipkit.training import is_dataset
    from data_prep.build import build_once

    data = Path(config.data).expanduser()
    if is_dataset(data):
        return str(data)
    with progress_shown(quiet=quiet) as show:

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


def _listed(recipe: str) -> Iterator[str]:
    """Yield a line for each option of a run, with its default in `recipe`."""
    yield f"defaults of recipe {recipe}; in a TOML file a line is: batch = 1024"
    for item in fields(TrainConfig):
        default = RECIPES[recipe].get(item.name, item.default)
        shown = "" if default in ("", MISSING) else f" [{default}]"
        flag = _OWN.get(item.name, f"--{item.name.replace('_', '-')}")
        yield f"  {flag:<28} {item.metadata['help']}{shown}"


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a run's progress as a bar, with a line for each evaluation and warning."""
    printed: float | None = None
    with progress_shown(quiet=quiet) as bar:

        def show(progress: Progress) -> None:
            nonlocal printed
            if progress.phase == "features":
                bar(f"features of {progress.message}", progress.done, progress.total)
                return
            bar(progress.phase, progress.done, progress.total)
            if progress.message:
                print(f"warning: {progress.message}", file=sys.stderr)
            new = progress.phase == "training" and progress.mean_recall not in (None, printed)
            if new and not quiet:
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


def _report(summary: RunSummary, generic: str | None, stop: Any, quiet: bool) -> None:
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
        with progress_shown(quiet=quiet) as show:
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
