"""What is evaluated on: pictures with captions, or pictures with classes, wherever they lie.

`data` names it:

    a folder           train/, validation/, test/ or none of them; in it a metadata.jsonl, or pictures
                       with captions beside them, or a folder per class (below domain folders, maybe)
    a JSONL file       one object a line: `image` or `file_name` relative to the file, `captions`,
                       `keywords` or `tags`, `label` or `labels`; lines of one picture are joined
    WebDataset shards  a .tar, a folder of them, or a glob (`eval.shards`)
    a benchmark        `cifar10`, `imagenet1k`, `flickr30k` ... from the hub (`eval.hub`)
    hf:ORG/NAME        any dataset of the Hugging Face hub, `hf:ORG/NAME:CONFIG` one of its configs

Without `split` the first of test, validation, train is taken. `limit` takes that many pictures by
the hash of their names: as good as random, and the same ones wherever and in whatever order they lie.
"""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.errors import DatasetError, InputError
from clipkit.records import Texts
from eval.folders import captioned_folder, class_folders, read_lines, split_folder
from eval.source import Label, Pictures, Source, Subset

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Captioned:
    """Pictures, and texts that are true of them."""

    name: str  # as it was asked for
    split: str | None
    pictures: Pictures
    captions: tuple[str, ...]
    owner: Int64  # (M,) the row of each caption's picture
    tags: tuple[tuple[str, ...], ...]  # one per picture, maybe empty
    subset: str | None = None  # what `limit` took, in words
    warnings: tuple[str, ...] = ()

    def select(self, rows: Sequence[int] | Int64) -> Captioned:
        """Only these pictures, in this order, with their captions and tags."""
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
    """Pictures, and the class or the classes of each: exactly one of labels and targets is there."""

    name: str
    split: str | None
    pictures: Pictures
    classes: tuple[str, ...]
    labels: Int64 | None  # (N,)
    targets: npt.NDArray[np.bool_] | None  # (N, C), multi-label
    domains: tuple[str, ...] | None = None  # one per picture
    subset: str | None = None
    warnings: tuple[str, ...] = ()

    def pictures_per_class(self) -> Int64:
        """How many pictures each class has, int64 (C,)."""
        if self.targets is not None:
            return np.asarray(self.targets.sum(axis=0), np.int64)
        assert self.labels is not None
        return np.bincount(self.labels, minlength=len(self.classes))

    def select(self, rows: Sequence[int] | Int64) -> Labelled:
        """Only these pictures, in this order; the classes stay."""
        chosen = np.asarray(rows, np.int64)
        return replace(
            self,
            pictures=Subset(self.pictures, chosen.tolist()),
            labels=None if self.labels is None else self.labels[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            domains=None if self.domains is None else tuple(self.domains[row] for row in chosen),
        )


def open_captioned(data: str, *, split: str | None = None, limit: int | None = None) -> Captioned:
    """Pictures with captions or tags. InputError: there are none, or they cannot be reached."""
    source = _open(data, split, captioned_folder)
    texts = source.texts or [Texts()] * len(source.pictures)
    if not any(text.captions or text.tags for text in texts):
        raise InputError(
            f"no picture of {data} has a caption; captions stand in metadata.jsonl, in a JSONL "
            "file, in .txt or .json files beside the pictures, or in a hub dataset's caption column"
        )
    rows, subset = _limited(source.pictures, limit)
    whole = Captioned(
        data,
        source.split,
        source.pictures,
        tuple(caption for text in texts for caption in text.captions),
        np.repeat(np.arange(len(texts)), [len(text.captions) for text in texts]),
        tuple(text.tags for text in texts),
        subset,
        source.warnings,
    )
    return whole if rows is None else whole.select(rows)


def open_labelled(
    data: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    by_domain: bool = False,
) -> Labelled:
    """Pictures with classes; `by_domain` if the class folders lie below domain folders.

    `classes` are matched to the data's own by name ("_" is " "). Folders none of which bears one of
    the names, and numbered classes, take them in order. InputError: their number is wrong, or only
    some match, or the data cannot be reached.
    """
    source = _open(data, split, lambda root, at: class_folders(root, at, by_domain=by_domain))
    if source.labels is None or all(label is None for label in source.labels):
        raise InputError(
            f"{data} names no classes; give a folder per class, or a JSONL file or hub dataset "
            "with a label column"
        )
    labels: list[Label] = []
    for row, label in enumerate(source.labels):
        if label is None:
            raise DatasetError(f"{source.pictures.name(row)} of {data} has no label; give it one")
        labels.append(label)
    names, numbers, notes = _classes(data, labels, source.classes, classes)
    rows, subset = _limited(source.pictures, limit)
    single = targets = None
    if any(isinstance(label, tuple) for label in labels):
        targets = np.zeros((len(labels), len(names)), np.bool_)
        for row, several in enumerate(numbers):
            targets[row, list(several)] = True
    else:
        single = np.array([several[0] for several in numbers], np.int64)
    whole = Labelled(
        data, source.split, source.pictures, names, single, targets, source.domains, subset
    )
    if rows is not None:
        whole = whole.select(rows)
    return replace(whole, warnings=(*source.warnings, *notes, *_class_warnings(whole)))


# ---- where it lies


def _open(data: str, split: str | None, read_folder: Callable[[Path, str], Source]) -> Source:
    from eval import hub, shards

    if data.startswith("hf:"):
        return hub.open_dataset(data.removeprefix("hf:"), split)
    path = Path(data).expanduser()
    if any(sign in data for sign in "*?[") and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path)))
        if not found:
            raise InputError(f"nothing matches {data}; name a folder, a file or shards that exist")
    elif not path.exists():
        return hub.open_benchmark(data, split)
    else:
        found = [path]
    if not path.is_dir():
        if split is not None:
            raise InputError(f"{data} is not a folder of splits; leave out --split {split}")
        shard = found[0].suffix == ".tar"
        return shards.read_shards(found) if shard else read_lines(path)
    folder, name = split_folder(path, split)
    if tars := sorted(folder.glob("*.tar")):
        return shards.read_shards(tars, split=name)
    source = read_folder(folder, data)
    warnings = source.warnings
    if name == "train" and split is None:
        warnings += (f"{data} has only a split train: a model that has seen it looks too good",)
    return replace(source, split=name, warnings=warnings)


