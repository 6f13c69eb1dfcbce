"""Pictures with captions, or pictures with classes, collected from any source for an evaluation.

`data` is whatever `clipkit.sources.open_source` opens: a folder, a table, JSON lines, COCO, shards, a
benchmark's name, `hf:ORG/NAME`. Pictures stay where they are and are read one at a time. Rows of one
picture are joined. No row is dropped in silence: one that is broken is an error with its place, one
that has no picture is counted in a warning.

Without `split` the first of test, validation, train is taken. `limit` takes that many pictures by the
hash of their names: as good as random, and the same ones wherever and in whatever order they lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from clipkit.arrays import Bool, Int64
from clipkit.errors import DatasetError, InputError
from clipkit.records import stripped
from clipkit.sources import Broken, Options, Picture, Row, Source, detect, open_source
from clipkit.sources.folders import choose_split, split_folder
from clipkit.wording import list_text

# A class by its number or its name; a tuple where a picture may have several.
Label = int | str | tuple[int | str, ...]

# Broken rows that only lack a picture: a warning counts them. Any other broken row is an error.
_WITHOUT_PICTURE = {"no-picture", "unreadable-folder", "symlink-loop"}


class Pictures(Protocol):
    """Pictures by row; safe to share between threads."""

    def __len__(self) -> int: ...
    def name(self, row: int) -> str:
        """Return a name to find the picture by: a path relative to the data, or "row 12"."""

    def read(self, row: int) -> bytes:
        """Return the file's bytes. Raises ImageError if they cannot be read."""


