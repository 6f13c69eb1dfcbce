"""`clipkit data`: build a dataset of pictures and captions, check its splits, show its statistics."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.terminal import (
    MORE,
    MegapixelsOption,
    QuietOption,
    WorkersOption,
    choice,
    command_line,
    examples,
    group,
    number,
    progress_shown,
)
from clipkit.wording import class_sizes, count, duration, printable

if TYPE_CHECKING:
    from data_prep.build import Built, Progress
    from data_prep.leaks import Leaks

data = group(
    "data",
    "Build a dataset of pictures and captions, check its splits, show its statistics.",
    "clipkit data build captions.csv --out dataset",
)


def _kinds() -> list[str]:
    from clipkit.sources import SOURCES

    return sorted(SOURCES)


def _reasons() -> list[str]:
    from data_prep.clean import ALLOWABLE

    return list(ALLOWABLE)


KindOption = Annotated[
    str | None,
    choice(
        "--kind",
        _kinds,
        metavar="KIND",
        help="classes, coco, corrections, flickr, folder, hf, imagefolder, jsonl, karpathy, table, "
        "webdataset or zip.",
        show_default="detected",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The column that names the picture.", show_default="detected"
    ),
]
CaptionColumn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="A column of captions; may be repeated.", show_default="detected"
    ),
]
PicturesOption = Annotated[
    Path | None,
    typer.Option(
        "--pictures", metavar="DIR", help="The pictures' folder.", show_default="beside the table"
    ),
]
RadiusOption = Annotated[
    int,
    number(
        "--radius",
        help="Largest distance of look-alikes, in bits of 256: 0 to 15.",
        low=0,
        high=15,  # data_prep.split.MAX_RADIUS
        more=True,
    ),
]
_SHARE = {"low": 0.0, "below": 1.0}


@data.command(
    epilog=examples(
        "clipkit data build captions.csv --out dataset",
        "clipkit data build photos/ --out dataset --resize 512",
        "clipkit data build dataset_flickr8k.json --pictures Flicker8k --out flickr8k",
        "clipkit data build captions.csv corrections.jsonl --out dataset --overwrite",
        "clipkit data build hf:nlphuji/flickr30k --out flickr30k --shards",
        "clipkit data build cifar10.zip --out dataset --uncaptioned keep",
    )
)
def build(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The dataset's folder.")],
    kind: KindOption = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    pictures: PicturesOption = None,
    split: Annotated[
        Literal["train", "validation", "test"] | None,
        choice(
            "--split",
            ("train", "validation", "test"),
            help="The split of rows that name none: train, validation or test.",
            show_default="by content",
        ),
    ] = None,
    validation: Annotated[
        float,
        number("--validation", help="Share of pictures for validation.", kind=float, **_SHARE),
    ] = 0.1,
    test: Annotated[
        float, number("--test", help="Share of pictures for the test.", kind=float, **_SHARE)
    ] = 0.1,
    resize: Annotated[
        int | None,
        number("--resize", help="Shrink the shorter side to these pixels, as JPEG.", low=16),
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Write WebDataset tars, for very many pictures.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset.")] = False,
    uncaptioned: Annotated[
        Literal["reject", "keep"],
        choice(
            "--uncaptioned",
            ("reject", "keep"),
            help="Pictures without a caption: reject or keep.",
        ),
    ] = "reject",
    quiet: QuietOption = False,
    seed: Annotated[int, number("--seed", help="Another seed gives other splits.", more=True)] = 0,
    near: Annotated[
        Literal["group", "drop", "ignore"],
        choice(
            "--near",
            ("group", "drop", "ignore"),
            help="Look-alikes: group (keep in one split), drop (keep one of each), or ignore.",
            rich_help_panel=MORE,
        ),
    ] = "group",
    radius: RadiusOption = 15,
    min_side: Annotated[
        int, number("--min-side", help="Smallest side in pixels; 0: any.", low=0, more=True)
    ] = 32,
    min_chars: Annotated[
        int, number("--min-chars", help="Shortest caption; 0: any.", low=0, more=True)
    ] = 2,
    max_chars: Annotated[
        int, number("--max-chars", help="Longest caption; 0: any.", low=0, more=True)
    ] = 1000,
    max_repeats: Annotated[
        int,
        number(
            "--max-repeats",
            help="Pictures that may share a caption; 0: any number.",
            low=0,
            more=True,
        ),
    ] = 100,
    script: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only captions in this script, such as LATIN.",
            rich_help_panel=MORE,
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        choice(
            "--allow",
            _reasons,
            metavar="REASON",
            help="Switch a rule off: blank, url, file-name, placeholder, no-letters, mojibake, "
            "marked-wrong.",
            rich_help_panel=MORE,
        ),
    ] = None,
    max_megapixels: MegapixelsOption = 100.0,
    workers: WorkersOption = None,
) -> None:
    """Build a dataset from tables, folders, JSON, shards, zips or the hub.

    Captions are repaired and filtered, equal pictures become one with all their captions, look-alikes
    stay in one split, classes are in all. Everything rejected is counted and listed in
    DIR/rejected.jsonl. Pictures are hard-linked where the file system can. DIR appears when the dataset
    is complete, or not at all.
    """
    from clipkit.images import Limits
    from clipkit.sources import Options, open_sources
    from data_prep.build import build as build_dataset
    from data_prep.clean import Rules
    from data_prep.split import Fractions

    rules = Rules(
        min_side=min_side,
        min_chars=min_chars,
        max_chars=max_chars,
        max_repeats=max_repeats,
        scripts=tuple(script or ()),
        near=near,
        radius=radius,
        allow=frozenset(allow or ()),
        uncaptioned=uncaptioned,
    )
    fractions = Fractions(validation, test)
    limits = Limits(max_megapixels=max_megapixels)
    options = Options(
        image_column,
        tuple(caption_column or ()),
        pictures,
        split,
        uncaptioned=rules.uncaptioned == "keep",
    )
    start = time.monotonic()
    opened = open_sources(sources, kind=kind, options=options)
    for source in opened:
        kind, path = f"{source.kind:<10}", printable(source.path)
        print(f"{kind} {path}: {printable(source.description)}")
    with _stopping(f"stopped; {out} was not touched"), progress_shown(quiet=quiet) as show:

        def on_progress(progress: Progress) -> None:
            show(progress.phase, progress.done, progress.total or progress.done)

        built = build_dataset(
            opened,
            out,
            rules=rules,
            fractions=fractions,
            seed=seed,
            resize=resize,
            shards=shards,
            overwrite=overwrite,
            workers=workers,
            limits=limits,
            command=command_line(),
            on_progress=on_progress,
        )
    _print_built(built, time.monotonic() - start)


@data.command(
    epilog=examples(
        "clipkit data check dataset",
        "clipkit data check dataset --show 0",
        "clipkit data check dataset_flickr8k.json --pictures Flicker8k_Dataset",
    )
)
def check(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", show_default=False)],
    kind: KindOption = None,
    pictures: PicturesOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Count equal captions in two splits as leaks.")
    ] = False,
    most: Annotated[
        int, number("--show", help="How many to list of each kind; 0: all.", low=0)
    ] = 20,
    quiet: QuietOption = False,
    radius: RadiusOption = 15,
    workers: WorkersOption = None,
) -> None:
    """Find pictures that are in two splits: the same file, or a look-alike.

    Equal captions are listed, too, but are not leaks in themselves: two pictures may both be "A dog
    runs.". Exit code 1 if there are leaks.
    """
    from clipkit.sources import Options, open_source
    from data_prep.leaks import find_leaks

    source = open_source(dataset, kind=kind, options=Options(pictures=pictures))
    with _stopping("stopped"), progress_shown(quiet=quiet) as show:
        leaks = find_leaks(
            source,
            radius=radius,
            workers=workers,
            on_progress=lambda done, total: show("reading", done, total or done),
        )
    _print_leaks(leaks, most or sys.maxsize)
    if leaks.pairs or (strict and leaks.shared_captions):
        raise typer.Exit(1)


@data.command(
    epilog=examples(
        "clipkit data stats dataset",
        "clipkit data stats dataset --out dataset.png",
    )
)
def stats(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="Draw it: a .png, .pdf, .svg or a folder.",
        ),
    ] = None,
    kind: KindOption = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    pictures: PicturesOption = None,
    quiet: QuietOption = False,
    workers: WorkersOption = None,
) -> None:
    """Show the statistics of a dataset or of any source: captions, words, labels, sizes, splits."""
    from clipkit.sources import Options, open_source
    from data_prep.stats import collect, lines

    if out is not None and not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        out = out / "stats.png"
    options = Options(image_column, tuple(caption_column or ()), pictures)
    source = open_source(dataset, kind=kind, options=options)
    with _stopping("stopped"), progress_shown(quiet=quiet) as show:
        statistics = collect(
            source,
            workers=workers,
            on_progress=lambda done, total: show("reading", done, total or done),
        )
    for line in lines(statistics):
        print(printable(line))
    if out is not None:
        from data_prep.stats import draw

        draw(statistics, out, title=Path(dataset).name or dataset)
        print(f"drawn      {printable(str(out))}")


# ---- shared by the commands


@contextmanager
def _stopping(message: str) -> Iterator[None]:
    """Turn Ctrl-C into `message` and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr)
        raise typer.Exit(130) from None


