"""Options and helpers shared by the commands of `clipkit eval`."""

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

from app.cli.terminal import DeviceOption, PrecisionOption, progress_shown, stop_on_signal
from app.paths import features_folder, reports_folder
from clipkit.errors import InputError
from clipkit.wording import printable

if TYPE_CHECKING:
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import Labelled
    from eval.reports import Comparison, EvalReport
    from eval.session import Session

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        show_default=False,
        help="A dataset, pictures with captions beside them, a folder per class, a table, JSONL or COCO "
        "file, WebDataset shards, a benchmark's name (cifar10, imagenet1k), or hf:ORG/NAME/CONFIG.",
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
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use a random sample of N pictures.")]
SeedOption = Annotated[int, typer.Option(help="Random seed of splits and resampling.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The report's folder. Default: a new one."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", envvar="CLIPKIT_CACHE", help="The feature cache."),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Do not use the feature cache.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
CutsOption = Annotated[str, typer.Option("-k", metavar="K,K,...", help="Cut-offs.")]
TemplatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A prompt set by name, or a file with one template per line. Default: the data's own.",
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
        def run(**values: Any) -> None:
            chosen = kind(**{option.name: values.pop(option.name) for option in options})
            command(**values, shared=chosen)

        parameters = [*own, *options]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@contextmanager
def running(shared: Common, cache: Path | None = None) -> Iterator[Session]:
    """Yield a session that shows progress; Ctrl-C stops it with a message and exit code 130.

    `cache` is the folder of features, None for no cache.
    """
    from eval.features import FeatureCache, Stopped
    from eval.session import Session

    try:
        with stop_on_signal() as stop, progress_shown() as show:
            yield Session(FeatureCache(cache), shared.seed, show, stop)
    except Stopped:
        print("stopped; encoded features are kept, and the same command continues from there")
        raise typer.Exit(130) from None


@contextmanager
def measuring(model: str, shared: Encoding) -> Iterator[tuple[LazyEncoder, Session]]:
    """Yield an encoder and a session that caches its features."""
    from clipkit.lazy_encoder import LazyEncoder

    cache = None if shared.no_cache else features_folder(shared.cache)
    with running(shared, cache) as session:
        yield LazyEncoder(model, device=shared.device, precision=shared.precision), session


def finish(report: EvalReport, shared: Common) -> None:
    """Save the report and print it."""
    from eval.reports import save

    report = replace(report, command=command_line())
    folder = report_folder(shared.out, report.task, report.dataset, report.model)
    save(report, folder)
    say(report, folder, shared)


def say(result: EvalReport | Comparison, folder: Path, shared: Common) -> None:
    """Print a result as a table or as JSON, and the path of its report."""
    print(result.to_json() if shared.as_json else "\n".join(result.lines()))
    path = printable(str(folder / "report.html"))
    print(f"report: {path}", file=sys.stderr if shared.as_json else sys.stdout)


def command_line() -> str:
    """Return the running command as it can be typed again."""
    return shlex.join(["clipkit", *sys.argv[1:]])


def report_folder(out: Path | None, *names: str) -> Path:
    """Return the report's folder: `out`, else a new one named after task, dataset and model."""
    if out is not None:
        return out.expanduser()
    parts = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name).strip("-.") for name in names]
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return reports_folder() / "-".join([*filter(None, parts), stamp])[-120:]


def library(folder: Path) -> tuple[str, str, Any, Any]:
    """Return an index's model spec, encoder id, and its pictures' ids and vectors (float16)."""
    from clipkit.catalog import Catalog

    with Catalog.open(folder.expanduser()) as catalog:
        last = catalog.newest_encoder()
        if last is None:
            raise InputError(f"index {folder} holds no vectors yet; fill it: clipkit index FOLDER")
        stored = catalog.vectors(last.encoder_id)
        return last.spec, last.encoder_id, stored.nums, stored.vectors


def captioned_or_labelled(data: str, split: str | None, limit: int | None) -> Any:
    """Open data as captioned pictures if it has captions, else as labelled ones."""
    from eval.data import open_captioned, open_labelled

    try:
        return open_captioned(data, split=split, limit=limit)
    except InputError as no_captions:
        try:
            return open_labelled(data, split=split, limit=limit)
        except InputError:
            raise no_captions from None


def to_learn_from(data: str, split: str | None) -> Labelled:
    """Open the training split, or all of data that has no splits."""
    from eval.data import open_labelled

    try:
        return open_labelled(data, split=split or "train")
    except InputError:
        whole = open_labelled(data, split=split)
        if whole.split is not None:
            raise
        return whole


def prompts_for(templates: str | None, data: str) -> Any:
    """Return the named templates, else those that belong to the dataset's name."""
    from eval.prompts import default_templates, load_templates

    return load_templates(templates) if templates else default_templates(data)


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raise InputError, naming the known values, for any other value."""
    if value not in known:
        raise InputError(f"{option} is {value!r}; it must be one of {', '.join(known)}")


def some_of(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse "a,b" into known values. Raises InputError for any other value."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        one_of(option, name, known)
    return names


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse "1,5,10" into (1, 5, 10). Raises InputError for anything but whole numbers from 1."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise InputError(f"{option} is {text!r}; it must be whole numbers from 1, such as 1,5,10")
    return tuple(sorted(set(values)))


def fractions(option: str, text: str) -> tuple[float, ...]:
    """Parse "0.9,0.99" into (0.9, 0.99). Raises InputError for anything outside 0 to 1."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise InputError(f"{option} is {text!r}; it must be shares of 1, such as 0.9,0.99")
    return tuple(sorted(set(values)))
