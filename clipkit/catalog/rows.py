"""What the catalog takes and hands out, and how it makes names comparable. Pure: no SQL, no I/O."""

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

Int64 = npt.NDArray[np.int64]
AnyPath = str | os.PathLike[str]

ISO_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?)?)?)?", re.ASCII)


class KnownFile(NamedTuple):
    """What the catalog remembers of one file, to tell in an instant whether it changed."""

    size: int
    mtime_ns: int
    state: str  # "ok"; "skipped"; "pending": its picture has no vector of the asked encoder yet
    num: int | None  # its picture; None if skipped


class StoredVectors(NamedTuple):
    nums: Int64  # (N,)
    vectors: npt.NDArray[np.float16]  # (N, D), rows in the order of nums
    last_seq: int  # pass it as `after_seq` to get only what is newer


class EncoderRow(NamedTuple):
    encoder_id: str
    spec: str
    config_json: str
    dim: int


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
    """Counts of what is live. `vectors` counts one encoder's; `newest` is the last `added_at`."""

    pictures: int
    vectors: int
    places: int
    skipped: int
    bytes: int
    roots: tuple[str, ...]
    newest: str | None


def below(folder: AnyPath) -> tuple[bytes, bytes]:
    """The half-open range of stored paths that lie below a folder: no pattern, nothing to escape."""
    sep = os.sep.encode()
    low = os.fsencode(folder).rstrip(sep) + sep
    return low, low[:-1] + bytes([sep[0] + 1])


def clean(text: str) -> str:
    """Text that any file or tag can hold, fit for a database: no lone surrogates, no NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


def fold(text: str) -> str:
    """The form in which two spellings compare equal: "CAFÉ" and a decomposed "café" do."""
    return unicodedata.normalize("NFKC", clean(text)).casefold()


def fold_path(path: str) -> str:
    return fold(path).replace(os.sep, "/")


def tag_keys(tags: str) -> str:
    """Tags, a line each, such that `tag_keys(tag) in tag_keys(tags)` finds a whole tag."""
    return "".join(f"\n{' '.join(fold(tag).split())}\n" for tag in tags.split("\n"))


def lines(texts: Iterable[str]) -> str:
    """Captions or tags as one stored text: a line each, white space evened out, empty ones left out."""
    return "\n".join(filter(None, (" ".join(clean(text).split()) for text in texts)))


def name_words(paths: Iterable[str]) -> str:
    """The searchable words of file names: "redCar_2023.jpg" is found by redcar, red, car and 2023.

    The tokenizer itself splits at _ - and other signs; here letter case and digits split too.
    """
    found: dict[str, None] = {}
    for path in paths:
        stem = clean(os.path.splitext(os.path.basename(path))[0])
        found[stem] = None
        split = "".join(
            f" {b}" if (a.islower() and b.isupper()) or a.isdigit() != b.isdigit() else b
            for a, b in zip(" " + stem, stem, strict=False)
        )
        found[" ".join(split.split())] = None
    return "\n".join(found)


def local_time(mtime_ns: int) -> str | None:
    """A file's modification time as EXIF would say it; None if the clock was out of this world."""
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(mtime_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return None
    return text if ISO_DATE.fullmatch(text) else None
