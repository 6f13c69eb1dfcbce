"""`clipkit export`: write a model's towers for other runtimes than torch, and measure them there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.terminal import (
    JsonOption,
    QuietOption,
    command_line,
    examples,
    model_specs,
    number,
    progress_shown,
    size,
)
from clipkit.wording import printable

if TYPE_CHECKING:
    from eval.runtimes import Rate, RuntimeRow

EPILOG = examples(
    "clipkit export builtin --onnx",
    "clipkit export runs/mine --onnx --int8 --data dataset",
    "clipkit index ~/Pictures --model builtin-onnx-int8",
)
GALLERY_PICTURES = 100  # that an export without --data is measured on
REPORT_FILE = "report.json"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            autocompletion=model_specs,
            help="Any model that --model takes elsewhere; clipkit models lists them.",
        ),
    ],
    onnx: Annotated[  # noqa: ARG001  the format is named so that others can follow
        bool,
        typer.Option("--onnx", show_default=False, help="Write ONNX files; this is the default."),
    ] = True,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Compute in int8: a quarter of the size, faster, not the same."
        ),
    ] = False,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="With --int8: the image tower stays in float32, and an index of the model keeps its "
            "vectors: clipkit use DIR.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The new folder.",
            show_default="onnx/ in the model's folder, else MODEL-onnx here",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export in the folder of --out.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Captioned pictures to measure on, as for clipkit eval.",
            show_default=f"{GALLERY_PICTURES} of the sample gallery",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The split of --data: train, validation, test."),
    ] = None,
    limit: Annotated[
        int | None, number("--limit", help="Measure on a random sample of N pictures.", low=1)
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the two towers of a model as ONNX files that run without torch and without clipkit.

    The folder is a model too: clipkit index, search, app and eval take it as --model, and compute in
    ONNX Runtime, or with --runtime openvino in OpenVINO. In float32 its vectors are the model's own,
    so that an index of the model can be searched with it. In int8 they are others: an index keeps
    both apart. README.md in the folder says how to use the files without clipkit.

    The export is then compared with torch: the cosines of the vectors, the change of recall with its
    95 % interval, and the speed, which is for this machine and whatever else runs on it. The table is
    also in report.json.

    --json prints one object: folder, files (name and bytes), and the rows of the table.
    """
    from clipkit import checkpoint, models, towers
    from clipkit.errors import InputError
    from clipkit.lazy_encoder import load
    from clipkit.towers.exporting import SIDES, export_onnx
    from data_prep import gallery
    from eval.data import open_captioned
    from eval.runtimes import compare_runtimes

    if text_only and not int8:
        raise InputError("--text-only says which tower is in int8; give --int8 with it")
    sides = () if not int8 else ("text",) if text_only else SIDES
    models.check(model)
    if checkpoint.is_export(model):
        raise InputError(checkpoint.not_for_torch(model))
    folder = out or default_out(model, int8=int8)
    measured = open_captioned(
        data or str(gallery.folder()),
        split=split,
        limit=limit or (None if data else GALLERY_PICTURES),
    )
    with progress_shown(quiet=quiet) as show:
        show("loading", 0, 0)
        encoder = towers.load(model, device="cpu", precision="float32")
        show("exporting", 0, 0)
        export_onnx(
            encoder,
            folder,
            int8=sides,
            pictures=_sample_pictures(encoder) if "image" in sides else (),
            overwrite=overwrite,
        )
        compared = {"torch float32": encoder}
        usual = towers.choose_precision(encoder.device)
        if usual != "float32":
            compared[f"torch {usual}"] = towers.load(model, device="cpu", precision=usual)
        exported = load(str(folder), device="cpu")
        name = f"onnx {'int8' if int8 else 'float32'}{' texts' if text_only else ''}"
        rows = compare_runtimes({**compared, name: exported}, measured, on_progress=show)
    pictures, texts = rows[0].image_cosine.n, rows[0].text_cosine.n
    report = {
        "command": command_line(),
        "data": {"name": data or "sample gallery", "pictures": pictures, "texts": texts},
        "rows": [asdict(row) for row in rows],
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if as_json:
        print(json.dumps({"folder": str(folder), "files": files, **report}, indent=2))
        return
    towers_size = sum(bytes for name, bytes in files.items() if ".onnx" in name)
    print(f"{printable(model)} exported to {printable(str(folder))}, {size(towers_size)}")
    print(f"compared on {pictures:,} pictures and {texts:,} texts")
    for line in table(rows):
        print(line)
    print(f"use it: clipkit index FOLDER --model {printable(str(folder))}")


def default_out(model: str, *, int8: bool) -> Path:
    """Return where a model is exported to: its own folder's onnx/, else a new one in this folder."""
    from clipkit import checkpoint

    folder = checkpoint.find_folder(model)
    if folder is not None and model != "builtin" and not int8:
        return folder / checkpoint.EXPORT_FOLDER
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.removeprefix("hf-hub:")).strip("-.")
    return Path(f"{stem}-onnx{'-int8' if int8 else ''}")


def _sample_pictures(encoder: Any) -> list[Any]:
    """Return some pictures of the sample gallery, spread over its subjects, for an int8 image tower."""
    from clipkit import images
    from clipkit.towers.exporting import CALIBRATION_PICTURES
    from data_prep import gallery

    files = sorted(p for p in gallery.folder().rglob("*") if p.suffix in images.SUFFIXES)
    files = files[:: max(1, len(files) // CALIBRATION_PICTURES)][:CALIBRATION_PICTURES]
    side = encoder.preferred_side
    return [images.decode(images.read_bytes(file), target=side).rgb for file in files]


def table(rows: Sequence[RuntimeRow]) -> list[str]:
    """Return the lines of the table: a column for each runtime, the reference first."""
    cells = [["", *(row.name for row in rows)]]
    for side, name in (("picture", "image_cosine"), ("text", "text_cosine")):
        agreements = [getattr(row, name) for row in rows]
        cells.append(
            [f"{side} cosine, mean (least)", *(f"{a.mean:.4f} ({a.low:.4f})" for a in agreements)]
        )
    for key in rows[0].recall:
        direction, _, cut = key.partition("/")
        changes = [_recall(row, key, reference=row is rows[0]) for row in rows]
        cells.append([f"{direction.replace('_', ' ')} {cut}", *changes])
    for label, name in (
        ("pictures/s", "pictures_per_second"),
        ("texts/s", "texts_per_second"),
        ("ms a query", "query_ms"),
    ):
        cells.append([label, *(_rate(getattr(row, name)) for row in rows)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    notes = [
        "recall: % of queries, and the change with its 95 % interval",
        f"speed: the median of {rows[0].query_ms.runs} runs, and the lowest and highest; all in turn",
    ]
    return [*map(str.rstrip, lines), *notes]


def _recall(row: RuntimeRow, key: str, *, reference: bool) -> str:
    percent = f"{100 * row.recall[key]:.1f}"
    change = row.recall_change[key]
    value, low, high = (f"{100 * bound:+.1f}" for bound in (change.value, change.low, change.high))
    return percent if reference else f"{percent} ({value}, {low} to {high})"


def _rate(rate: Rate) -> str:
    digits = 0 if rate.median >= 100 else 1
    return f"{rate.median:,.{digits}f} ({rate.low:,.{digits}f} to {rate.high:,.{digits}f})"
