"""The commands on one index: `clipkit index`, `search`, `app`, `status` and `corrections`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.terminal import (
    DeviceOption,
    IndexOption,
    PrecisionOption,
    examples,
    progress_shown,
    size,
    stop_on_signal,
)
from app.paths import index_folder
from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.wording import duration, printable

if TYPE_CHECKING:
    from clipkit import Hits
    from clipkit.embed import Progress, Summary
    from clipkit.search import SearchHit

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="builtin, ARCHITECTURE/TAG, hf-hub:ORG/NAME, or a checkpoint folder. "
        "Default: the index's own model, builtin for a new index.",
    ),
]


def index(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", show_default=False)],
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode. Default: one per core.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures per batch. Default: by device.")
    ] = None,
    max_megapixels: Annotated[
        float, typer.Option(min=0.1, help="Skip pictures that are larger.")
    ] = 100.0,
    max_megabytes: Annotated[
        float, typer.Option(min=0.1, help="Skip files that are larger.")
    ] = 256.0,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove these folders from the index instead.")
    ] = False,
) -> None:
    """Index folders of pictures; run it again to bring the index up to date.

    Ctrl-C stops it after the current batch, and the next run resumes there. Moved files are
    recognised by their content. A folder that is missing or empty (an unmounted disk) removes
    nothing from the index.
    """
    from clipkit import Library
    from clipkit.images import Limits

    place = index_folder(index)
    with Library.open(place, model=model, device=device, precision=precision) as library:
        if forget:
            removed = library.remove(*folders)
            print(f"{removed:,} files removed from the index; the pictures were not touched")
            return
        with stop_on_signal() as stop, progress_shown() as show:

            def on_progress(progress: Progress) -> None:
                if progress.phase == "embedding":
                    note = f"{progress.rate:.1f}/s, {progress.skipped:,} skipped"
                    show("indexing", progress.done, progress.total, note)
                else:
                    show(progress.phase, progress.seen, 0)

            summary = library.add(
                *folders,
                on_progress=on_progress,
                stop=stop,
                workers=workers,
                batch_size=batch_size,
                limits=Limits(max_megapixels=max_megapixels, max_megabytes=max_megabytes),
            )
    _print_summary(summary, place)
    if summary.stopped:
        raise typer.Exit(130)


def search(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", show_default=False, help="The query."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An example: find pictures like this one.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of pictures, without a limit.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as a JSON list.")] = False,
    open_first: Annotated[bool, typer.Option("--open", help="Open the best picture.")] = False,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Find pictures by text, by an example picture, or by both.

    Plain words describe the picture, and count in the names of its folders. [bold]-word[/] pushes
    away, [bold]+FILE[/] adds an example, [bold]"a phrase"[/] must occur in file name, folder, caption
    or tags ([bold]"IMG_20*"[/]: in a word that begins so), and [bold]key:value[/] filters:
    after, before, path, folder, camera, format, tag, width, height, orientation. [bold]sort:[/]
    orders by score, date or name.
    """
    # One short text through numpy: more threads than one would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from clipkit import Library

    if not text and image is None:
        raise InputError("nothing to search for; give words, or a picture with --image FILE")
    place = index_folder(index)
    with Library.open(place, model=model, device=device, precision=precision) as library:
        hits = library.search(" ".join(text or ()), k=k, image=image)
    if as_json:
        print(json.dumps([_as_json(hit) for hit in hits], indent=2))
    else:
        _print_hits(hits)
    if hits.empty:
        print(hits.empty.sentence, file=sys.stderr)
        for offer in hits.empty.offers:
            print(f"  {offer.label}: {offer.total:,} pictures", file=sys.stderr)
    if open_first and hits:
        typer.launch(hits[0].picture.path)