@dataclass(frozen=True, slots=True)
class SourcePictures:
    """The pictures of a source."""

    names: tuple[str, ...]
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> bytes:
        return self.pictures[row].read()


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some rows of other pictures."""

    pictures: Pictures
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return self.pictures.name(self.rows[row])

    def read(self, row: int) -> bytes:
        return self.pictures.read(self.rows[row])


@dataclass(frozen=True, slots=True, eq=False)
class Captioned:
    """Pictures with their captions and tags."""

    name: str  # `data` as the user wrote it
    split: str | None
    pictures: Pictures
    captions: tuple[str, ...]
    owner: Int64  # (M,) the row of each caption's picture
    tags: tuple[tuple[str, ...], ...]  # one per picture, maybe empty
    subset: str | None = None  # which pictures `limit` took
    warnings: tuple[str, ...] = ()

    def select(self, rows: Sequence[int] | Int64) -> Captioned:
        """Return only these pictures, in this order, with their captions and tags."""
        chosen = np.asarray(rows, np.int64)
        order = np.argsort(self.owner, kind="stable")
        starts = np.searchsorted(self.owner[order], chosen)
        ends = np.searchsorted(self.owner[order], chosen, side="right")
        mine = [at for a, b in zip(starts, ends, strict=True) for at in order[a:b]]
        return replace(
            self,
            pictures=Subset(self.pictures, chosen.tolist()),
            captions=tuple(self.captions[at] for at in mine),
            owner=np.repeat(np.arange(len(chosen)), ends - starts),
            tags=tuple(self.tags[row] for row in chosen),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Pictures with a class each (`labels`), or with several (`targets`): one of the two is None."""

    name: str
    split: str | None
    pictures: Pictures
    classes: tuple[str, ...]
    labels: Int64 | None  # (N,)
    targets: Bool | None  # (N, C), multi-label
    domains: tuple[str, ...] | None = None  # one per picture
    subset: str | None = None
    warnings: tuple[str, ...] = ()

    def pictures_per_class(self) -> Int64:
        """Return the number of pictures of each class, int64 (C,)."""
        if self.targets is not None:
            return np.asarray(self.targets.sum(axis=0), np.int64)
        assert self.labels is not None
        return np.bincount(self.labels, minlength=len(self.classes))

    def select(self, rows: Sequence[int] | Int64) -> Labelled:
        """Return only these pictures, in this order, with all the classes."""
        chosen = np.asarray(rows, np.int64)
        return replace(
            self,
            pictures=Subset(self.pictures, chosen.tolist()),
            labels=None if self.labels is None else self.labels[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            domains=None if self.domains is None else tuple(self.domains[row] for row in chosen),
        )


Data = TypeVar("Data", Captioned, Labelled)


def open_captioned(data: str, *, split: str | None = None, limit: int | None = None) -> Captioned:
    """Collect pictures with captions or tags. Raises InputError if there are none."""
    source, groups, warnings = _collect(data, split)
    # Repeated captions stay: the field counts each as a query.
    captions = [stripped(text for row in group for text in row.captions) for group in groups]
    tags = [stripped(tag for row in group for tag in _tags(row)) for group in groups]
    if not any(tags) and all(_has_no_caption(source, row) for group in groups for row in group):
        raise InputError(
            f"no picture of {data} has a caption; captions are read from a caption column, from "
            f"metadata.jsonl, or from .txt or .json files beside the pictures{_tables_there(data)}"
        )
    whole = Captioned(
        data,
        source.split,
        _pictures(groups),
        tuple(itertools.chain(*captions)),
        np.repeat(np.arange(len(groups)), [len(texts) for texts in captions]),
        tuple(tuple(dict.fromkeys(own)) for own in tags),
        warnings=warnings,
    )
    return _limited(whole, limit)


def open_labelled(
    data: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    by_domain: bool = False,
) -> Labelled:
    """Collect pictures with classes; with `by_domain` the class folders lie below domain folders.

    `classes` are matched to the data's own by name ("_" is " "). If none of the data's classes has one
    of these names, or they are numbers, the names are assigned in order. Raises InputError if the
    number of names is wrong, only some match, or the data has no labels.
    """
    source, groups, warnings = _collect_labelled(data, split, by_domain=by_domain)
    labels: list[Label] = []
    for group in groups:
        own = {label: row for row in group if (label := _label(source, row)) is not None}
        if len(own) > 1:
            row = list(own.values())[1]
            raise DatasetError(f"{source.where(row.place)}: {row.name} had another label before")
        if not own:
            raise DatasetError(f"{group[0].name} of {data} has no label; give it one")
        labels.append(next(iter(own)))
    names, numbers, notes = _classes(data, labels, source.classes, classes)
    single = targets = None
    if any(isinstance(label, tuple) for label in labels):
        targets = np.zeros((len(labels), len(names)), np.bool_)
        for at, several in enumerate(numbers):
            targets[at, list(several)] = True
    else:
        single = np.array([several[0] for several in numbers], np.int64)
    domains = tuple(group[0].meta["domain"] for group in groups) if by_domain else None
    whole = Labelled(data, source.split, _pictures(groups), names, single, targets, domains)
    chosen = _limited(whole, limit)
    return replace(chosen, warnings=(*warnings, *notes, *_class_warnings(chosen)))


# ---- rows


def _collect(
    data: str, split: str | None, *, kind: str | None = None, by_domain: bool = False
) -> tuple[Source, list[list[Row]], tuple[str, ...]]:
    """Return the source with its split, the rows of each picture of that split, and warnings."""
    path, name = Path(data).expanduser(), None
    if path.is_dir() and detect(path) != "hf":
        path, name = split_folder(path, split)
    options = Options(indexed=True, only=split, domains=by_domain)
    source = open_source(data if name is None else path, kind=kind, options=options)
    source = replace(source, split=name or source.split)
    rows: list[Row] = []
    first: Broken | None = None
    without = 0
    for row in source.rows():
        if isinstance(row, Row):
            rows.append(row)
            continue
        if row.reason not in _WITHOUT_PICTURE:
            raise DatasetError(
                f"{source.where(row.place)}: {row.detail}; correct it, or leave such rows out with: "
                f"clipkit data build {data} --out DIR"
            )
        first = first or row
        without += 1
    if not rows:
        raise source.nothing_read(without, first)
    if source.split is None:
        source, rows = _of_split(source, rows, data, split)
    warnings = []
    if first is not None:
        warnings.append(
            f"{data} has {without:,} row{'s' * (without > 1)} without a picture, left out; the first: "
            f"{first.place}: {first.detail}"
        )
    if source.split == "train" and split is None:
        warnings.append(f"{data} has only a split train: a model that has seen it looks too good")
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.picture, []).append(row)
    return source, list(groups.values()), tuple(warnings)


