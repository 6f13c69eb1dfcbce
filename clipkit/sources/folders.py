"""Folders of pictures: with sidecar captions, or with metadata files as Hugging Face has them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.records import SPLITS, FolderCaptions
from clipkit.sources.columns import Columns, choose
from clipkit.sources.json_files import object_pairs, read_lines
from clipkit.sources.rows import LISTS, Broken, Options, Pictures, RawPair, Source, split_name
from clipkit.sources.tables import Row, Table

_METADATA = ("metadata.jsonl", "metadata.csv")
_ORDER: dict[str | None, int] = {split: n for n, split in enumerate(SPLITS)}


def open_folder(path: Path, options: Options) -> Source:
    """Pictures with NAME.txt (a caption a line) or NAME.json beside them, at any depth.

    Below folders named train, val, validation or test, these are the splits.
    """
    pictures = options.pictures or path
    if not pictures.is_dir():
        raise DatasetError(f"{pictures} is no folder")
    total = sum(1 for _ in _walk(pictures))
    if not total:
        suffixes = " ".join(sorted(SUFFIXES))
        raise DatasetError(f"{pictures} holds no pictures; looked for {suffixes}")

    def pairs() -> Iterator[RawPair | Broken]:
        beside = FolderCaptions()
        for file in _walk(pictures):
            texts = beside.for_picture(file)
            name = file.relative_to(pictures).as_posix()
            split = split_name(PurePosixPath(name).parts[0]) if "/" in name else None
            meta = {"keywords": list(texts.tags)} if texts.tags else {}
            yield RawPair(file, name, name, texts.captions, split or options.split, meta)

    says = f"folder of {total:,} pictures, captions from the files beside them"
    return Source("folder", str(path), says, total, pairs)


def open_imagefolder(path: Path, options: Options) -> Source:
    """Hugging Face's imagefolder: a metadata file in each split's folder. Also what clipkit builds."""
    files = metadata_files(path)
    if not files:
        raise DatasetError(f"{path} holds no {' and no '.join(_METADATA)}")
    columns = [_columns(file, options) for file in files]
    tables = [Table.open(file) if file.suffix == ".csv" else None for file in files]
    total = sum(_count(file) for file in files)

    def pairs() -> Iterator[RawPair | Broken]:
        for file, chosen, table in zip(files, columns, tables, strict=True):
            folder = file.parent.relative_to(path).as_posix()
            finder = Pictures(file.parent, options.pictures)
            for pair in object_pairs(
                _table_rows(table) if table else read_lines(file),
                chosen,
                finder.pair,
                split_name(folder) or options.split,
            ):
                yield _named(pair, folder)

    splits = [file.parent.relative_to(path).as_posix() for file in files]
    says = f"imagefolder ({', '.join(splits)}): {columns[0]}"
    return Source("imagefolder", str(path), says, total, pairs)


def metadata_files(folder: Path) -> list[Path]:
    """Those of the folder itself and of the folders one level down."""
    below = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    below.sort(key=lambda p: (_ORDER.get(split_name(p.name), len(_ORDER)), p.name))
    return [p / name for p in (folder, *below) for name in _METADATA if (p / name).is_file()]


def _columns(file: Path, options: Options) -> Columns:
    if file.suffix == ".csv":
        rows = itertools.islice(Table.open(file).rows(), 200)
        sample: list[dict[str, object]] = [dict(r.fields) for r in rows if isinstance(r, Row)]
    else:
        lines = itertools.islice(read_lines(file), 200)
        sample = [
            {k: v[0] if isinstance(v, list) and v else v for k, v in fields.items()}
            for _, fields in lines
            if fields is not None
        ]
    if not options.image_column:
        options = replace(options, image_column="file_name")
    return choose(sample, options, where=str(file))


def _table_rows(table: Table) -> Iterator[tuple[str, dict[str, object] | None]]:
    for row in table.rows():
        yield (row.row, None) if isinstance(row, Broken) else (row.row, dict(row.fields))


def _named(pair: RawPair | Broken, folder: str) -> RawPair | Broken:
    """The row with its folder before it, as every split has a line 1, and meta as it was before."""
    row = f"{folder}, {pair.row}"
    if isinstance(pair, Broken):
        return Broken(row, pair.reason, pair.detail)
    meta = _unpacked(pair.meta) if "image_id" in pair.meta else pair.meta
    return RawPair(pair.picture, pair.name, row, pair.captions, pair.split, meta)


def _unpacked(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a data set that data_prep.build wrote: what went into it; any other is left as it is."""
    try:
        inner = json.loads(meta.get("meta", ""))
    except (TypeError, ValueError):
        return meta
    if not isinstance(inner, dict):
        return meta
    lists = {name: [text for text in meta.get(name, ()) if text] for name in LISTS}
    return {name: texts for name, texts in lists.items() if texts} | inner


def _count(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _walk(folder: Path) -> Iterator[Path]:
    """Files with a picture's suffix, in a stable order; hidden ones and links to folders left out."""
    for here, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield Path(here, name)
