"""Folders of pictures: with captions beside them, with a folder per class, or with metadata files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from clipkit.errors import DatasetError, InputError
from clipkit.images import SUFFIXES
from clipkit.records import METADATA, FolderCaptions
from clipkit.sources.columns import Columns, choose
from clipkit.sources.json_files import read_objects, sample_of
from clipkit.sources.rows import (
    LISTS,
    ORDER,
    Broken,
    Options,
    PictureFile,
    PictureFinder,
    Row,
    Source,
    count_lines,
    rows_of,
    split_name,
)
from clipkit.sources.tables import Table, filled

_METADATA = (METADATA, "metadata.csv")
# Names of split folders; evaluation takes the first that there is.
_SPLIT_FOLDERS = ("test", "validation", "val", "valid", "dev", "train")


def open_folder(path: Path, options: Options) -> Source:
    """Open pictures at any depth, with captions where NAME.txt (one a line) or NAME.json is beside them.

    Folders named train, val, validation or test are the splits; `FolderRoles` says which folders are
    classes. Raises DatasetError if there are no pictures.
    """
    pictures = options.pictures or path
    if not pictures.is_dir():
        raise DatasetError(f"{pictures} is no folder; give the folder of the pictures")
    files = list(_walk(pictures))
    total = sum(isinstance(file, Path) for file in files)
    if not total:
        suffixes = " ".join(sorted(SUFFIXES))
        raise DatasetError(f"{pictures} holds no pictures; looked for {suffixes}")

    roles = FolderRoles.of(file.relative_to(pictures) for file in files if isinstance(file, Path))

    def rows() -> Iterator[Row | Broken]:
        beside = FolderCaptions()

        def row(file: Path) -> Row:
            texts = beside.for_picture(file)
            below = file.relative_to(pictures)
            split, label = roles.split_and_label(below)
            meta = {"keywords": list(texts.tags)} if texts.tags else {}
            name = below.as_posix()
            split = split or options.split
            return Row(PictureFile(file), name, name, texts.captions, label, split, meta=meta)

        return rows_of(files, row)

    description = f"folder of {total:,} pictures{roles}, captions from the files beside them"
    return Source("folder", str(path), description, total, rows, roles.classes)


@dataclass(frozen=True, slots=True)
class FolderRoles:
    """Which folders of a tree of pictures are splits, and which are classes.

    Folders that hold everything are passed over. The folders then first in the pictures' paths are the
    splits, if they have splits' names, and those below are the classes; else they are the classes. They
    are classes only if there are two or more and every picture lies in one, at any depth. One split's
    name among two other folders or more is no split: CIFAR-100 has a class "train".
    """

    above: int  # folders that are passed over
    splits: frozenset[str]  # names of folders
    classes: tuple[str, ...] | None  # sorted; None: no folders of classes

    @classmethod
    def of(cls, paths: Iterable[PurePath]) -> FolderRoles:
        """Find the roles from the pictures' paths, relative to the tree's root."""
        parents = {path.parts[:-1] for path in paths}
        above = 0
        while len(first := {parent[above : above + 1] for parent in parents}) == 1:
            name = "".join(*first)
            if not name or split_name(name):
                break
            above += 1
        firsts = {name for head in first for name in head}
        splits = frozenset(name for name in firsts if split_name(name))
        if len(splits) == 1 and len(firsts) > 2:
            splits = frozenset()
        classes: tuple[str, ...] | None = None
        if splits in (frozenset(), firsts):
            place = above + bool(splits)
            heads = {parent[place : place + 1] for parent in parents}
            names = sorted(name for head in heads for name in head)
            classes = tuple(names) if len(names) == len(heads) > 1 else None
        return cls(above, splits, classes)

    def split_and_label(self, path: PurePath) -> tuple[str | None, str | None]:
        """Return the split and the class of the picture at `path`."""
        folders = path.parts[self.above : -1]
        split = split_name(folders[0]) if folders and folders[0] in self.splits else None
        return split, folders[split is not None] if self.classes else None

    def __str__(self) -> str:
        return f" in {len(self.classes):,} class folders" if self.classes else ""


def open_class_folders(path: Path, options: Options) -> Source:
    """Open a folder per class; with options.domains they lie below a folder per domain.

    The label is the class folder's name, the domain is in `meta`. Raises InputError if no class folder
    holds a picture.
    """
    domains = _subfolders(path) if options.domains else [path]
    folders = [folder for domain in domains for folder in _subfolders(domain)]
    files = [(folder, file) for folder in folders for file in _walk(folder)]
    total = sum(isinstance(file, Path) for _, file in files)
    if not total:
        what = "domain folders with class folders" if options.domains else "class folders"
        raise InputError(
            f"{path} holds no {what} with pictures; put each class's pictures in a folder of its name"
        )

    def rows() -> Iterator[Row | Broken]:
        for folder, file in files:
            if isinstance(file, Broken):
                yield file
                continue
            meta = {"domain": folder.parent.name} if options.domains else {}
            name, split = file.relative_to(path).as_posix(), options.split
            yield Row(PictureFile(file), name, name, (), folder.name, split, meta=meta)

    classes = tuple(sorted({folder.name for folder in folders}))
    description = f"{len(classes):,} class folders with {total:,} pictures"
    return Source("classes", str(path), description, total, rows, classes)


def open_imagefolder(path: Path, options: Options) -> Source:
    """Open Hugging Face's imagefolder: a metadata file in each split's folder, as clipkit builds it.

    Raises DatasetError if there is no metadata file, or its columns' roles cannot be told.
    """
    files = metadata_files(path)
    if not files:
        raise DatasetError(f"{path} holds no {' and no '.join(_METADATA)}")
    tables = [Table.open(file) if file.suffix == ".csv" else None for file in files]
    columns = [_columns(f, t, options) for f, t in zip(files, tables, strict=True)]
    total = sum(map(count_lines, files))

    def rows() -> Iterator[Row | Broken]:
        for file, table, roles in zip(files, tables, columns, strict=True):
            folder = file.parent.relative_to(path).as_posix()
            split = split_name(folder) or options.split
            finder = PictureFinder(file.parent, options)
            for item in table.records() if table else read_objects(file):
                if isinstance(item, Broken):
                    yield _placed(item, folder)
                    continue
                place, fields = item
                name = PurePosixPath(str(fields.get(roles.image)))
                if name.is_absolute() or ".." in name.parts:
                    detail = (
                        f"{roles.image} {str(name)!r} must stay below the folder of {file.name}"
                    )
                    yield _placed(Broken(place, "outside", detail), folder)
                    continue
                cells = filled(fields, roles) if table else fields
                yield _placed(roles.row(place, cells, finder.row, split), folder)

    splits = ", ".join(file.parent.relative_to(path).as_posix() for file in files)
    description = f"imagefolder ({splits}): {columns[0]}"
    return Source("imagefolder", str(path), description, total, rows)


def metadata_files(folder: Path) -> list[Path]:
    """Return the metadata files of the folder itself and of the folders one level below."""
    below = sorted(_subfolders(folder), key=lambda p: ORDER.get(split_name(p.name), len(ORDER)))
    return [p / name for p in (folder, *below) for name in _METADATA if (p / name).is_file()]


def split_folder(root: Path, split: str | None) -> tuple[Path, str | None]:
    """Return the folder of one split and its name; (root, None) if the folder has no splits.

    Folders are splits only if all have a split's name, or one of them holds metadata or shards:
    CIFAR-100 has a class "train". Raises InputError if the split is not there.
    """
    below = _subfolders(root)
    named = [folder for folder in below if folder.name in _SPLIT_FOLDERS]
    if named and (
        len(named) == len(below)
        or any(any((f / m).is_file() for m in _METADATA) or any(f.glob("*.tar")) for f in named)
    ):
        name = choose_split([folder.name for folder in named], split, where=str(root))
    elif split is not None and (root / split).is_dir():
        name = split
    else:
        return root, None
    return root / name, name


def choose_split(available: Sequence[str], split: str | None, *, where: str) -> str:
    """Return the split to evaluate on: `split` ("val" is "validation"), or test, validation, train.

    Raises InputError if it is not there.
    """
    if split is None:
        return next((name for name in _SPLIT_FOLDERS if name in available), available[0])
    if split in available:
        return split
    meaning = split_name(split)
    for name in available:
        if meaning is not None and split_name(name) == meaning:
            return name
    raise InputError(f"{where} has no split {split!r}; it has {', '.join(available)}")


def table_in(folder: Path) -> Path | None:
    """Return the one file in `folder` that can hold all captions: CSV, TSV, JSON lines, COCO.

    None if there is no such file or there are several, or if captions lie beside the pictures.
    """
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    pictures = {p.stem for p in files if p.suffix.lower() in SUFFIXES}
    if any(p.suffix.lower() in (".txt", ".json") and p.stem in pictures for p in files):
        return None
    tables = [
        p for p in files if p.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
    ]
    return tables[0] if len(tables) == 1 else None


def _subfolders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def _columns(file: Path, table: Table | None, options: Options) -> Columns:
    if not options.image_column:
        options = replace(options, image_column="file_name")
    sample = sample_of(table.records() if table else read_objects(file))
    if not sample:  # an empty split
        return Columns("file_name", ())
    return choose(sample, options, where=str(file))


def _placed(row: Row | Broken, folder: str) -> Row | Broken:
    """Put the split's folder before place and name, and restore `meta` as it was before a build."""
    place = row.place if folder == "." else f"{folder}, {row.place}"
    if isinstance(row, Broken):
        return replace(row, place=place)
    name = row.name if folder == "." else f"{folder}/{row.name}"
    image_id = row.meta.get("image_id")
    if not isinstance(image_id, str):
        return replace(row, place=place, name=name)
    captions = tuple(text for text in row.captions if text)  # without what gives the column a type
    meta = _unpacked(row.meta)
    return replace(
        row, place=place, name=name, captions=captions, image_id=image_id or None, meta=meta
    )


def _unpacked(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `meta` that data_prep.build wrote as JSON text; any other stays as it is."""
    try:
        inner = json.loads(meta.get("meta", ""))
    except (TypeError, ValueError):
        return meta
    if not isinstance(inner, dict):
        return meta
    lists = {name: [text for text in meta.get(name, ()) if text] for name in LISTS}
    return {name: texts for name, texts in lists.items() if texts} | inner


def _walk(folder: Path) -> Iterator[Path | Broken]:
    """Yield the picture files below, in a stable order, and each folder that cannot be read.

    Hidden names are left out. Links to folders are followed, each folder once.
    """
    problems: list[OSError] = []
    visited: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, onerror=problems.append, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            below.clear()
            detail = f"{here} links to a folder that was read already"
            yield Broken(os.path.relpath(here, folder), "symlink-loop", detail)
            continue
        visited.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield Path(here, name)
    for error in problems:
        place = os.path.relpath(os.fsdecode(error.filename), folder)
        yield Broken(place, "unreadable-folder", f"folder cannot be read: {error.strerror}")
