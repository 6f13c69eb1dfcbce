"""`clipkit eval ...`: measure models and indexes, print a table and save a report."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from app.cli.terminal import (
    MORE,
    CacheOption,
    DeviceOption,
    IndexOption,
    JsonOption,
    QuietOption,
    RuntimeOption,
    choice,
    command_line,
    default_folder,
    examples,
    group,
    model_option,
    model_specs,
    number,
    progress_shown,
    stop_on_signal,
)
from app.paths import features_folder, index_folder, reports_folder
from clipkit.errors import InputError, check_choice
from clipkit.training.config import Precision
from clipkit.wording import printable

if TYPE_CHECKING:
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import Labelled
    from eval.session import Session

evaluate = group(
    "eval",
    "Measure models and indexes: every figure with its n and a 95 % interval.",
    "clipkit eval retrieval --data dataset",
    "clipkit eval compare builtin runs/mine --data dataset",
)


# An EvalReport, a list of them or a Comparison; none is imported before a command needs it.
Result = Any
Command = Callable[..., Result]
N = TypeVar("N", int, float)


# ---- options

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
DatasOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="DATA",
        show_default=False,
        help="As for the other commands of eval: a dataset, a folder, a table, shards, a benchmark's "
        "name or hf:ORG/NAME. Repeat the option for several.",
    ),
]
CutsOption = Annotated[str, typer.Option("-k", metavar="K,K,...", help="Cut-offs.")]
TemplatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A prompt set by name, or a file with one template per line.",
        show_default="the data's own",
    ),
]


@dataclass(frozen=True)
class Common:
    """The options of every command."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The report's folder.",
            show_default=f"a new one in {default_folder(reports_folder())}",
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the report in the folder of --out.")
    ] = False
    as_json: JsonOption = False
    quiet: QuietOption = False
    seed: Annotated[
        int, number("--seed", help="Random seed of splits and resampling.", low=0, more=True)
    ] = 0


@dataclass(frozen=True)
class Encoding(Common):
    """The options of commands that encode data."""

    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=lambda: ["train", "validation", "test"],
            help="train, validation, test.",
            show_default="test, if there is one",
        ),
    ] = None
    limit: Annotated[
        int | None, number("--limit", help="Use a random sample of N pictures.", low=1)
    ] = None
    device: DeviceOption = "auto"
    precision: Annotated[
        str,
        choice(
            "--precision",
            get_args(Precision),
            envvar="CLIPKIT_PRECISION",
            help="float32, bfloat16, float16, or auto: bfloat16 where the hardware computes in it, "
            "so that figures depend on the machine.",
            rich_help_panel=MORE,
        ),
    ] = "float32"
    runtime: RuntimeOption = "auto"
    cache: CacheOption = None
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Do not use the feature cache.", rich_help_panel=MORE),
    ] = False

    def encoder(self, spec: str) -> LazyEncoder:
        """Return a model that is loaded when it is needed."""
        from clipkit.lazy_encoder import LazyEncoder

        return LazyEncoder(spec, device=self.device, precision=self.precision, runtime=self.runtime)

    def open(self, data: str) -> Any:
        """Open data as captioned pictures if it has captions, else as labelled ones."""
        from eval.data import open_captioned, open_labelled

        try:
            return open_captioned(data, split=self.split, limit=self.limit)
        except InputError as no_captions:
            try:
                return open_labelled(data, split=self.split, limit=self.limit)
            except InputError:
                raise no_captions from None


@dataclass(frozen=True)
class OneModel(Encoding):
    """The options of commands that encode data with one model."""

    model: Annotated[
        str,
        model_option(help="builtin, ARCHITECTURE/TAG, hf-hub:ORG/NAME, or a checkpoint folder."),
    ] = "builtin"


