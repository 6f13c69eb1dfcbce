"""`clipkit data`: build a dataset from any source, check its splits, describe it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.terminal import examples, progress_shown
from clipkit.errors import InputError
from clipkit.wording import count, duration, printable

if TYPE_CHECKING:
    from clipkit.sources import Source
    from data_prep.build import Built, Progress
    from data_prep.leaks import Leaks

data = typer.Typer(
    name="data",
    help="Build a dataset of captioned pictures, check its splits, describe it.",
    epilog=examples("clipkit data build captions.csv --out dataset", "clipkit data check dataset"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


class Near(StrEnum):
    group = "group"
    drop = "drop"
    ignore = "ignore"


class Split(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"


KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="classes, coco, corrections, flickr, folder, hf, imagefolder, jsonl, karpathy, table or "
        "webdataset. Default: detected from the files.",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The column that names the picture. Default: detected."),
]
CaptionColumn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A column of captions; repeat the option for several. Default: detected.",
    ),
]
PicturesOption = Annotated[
    Path | None,
    typer.Option(
        "--pictures", metavar="DIR", help="The folder of the pictures. Default: beside the table."
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode. Default: one per core.")
]


@data.command(
    epilog=examples(
        "clipkit data build captions.csv --out dataset",
        "clipkit data build photos/ --out dataset --resize 512",
        "clipkit data build dataset_flickr8k.json --pictures Flicker8k_Dataset --out flickr8k",
        "clipkit data build captions.csv corrections.jsonl --out dataset --overwrite",
        "clipkit data build hf:nlphuji/flickr30k --out flickr30k --shards",
    )
)
def build(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The dataset's folder.")],
    kind: KindOption = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    pictures: PicturesOption = None,
    split: Annotated[
        Split | None,
        typer.Option(help="The split of rows that name none. Default: by content hash."),
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of the pictures for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the pictures for the test.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    resize: Annotated[
        int | None,
        typer.Option(metavar="SIDE", min=16, help="Shrink the shorter side to this, as JPEG."),
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Write WebDataset tars, for very many pictures.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing dataset.")
    ] = False,
    near: Annotated[
        Near,
        typer.Option(
            help="Look-alikes: group them in one split, drop all but one, or ignore them."
        ),
    ] = Near.group,
    radius: Annotated[
        int, typer.Option(help="Most bits of 256 in which the hashes of look-alikes differ.")
    ] = 15,
    min_side: Annotated[int, typer.Option(help="Shortest side in pixels; 0: any.")] = 32,
    min_chars: Annotated[int, typer.Option(help="Shortest caption in characters; 0: any.")] = 2,
    max_chars: Annotated[int, typer.Option(help="Longest caption in characters; 0: any.")] = 1000,
    max_repeats: Annotated[
        int, typer.Option(help="Most pictures that may share a caption; 0: any number.")
    ] = 100,
    script: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only captions in this script, such as LATIN."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REASON",
            help="Switch off a rule: blank, url, file-name, placeholder, no-letters, mojibake, "
            "marked-wrong.",
        ),
    ] = None,
    max_megapixels: Annotated[float, typer.Option(min=0.1, help="Reject larger pictures.")] = 100.0,
    workers: WorkersOption = None,
) -> None:
    """Build a dataset from one or more tables, folders, JSON files, shards or hub datasets.

    Captions are repaired and filtered, equal pictures become one with all their captions, look-alikes
    stay in one split. Rejections are counted and listed in DIR/rejected.jsonl. Pictures are hard links
    where the file system allows it. DIR appears when the build is complete, or not at all.
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
        near=near.value,
        radius=radius,
        allow=frozenset(allow or ()),
    )
    fractions = Fractions(validation, test)
    limits = Limits(max_megapixels=max_megapixels)
    named = split.value if split else None
    options = Options(image_column, tuple(caption_column or ()), pictures, named)
    start = time.monotonic()
    opened = open_sources(sources, kind=kind, options=options)
    for source in opened:
        print(_description(source))
    with _stopping(f"stopped; {out} was not touched"), progress_shown() as show:

        def on_progress(progress: Progress) -> None:
            show(progress.phase, progress.done, _total(progress.total, progress.done))

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
            command=shlex.join(["clipkit", *sys.argv[1:]]),
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
    radius: Annotated[
        int, typer.Option(help="Most bits of 256 in which the hashes of look-alikes differ.")
    ] = 15,
    strict: Annotated[
        bool, typer.Option("--strict", help="Count equal captions in two splits as leaks.")
    ] = False,
    shown: Annotated[
        int, typer.Option("--show", min=0, help="How many of each kind to list; 0: all.")
    ] = 20,
    workers: WorkersOption = None,
) -> None:
    """Find pictures that are in two splits: the same file, or one that looks alike.

    Equal captions are listed, too, but are not leaks: "A dog runs." may describe two pictures. The
    exit code is 1 if there are leaks.
    """
    from clipkit.sources import Options, open_source
    from data_prep.leaks import find_leaks
    from data_prep.split import MAX_RADIUS

    if not 0 <= radius <= MAX_RADIUS:
        raise InputError(f"--radius is {radius}; it must be 0 to {MAX_RADIUS} bits of 256")
    source = open_source(dataset, kind=kind, options=Options(pictures=pictures))
    with _stopping("stopped"), progress_shown() as show:
        leaks = find_leaks(
            source,
            radius=radius,
            workers=workers,
            on_progress=lambda done, total: show("reading", done, _total(total, done)),
        )
    _print_leaks(leaks, shown or sys.maxsize)
    if leaks.found or (strict and leaks.shared_captions):
        raise typer.Exit(1)


