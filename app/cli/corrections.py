"""`clipkit corrections`: export marks of results as a source of `clipkit data build`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from app.paths import index_folder
from clipkit.errors import InputError
from clipkit.wording import printable

EPILOG = (
    "Examples:  clipkit corrections   ·   clipkit corrections --out corrections.jsonl   ·   "
    "clipkit corrections --index .demo/gallery --out corrections.jsonl   ·   "
    "clipkit data build captions.csv corrections.jsonl --out dataset"
)


def corrections(
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="DIR", help="The index's folder.", envvar="CLIPKIT_INDEX"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A .jsonl to write. Default: the terminal."),
    ] = None,
) -> None:
    """Export the results that were marked right or wrong in the app, for `clipkit data build`.

    One line each: {"picture": path, "query": words, "right": true or false, ...}. A right query becomes
    a caption of the picture, a wrong one removes such a caption.
    """
    from app.corrections import Corrections, export
    from clipkit.catalog import Catalog

    folder = index_folder(index)
    with Catalog.open(folder) as catalog:
        marks = Corrections(folder).all()
        rows = list(export(marks, catalog))
    if not marks:
        raise InputError(
            f"no corrections in {folder} yet; mark results of a text search in: clipkit app"
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(lines)
    else:
        _write(out.expanduser(), lines)
        kinds = Counter(row["right"] for row in rows)
        print(f"{len(rows):,} corrections: {kinds[True]:,} right, {kinds[False]:,} wrong")
        print(f"written to {printable(str(out))}")
    if left := len(marks) - len(rows):
        print(
            f"{left:,} left out: their pictures left the index, or their files were deleted or changed",
            file=sys.stderr,
        )


def _write(path: Path, lines: str) -> None:
    """Write the whole file or none of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(lines, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
