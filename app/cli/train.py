"""`clipkit train`: fine-tune the towers on your own captions, with a report before and after."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.terminal import command_line, examples, progress_shown, stop_on_signal
from app.paths import features_folder
from clipkit.errors import InputError
from clipkit.wording import duration, percent, printable

if TYPE_CHECKING:
    from clipkit.training import Progress, RunSummary, TrainConfig
    from data_prep.build import Progress as BuildProgress
    from eval.data import Captioned, Labelled

EPILOG = examples(
    "clipkit train dataset",
    "clipkit train dataset --recipe lora --epochs 4",
    "clipkit train dataset --config run.toml --batch 4096",
    "clipkit train --resume runs/mine",
    "torchrun --nproc-per-node 4 -m app.cli train dataset --recipe full",
    "clipkit train --options",
)

TIMED_STEPS = 3  # after which the time left is worth saying
LONG_SECONDS = 180.0

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
            folder = resume.expanduser()
            if (folder / "summary.json").is_file():
                _finished(folder, generic, stop, no_report=no_report)
                return
            with _progress() as show:
                summary = resume_run(folder, on_progress=show, stop=stop)
        else:
            chosen = (
                TrainConfig.from_toml(config, flags)
                if config is not None
                else TrainConfig.from_mapping(flags)
            )
            chosen = replace(chosen, data=_dataset(chosen, command, stop))
            with _progress(_slow(chosen)) as show:
                summary = train_run(chosen, on_progress=show, stop=stop, command=command)
        if not _is_first_process():
            raise typer.Exit(130 if summary.stopped else 0)
        for note in summary.notes:
            print(note)
        place = printable(str(summary.folder))
        if summary.stopped:
            print(
                f"stopped after step {summary.steps:,}; go on with: clipkit train --resume {place}"
            )
            raise typer.Exit(130)
        print(
            f"{place}: {summary.steps:,} steps of {summary.recipe} in {duration(summary.seconds)}\n"
        )
        if no_report or not _report(summary.folder, generic, stop):
            _print_validation(summary)


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


def _slow(config: TrainConfig) -> str:
    """Return why a run may take long, or "" if it will not."""
    from clipkit.towers import choose_device

    if config.recipe == "heads" or choose_device(config.device).type != "cpu":
        return ""
    gpu = "; a GPU would be used if there were one" if config.device == "auto" else ""
    return f"recipe {config.recipe} is slow on a CPU, recipe heads takes minutes{gpu}"


@contextmanager
def _progress(slow: str = "") -> Iterator[Callable[[Progress], None]]:
    """Show a run's progress as a bar, with a line for each evaluation and warning.

    `slow`: a reason to print once the time that is left is known, if it is long.
    """
    printed: int | None = None
    with progress_shown() as bar:

        def show(progress: Progress) -> None:
            nonlocal printed, slow
            if progress.phase == "features":
                bar(f"features of {progress.message}", progress.done, progress.total)
                return
            bar(progress.phase, progress.done, progress.total)
            if progress.message:
                print(f"warning: {progress.message}", file=sys.stderr)
            if slow and progress.phase == "training" and progress.done >= TIMED_STEPS:
                if (left := progress.eta_seconds or 0.0) > LONG_SECONDS:
                    print(f"about {duration(left)} left: {slow}", file=sys.stderr)
                slow = ""
            if progress.evaluated not in (None, printed):
                printed = progress.evaluated
                print(_line(progress), file=sys.stderr)

        yield show


def _line(progress: Progress) -> str:
    """Return what the last evaluation showed."""
    where = f"step {progress.done:,} of {progress.total:,}" if progress.done else "start"
    line = f"{where}: validation loss {progress.validation_loss:.3f}, "
    line += f"mean recall {percent(progress.mean_recall or 0.0)}"
    if progress.best_step:
        line += f", best so far: step {progress.best_step:,}"
    left = progress.eta_seconds
    return line if left is None else f"{line}; {duration(left)} left"


def _finished(folder: Path, generic: str | None, stop: threading.Event, *, no_report: bool) -> None:
    """Say that a run is finished, and make its report if there is none yet."""
    from eval.training_report import VERDICT

    if not _is_first_process():
        return
    report = folder / "report.html"
    print(f"{printable(str(folder))} is finished; there is nothing to go on with")
    if report.is_file():
        with suppress(OSError, ValueError):
            for sentence in json.loads((folder / VERDICT).read_bytes())["sentences"]:
                print(printable(sentence))
        print(f"report: {printable(str(report))}")
    elif not no_report:
        _report(folder, generic, stop)


def _print_validation(summary: RunSummary) -> None:
    """Print the figures of the validation split, and the commands that come next."""
    from eval.training_report import next_commands, summary_lines, validation_group

    facts = json.loads((summary.folder / "config.json").read_text(encoding="utf-8"))
    if summary.before and summary.after:
        count = facts["data"]["validation_pictures"]
        group = validation_group(summary.before, summary.after, count)
        print("\n".join(summary_lines([group])) + "\n")
    _print_commands(next_commands(summary.folder, facts["config"]["start"]))


def _print_commands(commands: Sequence[tuple[str, str]]) -> None:
    width = max(len(what) for what, _ in commands) + 1
    for what, command in commands:
        print(f"{what + ':':<{width}} {printable(command)}")


def _report(folder: Path, generic: str | None, stop: threading.Event) -> bool:
    """Write and print the report: the start and the result on held-out pictures, and on generic data.
    Return whether there is held-out data to make one of."""
    from clipkit.lazy_encoder import LazyEncoder
    from data_prep import gallery
    from eval.data import open_captioned, open_labelled
    from eval.features import FeatureCache, Stopped
    from eval.session import Session
    from eval.training_report import summary_lines, training_report

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    try:
        own = open_captioned(config["data"])
    except InputError as error:
        print(f"no report: {error}\n")
        return False
    if own.split not in ("test", "validation"):
        print("no report: the dataset has neither a test nor a validation split to compare on\n")
        return False
    try:
        general: Captioned | Labelled = open_captioned(generic or str(gallery.folder()))
    except InputError:
        general = open_labelled(str(generic))
    if generic is None:
        general = replace(general, name="the sample gallery")
    encoders = [
        # float32: a verdict must not depend on the kind of CPU
        LazyEncoder(spec, device=config["device"], precision="float32")
        for spec in (config["start"], str(folder))
    ]
    try:
        with progress_shown() as show:
            result = training_report(
                folder,
                encoders,
                own,
                general,
                session=Session(FeatureCache(features_folder(None)), on_progress=show, stop=stop),
            )
    except Stopped:
        place = printable(str(folder))
        print(f"stopped before the report; make it with: clipkit train --resume {place}")
        raise typer.Exit(130) from None
    print("\n".join(map(printable, result.sentences)))
    for warning in result.warnings:
        print(f"warning: {printable(warning)}")
    print("\n".join(["", *summary_lines(result.details["summary"]["groups"]), ""]))
    report = folder / "report.html"
    _print_commands([*result.details["commands"], ("Report", str(report))])
    return True


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
