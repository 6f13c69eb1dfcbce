"""`clipkit train`: fine-tune the towers on your own captions, with a report before and after."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from app.cli.terminal import (
    MORE,
    Command,
    QuietOption,
    choice,
    command_line,
    device_option,
    examples,
    model_option,
    model_specs,
    number,
    progress_shown,
    stop_on_signal,
)
from app.paths import features_folder
from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.options import option_fields
from clipkit.training.config import (
    RECIPES,
    TrainConfig,
    method_and_loss_options,
    usable_losses,
)
from clipkit.training.registry import METHODS
from clipkit.wording import duration, percent, printable

if TYPE_CHECKING:
    from clipkit.training import Progress, RunSummary
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
# The options that `clipkit train --help` shows; `--options` lists them all.
SHOWN = "epochs batch learning_rate name out device precision".split()
# These have options of another name or kind.
_OWN = {"data": "DATA", "start": "--model", "recipe": "--recipe"}


class TrainCommand(Command):
    """`train`: its help leaves out the options that are rarely needed, completion does not."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        left_out = _every_option().keys() - {*SHOWN, *_OWN}
        for param in self.params:
            param.hidden = param.name in left_out
        super().format_help(ctx, formatter)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add every option of a run to a command's, which it gets as `flags`.

    Typer reads them from the function's signature. One that was not given is not in `flags`: its
    default depends on the recipe or the configuration file.
    """
    flags = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, _option(item, kind)],
        )
        for name, (item, kind) in _every_option().items()
        if name not in _OWN
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


def _every_option() -> dict[str, tuple[Field[Any], Any]]:
    """Return the options of a run by name, those of its methods and losses too."""
    return {**option_fields(TrainConfig), **method_and_loss_options()}


def _option(item: Field[Any], kind: Any) -> Any:
    """Return the command line's option for an option of a run."""
    if item.name == "device":
        return device_option
    flag = f"--{item.name.replace('_', '-')}"
    text = item.metadata["help"]
    help = f"{text[0].upper()}{text[1:]}."
    various = "by recipe" if item.name in RECIPES["heads"] else "by method and loss"
    default = various if item.default is MISSING else str(item.default)
    if kind is bool:
        return typer.Option(f"{flag}/--no-{flag[2:]}", help=help, show_default=default)
    if kind in (int, float):
        return number(flag, help=help, kind=kind, default=default, **item.metadata["limits"])
    if choices := get_args(kind):
        return choice(flag, choices, help=help, show_default=default, rich_help_panel=MORE)
    if item.name == "loss":
        return choice(flag, ["auto", *usable_losses()], help=help, show_default=default)
    if item.name == "method":
        return choice(flag, METHODS, help=help, show_default=default)
    metavar = "DIR" if item.name == "out" else "NAME"
    return typer.Option(flag, metavar=metavar, help=help, show_default=default or True)


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
        model_option(help="The model to start from.", show_default="builtin"),
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
    show_views: Annotated[
        bool,
        typer.Option(
            "--show-views", help="Draw what the run would see of some pictures, and do not train."
        ),
    ] = False,
    options: Annotated[
        bool, typer.Option("--options", help="List every option of a run with its default.")
    ] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="Explain every method and loss, with its paper.")
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
    if options or methods:
        for line in _methods() if methods else _listed(recipe or "heads"):
            print(fill(line, get_terminal_size().columns, subsequent_indent=" " * 31))
        return
    from clipkit.towers import choose_device
    from clipkit.training import resume as resume_run
    from clipkit.training import train as train_run
    from eval.study import is_study

    named = {"data": data, "recipe": recipe, "start": model}
    flags |= {key: value for key, value in named.items() if value is not None}
    if resume is not None and (flags or config is not None or show_views):
        raise InputError("--resume goes on with the run's own options; give no others")
    command = command_line()
    with stop_on_signal("stopping after this step; once more to stop at once") as stop:
        if config is not None and is_study(config):
            _study(config, flags, command, stop, no_report=no_report, quiet=quiet)
            return
        if resume is not None:
            folder = resume.expanduser()
            if (folder / "summary.json").is_file():
                _finished(folder, generic, stop, no_report=no_report, quiet=quiet)
                return
            with _progress(quiet=quiet) as show:
                summary = resume_run(folder, on_progress=show, stop=stop)
        else:
            chosen = (
                TrainConfig.from_toml(config, flags)
                if config is not None
                else TrainConfig.from_mapping(flags)
            )
            choose_device(chosen.device)  # a configuration file's, too, before a dataset is built
            chosen = replace(chosen, data=_dataset(chosen, command, stop, quiet))
            if show_views:
                _draw_views(chosen)
                return
            with _progress(_slow(chosen), quiet=quiet) as show:
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
        if no_report or not _report(summary.folder, generic, stop, quiet):
            _print_validation(summary)