@dataclass(frozen=True)
class SeveralModels(Encoding):
    """The options of commands that encode data with one model or several."""

    model: Annotated[
        list[str] | None,
        model_option(
            show_default="builtin",
            help="builtin, ARCHITECTURE/TAG, hf-hub:ORG/NAME, or a checkpoint folder. Repeat the option "
            "for several.",
        ),
    ] = None

    def encoders(self) -> Iterator[LazyEncoder]:
        """Yield the models one by one, so that only one is in memory."""
        yield from map(self.encoder, dict.fromkeys(self.model or ["builtin"]))


def with_options(kind: type[Common]) -> Callable[[Command], Callable[..., None]]:
    """Add the fields of `kind` to a command's options, and save and print the result it returns.

    The command gets the options as `shared`. Typer reads them from the function's signature.
    """

    def decorate(command: Command) -> Callable[..., None]:
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
            shared = kind(**{option.name: values.pop(option.name) for option in options})
            check_out(shared)
            result = command(**values, shared=shared)
            results = result if isinstance(result, list) else [result]
            results = [replace(each, command=command_line()) for each in results]
            finish(results, shared, values.get("models", ()))

        parameters = [*own, *options]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


# ---- commands


@evaluate.command(
    epilog=examples(
        "clipkit eval retrieval --data dataset",
        "clipkit eval retrieval --data hf:nlphuji/flickr30k --model ViT-B-32/openai",
        "clipkit eval retrieval --data ~/Pictures --queries tags -k 5,20",
    )
)
@with_options(SeveralModels)
def retrieval(
    data: DatasOption,
    k: CutsOption = "1,5,10",
    queries: Annotated[
        str,
        choice(
            "--queries",
            ("captions", "tags"),
            help="captions, in both directions; or tags, each a query for all pictures that have it.",
        ),
    ] = "captions",
    *,
    shared: SeveralModels,
) -> Result:
    """Find pictures by their captions, captions by their pictures: recall@K, ranks, MRR, mAP, nDCG."""
    from eval.data import open_captioned
    from eval.retrieval import evaluate_retrieval

    cuts = numbers("-k", k)
    captioned = [
        open_captioned(name, split=shared.split, limit=shared.limit) for name in distinct(data)
    ]
    with running(shared) as session:
        return [
            evaluate_retrieval(
                encoder,
                each,
                ks=cuts,
                queries=queries,  # type: ignore[arg-type]
                session=session,
            )
            for encoder in shared.encoders()
            for each in captioned
        ]


@evaluate.command(
    epilog=examples(
        "clipkit eval zeroshot --data ./folder-per-class",
        "clipkit eval zeroshot --data cifar10 --model ViT-B-32/openai",
        "clipkit eval zeroshot --data cifar10 --data cars/test --data pets",
        "clipkit eval zeroshot --data shards/ --classes names.txt --templates a.txt",
    )
)
@with_options(SeveralModels)
def zeroshot(
    data: DatasOption,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A benchmark's class names, or a file with one name per line, in the labels' order.",
        ),
    ] = None,
    templates: TemplatesOption = None,
    k: CutsOption = "1,5",
    *,
    shared: SeveralModels,
) -> Result:
    """Classify pictures by the names of their classes: accuracy, recall per class, calibration, mAP."""
    from eval.data import open_labelled
    from eval.prompts import load_classes
    from eval.zero_shot import evaluate_zero_shot

    cuts = numbers("-k", k)
    sets = distinct(data)
    if classes is not None and len(sets) > 1:
        raise InputError(f"--classes names the classes of one dataset, but {len(sets)} are given")
    names = None if classes is None else load_classes(classes)
    labelled = [
        (
            open_labelled(name, split=shared.split, classes=names, limit=shared.limit),
            prompts_for(templates, name),
        )
        for name in sets
    ]
    with running(shared) as session:
        return [
            evaluate_zero_shot(encoder, each, templates=prompts, ks=cuts, session=session)
            for encoder in shared.encoders()
            for each, prompts in labelled
        ]