def _of_split(
    source: Source, rows: list[Row], data: str, split: str | None
) -> tuple[Source, list[Row]]:
    """Return the rows of one split, where rows name their splits; all of them where none does."""
    available = list(dict.fromkeys(row.split for row in rows if row.split))
    if not available:
        if split is not None:
            raise InputError(f"{data} has no splits, so none called {split!r}; leave out --split")
        return source, rows
    # A folder called train beside others need not be a split: it may hold pictures of trains.
    if split is None and source.kind == "folder" and not all(row.split for row in rows):
        return source, rows
    name = choose_split(available, split, where=data)
    return replace(source, split=name), [row for row in rows if row.split == name]


def _collect_labelled(
    data: str, split: str | None, *, by_domain: bool
) -> tuple[Source, list[list[Row]], tuple[str, ...]]:
    """Collect rows with labels: those of the source itself, else of its class folders."""
    path = Path(data).expanduser()
    kind = detect(split_folder(path, split)[0]) if path.is_dir() and detect(path) != "hf" else None
    if by_domain or kind == "folder":
        return _collect(data, split, kind="classes", by_domain=by_domain)
    refusal = InputError(
        f"{data} names no classes; give a folder per class, or a table, JSONL file or hub dataset "
        "with a label column"
    )
    try:
        collected = _collect(data, split)
        if any(row.label is not None for group in collected[1] for row in group):
            return collected
    except DatasetError as error:
        if kind in (None, "imagefolder", "webdataset"):
            raise
        refusal = error  # a table beside class folders need not be about them
    if kind is not None:
        with contextlib.suppress(InputError):
            return _collect(data, split, kind="classes")
    raise refusal


def _pictures(groups: Sequence[Sequence[Row]]) -> SourcePictures:
    return SourcePictures(tuple(g[0].name for g in groups), tuple(g[0].picture for g in groups))


def _tables_there(data: str) -> str:
    """Return which tables lie in the folder `data`, to be given one by one, or ""."""
    folder = Path(data).expanduser()
    tables = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"}
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in tables)
    if not files or (folder / "dataset.json").is_file():  # of a dataset that clipkit built
        return ""
    names = list_text([file.name for file in files], 5)
    return f"; it holds {names}: name the one with the captions, as in --data {files[0]}"


def _tags(row: Row) -> Sequence[str]:
    tags = row.meta.get("keywords", ())
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else ()


def _has_no_caption(source: Source, row: Row) -> bool:
    """Return whether a row has no caption but, at most, the names of its classes."""
    names = row.label if isinstance(row.label, list) else [row.label]
    if source.classes is not None:
        names = [source.classes[n] if isinstance(n, int) else n for n in names]
    return list(row.captions) in ([], names)


def _label(source: Source, row: Row) -> Label | None:
    """Return a row's class or classes. Raises DatasetError if one is no name and no number."""
    several = row.label if isinstance(row.label, list) else [row.label]
    if several == [None]:
        return None
    for item in several:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise DatasetError(
                f"{source.where(row.place)}: a label must be a name or a number, got "
                f"{reprlib.repr(item)}"
            )
    return tuple(several) if isinstance(row.label, list) else several[0]


# ---- limit


def _limited(data: Data, limit: int | None) -> Data:
    """Return the `limit` pictures with the smallest hashes of their names, in order; None for all."""
    total = len(data.pictures)
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} pictures; it must be at least 1")
    if limit is None or limit >= total:
        return data
    names = (data.pictures.name(row).encode("utf-8", "surrogateescape") for row in range(total))
    keys = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    rows = sorted(sorted(range(total), key=keys.__getitem__)[:limit])
    subset = f"{limit:,} of {total:,} pictures, by the hash of their names"
    return replace(data.select(rows), subset=subset)


# ---- classes


