"""The commands on one index: `clipkit index`, `search`, `app`, `status` and `corrections`."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.terminal import (
    Command,
    Commands,
    DeviceOption,
    IndexOption,
    JsonOption,
    MegapixelsOption,
    PrecisionOption,
    QuietOption,
    RuntimeOption,
    WorkersOption,
    examples,
    model_option,
    number,
    progress_shown,
    size,
    stop_on_signal,
)
from app.paths import index_folder
from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.wording import count, duration, printable, reason_text

if TYPE_CHECKING:
    from clipkit import Hits
    from clipkit.embed import Progress, Summary
    from clipkit.search import SearchHit

ModelOption = Annotated[
    str | None,
    model_option(
        help="builtin, ARCHITECTURE/TAG or :FILE (see clipkit models), hf-hub:ORG/NAME, or a "
        "checkpoint folder such as a run's.",
        show_default="the index's own; builtin for a new index",
    ),
]
OTHERS = "Serving others"  # a panel of options


def _prefix(text: str) -> str:
    """Return the prefix of --root-path without the slash at its end. Raises InputError."""
    prefix = text.rstrip("/")
    if text and (not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix) or ".." in prefix):
        raise InputError(
            f"--root-path is {text!r}; it must be a path that begins with /, such as /photos"
        )
    return prefix


_root_path: Any = typer.Option(
    "--root-path",
    metavar="PREFIX",
    parser=_prefix,
    help="The path below which a reverse proxy serves the page.",
    rich_help_panel=OTHERS,
)


def index(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", show_default=False)],
    index: IndexOption = None,
    model: ModelOption = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove these folders from the index instead.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
    workers: WorkersOption = None,
    batch_size: Annotated[
        int | None,
        number("--batch-size", help="Pictures per batch.", default="by device", low=1, more=True),
    ] = None,
    max_megapixels: MegapixelsOption = 100.0,
    max_megabytes: Annotated[
        float,
        number("--max-megabytes", help="Skip larger files.", kind=float, above=0, more=True),
    ] = 256.0,
    decoded_megapixels: Annotated[
        float | None,
        number(
            "--decoded-megapixels",
            help="Decode no more than this at once: 7 MB of memory each.",
            kind=float,
            default="40",
            above=0,
            more=True,
        ),
    ] = None,
) -> None:
    """Index folders of pictures; run it again to bring the index up to date.

    Ctrl-C or SIGTERM stops it after the current batch (exit code 130 or 143), and the next run resumes
    there; a second one ends it at once, which loses a few seconds of work. Moved files are recognised
    by their content. A folder that is missing or empty (an unmounted disk) removes nothing from the
    index, nor does a file that cannot be read for now. What no file is left of is purged.

    With another --model than the index's, all pictures of the index are encoded with it, those of other
    folders too. Searches use the model before until that is complete.

    --json prints one object: the files added, duplicates, moved, removed, unchanged, skipped (reasons
    counts them), skipped_before and waiting, left by a run that was stopped; the pictures embedded,
    purged, without_vector and refused; pictures_per_second, seconds, stopped; model, answers, the model
    that searches use, and model_before; the folders that were unavailable, and index, its folder. With
    --forget: removed, purged and index.
    """
    from clipkit import Library
    from clipkit.images import Limits

    place = index_folder(index)
    with Library.open(
        place, model=model, device=device, precision=precision, runtime=runtime
    ) as library:
        if forget:
            before = len(library)
            removed = library.remove(*folders)
            purged = before - len(library)
            if as_json:
                content = {"removed": removed, "purged": purged, "index": str(place)}
                print(json.dumps(content, indent=2))
            else:
                print(
                    f"{removed:,} files removed from the index, and all that it had of the "
                    f"{count(purged)} in them only; no file was touched"
                )
            return
        with stop_on_signal(safe_to_kill=True) as stop, progress_shown(quiet=quiet) as show:

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
                decoded_megapixels=decoded_megapixels,
                limits=Limits(max_megapixels=max_megapixels, max_megabytes=max_megabytes),
            )
    if as_json:
        rate = {"pictures_per_second": summary.pictures_per_second, "index": str(place)}
        print(json.dumps({**asdict(summary), **rate}, indent=2))
    else:
        _print_summary(summary, place)
    if summary.stopped:
        raise typer.Exit(stop.exit_code)


class SearchCommand(Command):
    """`search`: the query language's -word is a word of the query and no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, of which words that begin with - come last, behind a --."""
        options, words = self._parted(args)
        return super().parse_args(ctx, [*options, "--", *words] if words else options)

    def _parted(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return what Typer is to parse, and the words that begin with -.

        `-k5` is an option, `-kitchen` a word. Raises InputError for `-json`, typed for --json.
        """
        flags = {name: param.is_flag for param in self.params for name in param.opts if "-" in name}
        flags |= {"-h": True, "--help": True}
        options: list[str] = []
        words: list[str] = []
        rest = iter(args)
        for arg in rest:
            if arg == "--":
                return options, [*words, *rest]
            if f"-{arg}" in flags:
                raise InputError(
                    f"{arg} is no option: write -{arg}, or, to push the word away, "
                    f"clipkit search -- {arg}"
                )
            is_short = arg[:2] in flags and not arg[2:3].isalpha()
            is_word = arg[:1] == "-" and len(arg) > 1 and not (is_short or arg.startswith("--"))
            (words if is_word else options).append(arg)
            if not flags.get(arg, True):
                options += itertools.islice(rest, 1)  # its value
        return options, words


def search(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", show_default=False, help="The query."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An example: find pictures like this one.")
    ] = None,
    k: Annotated[int, number("-k", help="Number of pictures, without a limit.", low=1)] = 12,
    as_json: JsonOption = False,
    open_first: Annotated[bool, typer.Option("--open", help="Open the best picture.")] = False,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
) -> None:
    """Find pictures by text, by an example picture, or by both.

    Plain words describe the picture, and count in the names of its folders. [bold]-word[/] pushes
    away, [bold]+FILE[/] adds an example, [bold]"a phrase"[/] must occur in file name, folder, caption
    or tags ([bold]"IMG_20*"[/]: in a word that begins so), and [bold]key:value[/] filters:
    after, before, path, folder, camera, format, tag, width, height, orientation. [bold]sort:[/]
    orders by score, date or name. The shell takes quotes away: put a query with quotes into '...'.
    """
    # One short text through numpy: more threads than one would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from clipkit import Library

    if not text and image is None:
        raise InputError("nothing to search for; give words, or a picture with --image FILE")
    place = index_folder(index)
    with Library.open(
        place, model=model, device=device, precision=precision, runtime=runtime
    ) as library:
        hits = library.search(" ".join(text or ()), k=k, image=image)
        if not (hits.total or as_json or len(library)):
            raise InputError(_nothing_indexed(place))
    if as_json:
        print(json.dumps([_as_json(hit) for hit in hits], indent=2))
        for note in hits.notes:
            print(printable(note), file=sys.stderr)
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
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, number("--port", help="Port to listen on; 0: any free port.", low=0, high=65535)
    ] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Let the page change nothing: search only.")
    ] = False,
    token: Annotated[
        bool | None,
        typer.Option(
            "--token/--no-token",
            help="Ask for a token; it is printed with the address.",
            show_default="only where others can reach the page",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the token from a file. CLIPKIT_TOKEN gives it as well.",
            show_default="a new one",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A name by which the page is opened; may be repeated.",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Address or network of a reverse proxy, whose X-Forwarded-For counts.",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    root_path: Annotated[str, _root_path] = "",
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM certificate, for https.", rich_help_panel=OTHERS),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key.", rich_help_panel=OTHERS)
    ] = None,
    access_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Log each request as a line of JSON; -: standard error.",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    log_queries: Annotated[
        bool,
        typer.Option(
            "--log-queries", help="With addresses and words in the log.", rich_help_panel=OTHERS
        ),
    ] = False,
    max_requests: Annotated[
        int,
        number(
            "--max-requests",
            help="Answered at a time, a fifth of them for one client.",
            low=5,
            high=1000,
            panel=OTHERS,
        ),
    ] = 40,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
) -> None:
    """Serve the search page, to this machine only unless --host is given.

    Where others can reach the page, it asks for a token, which the printed link carries, and it does
    not index folders. Others can reach it with another --host, and behind a reverse proxy, which
    --allow-host, --proxy and --root-path tell of.
    """
    # Before numpy is imported: its BLAS would start a thread per core for each request's few rows. On
    # two cores, 32 clients waited 9 s each for their texts to be encoded, and 0.3 s with one thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from app.web.server import Opening, serve

    for name, value in (("--proxy", proxy), ("--allow-host", allow_host)):
        for one in value or ():
            _check_address(name, one)
    serve(
        index_folder(index),
        model=model,
        host=host,
        port=port,
        open_browser=open_browser,
        device=device,
        precision=precision,
        runtime=runtime,
        opening=Opening(
            token=token,
            secret=_secret(token_file),
            read_only=read_only,
            names=tuple(allow_host or ()),
            root_path=root_path,
            proxies=tuple(proxy or ()),
            certificate=tls_cert,
            key=tls_key,
            access_log=access_log,
            log_queries=log_queries,
            places=max_requests,
        ),
    )


def _secret(file: Path | None) -> str | None:
    """Return the token that the user chose, without the white space around it."""
    if file is None:
        return os.environ.get("CLIPKIT_TOKEN", "").strip() or None
    try:
        return file.expanduser().read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the token file {file}: {reason}") from None


def _check_address(name: str, text: str) -> None:
    """Check that --proxy is an address or a network, and --allow-host a bare name. Raises InputError."""
    if name == "--proxy":
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise InputError(
                f"--proxy is {text!r}; it must be an address or a network, such as 127.0.0.1 or "
                "10.0.0.0/8"
            ) from None
    elif not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text):
        raise InputError(
            f"--allow-host is {text!r}; it must be a name without scheme and port, such as "
            "photos.example.org"
        )


def status(
    index: IndexOption = None,
    skipped: Annotated[bool, typer.Option("--skipped", help="List the skipped files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an index holds, and which files were skipped and why.

    --json prints one object: index, its folder; the number of pictures, files and bytes; the folders;
    the models, each with spec, encoder_id, space_id, vectors, missing (pictures without a vector),
    bytes, shared_with (specs), answers and gone; skipped, how many files; and with --skipped
    skipped_files, each with path, reason and message.
    """
    from app.cli.switch import lines_of_status, rows_of_status
    from clipkit.catalog import Catalog

    place = index_folder(index)
    with Catalog.open(place) as catalog:
        stats = catalog.stats()
        models = rows_of_status(catalog)
        rows = list(catalog.skipped()) if skipped else []
    if as_json:
        content = {
            "index": str(place),
            "pictures": stats.pictures,
            "files": stats.places,
            "bytes": stats.bytes,
            "folders": stats.roots,
            "models": models,
            "skipped": stats.skipped,
        }
        if skipped:
            content["skipped_files"] = [
                {"path": row.path, "reason": row.reason, "message": row.message} for row in rows
            ]
        print(json.dumps(content, indent=2))
        return
    print(f"index      {printable(str(place))}")
    print(f"pictures   {stats.pictures:,} in {stats.places:,} files, {size(stats.bytes)}")
    for root in stats.roots:
        print(f"folder     {printable(root)}")
    for line in lines_of_status(models, stats.pictures):
        print(line)
    hint = "" if skipped or not stats.skipped else " (list them with --skipped)"
    print(f"skipped    {stats.skipped:,}{hint}")
    for row in rows:
        print(f"  {reason_text(row.reason):<18} {printable(row.path)}: {printable(row.message)}")
    if not stats.pictures:
        print(_nothing_indexed(place))


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
        print("next, with your own captions, if you have some, before it:")
        print(f"  clipkit data build {shlex.quote(printable(str(out)))} --out dataset")
        print("  clipkit train dataset")
    if left := len(marks) - len(rows):
        print(
            f"{left:,} left out: their pictures left the index, or their files were deleted or changed",
            file=sys.stderr,
        )


def add_commands(cli: Commands) -> None:
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
            "clipkit search dog on a beach -leash after:2023 -k 50",
            "clipkit search 'a castle \"by the sea\"'",
            "clipkit search --image photo.jpg",
            "clipkit search cat --json",
        ),
        cls=SearchCommand,
    )(search)
    cli.command(
        epilog=examples(
            "clipkit app --open",
            "clipkit app --index .demo/gallery",
            "clipkit app --host 0.0.0.0 --read-only",
            "clipkit app --allow-host photos.example.org --proxy 127.0.0.1",
            "clipkit app --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem",
        )
    )(app)
    cli.command(
        epilog=examples("clipkit status", "clipkit status --skipped", "clipkit status --json")
    )(status)
    cli.command(
        epilog=examples(
            "clipkit corrections",
            "clipkit corrections --out corrections.jsonl",
            "clipkit data build captions.csv corrections.jsonl --out dataset",
        )
    )(corrections)


