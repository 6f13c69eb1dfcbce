"""The catalog's row types, and the folded forms in which it compares names. No SQL and no I/O."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64

AnyPath = str | os.PathLike[str]

# A private-use token between captions or names, so that no phrase matches across the end of one.
BREAK = " \ue000 "
ISO_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?)?)?)?", re.ASCII)


class KnownFile(NamedTuple):
    """The catalog's record of one file, by which a change is seen without reading it."""

    size: int
    mtime_ns: int
    state: str  # "ok"; "skipped"; "pending": its picture has no vector of the encoder yet
    num: int | None  # its picture; None if skipped


class StoredVectors(NamedTuple):
    nums: Int64  # (N,)
    vectors: npt.NDArray[np.float16]  # (N, D), rows in the order of nums
    last_seq: int  # pass it as `after_seq` to read only newer ones


class EncoderRow(NamedTuple):
    encoder_id: str
    spec: str
    config_json: str
    dim: int
    space_id: str


class SkippedRow(NamedTuple):
    path: str
    reason: str  # a short slug to count by
    message: str  # a sentence


class SnapshotPointer(NamedTuple):
    name: str
    last_seq: int


@dataclass(frozen=True, slots=True)
class PictureRow:
    num: int
    image_id: str
    path: str  # the shortest of the places, then the first by name
    places: tuple[str, ...]  # sorted
    width: int
    height: int
    format: str
    bytes: int
    taken_at: str | None  # "2023-05-01T12:30:00", the camera's clock, from EXIF
    dated: str | None  # taken_at, else the local time at which the oldest place was last modified
    camera: str | None
    added_at: str  # UTC
    captions: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CatalogStats:
    """Counts of live pictures. `vectors` are one encoder's; `newest` is the last `added_at`."""

    pictures: int
    vectors: int
    places: int
    skipped: int
    bytes: int
    roots: tuple[str, ...]
    newest: str | None


class Facets(NamedTuple):
    """The values that pictures have, each with the number of pictures, the most frequent first."""

    formats: tuple[tuple[str, int], ...] = ()
    cameras: tuple[tuple[str, int], ...] = ()
    tags: tuple[tuple[str, int], ...] = ()  # folded


def below(folder: AnyPath) -> tuple[bytes, bytes]:
    """Return the half-open range of stored paths below a folder: no pattern, nothing to escape."""
    sep = os.sep.encode()
    low = os.fsencode(folder).rstrip(sep) + sep
    return low, low[:-1] + bytes([sep[0] + 1])


def clean(text: str) -> str:
    """Return any text in a form that SQLite can store: no lone surrogates, no NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


def fold(text: str) -> str:
    """Return the form in which spellings compare equal, as "CAFÉ" and a decomposed "café" do."""
    return unicodedata.normalize("NFKC", clean(text)).casefold()


def fold_path(path: str) -> str:
    return fold(path).replace(os.sep, "/")


def tag_keys(tags: str) -> str:
    """Fold tags, one a line, such that `tag_keys(tag) in tag_keys(tags)` finds a whole tag."""
    return "".join(f"\n{' '.join(fold(tag).split())}\n" for tag in tags.split("\n"))


def split_paths(joined: str) -> list[str]:
    """Return the paths of SQL's group_concat(hex(path)): in hexadecimal, any bytes survive it."""
    return [os.fsdecode(bytes.fromhex(path)) for path in joined.split(",")]


def lines(texts: Iterable[str]) -> str:
    """Join captions or tags for storage, one a line, with single spaces and without empty ones."""
    return "\n".join(filter(None, (" ".join(clean(text).split()) for text in texts)))


def name_words(paths: Iterable[str]) -> str:
    """Return the searchable words of file names: "redCar_2023.jpg" matches redcar, red, car and 2023."""
    return _words(os.path.splitext(os.path.basename(path))[0] for path in paths)


def folder_text(paths: Iterable[str]) -> str:
    """Return the words of the names of all folders above files, as folder_texts holds them."""
    folders = (name for path in paths for name in os.path.dirname(path).split(os.sep) if name)
    return _words(folders).replace("\n", BREAK)


def _words(names: Iterable[str]) -> str:
    """Return the words of names, a line each.

    The tokenizer itself splits at _ - and other signs; here letter case and digits split too.
    """
    words: dict[str, None] = {}
    for name in map(clean, dict.fromkeys(names)):
        words[name] = None
        split = "".join(
            f" {b}" if (a.islower() and b.isupper()) or a.isdigit() != b.isdigit() else b
            for a, b in zip(" " + name, name, strict=False)
        )
        words[" ".join(split.split())] = None
    return "\n".join(words)


def local_time(mtime_ns: int) -> str | None:
    """Return a file's modification time in EXIF's form; None if it is out of range."""
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(mtime_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return None
    return text if ISO_DATE.fullmatch(text) else None
