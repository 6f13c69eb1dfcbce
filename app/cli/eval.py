"""`clipkit eval ...`: measure models and indexes, print a table and save a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.eval_options import (
    Common,
    CutsOption,
    DataOption,
    Encoding,
    OneModel,
    TemplatesOption,
    captioned_or_labelled,
    command_line,
    finish,
    fractions,
    library,
    measuring,
    numbers,
    one_of,
    prompts_for,
    report_folder,
    running,
    say,
    some_of,
    to_learn_from,
    with_options,
)
from app.cli.terminal import IndexOption, examples
from app.paths import index_folder
from clipkit.errors import InputError

evaluate = typer.Typer(
    name="eval",
    help="Measure models and indexes: every figure with its n and a 95 % interval.",
    epilog=examples(
        "clipkit eval retrieval --data dataset",
        "clipkit eval compare builtin runs/mine --data dataset",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@evaluate.command(
    epilog=examples(
        "clipkit eval retrieval --data dataset",
        "clipkit eval retrieval --data hf:nlphuji/flickr30k --model ViT-B-32/laion2b_s34b_b79k",
        "clipkit eval retrieval --data ~/Pictures --queries tags -k 5,20",
    )
)
@with_options(OneModel)
def retrieval(
    data: DataOption,
    k: CutsOption = "1,5,10",
    queries: Annotated[
        str,
        typer.Option(
            help="captions, in both directions; or tags, each a query for all pictures that have it."
        ),
    ] = "captions",
    *,
    shared: OneModel,
) -> None:
    """Find pictures by their captions, captions by their pictures: recall@K, ranks, MRR, mAP, nDCG."""
    from eval.data import open_captioned
    from eval.retrieval import evaluate_retrieval

    one_of("--queries", queries, ("captions", "tags"))
    cuts = numbers("-k", k)
    captioned = open_captioned(data, split=shared.split, limit=shared.limit)
    with measuring(shared.model, shared) as (encoder, session):
        report = evaluate_retrieval(
            encoder,
            captioned,
            ks=cuts,
            queries=queries,  # type: ignore[arg-type]
            session=session,
        )
    finish(report, shared)


@evaluate.command(
    epilog=examples(
        "clipkit eval zeroshot --data ./folder-per-class",
        "clipkit eval zeroshot --data cifar10 --model ViT-B-32/openai",
        "clipkit eval zeroshot --data shards/ --classes classes.txt --templates mine.txt",
    )
)
@with_options(OneModel)
def zeroshot(
    data: DataOption,
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
    shared: OneModel,
) -> None:
    """Classify pictures by the names of their classes: accuracy, recall per class, calibration, mAP."""
    from eval.data import open_labelled
    from eval.prompts import load_classes
    from eval.zero_shot import evaluate_zero_shot

    cuts = numbers("-k", k)
    prompts = prompts_for(templates, data)
    names = None if classes is None else load_classes(classes)
    labelled = open_labelled(data, split=shared.split, classes=names, limit=shared.limit)
    with measuring(shared.model, shared) as (encoder, session):
        report = evaluate_zero_shot(encoder, labelled, templates=prompts, ks=cuts, session=session)
    finish(report, shared)


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
            help="The split of --train. Default: train, or all pictures if there are no splits."
        ),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Which probes: knn, linear.")] = "knn,linear",
    k: Annotated[
        str, typer.Option("-k", metavar="K,K,...", help="Numbers of neighbours.")
    ] = "1,5,10,20",
    shots: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Few-shot: numbers of training pictures per class."),
    ] = "",
    *,
    shared: OneModel,
) -> None:
    """Measure what the frozen image tower knows, by k nearest neighbours and a linear classifier."""
    from eval.data import open_labelled
    from eval.probes import evaluate_probe

    chosen = some_of("--kinds", kinds, ("knn", "linear"))
    neighbours, few = numbers("-k", k), numbers("--shots", shots) if shots else ()
    learning = to_learn_from(train, train_split)
    testing = open_labelled(data, split=shared.split, limit=shared.limit)
    with measuring(shared.model, shared) as (encoder, session):
        report = evaluate_probe(
            encoder,
            learning,
            testing,
            kinds=chosen,
            knn_ks=neighbours,
            shots=few,
            session=session,
        )
    finish(report, shared)


@evaluate.command(
    epilog=examples(
        "clipkit eval robustness --data ./folder-per-class",
        "clipkit eval robustness --data dataset --corruptions motion_blur,pixelate --severities 1,5",
        "clipkit eval robustness --data ./domain-folders --by-domain",
    )
)
@with_options(OneModel)
def robustness(
    data: DataOption,
    corruptions: Annotated[
        str, typer.Option(metavar="NAME,...", help="Which corruptions. Default: all of them.")
    ] = "",
    severities: Annotated[str, typer.Option(metavar="N,N,...", help="1 to 5.")] = "1,3,5",
    templates: TemplatesOption = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Class folders lie below domain folders.")
    ] = False,
    *,
    shared: OneModel,
) -> None:
    """Measure what noise, blur, weather and compression cost in accuracy, or recall with captions."""
    from eval.corruptions import CORRUPTIONS
    from eval.data import open_labelled
    from eval.robustness import evaluate_robustness

    names = some_of("--corruptions", corruptions, tuple(CORRUPTIONS))
    levels = numbers("--severities", severities)
    opened: Any = (
        open_labelled(data, split=shared.split, limit=shared.limit, by_domain=True)
        if by_domain
        else captioned_or_labelled(data, shared.split, shared.limit)
    )
    with measuring(shared.model, shared) as (encoder, session):
        report = evaluate_robustness(
            encoder,
            opened,
            corruptions=names or tuple(CORRUPTIONS),
            severities=levels,
            templates=prompts_for(templates, data),
            session=session,
        )
    finish(report, shared)


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
) -> None:
    """Measure the embedding space: spread, effective rank, alignment, modality gap, hubs."""
    from eval.space import evaluate_space, space_of_vectors

    if (data is None) == (index is None):
        raise InputError("name what to look at: either --data DATA or --index DIR")
    if index is not None:
        spec, encoder_id, _, vectors = library(index)
        with running(shared) as session:
            report = space_of_vectors(
                vectors, model=spec, encoder_id=encoder_id, dataset=str(index), session=session
            )
    else:
        opened = captioned_or_labelled(str(data), shared.split, shared.limit)
        with measuring(shared.model, shared) as (encoder, session):
            report = evaluate_space(encoder, opened, session=session)
    finish(report, shared)


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
        typer.Option(metavar="SPEC", help="Another model on the same pictures."),
    ] = None,
    against_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other pictures, the same model.")
    ] = None,
    *,
    shared: OneModel,
) -> None:
    """Compare two models on the same pictures, or one model on two batches of pictures."""
    from clipkit.lazy_encoder import LazyEncoder
    from eval.drift import drift_between_batches, drift_between_encoders

    if (against is None) == (against_data is None):
        raise InputError("name what to compare with: either --against SPEC or --against-data DATA")
    first = captioned_or_labelled(data, shared.split, shared.limit)
    second = (
        None
        if against_data is None
        else captioned_or_labelled(against_data, shared.split, shared.limit)
    )
    with measuring(shared.model, shared) as (encoder, session):
        if second is not None:
            report = drift_between_batches(encoder, first, second, session=session)
        else:
            other = LazyEncoder(str(against), device=shared.device, precision=shared.precision)
            report = drift_between_encoders(encoder, other, first, session=session)
    finish(report, shared)


@evaluate.command(
    epilog=examples(
        "clipkit eval index",
        "clipkit eval index --index ~/my-index --kinds exact,rabitq --recall-goals 0.95,0.99",
    )
)
@with_options(Common)
def index(
    index: IndexOption = None,
    kinds: Annotated[str, typer.Option(metavar="KIND,...", help="Default: all of them.")] = "",
    recall_goals: Annotated[
        str, typer.Option(metavar="R,R,...", help="For each, find the fastest setting.")
    ] = "0.9,0.95,0.99",
    k: CutsOption = "1,10,100",
    *,
    shared: Common,
) -> None:
    """Measure recall, latency, memory, build and load time of every index kind on your vectors."""
    from clipkit.index import KINDS
    from eval.index_quality import evaluate_index

    names = some_of("--kinds", kinds, tuple(KINDS))
    goals = fractions("--recall-goals", recall_goals)
    cuts = numbers("-k", k)
    place = index_folder(index)
    spec, encoder_id, ids, vectors = library(place)
    with running(shared) as session:
        report = evaluate_index(
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
    finish(report, shared)


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
            metavar="SPEC...",
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
) -> None:
    """Compare models on the same pictures, with tests of whether the differences are chance.

    Data with captions is measured by retrieval, data with classes by zero-shot classification.
    Without --data, the arguments are folders of saved reports.
    """
    from clipkit.lazy_encoder import LazyEncoder
    from eval.compare import compare as compare_models
    from eval.compare import compare_reports
    from eval.prompts import load_templates
    from eval.reports import load, save

    if not data:
        folders = [Path(model).expanduser() for model in models]
        if not all((folder / "report.json").is_file() for folder in folders):
            raise InputError("name what to measure on with --data DATA, or give saved reports")
        reports = [[load(folder)] for folder in folders]
        result = compare_reports(reports, command=command_line(), seed=shared.seed)
    else:
        if len(models) < 2:
            raise InputError(f"{len(models)} model to compare; name at least two")
        cuts = numbers("-k", k)
        opened = [captioned_or_labelled(name, shared.split, shared.limit) for name in data]
        with measuring(models[0], shared) as (encoder, session):
            others = [
                LazyEncoder(m, device=shared.device, precision=shared.precision) for m in models[1:]
            ]
            result = compare_models(
                [encoder, *others],
                opened,
                templates=load_templates(templates) if templates else None,
                ks=cuts,
                command=command_line(),
                session=session,
            )
    folder = report_folder(shared.out, "compare", *models)
    save(result, folder)
    say(result, folder, shared)
