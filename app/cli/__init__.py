"""The command line, and where the parts are put together.

Nothing heavy is imported before a command needs it: `clipkit --help` must not pay for torch, nor a
text search for Gradio.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import corrections, train
from app.cli.data import data
from app.cli.eval import evaluate
from app.cli.terminal import size, stop_on_signal
from app.paths import index_folder
from clipkit import __version__
from clipkit.errors import ClipkitError, ImageError, InputError
from clipkit.wording import duration, printable

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.catalog import Catalog
    from clipkit.embed import Progress, Summary
    from clipkit.search import SearchHit, SearchResult

cli = typer.Typer(
    name="clipkit",
    help="Type words, see your pictures.",
    epilog="Start with:  clipkit index ~/Pictures  then  clipkit app",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
cli.add_typer(data)
cli.command(epilog=train.EPILOG, context_settings=train.ANY_OPTION)(train.train)
cli.add_typer(evaluate)
cli.command(epilog=corrections.EPILOG)(corrections.corrections)

IndexOption = Annotated[
    Path | None,
    typer.Option("--index", metavar="DIR", help="The index's folder.", envvar="CLIPKIT_INDEX"),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="builtin, ARCHITECTURE/TAG, hf-hub:ORG/NAME, or a checkpoint folder. "
        "Default: the index's own, else builtin.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
PrecisionOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]


def main() -> None:
    """The `clipkit` command: a sentence and exit code 2 for bad input, 1 for a fault."""
    try:
        cli()
    except ClipkitError as error:
        print(f"clipkit: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # such as `clipkit search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@cli.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"clipkit {__version__}")
        raise typer.Exit


@cli.command(
    epilog="Examples:  clipkit index ~/Pictures   ·   clipkit index /mnt/a /mnt/b --model "
    "ViT-B-32/laion2b_s34b_b79k   ·   clipkit index ~/Pictures --index /fast/disk/index"
)
def index(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", show_default=False)],
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decode threads. Default: one a core.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures a batch. Default: by device.")
    ] = None,
    max_megapixels: Annotated[
        float, typer.Option(min=0.1, help="Skip pictures beyond this.")
    ] = 100.0,
    max_megabytes: Annotated[float, typer.Option(min=0.1, help="Skip files beyond this.")] = 256.0,
    forget: Annotated[
        bool, typer.Option("--forget", help="Take these folders out of the index instead.")
    ] = False,
) -> None:
    """Index folders of pictures; run it again to bring the index up to date.

    Stop it at any time with Ctrl-C: the next run goes on from there. Moved files are recognised by
    their content. A folder that is missing or empty (a disk that is not mounted) deletes nothing.
    """
    from clipkit.catalog import Catalog
    from clipkit.embed import index_folders
    from clipkit.images import Limits
    from clipkit.lazy_encoder import LazyEncoder

    place = index_folder(index)
    if forget:
        with Catalog.open(place, write=True) as catalog:
            gone = sum(catalog.remove_root(_absolute(folder)) for folder in folders)
        print(f"{gone:,} files forgotten; the pictures themselves were not touched")
        return
    for folder in folders:  # before a new index is made for nothing
        if not place.exists() and not folder.expanduser().is_dir():
            raise InputError(f"folder {folder} does not exist; name a folder that holds pictures")
    with Catalog.open(place, write=True) as catalog:
        spec = model or _model_of(catalog) or "builtin"
        encoder = LazyEncoder(spec, device=device, precision=precision)
        with stop_on_signal() as stop, _progress_shown() as show:
            summary = index_folders(
                catalog,
                folders,
                encoder_id=encoder.encoder_id,
                load_encoder=encoder.towers,
                workers=workers,
                batch_size=batch_size,
                limits=Limits(max_megapixels=max_megapixels, max_megabytes=max_megabytes),
                on_progress=show,
                stop=stop,
            )
    _print_summary(summary, place)
    if summary.stopped:
        raise typer.Exit(130)


@cli.command(
    epilog="Examples:  clipkit search birthday cake   ·   clipkit search 'dog on a beach -leash "
    "after:2023'   ·   clipkit search --image photo.jpg -k 50   ·   clipkit search cat --json"
)
def search(
    words: Annotated[list[str] | None, typer.Argument(show_default=False)] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Find pictures like this one.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many pictures, without a cap.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of hits.")] = False,
    open_first: Annotated[bool, typer.Option("--open", help="Open the best picture.")] = False,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Find pictures by words, by a picture, or both.

    Words describe the picture. [bold]-word[/] pushes away, [bold]+FILE[/] adds a picture,
    [bold]"a phrase"[/] must occur in its name, caption or tags, and [bold]key:value[/] filters:
    after before path folder camera format tag width height orientation sort.
    """
    # One short text through numpy: more threads than one would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from clipkit.catalog import Catalog
    from clipkit.lazy_encoder import LazyEncoder
    from clipkit.search import Searcher

    if not words and image is None:
        raise InputError("nothing to search for; give words, or a picture with --image FILE")
    picture = _read_picture(image) if image else None
    with Catalog.open(index_folder(index)) as catalog:
        spec = model or _model_of(catalog) or "builtin"
        encoder = LazyEncoder(spec, device=device, precision=precision)
        searcher = Searcher(catalog, encoder, encoder_id=encoder.encoder_id)
        result = searcher.search(" ".join(words or ()), k=k, image=picture)
    if as_json:
        print(json.dumps([_hit_as_json(hit) for hit in result.hits], indent=2))
    else:
        _print_hits(result)
    if open_first and result.hits:
        typer.launch(result.hits[0].picture.path)


