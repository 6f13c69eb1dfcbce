"""The types that every reader shares, and the search for the files that a table names."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from clipkit.errors import DatasetError, ImageError
from clipkit.images import SUFFIXES, Limits, read_bytes
from clipkit.records import SPLITS

# Folders beside a table in which its pictures are searched.
USUAL_FOLDERS = (
    "images Images image imgs img pictures photos Flicker8k_Dataset Flickr8k_Dataset Flicker8k_Images "
    "flickr30k-images flickr30k_images Flickr30k_images"
).split()

# Entries of `meta` that are lists of strings; the lists of several rows of one picture are joined.
LISTS = ("keywords", "not_captions")

ORDER: dict[str | None, int] = {split: n for n, split in enumerate(SPLITS)}
_LIMITS = Limits()
T = TypeVar("T")
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


class Picture(Protocol):
    """The bytes of one picture file, wherever they lie. Equal pictures are the same file."""

    @property
    def path(self) -> Path | None:
        """The picture's own file; None inside a shard or a table."""

    def read(self, limits: Limits = ...) -> bytes:
        """Return the file's bytes. Raises ImageError if they cannot be read or are too many."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture in a file of its own, which need not exist."""

    path: Path

    def read(self, limits: Limits = _LIMITS) -> bytes:
        return read_bytes(self.path, limits=limits)


@dataclass(frozen=True, slots=True)
class PictureBytes:
    """A picture from a stream that is not read a second time."""

    data: bytes
    path: None = None

    def read(self, limits: Limits = _LIMITS) -> bytes:
        limits.check_bytes(len(self.data))
        return self.data


@dataclass(frozen=True, slots=True)
class TarMember:
    """A picture inside an uncompressed tar: `size` bytes from `offset`."""

    tar: Path
    offset: int
    size: int
    path: None = None

    def read(self, limits: Limits = _LIMITS) -> bytes:
        limits.check_bytes(self.size)
        try:
            with self.tar.open("rb", buffering=0) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(
                f"shard {self.tar} cannot be read: {error.strerror or error}", reason="unreadable"
            ) from error
        if len(data) < self.size:
            raise ImageError(f"shard {self.tar} ends inside the picture", reason="truncated")
        return data


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A picture inside a zip, stored or deflated: the entry whose header is at `offset`."""

    zip: Path
    offset: int
    packed: int  # bytes in the zip
    size: int  # bytes of the picture
    crc: int
    deflated: bool
    path: None = None

    def read(self, limits: Limits = _LIMITS) -> bytes:
        limits.check_bytes(self.size)
        limits.check_bytes(self.packed)
        try:
            with self.zip.open("rb", buffering=0) as file:
                file.seek(self.offset)
                head = file.read(30)  # the name and a field of extras follow, then the content
                file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)
                data = file.read(self.packed)
            if self.deflated:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        except OSError as error:
            raise ImageError(
                f"{self.zip} cannot be read: {error.strerror or error}", reason="unreadable"
            ) from error
        except (struct.error, zlib.error) as error:
            raise ImageError(f"{self.zip} is damaged: {error}", reason="broken") from error
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ImageError(
                f"{self.zip} is damaged: the picture is not the one packed", reason="broken"
            )
        return data


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A picture and its annotations as the source has them; nothing is checked yet."""

    picture: Picture
    name: str  # the picture's name in the source
    place: str  # where the row stands: "line 12", "00003.tar: 000030007"
    captions: tuple[str, ...] = ()
    label: Any = None  # class name or number, a list of them, or whatever the label column holds
    split: str | None = None  # "train", "validation", "test" if the source says so
    image_id: str | None = None  # content hash, in datasets that clipkit built
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that gives no picture; `reason` is a short word to count by."""

    place: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Options:
    """How to read a source; the defaults detect everything.

    indexed: yield pictures that can be read again at any time, as evaluation does: no streams; of a
    hub dataset one split is loaded, `only` or else test, validation, train; a file that is missing is
    yielded and fails when it is read.
    """

    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    pictures: Path | None = None  # folder of the pictures that a table names
    split: str | None = None  # of rows that name none
    indexed: bool = False
    only: str | None = None
    uncaptioned: bool = False  # a table may have no column of captions
    domains: bool = False  # kind "classes": class folders lie below domain folders


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was recognised and can be read, from the beginning each time."""

    kind: str
    path: str
    description: str  # what was taken for what
    total: int | None  # approximate number of rows, for progress
    rows: Callable[[], Iterator[Row | Broken]]
    classes: tuple[str, ...] | None = None  # names of the numbered labels, or all class folders
    split: str | None = None  # the split that was loaded, if only one was

    def where(self, place: str) -> str:
        """Return the path and a row's place in it: "captions.csv, line 12"."""
        path = Path(self.path)
        return str(path.parent / place) if place.startswith(path.name) else f"{path}, {place}"

    def nothing_read(self, rows: int, first: Broken | None) -> DatasetError:
        """Return the error for a source of whose `rows` none gives a picture; `first` is one."""
        why = f"none of its {rows:,} rows gives a picture" if rows else "it has no rows"
        if first:
            why += f"; the first: {first.place}: {first.detail}"
        if first and first.reason == "missing":
            why += "; move the pictures there, or give their folder to `clipkit data` as --pictures"
        return DatasetError(f"nothing could be read from {self.path}: {why}")