# ---- which of it


def _limited(pictures: Pictures, limit: int | None) -> tuple[Int64 | None, str | None]:
    """The rows with the smallest hashes of their names, in order; None for all of them."""
    total = len(pictures)
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} pictures; it must be at least 1")
    if limit is None or limit >= total:
        return None, None
    keys = [hashlib.blake2b(_bytes(pictures.name(row)), digest_size=8) for row in range(total)]
    order = np.argsort([int.from_bytes(key.digest(), "big") for key in keys], kind="stable")
    return np.sort(order[:limit]), f"{limit:,} of {total:,} pictures, by the hash of their names"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---- which classes


def _classes(
    data: str, labels: Sequence[Label], known: Sequence[str] | None, given: Sequence[str] | None
) -> tuple[tuple[str, ...], list[tuple[int, ...]], list[str]]:
    """The classes' names, each picture's class numbers, and what to be warned of."""
    several = [label if isinstance(label, tuple) else (label,) for label in labels]
    items = {item for label in several for item in label}
    given = None if given is None else [name.strip() for name in given]
    if given is not None and (not given or not all(given)):
        raise InputError("a class has no name; give one name a line and no empty lines")
    if all(isinstance(item, int) for item in items):
        names = _numbered(data, {item for item in items if isinstance(item, int)}, known, given)
        return names, [tuple(int(item) for item in label) for label in several], []
    old = list(known or sorted({str(item) for item in items}))
    names, place, notes = _named(data, old, given)
    try:
        return names, [tuple(place[str(item)] for item in label) for label in several], notes
    except KeyError as error:
        raise DatasetError(f"{data} has a label {error} that is none of its classes") from None


def _numbered(
    data: str, numbers: set[int], known: Sequence[str] | None, given: Sequence[str] | None
) -> tuple[str, ...]:
    names = given or known
    if names is None:
        raise InputError(f"{data} numbers its classes and does not name them; add --classes FILE")
    if known and given and len(known) != len(given):
        raise InputError(
            f"{len(given)} classes were given, but {data} has {len(known)} "
            f"({_some(known)}); give one name for each, in its order"
        )
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise InputError(
            f"{data} has the class numbers {min(numbers)} to {max(numbers)}, "
            f"but {len(names)} class names (0 to {len(names) - 1}) were given"
        )
    return tuple(names)


def _named(
    data: str, old: Sequence[str], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int], list[str]]:
    """Names for the classes that the data calls `old`, and each one's number."""
    if given is None:
        return tuple(map(_spoken, old)), {name: at for at, name in enumerate(old)}, []
    at = {_spoken(name).casefold(): number for number, name in reversed(list(enumerate(given)))}
    missing = [name for name in old if _spoken(name).casefold() not in at]
    if not missing:
        return tuple(given), {name: at[_spoken(name).casefold()] for name in old}, []
    if len(given) != len(old):
        raise InputError(
            f"{len(given)} classes were given, but {data} has {len(old)}, and "
            f"{len(missing)} are none of them ({_some(missing)}); give a name for each"
        )
    if len(missing) < len(old):
        raise InputError(
            f"{len(missing)} of {data}'s {len(old)} classes are none of those given "
            f"({_some(missing)}); spell them alike, or give other names for all, in their order"
        )
    note = f"classes were named in order: {old[0]} is {given[0]!r}, {old[-1]} is {given[-1]!r}"
    return tuple(given), {name: number for number, name in enumerate(old)}, [note]


def _spoken(name: str) -> str:
    """A folder's name as a class's name: golden_retriever is a golden retriever."""
    return name.replace("_", " ").strip()


def _class_warnings(data: Labelled) -> Iterator[str]:
    counts = Counter(name.casefold() for name in data.classes)
    if twice := [name for name, count in counts.items() if count > 1]:
        yield f"class names given more than once: {_some(twice)}; no model tells those apart"
    counted = data.pictures_per_class()
    if empty := [name for name, count in zip(data.classes, counted, strict=True) if not count]:
        yield f"{len(empty)} of {len(data.classes)} classes have no picture: {_some(empty)}"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