def _study(
    file: Path,
    flags: dict[str, Any],
    command: str,
    stop: threading.Event,
    *,
    no_report: bool,
    quiet: bool,
) -> None:
    """Train all runs of a study file, or go on with them, and report on them together."""
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import open_labelled
    from eval.features import FeatureCache, Stopped
    from eval.reports import save
    from eval.session import Session
    from eval.study import read_study, slug, study_report, train_study

    name = flags.pop("name", None) or file.stem
    study = read_study(file, flags)
    configs = [run.config for run in study.runs.values() if run.config is not None]
    if not configs:
        raise InputError(f"{file} has no run to train; give one options other than model")
    folder = Path(configs[0].out) / slug(name)
    data = _dataset(configs[0], command, stop, quiet)
    print(f"{len(study.runs)} runs in {printable(str(folder))}", file=sys.stderr)
    current = ""
    with _progress(quiet=quiet) as show:

        def on_progress(run: str, progress: Progress) -> None:
            nonlocal current
            if run != current and not quiet:
                current = run
                print(f"-- {run}", file=sys.stderr)
            show(progress)

        done = train_study(study, folder, data, on_progress=on_progress, stop=stop, command=command)
    again = f"go on with: {command}"
    if done is None:
        print(f"stopped; {again}")
        raise typer.Exit(130)
    if no_report or not _is_first_process():
        return
    encoders = {
        run.name: LazyEncoder(
            run.model or str(folder / slug(run.name)),
            device=configs[0].device,
            precision="float32",
        )
        for run in study.runs.values()
    }
    try:
        with progress_shown(quiet=quiet) as bar:
            report = study_report(
                study,
                encoders,
                open_labelled(data, split="train"),
                open_labelled(data),
                folder=folder,
                session=Session(FeatureCache(features_folder(None)), on_progress=bar, stop=stop),
            )
    except Stopped:
        print(f"stopped before the report; {again}")
        raise typer.Exit(130) from None
    save(replace(report, command=command, dataset=configs[0].data), folder)
    print("\n".join(report.lines()))
    _print_commands([("Report", str(folder / "report.html"))])


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
                uncaptioned="captions" not in METHODS[config.method].needs,
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