@data.command(
    epilog=examples("clipkit data stats dataset", "clipkit data stats dataset --out dataset.png")
)
def stats(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="Draw the figures: a .png, .pdf or .svg file, or a folder.",
        ),
    ] = None,
    kind: KindOption = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    pictures: PicturesOption = None,
    workers: WorkersOption = None,
) -> None:
    """Describe a dataset, or any source of one: captions, words, sizes, splits."""
    from clipkit.sources import Options, open_source
    from data_prep.stats import collect, lines

    if out is not None and not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        out = out / "stats.png"
    options = Options(image_column, tuple(caption_column or ()), pictures)
    source = open_source(dataset, kind=kind, options=options)
    with _stopping("stopped"), progress_shown() as show:
        collected = collect(
            source,
            workers=workers,
            on_progress=lambda done, total: show("reading", done, _total(total, done)),
        )
    for line in lines(collected):
        print(printable(line))
    if out is not None:
        from data_prep.stats import draw

        draw(collected, out, title=Path(dataset).name or dataset)
        print(f"drawn      {printable(str(out))}")


# ---- what the commands share


@contextmanager
def _stopping(message: str) -> Iterator[None]:
    """Turn Ctrl-C into a message and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr)
        raise typer.Exit(130) from None


def _total(total: int | None, done: int) -> int:
    """Return the total, or `done` for a stream whose total is unknown."""
    return done if total is None else total


def _description(source: Source) -> str:
    return f"{source.kind:<10} {printable(source.path)}: {printable(source.description)}"


def _print_built(built: Built, seconds: float) -> None:
    splits = ", ".join(f"{split} {number:,}" for split, number in built.pictures.items())
    print(f"pictures   {sum(built.pictures.values()):,} ({splits})")
    repaired = f", {built.mended:,} repaired" if built.mended else ""
    print(f"captions   {built.captions:,}{repaired}")
    if built.groups:
        divided = f", {built.parted:,} divided by official splits: see clipkit data check"
        print(f"look-alike {count(built.groups, 'group')}{divided if built.parted else ''}")
    for what, reasons in built.rejected.items():
        listed = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())
        print(f"rejected   {count(sum(reasons.values()), what)}: {listed}")
    if built.rejected:
        print(
            f"           each with its reason in {printable(str(built.folder / 'rejected.jsonl'))}"
        )
    print(f"took       {duration(seconds)}")
    print(f"dataset    {printable(str(built.folder))}")


def _print_leaks(leaks: Leaks, most: int) -> None:
    from data_prep.leaks import count_by_splits

    print("pictures   " + ", ".join(f"{split} {n:,}" for split, n in leaks.pictures.items()))
    for name, why in leaks.unreadable[:most]:
        print(f"unreadable {printable(name)}: {printable(why)}")
    if len(leaks.unreadable) > most:
        print(f"           and {len(leaks.unreadable) - most:,} more unreadable")
    for title, pairs in (("leaks", leaks.found), ("captions", leaks.shared_captions)):
        counts = count_by_splits(pairs)
        listed = ", ".join(f"{n:,} {kind} in {a} and {b}" for (kind, a, b), n in counts.items())
        print(f"{title:<10} {listed or 'none across splits'}")
        for leak in pairs[:most]:
            names = " | ".join(
                f"{s}: {printable(p)}" for s, p in zip(leak.splits, leak.pictures, strict=True)
            )
            print(f"  {leak.kind:<13} {names}  ({printable(leak.detail)})")
        if len(pairs) > most:
            print(f"  and {len(pairs) - most:,} more; --show 0 lists all")
