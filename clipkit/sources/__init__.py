"""Captioned pictures from wherever they are: one registry of readers, one way in.

    open_source("captions.csv") -> Source: what was taken for what, and rows to go through lazily

A reader is a function (path, Options) -> Source in SOURCES. What it yields is not checked: pictures
may be missing, captions junk; `data_prep.clean` judges. A row that gives no pair is yielded as Broken,
with its place and a reason, and ends nothing.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.sources.flickr import is_token_file, open_flickr, token_files
from clipkit.sources.folders import metadata_files, open_folder, open_imagefolder
from clipkit.sources.hub import open_hub
from clipkit.sources.json_files import (
    json_kind,
    open_coco,
    open_corrections,
    open_jsonl,
    open_karpathy,
)
from clipkit.sources.rows import Broken, Options, RawPair, Source, split_of_file
from clipkit.sources.shards import open_shards, shard_files
from clipkit.sources.tables import open_table

__all__ = [
    "SOURCES",
    "Broken",
    "Options",
    "RawPair",
    "Source",
    "detect",
    "open_source",
    "open_sources",
]

SOURCES: dict[str, Callable[[Path, Options], Source]] = {
    "coco": open_coco,
    "corrections": open_corrections,
    "flickr": open_flickr,
    "folder": open_folder,
    "hf": open_hub,
    "imagefolder": open_imagefolder,
    "jsonl": open_jsonl,
    "karpathy": open_karpathy,
    "table": open_table,
    "webdataset": open_shards,
}

_TABLES = {".csv", ".tsv", ".tab", ".psv", ".txt"}
_SAVED = ("dataset_dict.json", "state.json")


def open_source(
    path: str | Path, *, kind: str | None = None, options: Options | None = None
) -> Source:
    """The source at `path`, of the kind that is given or else detected; "hf:ORG/NAME" is on the hub.

    DatasetError: nothing is there, it is of no known kind, or its layout is not what the kind says.
    """
    options = options or Options()
    if str(path).startswith("hf:"):
        return open_hub(Path(path), options, name=str(path))
    path = Path(path).expanduser()
    kind = kind or detect(path)
    if kind not in SOURCES:
        near = difflib.get_close_matches(kind, SOURCES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DatasetError(f"unknown kind {kind!r}; there are {', '.join(sorted(SOURCES))}{hint}")
    if kind != "webdataset" and not path.exists():
        raise DatasetError(f"{path} does not exist")
    try:
        return SOURCES[kind](path, options)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error


def open_sources(
    paths: Sequence[str], *, kind: str | None = None, options: Options | None = None
) -> list[Source]:
    """Several sources that belong together. If their names tell two splits or more, as in train.csv
    and test.csv, those are the splits; a lone train.csv is split like any other file."""
    options = options or Options()
    named = [None if path.startswith("hf:") else split_of_file(Path(path).name) for path in paths]
    if options.split or len(set(named) - {None}) < 2:
        named = [options.split] * len(paths)
    return [
        open_source(path, kind=kind, options=replace(options, split=split))
        for path, split in zip(paths, named, strict=True)
    ]


def detect(path: str | Path) -> str:
    """The kind of source at `path`, a key of SOURCES. DatasetError if it is none."""
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if path.is_file():
        return _detect_file(path)
    if glob.has_magic(str(path)) and shard_files(path):
        return "webdataset"
    hint = ""
    if len(path.parts) == 2 and not path.is_absolute():
        hint = f"; for the hub's data set write hf:{path}"
    raise DatasetError(f"{path} does not exist{hint}")


def _detect_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".tar" or path.name.lower().endswith((".tar.gz", ".tgz")):
        return "webdataset"
    if suffix in (".json", ".jsonl", ".ndjson"):
        return json_kind(path)
    if suffix in (".parquet", ".arrow"):
        return "hf"
    if suffix in _TABLES or suffix == ".token":
        return "flickr" if is_token_file(path) else "table"
    if suffix in SUFFIXES:
        raise DatasetError(f"{path} is a single picture; give its folder, or a table of captions")
    raise DatasetError(
        f"cannot tell what {path} is by its suffix {suffix!r}; say with --kind, one of "
        f"{', '.join(sorted(SOURCES))}"
    )


def _detect_folder(path: Path) -> str:
    if any((path / name).is_file() for name in _SAVED):
        return "hf"
    if metadata_files(path):
        return "imagefolder"
    if shard_files(path):
        return "webdataset"
    if token_files(path):
        return "flickr"
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "hf"
    return "folder"