@evaluate.command(
    epilog=examples(
        "clipkit eval probe --train cars/train --data cars/test",
        "clipkit eval probe --train dataset --data dataset --kinds knn -k 1,20",
        "clipkit eval probe --train train/ --data test/ --shots 1,2,4,8,16",
    )
)
@with_options(OneModel)
def probe(
    data: DataOption,
    train: Annotated[
        str,
        typer.Option(
            metavar="DATA", help="The data that the probes learn from.", show_default=False
        ),
    ],
    train_split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The split of --train.",
            show_default="train, or all pictures if there are no splits",
        ),
    ] = None,
    kinds: Annotated[
        str, typer.Option(metavar="KIND,...", help="Which probes: knn, linear.")
    ] = "knn,linear",
    k: Annotated[
        str, typer.Option("-k", metavar="K,K,...", help="Numbers of neighbours.")
    ] = "1,5,10,20",
    shots: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Few-shot: numbers of training pictures per class."),
    ] = "",
    *,
    shared: OneModel,
) -> Result:
    """Measure what the frozen image tower knows, by k nearest neighbours and a linear classifier."""
    from eval.data import open_labelled
    from eval.probes import evaluate_probe

    chosen = some_of("--kinds", kinds, ("knn", "linear"))
    neighbours, few = numbers("-k", k), numbers("--shots", shots) if shots else ()
    learning = to_learn_from(train, train_split)
    testing = open_labelled(data, split=shared.split, limit=shared.limit)
    with running(shared) as session:
        return evaluate_probe(
            shared.encoder(shared.model),
            learning,
            testing,
            kinds=chosen,
            knn_ks=neighbours,
            shots=few,
            session=session,
        )


@evaluate.command(
    epilog=examples(
        "clipkit eval robustness --data ./folder-per-class",
        "clipkit eval robustness --data dataset --corruptions pixelate --severities 1,5",
        "clipkit eval robustness --data ./domain-folders --by-domain",
    )
)
@with_options(OneModel)
def robustness(
    data: DataOption,
    corruptions: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Which corruptions.", show_default="all of them"),
    ] = "",
    severities: Annotated[str, typer.Option(metavar="N,N,...", help="1 to 5.")] = "1,3,5",
    templates: TemplatesOption = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Class folders lie below domain folders.")
    ] = False,
    *,
    shared: OneModel,
) -> Result:
    """Measure what noise, blur, weather and compression cost in accuracy, or recall with captions."""
    from eval.corruptions import CORRUPTIONS
    from eval.data import open_labelled
    from eval.robustness import evaluate_robustness

    names = some_of("--corruptions", corruptions, tuple(CORRUPTIONS))
    levels = numbers("--severities", severities)
    opened = (
        open_labelled(data, split=shared.split, limit=shared.limit, by_domain=True)
        if by_domain
        else shared.open(data)
    )
    with running(shared) as session:
        return evaluate_robustness(
            shared.encoder(shared.model),
            opened,
            corruptions=names or tuple(CORRUPTIONS),
            severities=levels,
            templates=prompts_for(templates, data),
            session=session,
        )


@evaluate.command(
    epilog=examples(
        "clipkit eval space --data dataset",
        "clipkit eval space --index ~/my-index",
        "clipkit eval space --data dataset --model runs/mine",
    )
)
@with_options(OneModel)
def space(
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Pictures, as for retrieval.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", metavar="DIR", help="An index's own vectors.")
    ] = None,
    *,
    shared: OneModel,
) -> Result:
    """Measure the embedding space: spread, effective rank, alignment, modality gap, hubs."""
    from eval.space import evaluate_space, space_of_vectors

    if (data is None) == (index is None):
        raise InputError("name what to look at: either --data DATA or --index DIR")
    if index is not None:
        spec, encoder_id, _, vectors = library(index)
        with running(shared) as session:
            return space_of_vectors(
                vectors, model=spec, encoder_id=encoder_id, dataset=str(index), session=session
            )
    opened = shared.open(str(data))
    with running(shared) as session:
        return evaluate_space(shared.encoder(shared.model), opened, session=session)