@cli.command(epilog="Examples:  clipkit app --open   ·   clipkit app --index .demo/gallery")
def app(
    index: IndexOption = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Open the search page. It listens on this machine only, unless --host says otherwise."""
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


@cli.command(epilog="Examples:  clipkit status   ·   clipkit status --skipped")
def status(
    index: IndexOption = None,
    skipped: Annotated[bool, typer.Option("--skipped", help="List skipped files.")] = False,
) -> None:
    """Say what an index holds, and what it had to skip and why."""
    from clipkit.catalog import Catalog

    place = index_folder(index)
    with Catalog.open(place) as catalog:
        encoders = catalog.encoders()
        newest = catalog.newest_encoder()
        stats = catalog.stats(newest.encoder_id if newest else "")
        rows = catalog.skipped() if skipped else []
        print(f"index      {printable(str(place))}")
        print(f"pictures   {stats.pictures:,} in {stats.places:,} files, {size(stats.bytes)}")
        for root in stats.roots:
            print(f"folder     {printable(root)}")
        for encoder in encoders:
            vectors = catalog.stats(encoder.encoder_id).vectors
            print(f"model      {encoder.spec} ({encoder.encoder_id}), {vectors:,} vectors")
        hint = "" if skipped or not stats.skipped else " (list them with --skipped)"
        print(f"skipped    {stats.skipped:,}{hint}")
        for row in rows:
            print(f"  {row.reason:<16} {printable(row.path)}: {printable(row.message)}")


# ---- what the commands share


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder.expanduser())


def _model_of(catalog: Catalog) -> str | None:
    newest = catalog.newest_encoder()
    return newest.spec if newest else None


def _read_picture(file: Path) -> Image.Image:
    from clipkit.images import decode, read_bytes

    try:
        return decode(read_bytes(file.expanduser())).rgb
    except ImageError as error:
        raise InputError(f"{file}: {error}") from error


@contextmanager
def _progress_shown() -> Iterator[Callable[[Progress], None]]:
    """Progress with rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("looking", total=None, pace="")
        last_line = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal last_line
            words = {"walking": "looking", "embedding": "indexing", "finishing": "finishing"}
            pace = f"{progress.seen:,} found"
            if progress.phase == "embedding":
                left = (
                    ""
                    if progress.eta_seconds is None
                    else f", {duration(progress.eta_seconds)} left"
                )
                pace = f"{progress.rate:.1f}/s{left}, {progress.skipped:,} skipped"
            bars.update(
                task,
                description=words[progress.phase],
                completed=progress.done,
                total=progress.total or None,
                pace=pace,
            )
            if not console.is_terminal and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                print(f"{progress.done:,} of {progress.total:,}, {pace}", file=sys.stderr)

        yield show


def _print_summary(summary: Summary, place: Path) -> None:
    counts = [
        (summary.added, "added"),
        (summary.moved, "moved"),
        (summary.duplicates, "duplicates"),
        (summary.removed, "removed"),
        (summary.unchanged, "unchanged"),
        (summary.skipped, "skipped"),
        (summary.skipped_before, "skipped before"),
    ]
    told = ", ".join(f"{count:,} {word}" for count, word in counts if count) or "no pictures found"
    rate = f", {summary.pictures_per_second:.1f} pictures/s" if summary.embedded else ""
    print(f"{told} in {duration(summary.seconds)}{rate}")
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
        print("stopped; run the same command again to go on")
    print(f"index: {printable(str(place))}")


def _hit_as_json(hit: SearchHit) -> dict[str, object]:
    return {
        "rank": hit.rank,
        "image_id": hit.picture.image_id,
        "score": hit.score,
        "strength": hit.strength,
        "path": hit.picture.path,
    }


def _print_hits(result: SearchResult) -> None:
    """A hit a line, its path last and never broken, so that it can be copied or piped."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    colours = {"strong": "green", "fair": "yellow", "weak": "dim"}
    width = len(str(len(result.hits)))
    for hit in result.hits:
        strength = hit.strength or ""
        score = "" if hit.score is None else f"{hit.score:.3f}"
        line = Text(f"{hit.rank:>{width}}  {score:>5}  ")
        line.append(f"{strength:<6}", style=colours.get(strength, ""))
        line.append(f"  {printable(hit.picture.path)}")
        console.print(line, soft_wrap=True)
    took = sum(result.seconds.values())
    console.print(
        f"{len(result.hits):,} of {result.total:,} pictures, {duration(took)}", style="dim"
    )


if __name__ == "__main__":
    main()