def app(
    index: IndexOption = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")
    ] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Serve the search page, to this machine only unless --host is given."""
    from app.web.page import serve

    serve(
        index_folder(index),
        model=model,
        host=host,
        port=port,
        open_browser=open_browser,
        device=device,
        precision=precision,
    )


def status(
    index: IndexOption = None,
    skipped: Annotated[bool, typer.Option("--skipped", help="List the skipped files.")] = False,
) -> None:
    """Show what an index holds, and which files were skipped and why."""
    from clipkit.catalog import Catalog

    place = index_folder(index)
    with Catalog.open(place) as catalog:
        stats = catalog.stats()
        print(f"index      {printable(str(place))}")
        print(f"pictures   {stats.pictures:,} in {stats.places:,} files, {size(stats.bytes)}")
        for root in stats.roots:
            print(f"folder     {printable(root)}")
        for encoder in catalog.encoders():
            vectors = catalog.stats(encoder.encoder_id).vectors
            print(f"model      {encoder.spec} ({encoder.encoder_id}), {vectors:,} vectors")
        hint = "" if skipped or not stats.skipped else " (list them with --skipped)"
        print(f"skipped    {stats.skipped:,}{hint}")
        for row in catalog.skipped() if skipped else ():
            print(f"  {row.reason:<16} {printable(row.path)}: {printable(row.message)}")


def corrections(
    index: IndexOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A .jsonl file. Default: standard output."),
    ] = None,
) -> None:
    """Export the results that were marked right or wrong in the app, for `clipkit data build`.

    One JSON object per line: {"picture": path, "query": text, "right": true or false, ...}. A right
    query becomes a caption of the picture, a wrong one removes such a caption.
    """
    from app.corrections import Corrections, export
    from clipkit.catalog import Catalog

    place = index_folder(index)
    with Catalog.open(place) as catalog:
        marks = Corrections(place).all()
        rows = list(export(marks, catalog))
    if not marks:
        raise InputError(
            f"no corrections in {place} yet; mark results of a text search in: clipkit app"
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(lines)
    else:
        try:
            write_whole(out.expanduser(), lines.encode("utf-8"))
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}") from error
        kinds = Counter(row["right"] for row in rows)
        print(f"{len(rows):,} corrections: {kinds[True]:,} right, {kinds[False]:,} wrong")
        print(f"written to {printable(str(out))}")
    if left := len(marks) - len(rows):
        print(
            f"{left:,} left out: their pictures left the index, or their files were deleted or changed",
            file=sys.stderr,
        )


def add_commands(cli: typer.Typer) -> None:
    """Register the commands above, each with its examples."""
    cli.command(
        epilog=examples(
            "clipkit index ~/Pictures",
            "clipkit index /mnt/a /mnt/b --model ViT-B-32/laion2b_s34b_b79k",
            "clipkit index ~/Pictures --index /fast/disk/index",
        )
    )(index)
    cli.command(
        epilog=examples(
            "clipkit search birthday cake",
            "clipkit search 'dog on a beach -leash after:2023' -k 50",
            "clipkit search --image photo.jpg",
            "clipkit search cat --json",
        )
    )(search)
    cli.command(epilog=examples("clipkit app --open", "clipkit app --index .demo/gallery"))(app)
    cli.command(epilog=examples("clipkit status", "clipkit status --skipped"))(status)
    cli.command(
        epilog=examples(
            "clipkit corrections",
            "clipkit corrections --out corrections.jsonl",
            "clipkit data build captions.csv corrections.jsonl --out dataset",
        )
    )(corrections)


def _print_summary(summary: Summary, place: Path) -> None:
    names = "added moved duplicates removed unchanged skipped skipped_before".split()
    counts = {name.replace("_", " "): getattr(summary, name) for name in names}
    changes = ", ".join(f"{count:,} {label}" for label, count in counts.items() if count)
    rate = f", {summary.pictures_per_second:.1f} pictures/s" if summary.embedded else ""
    print(f"{changes or 'no pictures found'} in {duration(summary.seconds)}{rate}")
    for reason, count in summary.reasons.items():
        print(f"  {count:,} skipped: {reason}")
    if summary.skipped:
        print("  list them with: clipkit status --skipped")
    for root in summary.unavailable:
        print(
            f"{printable(root)} is empty or not mounted: nothing was removed from the index "
            "(if its pictures are gone for good: clipkit index --forget FOLDER)"
        )
    if summary.stopped:
        print("stopped; run the same command again to resume")
    print(f"index: {printable(str(place))}")


def _as_json(hit: SearchHit) -> dict[str, object]:
    return {
        "rank": hit.rank,
        "image_id": hit.picture.image_id,
        "score": hit.score,
        "strength": hit.strength,
        "named": hit.named,
        "path": hit.picture.path,
    }


def _print_hits(hits: Hits) -> None:
    """Print a hit per line, its path last and never wrapped, so that it can be copied or piped."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    colours = {"strong": "green", "fair": "yellow", "weak": "dim"}
    width = len(str(len(hits)))
    for hit in hits:
        strength = hit.strength or ""
        score = "" if hit.score is None else f"{hit.score:.3f}"
        line = Text(f"{hit.rank:>{width}}  {score:>5}  ")
        line.append(f"{strength:<6}", style=colours.get(strength, ""))
        line.append(f"  {printable(hit.picture.path)}")
        console.print(line, soft_wrap=True)
    seconds = sum(hits.seconds.values())
    console.print(f"{len(hits):,} of {hits.total:,} pictures, {duration(seconds)}", style="dim")