def _draw_views(config: TrainConfig) -> None:
    """Write the sheet of views into the folder for runs, and print its path."""
    from clipkit.training import draw_views

    folder = Path(config.out).expanduser()
    path = folder / f"views-{config.method}.png"
    content = io.BytesIO()
    draw_views(config).save(content, "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
    print(f"views: {printable(str(path))}")


def _listed(recipe: str) -> Iterator[str]:
    """Yield a line for each option of a run, with its default in `recipe`."""
    yield f"defaults of recipe {recipe}; in a TOML file a line is: batch = 1024"
    for name, (item, _) in _every_option().items():
        default = RECIPES[recipe].get(name, item.default)
        shown = "" if default in ("", MISSING) else f" [{default}]"
        flag = _OWN.get(name, f"--{name.replace('_', '-')}")
        yield f"  {flag:<28} {item.metadata['help']}{shown}"


def _methods() -> Iterator[str]:
    """Yield what each method and each loss does."""
    for name, method in METHODS.items():
        yield f"  --method {name:<19} {method.summary}"
    yield ""
    for name, loss in usable_losses().items():
        yield f"  --loss {name:<21} {loss.summary}"


def _slow(config: TrainConfig) -> str:
    """Return why a run may take long, or "" if it will not."""
    from clipkit.towers import choose_device

    if config.recipe == "heads" or choose_device(config.device).type != "cpu":
        return ""
    gpu = "; a GPU would be used if there were one" if config.device == "auto" else ""
    return f"recipe {config.recipe} is slow on a CPU, recipe heads takes minutes{gpu}"


@contextmanager
def _progress(slow: str = "", *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a run's progress as a bar, with a line for each evaluation and warning.

    `slow`: a reason to print once the time that is left is known, if it is long.
    """
    printed: int | None = None
    with progress_shown(quiet=quiet) as bar:

        def show(progress: Progress) -> None:
            nonlocal printed, slow
            if progress.phase == "features":
                bar(f"features of {progress.message}", progress.done, progress.total)
                return
            bar(progress.phase, progress.done, progress.total)
            if progress.message:
                print(f"warning: {progress.message}", file=sys.stderr)
            if slow and not quiet and progress.phase == "training" and progress.done >= TIMED_STEPS:
                if (left := progress.eta_seconds or 0.0) > LONG_SECONDS:
                    print(f"about {duration(left)} left: {slow}", file=sys.stderr)
                slow = ""
            if not quiet and progress.evaluated not in (None, printed):
                printed = progress.evaluated
                print(_line(progress), file=sys.stderr)

        yield show


def _line(progress: Progress) -> str:
    """Return what the last evaluation showed."""
    where = f"step {progress.done:,} of {progress.total:,}" if progress.done else "start"
    line = f"{where}: validation loss {progress.validation_loss:.3f}, "
    line += f"{progress.score_title} {percent(progress.score or 0.0)}"
    if progress.best_step:
        line += f", best so far: step {progress.best_step:,}"
    left = progress.eta_seconds
    return line if left is None else f"{line}; {duration(left)} left"


def _finished(
    folder: Path, generic: str | None, stop: threading.Event, *, no_report: bool, quiet: bool
) -> None:
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
        _report(folder, generic, stop, quiet)


def _print_validation(summary: RunSummary) -> None:
    """Print the figures of the validation split, and the commands that come next."""
    from eval.training_report import next_commands, summary_lines, validation_group

    facts = json.loads((summary.folder / "config.json").read_text(encoding="utf-8"))
    if summary.before and summary.after:
        group = validation_group(summary.before, summary.after, facts)
        print("\n".join(summary_lines([group])) + "\n")
    _print_commands(next_commands(summary.folder, facts["config"]["start"]))


def _print_commands(commands: Sequence[tuple[str, str]]) -> None:
    width = max(len(what) for what, _ in commands) + 1
    for what, command in commands:
        print(f"{what + ':':<{width}} {printable(command)}")


def _report(folder: Path, generic: str | None, stop: threading.Event, quiet: bool) -> bool:
    """Write and print the report: the start and the result on held-out pictures, and on generic data.
    Return whether there is held-out data to make one of."""
    from clipkit.lazy_encoder import LazyEncoder
    from data_prep import gallery
    from eval.data import open_captioned, open_labelled
    from eval.features import FeatureCache, Stopped
    from eval.session import Session
    from eval.training_report import summary_lines, training_report

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    own: Captioned | None = None
    try:
        own = open_captioned(config["data"])
    except InputError as error:
        if "captions" in METHODS[config["method"]].needs:
            print(f"no report: {error}\n")
            return False
    if own is not None and own.split not in ("test", "validation"):
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
        with progress_shown(quiet=quiet) as show:
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
