"""What the commands of `clipkit eval` share: their options, a run's frame, where its report goes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from app.cli.terminal import progress_shown, stop_on_signal
from app.paths import features_folder, reports_folder
from clipkit.errors import InputError
from clipkit.wording import printable

if TYPE_CHECKING:
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import Labelled
    from eval.features import FeatureCache
    from eval.reports.comparison import Comparison
    from eval.reports.report import EvalReport

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        show_default=False,
        help="A dataset folder, pictures with captions beside them, a folder per class, a JSONL "
        "file, WebDataset shards, a benchmark's name (cifar10, imagenet1k), or hf:ORG/NAME.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="builtin, ARCHITECTURE/TAG, hf-hub:ORG/NAME, or a checkpoint folder.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="train, validation, test. Default: test, if there is one.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Take so many pictures, as good as random.")
]
SeedOption = Annotated[int, typer.Option(help="Of splits and resampling.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
PrecisionOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The report's folder. Default: a new one."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", envvar="CLIPKIT_CACHE", help="Where features are kept."),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep features.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
CutsOption = Annotated[str, typer.Option("-k", metavar="K,K,...", help="Cut-offs.")]
TemplatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A prompt set by name, or a file with a template a line. Default: the data's own.",
    ),
]


@dataclass(frozen=True)
class Common:
    """The options of every command."""

    seed: SeedOption = 0
    out: OutOption = None
    as_json: JsonOption = False


@dataclass(frozen=True)
class Encoding(Common):
    """The options of commands that encode data."""

    split: SplitOption = None
    limit: LimitOption = None
    device: DeviceOption = "auto"
    precision: PrecisionOption = "auto"
    cache: CacheOption = None
    no_cache: NoCacheOption = False


@dataclass(frozen=True)
class OneModel(Encoding):
    """The options of commands that encode data with one model."""

    model: ModelOption = "builtin"


def with_options(kind: type[Common]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the fields of `kind` to a command's options; the command gets them as `shared`.

    Typer reads a function's signature, so the options are written into it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(kind, include_extras=True)
        options = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(kind)
        ]
        own = [
            p for p in signature(command, eval_str=True).parameters.values() if p.name != "shared"
        ]

        @wraps(command)
        def run(**given: Any) -> None:
            chosen = kind(**{option.name: given.pop(option.name) for option in options})
            command(**given, shared=chosen)

        parameters = [*own, *options]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@dataclass(frozen=True)
class _Job:
    encoder: LazyEncoder
    cache: FeatureCache
    options: dict[str, Any]  # cache, on_progress and stop, as every evaluator takes them


@contextmanager
def measuring(model: str, shared: Encoding) -> Iterator[_Job]:
    """The frame of a measurement: encoder, cache, progress, and Ctrl-C that keeps what was encoded."""
    from clipkit.lazy_encoder import LazyEncoder
    from eval.features import FeatureCache

    kept = FeatureCache(None if shared.no_cache else features_folder(shared.cache))
    with stoppable(), stop_on_signal() as stop, progress_shown() as show:
        options = {"cache": kept, "on_progress": show, "stop": stop}
        encoder = LazyEncoder(model, device=shared.device, precision=shared.precision)
        yield _Job(encoder, kept, options)


@contextmanager
def stoppable() -> Iterator[None]:
    """A stop that was asked for is a sentence and exit code 130."""
    from eval.features import Stopped

    try:
        yield
    except Stopped:
        print("stopped; what was encoded is kept, the same command goes on from there")
        raise typer.Exit(130) from None


def finish(report: EvalReport, shared: Common) -> None:
    """Print the report, and keep it."""
    report = replace(report, command=command_line())
    folder = report_folder(shared.out, report.task, report.dataset, report.model)
    report.save(folder)
    say(report, folder, shared)


def say(result: EvalReport | Comparison, folder: Path, shared: Common) -> None:
    """Print a result, as it was asked for, and where it is kept."""
    print(result.to_json() if shared.as_json else "\n".join(result.lines()))
    shown = printable(str(folder / "report.html"))
    print(f"report: {shown}", file=sys.stderr if shared.as_json else sys.stdout)


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["clipkit", *sys.argv[1:]])


def report_folder(given: Path | None, *named: str) -> Path:
    """Where a report goes: what was given, else a new folder that is named for what it is about."""
    if given is not None:
        return given.expanduser()
    parts = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name).strip("-.") for name in named]
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return reports_folder() / "-".join([*filter(None, parts), stamp])[-120:]


def library(place: Path) -> tuple[str, str, Any, Any]:
    """An index's model, its identity, and the ids and vectors (float16) of its live pictures."""
    from clipkit.catalog import Catalog

    with Catalog.open(place.expanduser()) as catalog:
        last = catalog.newest_encoder()
        if last is None:
            raise InputError(f"index {place} holds no vectors yet; fill it: clipkit index FOLDER")
        stored = catalog.vectors(last.encoder_id)
        return last.spec, last.encoder_id, stored.nums, stored.vectors


def captioned_or_labelled(data: str, split: str | None, limit: int | None) -> Any:
    """What the data is: captions if it has them, else classes."""
    from eval.data import open_captioned, open_labelled

    try:
        return open_captioned(data, split=split, limit=limit)
    except InputError as no_captions:
        try:
            return open_labelled(data, split=split, limit=limit)
        except InputError:
            raise no_captions from None


def to_learn_from(data: str, split: str | None) -> Labelled:
    """The training split, or all of data that has no splits."""
    from eval.data import open_labelled

    try:
        return open_labelled(data, split=split or "train")
    except InputError:
        whole = open_labelled(data, split=split)
        if whole.split is not None:
            raise
        return whole


def prompts_for(given: str | None, data: str) -> Any:
    """The templates that were asked for, else those that go with the data's name."""
    from eval.prompts import default_templates, load_templates

    return load_templates(given) if given else default_templates(data)


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """InputError, naming what is known, for any other value."""
    if value not in known:
        raise InputError(f"{option} is {value!r}; it must be one of {', '.join(known)}")


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,5,10" -> (1, 5, 10)"""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise InputError(f"{option} is {text!r}; it must be whole numbers from 1, such as 1,5,10")
    return tuple(sorted(set(values)))


def fractions(option: str, text: str) -> tuple[float, ...]:
    """ "0.9,0.99" -> (0.9, 0.99)"""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise InputError(f"{option} is {text!r}; it must be shares of 1, such as 0.9,0.99")
    return tuple(sorted(set(values)))