def _nothing_indexed(place: Path) -> str:
    return f"nothing is indexed in {printable(str(place))} yet; fill it: clipkit index ~/Pictures"


def _print_summary(summary: Summary, place: Path) -> None:
    names = (
        "added moved duplicates removed reencoded unchanged skipped skipped_before purged".split()
    )
    labels = {
        "reencoded": f"known pictures encoded with {printable(summary.model)}",
        "purged": "pictures purged that had no file left",
    }
    counts = {labels.get(n, n.replace("_", " ")): getattr(summary, n) for n in names}
    changes = ", ".join(f"{count:,} {label}" for label, count in counts.items() if count)
    rate = f", {summary.pictures_per_second:.1f} pictures/s" if summary.embedded else ""
    print(f"{changes or 'no pictures found'} in {duration(summary.seconds)}{rate}")
    if summary.skipped:
        reasons = ", ".join(f"{n:,} {reason_text(reason)}" for reason, n in summary.reasons.items())
        print(f"  skipped: {reasons}; list them with: clipkit status --skipped")
    for root in summary.unavailable:
        print(
            f"{printable(root)} is empty or not mounted: nothing was removed from the index "
            "(if its pictures are gone for good: clipkit index --forget FOLDER)"
        )
    if summary.model_before == summary.model:  # other weights by the same name
        print(f"searches now use {printable(summary.model)} as it is now; its old vectors are kept")
    elif summary.model_before:
        print(
            f"searches now use {printable(summary.model)} instead of "
            f"{printable(summary.model_before)}, whose vectors are kept"
        )
    if summary.answers != summary.model:
        ready = summary.pictures - summary.without_vector
        refused = f", and it gives none for {summary.refused:,}" if summary.refused else ""
        print(
            f"{ready:,} of {count(summary.pictures)} have vectors of {printable(summary.model)}"
            f"{refused}; run again to go on; searches still use {printable(summary.answers)}"
        )
    if summary.stopped:
        left = f"; {summary.waiting:,} files are left" if summary.waiting else ""
        print(f"stopped; run the same command again to resume: what was done is kept{left}")
    print(f"index: {printable(str(place))}")


