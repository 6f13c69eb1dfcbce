"""What a source hands out, and how the name of a picture in a table becomes a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES

# Where the pictures of a table are looked for, beside it, when its names alone do not lead to them.
USUAL_FOLDERS = (
    "images Images image imgs img pictures photos Flicker8k_Dataset Flickr8k_Dataset Flicker8k_Images "
    "flickr30k-images flickr30k_images Flickr30k_images"
).split()

# Entries of `meta` that are lists of strings, and lists of several rows of a picture are joined.
LISTS = ("keywords", "not_captions")

_SPLITS = {
    "train": "train",
    "training": "train",
    "restval": "train",  # COCO's validation pictures that Karpathy's split trains on
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True, eq=False)
class RawPair:
    """One row: a picture and what is said of it, nothing of it checked yet."""

    picture: Path | bytes  # a file that may not exist, or the bytes of one
    name: str  # as the source calls the picture
    row: str  # where it stands: "line 12", "00003.tar: 000030007"
    captions: tuple[str, ...]
    split: str | None = None  # "train", "validation", "test" where the source says so
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that gives no pair: `reason` is a short word to count by."""

    row: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may have to say about a source; empty: it is guessed."""

    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    pictures: Path | None = None  # where the pictures named in a table lie
    split: str | None = None  # of every row that does not say its own


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was understood: `says` tells in words what was taken for what."""

    kind: str
    path: str
    says: str
    total: int | None  # rows, about: for the time left
    rows: Callable[[], Iterator[RawPair | Broken]]


class Pictures:
    """Finds the files that a table names: beside it, in `--pictures`, or in a folder usual there."""

    def __init__(self, home: Path, root: Path | None, *, also: tuple[str, ...] = ()) -> None:
        if root is not None and not root.is_dir():
            raise DatasetError(f"--pictures {root} is no folder; name the one the pictures lie in")
        self._folders = [root] if root else []
        self._folders += [home, *(home / name for name in (*also, *USUAL_FOLDERS))]
        self._told = (
            f"{root} nor {home}" if root else f"{home} nor in a folder such as images/ there"
        )
        self._last = self._folders[0]  # where the one before was: most often right again

    def find(self, name: str) -> Path | None:
        """The file of that name; with any picture suffix, if the name has none."""
        if "\0" in name:
            return None
        name = name.strip().replace("\\", "/").removeprefix("file://")
        names = [name]
        if PurePosixPath(name).suffix.lower() not in SUFFIXES:
            names += [name + suffix for suffix in (".jpg", ".jpeg", ".png", ".webp")]
        for folder in dict.fromkeys((self._last, *self._folders)):
            for candidate in names:
                path = folder / candidate  # an absolute name stays what it is
                if os.path.isfile(path):
                    self._last = folder
                    return path
        return None

    def pair(
        self,
        name: object,
        row: str,
        captions: tuple[str, ...],
        split: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> RawPair | Broken:
        """The pair of that row, or why there is none."""
        if not isinstance(name, str) or not name.strip():
            return Broken(row, "no-picture-name", f"the row names no picture: {name!r:.80}")
        if name.strip().lower().startswith(("http://", "https://")):
            return Broken(
                row, "remote", f"{name:.200} is an address; fetch it first, as with img2dataset"
            )
        path = self.find(name)
        if path is None:
            return Broken(row, "missing", f"{name:.200} is not in {self._told}")
        return RawPair(path, name, row, captions, split, meta or {})


def split_name(said: object) -> str | None:
    """ "val", "Dev", "train2017", "restval" -> train, validation or test; None for anything else."""
    return _SPLITS.get(str(said).strip().lower().rstrip("0123456789-_")) if said else None


def split_of_file(name: str) -> str | None:
    """The split that a file's name tells: "captions_val2017.json", "train-0001.tar"."""
    words = "".join(c if c.isalpha() else " " for c in name).split()
    return next((split for word in words if (split := split_name(word))), None)


def strings(value: object) -> tuple[str, ...] | None:
    """One string or a list of them as a tuple; None for what is neither."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None