def _print_built(built: Built, seconds: float) -> None:
    splits = ", ".join(f"{split} {number:,}" for split, number in built.pictures.items())
    print(f"pictures   {sum(built.pictures.values()):,} ({splits})")
    repairs = ", ".join(f"{kind} {number:,}" for kind, number in built.mended.items())
    repaired = f", {sum(built.mended.values()):,} repaired ({repairs})" if repairs else ""
    without = f"; {count(built.uncaptioned)} without" if built.uncaptioned else ""
    print(f"captions   {built.captions:,}{repaired}{without}")
    if sizes := built.labels.values():
        print(f"labels     {class_sizes(sizes, sum(built.pictures.values()) - sum(sizes))}")
    if "train" not in built.pictures:
        print("note       none is in train, by its source or --split: there is nothing to train on")
    elif len(built.pictures) == 1:
        print("note       none is held out, so a training run cannot show what it gained")
    if built.groups:
        parted = f", {built.parted:,} split up by official splits: see clipkit data check"
        print(f"look-alike {count(built.groups, 'group')}{parted if built.parted else ''}")
    for what, reasons in built.rejected.items():
        counts = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())
        print(f"rejected   {count(sum(reasons.values()), what)}: {counts}")
    if built.rejected:
        print(
            f"           each with its reason in {printable(str(built.folder / 'rejected.jsonl'))}"
        )
    print(f"took       {duration(seconds)}")
    print(f"dataset    {printable(str(built.folder))}")


def _print_leaks(leaks: Leaks, most: int) -> None:
    print("pictures   " + ", ".join(f"{split} {n:,}" for split, n in leaks.pictures.items()))
    for name, why in leaks.unreadable[:most]:
        print(f"unreadable {printable(name)}: {printable(why)}")
    if len(leaks.unreadable) > most:
        print(f"           and {len(leaks.unreadable) - most:,} more unreadable")
    for title, listed in (("leaks", leaks.pairs), ("captions", leaks.shared_captions)):
        counts = Counter((leak.kind, *leak.splits) for leak in listed)
        summary = ", ".join(f"{n:,} {kind} in {a} and {b}" for (kind, a, b), n in counts.items())
        print(f"{title:<10} {summary or 'none across splits'}")
        for leak in listed[:most]:
            names = " | ".join(
                f"{s}: {printable(p)}" for s, p in zip(leak.splits, leak.pictures, strict=True)
            )
            print(f"  {leak.kind:<13} {names}  ({printable(leak.detail)})")
        if len(listed) > most:
            print(f"  and {len(listed) - most:,} more; --show 0 lists all")