@evaluate.command(
    epilog=examples(
        "clipkit eval drift --data dataset --model builtin --against runs/mine",
        "clipkit eval drift --data ./photos-2025 --against-data ./photos-2026",
    )
)
@with_options(OneModel)
def drift(
    data: DataOption,
    against: Annotated[
        str | None,
        model_option("--against", help="Another model on the same pictures."),
    ] = None,
    against_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other pictures, the same model.")
    ] = None,
    *,
    shared: OneModel,
) -> Result:
    """Compare two models on the same pictures, or one model on two batches of pictures."""
    from eval.drift import drift_between_batches, drift_between_encoders

    if (against is None) == (against_data is None):
        raise InputError("name what to compare with: either --against SPEC or --against-data DATA")
    first = shared.open(data)
    second = None if against_data is None else shared.open(against_data)
    with running(shared) as session:
        encoder = shared.encoder(shared.model)
        if second is not None:
            return drift_between_batches(encoder, first, second, session=session)
        other = shared.encoder(str(against))
        return drift_between_encoders(encoder, other, first, session=session)


@evaluate.command(
    epilog=examples(
        "clipkit eval index",
        "clipkit eval index --index ~/my-index --kinds exact,rabitq",
    )
)
@with_options(Common)
def index(
    index: IndexOption = None,
    kinds: Annotated[
        str,
        typer.Option(metavar="KIND,...", help="Which index kinds.", show_default="all of them"),
    ] = "",
    recall_goals: Annotated[
        str, typer.Option(metavar="R,R,...", help="For each, find the fastest setting.")
    ] = "0.9,0.95,0.99",
    k: CutsOption = "1,10,100",
    *,
    shared: Common,
) -> Result:
    """Measure recall, latency, memory and build time of every index kind on your vectors."""
    from clipkit.index import KINDS
    from eval.index_quality import evaluate_index

    names = some_of("--kinds", kinds, tuple(KINDS))
    needed = "shares of 1, such as 0.9,0.99"
    goals = values_of("--recall-goals", recall_goals, float, lambda goal: 0 < goal <= 1, needed)
    cuts = numbers("-k", k)
    place = index_folder(index)
    spec, encoder_id, ids, vectors = library(place)
    with running(shared) as session:
        return evaluate_index(
            ids,
            vectors,
            kinds=names or tuple(KINDS),
            recall_goals=goals,
            ks=cuts,
            model=spec,
            encoder_id=encoder_id,
            dataset=str(place),
            session=session,
        )


@evaluate.command(
    epilog=examples(
        "clipkit eval compare builtin runs/mine --data dataset",
        "clipkit eval compare builtin ViT-B-32/openai --data cifar10 --data dataset",
        "clipkit eval compare reports/a reports/b",
    )
)
@with_options(Encoding)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC",
            autocompletion=model_specs,
            help="Models, the first of which is the baseline; or folders of reports.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="DATA", help="The data to measure on; repeat the option for several."
        ),
    ] = None,
    templates: TemplatesOption = None,
    k: CutsOption = "1,5,10",
    *,
    shared: Encoding,
) -> Result:
    """Compare models on the same pictures, with tests of whether the differences are chance.

    Data with captions is measured by retrieval, data with classes by zero-shot classification.
    Without --data, the arguments are folders of saved reports.
    """
    from eval.compare import compare as compare_models
    from eval.compare import compare_reports
    from eval.prompts import load_templates
    from eval.reports import load

    if not data:
        folders = [Path(model).expanduser() for model in models]
        if not all((folder / "report.json").is_file() for folder in folders):
            raise InputError("name what to measure on with --data DATA, or give saved reports")
        return compare_reports([[load(folder)] for folder in folders], seed=shared.seed)
    if len(models) < 2:
        raise InputError(f"{len(models)} model to compare; name at least two")
    cuts = numbers("-k", k)
    opened = [shared.open(name) for name in data]
    with running(shared) as session:
        return compare_models(
            [shared.encoder(model) for model in models],
            opened,
            templates=load_templates(templates) if templates else None,
            ks=cuts,
            session=session,
        )