class PictureFinder:
    """Find the files that a table names: in options.pictures, beside the table, in a usual folder.

    Raises DatasetError if options.pictures is not a folder.
    """

    def __init__(self, home: Path, options: Options, *, also: tuple[str, ...] = ()) -> None:
        root = options.pictures
        if root is not None and not root.is_dir():
            raise DatasetError(f"--pictures {root} is no folder; give the folder of the pictures")
        self._folders = [root] if root else []
        self._folders += [home, *(home / name for name in (*also, *USUAL_FOLDERS))]
        self._searched = (
            f"{root} nor {home}" if root else f"{home} nor in a folder such as images/ there"
        )
        self._keep_missing = options.indexed
        self._last = self._folders[0]  # of the previous picture: most often right again

    def find(self, name: str) -> Path | None:
        """Return the file of that name, with any picture suffix if the name has none."""
        if "\0" in name:
            return None
        name = name.strip().replace("\\", "/").removeprefix("file://")
        names = [name]
        if PurePosixPath(name).suffix.lower() not in SUFFIXES:
            names += [name + suffix for suffix in (".jpg", ".jpeg", ".png", ".webp")]
        for folder in dict.fromkeys((self._last, *self._folders)):
            for candidate in names:
                path = folder / candidate  # an absolute name stays as it is
                if os.path.isfile(path):
                    self._last = folder
                    return path
        return None

    def row(
        self,
        name: object,
        place: str,
        captions: tuple[str, ...] = (),
        label: object = None,
        split: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Row | Broken:
        """Return the row of the picture called `name`, or the reason why there is none."""
        if not isinstance(name, str) or not name.strip():
            return Broken(place, "no-picture-name", f"no picture is named, but {name!r:.80}")
        if name.strip().lower().startswith(("http://", "https://")):
            detail = f"{name:.200} is an address; download it first, for example with img2dataset"
            return Broken(place, "remote", detail)
        path = self.find(name)
        if path is None and self._keep_missing:
            path = self._folders[0] / name
        if path is None:
            return Broken(place, "missing", f"{name:.200} is not in {self._searched}")
        return Row(PictureFile(path), name, place, captions, label, split, meta=meta or {})


def rows_of(
    items: Iterable[T | Broken], make: Callable[[T], Row | Broken]
) -> Iterator[Row | Broken]:
    """Yield make(item) for each item that is not Broken, and those that are as they are."""
    for item in items:
        yield item if isinstance(item, Broken) else make(item)


def count_lines(path: Path) -> int:
    """Return the number of lines of a file, for progress."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def split_name(text: object) -> str | None:
    """Return the split that a word means: "val", "Dev", "train2017", "restval"; None for no split."""
    return _SPLITS.get(str(text).strip().lower().rstrip("0123456789-_")) if text else None


def split_of_file(name: str) -> str | None:
    """Return the split in a file's name: "captions_val2017.json", "train-0001.tar"."""
    words = "".join(c if c.isalpha() else " " for c in name).split()
    return next((split for word in words if (split := split_name(word))), None)


def strings(value: object) -> tuple[str, ...] | None:
    """Return one string, or a list of them, as a tuple; None for any other type."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None


def tag_list(value: object) -> list[str]:
    """Return tags that are a list of strings, or one string split at commas, semicolons and bars."""
    tags = re.split("[,;|]", value) if isinstance(value, str) else strings(value) or ()
    return [tag.strip() for tag in tags if tag.strip()]