def _classes(
    data: str,
    labels: Sequence[Label],
    own_names: Sequence[str] | None,
    new_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], list[tuple[int, ...]], list[str]]:
    """Return the classes' names, each picture's class numbers, and warnings."""
    several = [label if isinstance(label, tuple) else (label,) for label in labels]
    items = {item for label in several for item in label}
    new_names = None if new_names is None else [name.strip() for name in new_names]
    if new_names is not None and (not new_names or not all(new_names)):
        raise InputError("a class has no name; give one name a line and no empty lines")
    if all(isinstance(item, int) for item in items):
        names = _numbered(
            data, {item for item in items if isinstance(item, int)}, own_names, new_names
        )
        return names, [tuple(int(item) for item in label) for label in several], []
    old = list(own_names or sorted({str(item) for item in items}))
    names, place, notes = _named(data, old, new_names)
    try:
        return names, [tuple(place[str(item)] for item in label) for label in several], notes
    except KeyError as error:
        raise DatasetError(f"{data} has a label {error} that is not one of its classes") from None


def _numbered(
    data: str, numbers: set[int], own_names: Sequence[str] | None, new_names: Sequence[str] | None
) -> tuple[str, ...]:
    names = new_names or own_names
    if names is None:
        raise InputError(f"{data} numbers its classes and does not name them; add --classes FILE")
    if own_names and new_names and len(own_names) != len(new_names):
        raise InputError(
            f"{len(new_names)} classes were given, but {data} has {len(own_names)} "
            f"({list_text(own_names, 5)}); give one name for each, in its order"
        )
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise InputError(
            f"{data} has the class numbers {min(numbers)} to {max(numbers)}, "
            f"but {len(names)} class names (0 to {len(names) - 1}) were given"
        )
    return tuple(names)


def _named(
    data: str, old: Sequence[str], new_names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int], list[str]]:
    """Return names for the classes that the data calls `old`, the number of each, and warnings."""
    if new_names is None:
        return tuple(map(_spoken, old)), {name: at for at, name in enumerate(old)}, []
    at = {_spoken(name).casefold(): number for number, name in reversed(list(enumerate(new_names)))}
    missing = [name for name in old if _spoken(name).casefold() not in at]
    if not missing:
        return tuple(new_names), {name: at[_spoken(name).casefold()] for name in old}, []
    if len(new_names) != len(old):
        raise InputError(
            f"{len(new_names)} classes were given, but {data} has {len(old)}, and "
            f"{len(missing)} are none of them ({list_text(missing, 5)}); give a name for each"
        )
    if len(missing) < len(old):
        raise InputError(
            f"{len(missing)} of {data}'s {len(old)} classes are none of those given "
            f"({list_text(missing, 5)}); spell them alike, or give other names for all, in their order"
        )
    note = (
        f"classes were named in order: {old[0]} is {new_names[0]!r}, {old[-1]} is {new_names[-1]!r}"
    )
    return tuple(new_names), {name: number for number, name in enumerate(old)}, [note]


def deeper_classes(pictures: Pictures) -> dict[str, frozenset[str]]:
    """Return the folders below the class folders that hold several picture folders, with the names of
    these: {"PACS/photo": {"dog", ...}} where PACS was taken for a class."""
    below: dict[str, set[str]] = {}
    for row in range(len(pictures)):
        parts = pictures.name(row).split("/")
        if len(parts) > 2:
            below.setdefault("/".join(parts[:-2]), set()).add(parts[-2])
    return {folder: frozenset(names) for folder, names in below.items() if len(names) > 1}


def _spoken(name: str) -> str:
    """Return a folder's name as a class name: golden_retriever -> golden retriever."""
    return name.replace("_", " ").strip()


def _class_warnings(data: Labelled) -> Iterator[str]:
    counts = Counter(name.casefold() for name in data.classes)
    if twice := [name for name, count in counts.items() if count > 1]:
        yield f"class names given more than once: {list_text(twice, 5)}; no model can distinguish those"
    deeper = deeper_classes(data.pictures) if data.domains is None else {}
    same = len(deeper) > 1 and len(set(deeper.values())) == 1
    if same and {_spoken(folder) for folder in deeper} == set(data.classes):
        folder, names = next(iter(deeper.items()))
        yield (
            f"every class has the same {len(names)} folders, such as {folder}, so the classes may be "
            f"domains; for one of them give --data {Path(data.name, folder)}"
        )
    counted = data.pictures_per_class()
    if empty := [name for name, count in zip(data.classes, counted, strict=True) if not count]:
        yield f"{len(empty)} of {len(data.classes)} classes have no picture: {list_text(empty, 5)}"