# ---- sessions, reports, data


@contextmanager
def running(shared: Common) -> Iterator[Session]:
    """Yield a session that shows progress; Ctrl-C stops it with a message and exit code 130."""
    from eval.features import FeatureCache, Stopped
    from eval.session import Session

    cache = None
    if isinstance(shared, Encoding) and not shared.no_cache:
        cache = features_folder(shared.cache)
    try:
        with stop_on_signal() as stop, progress_shown(quiet=shared.quiet) as show:
            yield Session(FeatureCache(cache), shared.seed, show, stop)
    except Stopped:
        kept = "encoded features are kept, and the same command continues from there"
        print("stopped;", "nothing is kept" if cache is None else kept)
        raise typer.Exit(130) from None


def check_out(shared: Common) -> None:
    """Raise InputError if --out is a file, or a folder with a report that may not be replaced."""
    out = shared.out and shared.out.expanduser()
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; give --out the folder to write the report into")
    if (out / "report.html").exists() and not shared.overwrite:
        raise InputError(
            f"{out} holds a report already; give --overwrite to replace it, or another --out"
        )


def finish(results: Sequence[Any], shared: Common, compared: Sequence[str]) -> None:
    """Save the result, print it as a table or as JSON, and print the path of its report.

    Of several, it is their overview; each report is in a folder below.
    """
    from eval.reports import overview, save

    result, names = results[0], [""]
    if len(results) > 1:
        result, names = overview(results)
        result = replace(result, command=results[0].command)
    folder = shared.out.expanduser() if shared.out else None
    if folder is None:
        parts = ["compare", *compared]
        if not compared:
            parts = [result.task, result.dataset, result.model]
        parts = [file_name(Path(part).name) for part in parts]
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = reports_folder() / "-".join([*filter(None, parts), stamp])[-120:]
    if len(results) > 1:
        for number, (each, name) in enumerate(zip(results, names, strict=True), 1):
            save(each, folder / file_name(f"{number} {name}"))
    save(result, folder, parts=results if len(results) > 1 else ())
    print(result.to_json() if shared.as_json else "\n".join(result.lines()))
    path = printable(str(folder / "report.html"))
    print(f"report: {path}", file=sys.stderr if shared.as_json else sys.stdout)


def file_name(text: str) -> str:
    """Return a text as the name of a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def distinct(data: Sequence[str]) -> list[str]:
    """Return the values of --data. Raises InputError if one is given twice."""
    for name in data:
        if data.count(name) > 1:
            raise InputError(f"--data {name} is given twice; a mean must count it once")
    return list(data)


def library(folder: Path) -> tuple[str, str, Any, Any]:
    """Return an index's model spec, encoder id, and its pictures' ids and vectors (float16)."""
    from clipkit.catalog import Catalog

    with Catalog.open(folder.expanduser()) as catalog:
        active = catalog.active_encoder()
        if active is None:
            raise InputError(f"index {folder} holds no vectors yet; fill it: clipkit index FOLDER")
        stored = catalog.vectors(active.encoder_id)
        return active.spec, active.encoder_id, stored.nums, stored.vectors


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


def some_of(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse "a,b" into known values. Raises InputError for any other value."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        check_choice(option, name, known)
    return names


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse "1,5,10" into (1, 5, 10). Raises InputError for anything but whole numbers from 1."""
    needed = "whole numbers from 1, such as 1,5,10"
    return values_of(option, text, int, lambda value: value >= 1, needed)


def values_of(
    option: str, text: str, parse: Callable[[str], N], valid: Callable[[N], bool], needed: str
) -> tuple[N, ...]:
    """Parse values between commas: ascending, each once. Raises InputError if one is not `valid`."""
    try:
        values = [parse(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(valid, values)):
        raise InputError(f"{option} is {text!r}; it must be {needed}")
    return tuple(sorted(set(values)))
