"""`clipkit eval ...`: numbers to trust, each with its n and an interval, as a table and as a report."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.places import features_folder, index_folder
from app.terminal import printable, progress_shown, stop_on_signal
from clipkit.errors import InputError

if TYPE_CHECKING:
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import Labelled
    from eval.features import FeatureCache
    from eval.report import EvalReport

evaluate = typer.Typer(
    name="eval",
    help="Measure models and indexes: every figure with its n and a 95 % interval.",
    epilog="Start with:  clipkit eval retrieval --data dataset   ·   clipkit eval compare builtin "
    "runs/mine --data dataset",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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


@evaluate.command(
    epilog="Examples:  clipkit eval retrieval --data dataset   ·   clipkit eval retrieval --data "
    "hf:nlphuji/flickr30k --model ViT-B-32/laion2b_s34b_b79k   ·   clipkit eval retrieval --data "
    "~/Pictures --queries tags -k 5,20"
)
def retrieval(
    data: DataOption,
    model: ModelOption = "builtin",
    split: SplitOption = None,
    k: CutsOption = "1,5,10",
    queries: Annotated[
        str, typer.Option(help="captions, both ways; or tags, each a query for all that bear it.")
    ] = "captions",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find pictures by their captions, captions by their pictures: recall@K, ranks, MRR, mAP, nDCG."""
    from eval.data import open_captioned
    from eval.retrieval import evaluate_retrieval

    _one_of("--queries", queries, ("captions", "tags"))
    cuts = _numbers("-k", k)
    captioned = open_captioned(data, split=split, limit=limit)
    with _measuring(model, device, precision, cache, no_cache) as job:
        report = evaluate_retrieval(
            job.encoder,
            captioned,
            ks=cuts,
            queries=queries,  # type: ignore[arg-type]
            seed=seed,
            **job.options,
        )
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval zeroshot --data ./folder-per-class   ·   clipkit eval zeroshot "
    "--data cifar10 --model ViT-B-32/openai   ·   clipkit eval zeroshot --data shards/ --classes "
    "classes.txt --templates mine.txt"
)
def zeroshot(
    data: DataOption,
    model: ModelOption = "builtin",
    split: SplitOption = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A benchmark's class names, or a file with a name a line, in the labels' order.",
        ),
    ] = None,
    templates: TemplatesOption = None,
    k: CutsOption = "1,5",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Classify pictures by the names of their classes: accuracy, recall per class, calibration, mAP."""
    from eval.data import open_labelled
    from eval.prompts import load_classes
    from eval.zero_shot import evaluate_zero_shot

    cuts = _numbers("-k", k)
    prompts = _templates(templates, data)
    names = None if classes is None else load_classes(classes)
    labelled = open_labelled(data, split=split, classes=names, limit=limit)
    with _measuring(model, device, precision, cache, no_cache) as job:
        report = evaluate_zero_shot(
            job.encoder, labelled, templates=prompts, ks=cuts, seed=seed, **job.options
        )
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval probe --train cars/train --data cars/test   ·   clipkit eval "
    "probe --train dataset --data dataset --kinds knn -k 1,20   ·   clipkit eval probe --train "
    "train/ --data test/ --shots 1,2,4,8,16"
)
def probe(
    data: DataOption,
    train: Annotated[
        str,
        typer.Option(metavar="DATA", help="What the probes learn from.", show_default=False),
    ],
    model: ModelOption = "builtin",
    split: SplitOption = None,
    train_split: Annotated[
        str | None, typer.Option(help="Of --train. Default: train, or all where there are none.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="knn, linear")] = "knn,linear",
    k: Annotated[str, typer.Option("-k", metavar="K,K,...", help="Neighbours.")] = "1,5,10,20",
    shots: Annotated[
        str, typer.Option(metavar="N,N,...", help="Few-shot: so many pictures a class.")
    ] = "",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """How much the frozen image tower knows: k nearest neighbours, and a linear classifier on top."""
    from eval.data import open_labelled
    from eval.probes import evaluate_probe

    chosen = tuple(part.strip() for part in kinds.split(",") if part.strip())
    for kind in chosen:
        _one_of("--kinds", kind, ("knn", "linear"))
    neighbours, few = _numbers("-k", k), _numbers("--shots", shots) if shots else ()
    learning = _to_learn_from(train, train_split)
    testing = open_labelled(data, split=split, limit=limit)
    with _measuring(model, device, precision, cache, no_cache) as job:
        report = evaluate_probe(
            job.encoder,
            learning,
            testing,
            kinds=chosen,  # type: ignore[arg-type]
            knn_ks=neighbours,
            shots=few,
            seed=seed,
            **job.options,
        )
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval robustness --data ./folder-per-class   ·   clipkit eval "
    "robustness --data dataset --corruptions motion_blur,pixelate --severities 1,5   ·   clipkit "
    "eval robustness --data ./domain-folders --by-domain"
)
def robustness(
    data: DataOption,
    model: ModelOption = "builtin",
    split: SplitOption = None,
    corruptions: Annotated[
        str, typer.Option(metavar="NAME,...", help="Which corruptions. Default: all of them.")
    ] = "",
    severities: Annotated[str, typer.Option(metavar="N,N,...", help="1 to 5.")] = "1,3,5",
    templates: TemplatesOption = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Class folders lie below domain folders.")
    ] = False,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """What noise, blur, weather and compression cost: accuracy, or recall where there are captions."""
    from eval.data import open_labelled
    from eval.robustness import CORRUPTIONS, evaluate_robustness

    names = tuple(part.strip() for part in corruptions.split(",") if part.strip())
    for name in names:
        _one_of("--corruptions", name, tuple(CORRUPTIONS))
    levels = _numbers("--severities", severities)
    opened: Any = (
        open_labelled(data, split=split, limit=limit, by_domain=True)
        if by_domain
        else _captioned_or_labelled(data, split, limit)
    )
    with _measuring(model, device, precision, cache, no_cache) as job:
        report = evaluate_robustness(
            job.encoder,
            opened,
            corruptions=names or tuple(CORRUPTIONS),
            severities=levels,
            templates=_templates(templates, data),
            seed=seed,
            **job.options,
        )
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval space --data dataset   ·   clipkit eval space --index "
    "~/my-index   ·   clipkit eval space --data dataset --model runs/mine"
)
def space(
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Pictures, as for retrieval.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", metavar="DIR", help="An index's own vectors.")
    ] = None,
    model: ModelOption = "builtin",
    split: SplitOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Health of the embedding space: spread, effective rank, alignment, modality gap, hubs."""
    from eval.space import evaluate_space, space_of_vectors

    if (data is None) == (index is None):
        raise InputError("name what to look at: either --data DATA or --index DIR")
    if index is not None:
        spec, encoder_id, _, vectors = _library(index)
        report = space_of_vectors(
            vectors, model=spec, encoder_id=encoder_id, dataset=str(index), seed=seed
        )
    else:
        opened = _captioned_or_labelled(str(data), split, limit)
        with _measuring(model, device, precision, cache, no_cache) as job:
            report = evaluate_space(job.encoder, opened, seed=seed, **job.options)
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval drift --data dataset --model builtin --against runs/mine   ·   "
    "clipkit eval drift --data ./photos-2025 --against-data ./photos-2026"
)
def drift(
    data: DataOption,
    model: ModelOption = "builtin",
    against: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Another model on the same pictures."),
    ] = None,
    against_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other pictures, the same model.")
    ] = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """What changed: between two models on the same pictures, or between two batches of pictures."""
    from clipkit.lazy_encoder import LazyEncoder
    from eval.drift import drift_between_batches, drift_between_encoders

    if (against is None) == (against_data is None):
        raise InputError("name what to compare with: either --against SPEC or --against-data DATA")
    first = _captioned_or_labelled(data, split, limit)
    second = None if against_data is None else _captioned_or_labelled(against_data, split, limit)
    with _measuring(model, device, precision, cache, no_cache) as job:
        if second is not None:
            report = drift_between_batches(job.encoder, first, second, seed=seed, **job.options)
        else:
            other = LazyEncoder(str(against), device=device, precision=precision)
            report = drift_between_encoders(job.encoder, other, first, seed=seed, **job.options)
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval index   ·   clipkit eval index --index ~/my-index --kinds "
    "exact,rabitq --recall-goals 0.95,0.99"
)
def index(
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="DIR", envvar="CLIPKIT_INDEX", help="The index's folder."),
    ] = None,
    kinds: Annotated[str, typer.Option(metavar="KIND,...", help="Default: all of them.")] = "",
    recall_goals: Annotated[str, typer.Option(metavar="R,R,...")] = "0.9,0.95,0.99",
    k: CutsOption = "1,10,100",
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recall, latency, memory, build and load time of every index kind on your own vectors."""
    from clipkit.index import KINDS
    from eval.index_quality import evaluate_index

    names = tuple(part.strip() for part in kinds.split(",") if part.strip())
    for name in names:
        _one_of("--kinds", name, tuple(KINDS))
    goals = _fractions("--recall-goals", recall_goals)
    cuts = _numbers("-k", k)
    place = index_folder(index)
    spec, encoder_id, ids, vectors = _library(place)
    with _stoppable(), stop_on_signal() as stop, progress_shown() as show:
        report = evaluate_index(
            ids,
            vectors,
            kinds=names or tuple(KINDS),
            recall_goals=goals,
            ks=cuts,
            model=spec,
            encoder_id=encoder_id,
            dataset=str(place),
            seed=seed,
            on_progress=show,
            stop=stop,
        )
    _finish(report, out, as_json=as_json)


@evaluate.command(
    epilog="Examples:  clipkit eval compare builtin runs/mine --data dataset   ·   clipkit eval "
    "compare builtin ViT-B-32/openai --data cifar10 --data dataset   ·   clipkit eval compare "
    "reports/a reports/b"
)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="Models, the first is the yardstick; or reports."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="What to measure on; may be given again."),
    ] = None,
    split: SplitOption = None,
    templates: TemplatesOption = None,
    k: CutsOption = "1,5,10",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: OutOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Models side by side on the same pictures: what differs, and whether that is more than chance.

    Retrieval where the data has captions, zero-shot where it has classes. What was encoded before
    is not encoded again. Folders of saved reports are compared as they are.
    """
    from clipkit.lazy_encoder import LazyEncoder
    from eval.compare import compare as compare_models
    from eval.compare import compare_reports
    from eval.prompts import load_templates
    from eval.report import EvalReport

    if not data:
        folders = [Path(model).expanduser() for model in models]
        if not all((folder / "report.json").is_file() for folder in folders):
            raise InputError("name what to measure on with --data DATA, or give saved reports")
        reports = [[EvalReport.load(folder)] for folder in folders]
        result = compare_reports(reports, command=command_line(), seed=seed)
    else:
        if len(models) < 2:
            raise InputError(f"{len(models)} model to compare; name at least two")
        cuts = _numbers("-k", k)
        opened = [_captioned_or_labelled(name, split, limit) for name in data]
        with _measuring(models[0], device, precision, cache, no_cache) as job:
            others = [LazyEncoder(m, device=device, precision=precision) for m in models[1:]]
            result = compare_models(
                [job.encoder, *others],
                opened,
                templates=load_templates(templates) if templates else None,
                ks=cuts,
                command=command_line(),
                seed=seed,
                **job.options,
            )
    folder = report_folder(out, "compare", *models)
    result.save(folder)
    _say(result.to_json() if as_json else "\n".join(result.lines()), folder, as_json=as_json)