def _as_json(hit: SearchHit) -> dict[str, object]:
    return {
        "rank": hit.rank,
        "image_id": hit.picture.image_id,
        "score": hit.score,
        "strength": hit.strength,
        "probability": hit.probability,
        "named": hit.named,
        "path": hit.picture.path,
    }


def _print_hits(hits: Hits) -> None:
    """Print a hit per line, its path last and never wrapped, so that it can be copied or piped."""
    # Typer's colours, not Rich's: importing that takes as long as a search.
    has = os.environ.get
    coloured = has("FORCE_COLOR") or (sys.stdout.isatty() and has("TERM") != "dumb")
    show = partial(typer.echo, color=bool(coloured and not has("NO_COLOR")))
    styles = {"strong": {"fg": "green"}, "fair": {"fg": "yellow"}, "weak": {"dim": True}}
    for note in hits.notes:
        show(printable(note))
    width = len(str(len(hits)))
    for hit in hits:
        score = "" if hit.score is None else f"{hit.score:.3f}"
        style: dict[str, Any] = styles.get(hit.strength or "", {})
        strength = typer.style(f"{hit.strength or '':<6}", **style)
        show(f"{hit.rank:>{width}}  {score:>5}  {strength}  {printable(hit.picture.path)}")
    seconds = sum(hits.seconds.values())
    total = f"{len(hits):,} of {hits.total:,} pictures, {duration(seconds)}"
    show(typer.style(total, dim=True))
