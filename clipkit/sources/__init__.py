"""Pictures with captions or labels from any kind of data: one registry of readers, one entry.

    open_source("captions.csv").rows()  ->  Row(picture, captions, label, split, meta), one at a time

A reader is a function (path, Options) -> Source in SOURCES, and registering it is enough. Rows are not
checked: captions may be junk, which `data_prep.clean` judges. A row that gives no picture is yielded as
Broken, with its place and a reason, and stops nothing: building a dataset lists it, evaluation refuses
it (`eval.data`). No reader imports torch.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.sources.annotations import (
    is_token_file,
    open_coco,
    open_flickr,
    open_karpathy,
    token_files,
)
from clipkit.sources.folders import (
    metadata_files,
    open_class_folders,
    open_folder,
    open_imagefolder,
    table_in,
)
from clipkit.sources.hub import SAVED, open_benchmark, open_hub, similar_benchmark
from clipkit.sources.json_files import json_kind, open_corrections, open_jsonl
from clipkit.sources.rows import (
    Broken,
    Options,
    Picture,
    PictureBytes,
    PictureFile,
    Row,
    Source,
    TarMember,
    ZipMember,
    split_of_file,
)
from clipkit.sources.shards import open_shards, shard_files
from clipkit.sources.tables import open_table
from clipkit.sources.zips import open_zip

__all__ = [
    "SOURCES",
    "Broken",
    "Options",
    "Picture",
    "PictureBytes",
    "PictureFile",
    "Row",
    "Source",
    "TarMember",
    "ZipMember",
    "detect",
    "open_source",
    "open_sources",
]

SOURCES: dict[str, Callable[[Path, Options], Source]] = {
    "classes": open_class_folders,
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
    "zip": open_zip,
}

_TABLES = {".csv", ".tsv", ".tab", ".psv", ".txt"}


def open_source(
    path: str | Path, *, kind: str | None = None, options: Options | None = None
) -> Source:
    """Open the source at `path`, of the given kind or the one that is detected.

    `path` may also be "hf:ORG/NAME", "hf:ORG/NAME/CONFIG", a benchmark's name such as "cifar10", or
    "KIND:PATH", as in "coco:captions.txt". Raises DatasetError if nothing is there, the kind is unknown,
    or the layout is not that kind's.
    """
    options = options or Options()
    prefix, colon, rest = str(path).partition(":")
    if kind is None and colon and prefix in SOURCES and prefix != "hf" and not Path(path).exists():
        kind, path = prefix, rest
    if str(path).startswith("hf:"):
        local = Path(str(path).removeprefix("hf:")).expanduser()
        if not local.exists():
            return open_hub(local, options, name=str(path))
        path = local
    path = Path(path).expanduser()
    if kind is not None and kind not in SOURCES:
        near = difflib.get_close_matches(kind, SOURCES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DatasetError(f"unknown kind {kind!r}; there are {', '.join(sorted(SOURCES))}{hint}")
    if not _exists(path):
        if kind is None and (benchmark := open_benchmark(str(path), options)) is not None:
            return benchmark
        raise _not_there(path)
    if kind is None:
        kind, path = _detect(path)
    try:
        return SOURCES[kind](path, options)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error


def open_sources(
    paths: Sequence[str], *, kind: str | None = None, options: Options | None = None
) -> list[Source]:
    """Open several sources that belong together.

    If their names tell two splits or more, as in train.csv and test.csv, those are the splits; a lone
    train.csv is split like any other file.
    """
    options = options or Options()
    splits = [None if path.startswith("hf:") else split_of_file(Path(path).name) for path in paths]
    if options.split or len(set(splits) - {None}) < 2:
        splits = [options.split] * len(paths)
    return [
        open_source(path, kind=kind, options=replace(options, split=split))
        for path, split in zip(paths, splits, strict=True)
    ]


def detect(path: str | Path) -> str:
    """Return the kind of source at `path`, a key of SOURCES. Raises DatasetError if it is none."""
    path = Path(path)
    if not _exists(path):
        raise _not_there(path)
    return _detect(path)[0]


def _detect(path: Path) -> tuple[str, Path]:
    """Return the kind, and the file that is meant by a folder which holds one table of captions."""
    if not path.exists():  # a pattern that matches shards
        return "webdataset", path
    if not path.is_dir():
        return _kind_of_file(path), path
    if any((path / name).is_file() for name in SAVED):
        return "hf", path
    if metadata_files(path):
        return "imagefolder", path
    if shard_files(path):
        return "webdataset", path
    if token_files(path):
        return "flickr", path
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "hf", path
    if (table := table_in(path)) is not None:
        try:
            return _kind_of_file(table), table
        except DatasetError:  # JSON of another kind beside the pictures
            pass
    return "folder", path


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".tar" or path.name.lower().endswith((".tar.gz", ".tgz")):
        return "webdataset"
    if suffix == ".zip":
        return "zip"
    if suffix in (".json", ".jsonl", ".ndjson"):
        return json_kind(path)
    if suffix in (".parquet", ".arrow"):
        return "hf"
    if suffix in _TABLES or suffix == ".token":
        return "flickr" if is_token_file(path) else "table"
    if suffix in SUFFIXES:
        raise DatasetError(f"{path} is a single picture; give its folder, or a table of captions")
    raise DatasetError(
        f"cannot tell what {path} is by its suffix {suffix!r}; rename it, or write its kind before it, "
        f"as in table:{path.name}; there are {', '.join(sorted(SOURCES))}"
    )


def _exists(path: Path) -> bool:
    return path.exists() or (glob.has_magic(str(path)) and bool(shard_files(path)))


def _not_there(path: Path) -> DatasetError:
    hint = "; give a file, a folder, shards, a benchmark's name such as cifar10, or hf:ORG/NAME"
    if glob.has_magic(str(path)):
        return DatasetError(f"nothing matches {path}{hint}")
    if near := similar_benchmark(str(path)):
        hint = f"; did you mean the benchmark {near}?"
    elif len(path.parts) == 2 and not path.is_absolute():
        hint = f"; for the hub's dataset write hf:{path}"
    return DatasetError(f"{path} does not exist{hint}")