# ---- what the commands share


@dataclass(frozen=True)
class _Job:
    encoder: LazyEncoder
    cache: FeatureCache
    options: dict[str, Any]  # cache, on_progress and stop, as every evaluator takes them


@contextmanager
def _measuring(
    model: str, device: str, precision: str, cache: Path | None, no_cache: bool
) -> Iterator[_Job]:
    from clipkit.lazy_encoder import LazyEncoder
    from eval.features import FeatureCache

    kept = FeatureCache(None if no_cache else features_folder(cache))
    with _stoppable(), stop_on_signal() as stop, progress_shown() as show:
        options = {"cache": kept, "on_progress": show, "stop": stop}
        yield _Job(LazyEncoder(model, device=device, precision=precision), kept, options)


@contextmanager
def _stoppable() -> Iterator[None]:
    from eval.features import Stopped

    try:
        yield
    except Stopped:
        print("stopped; what was encoded is kept, the same command goes on from there")
        raise typer.Exit(130) from None


def _finish(report: EvalReport, out: Path | None, *, as_json: bool) -> None:
    """Print the report, and keep it."""
    report = replace(report, command=command_line())
    folder = report_folder(out, report.task, report.dataset, report.model)
    report.save(folder)
    _say(report.to_json() if as_json else "\n".join(report.lines()), folder, as_json=as_json)


def _say(told: str, folder: Path, *, as_json: bool) -> None:
    print(told)
    shown = printable(str(folder / "report.html"))
    print(f"report: {shown}", file=sys.stderr if as_json else sys.stdout)


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["clipkit", *sys.argv[1:]])


def report_folder(given: Path | None, *named: str) -> Path:
    """Where a report goes: what was given, else a new folder that is named for what it is about."""
    from app.evaluation import reports_folder

    if given is not None:
        return given.expanduser()
    parts = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name).strip("-.") for name in named]
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return reports_folder() / "-".join([*filter(None, parts), stamp])[-120:]


def _library(place: Path) -> tuple[str, str, Any, Any]:
    """An index's model, its identity, and the ids and vectors (float16) of its live pictures."""
    from clipkit.catalog import Catalog

    with Catalog.open(place.expanduser()) as catalog:
        encoders = catalog.encoders()
        if not encoders:
            raise InputError(f"index {place} holds no vectors yet; fill it: clipkit index FOLDER")
        last = encoders[-1]
        stored = catalog.vectors(last.encoder_id)
        return last.spec, last.encoder_id, stored.nums, stored.vectors


def _captioned_or_labelled(data: str, split: str | None, limit: int | None) -> Any:
    """What the data is: captions if it has them, else classes."""
    from eval.data import open_captioned, open_labelled

    try:
        return open_captioned(data, split=split, limit=limit)
    except InputError as no_captions:
        try:
            return open_labelled(data, split=split, limit=limit)
        except InputError:
            raise no_captions from None


def _to_learn_from(data: str, split: str | None) -> Labelled:
    from eval.data import open_labelled

    try:
        return open_labelled(data, split=split or "train")
    except InputError:
        whole = open_labelled(data, split=split)
        if whole.split is not None:
            raise
        return whole


def _templates(given: str | None, data: str) -> Any:
    from eval.prompts import default_templates, load_templates

    return load_templates(given) if given else default_templates(data)


def _one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{option} is {value!r}; it must be one of {', '.join(known)}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,5,10" -> (1, 5, 10)"""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise InputError(f"{option} is {text!r}; it must be whole numbers from 1, such as 1,5,10")
    return tuple(sorted(set(values)))


def _fractions(option: str, text: str) -> tuple[float, ...]:
    """ "0.9,0.99" -> (0.9, 0.99)"""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise InputError(f"{option} is {text!r}; it must be shares of 1, such as 0.9,0.99")
    return tuple(sorted(set(values)))
