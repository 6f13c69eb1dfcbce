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
from clipkit.picture_set import PictureSet

AnyPath = str | os.PathLike[str]

# A private-use token between captions or names, so that no phrase matches across the end of one.
BREAK = " \ue000 "
ISO_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?)?)?)?", re.ASCII)


class KnownFile(NamedTuple):
    """The catalog's record of one file, by which a change is seen without reading it."""

    size: int
    mtime_ns: int
    state: str  # "ok"; "skipped"; "pending": its picture has no vector of the encoder yet
    num: int | None  # its picture; None if it never was one


class StoredVectors(NamedTuple):
    nums: Int64  # (N,)
    vectors: npt.NDArray[np.float16]  # (N, D), rows in the order of nums
    last_seq: int  # pass it as `after_seq` to read only newer ones


class EncoderRow(NamedTuple):
    encoder_id: str
    spec: str
    config_json: str
    dim: int
    space_id: str | None = None  # encoders of one space share their vectors; None if not told yet


class Phrase(NamedTuple):
    """The pictures that have a phrase, and how well each fits it."""

    nums: PictureSet
    bm25: (
        npt.NDArray[np.float64] | None
    )  # (N,) in the order of nums.nums, the best least; None: a tie


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
    path: str  # the shortest of the places, then the first
    places: tuple[str, ...]  # in the order of the paths' bytes
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


def fold_path(path: str | bytes) -> str:
    return fold(os.fsdecode(path)).replace(os.sep, "/")


def folder_of(path: bytes) -> bytes:
    """Return the folder of a stored path, with the separator at its end."""
    return path[: path.rindex(os.sep.encode()) + 1]


def name_of(path: bytes) -> str:
    """Return the folded name of the file at a stored path."""
    return fold(os.fsdecode(path[path.rindex(os.sep.encode()) + 1 :]))


def folded_tags(tags: str) -> list[str]:
    """Return the distinct tags of lines in the form in which they are compared."""
    return [tag for tag in dict.fromkeys(map(fold_tag, tags.split("\n"))) if tag]


def fold_tag(tag: str) -> str:
    return " ".join(fold(tag).split())


def date_key(date: str | None) -> int:
    """Return an integer that orders ISO dates and their prefixes as their texts do; 0 for other texts.

    Two decimal digits each for month, day, hour, minute and second after the year. A time's parts
    count from 1, so that a date comes before its midnight.
    """
    if not date or not ISO_DATE.fullmatch(date):
        return 0
    day, _, clock = date.partition("T")
    parts = [int(part) for part in day.split("-")]
    parts += [0] * (3 - len(parts)) + [int(part) + 1 for part in clock.split(":") if part]
    key = 0
    for part in (*parts, 0, 0, 0)[:6]:
        key = key * 100 + part
    return key


# Scripts that are written without spaces, or (Hangul) whose words carry endings: Thai, Lao, Tibetan,
# Myanmar, Khmer, kana, bopomofo, Han, Hangul, and their compatibility forms.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u318f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}][{_UNSPACED}\u0300-\u036f]*")


def has_unspaced(text: str) -> bool:
    """Whether a text has characters of a script that is written without spaces."""
    return not text.isascii() and _UNSPACED_RUN.search(text) is not None


def spaced(text: str) -> str:
    """Put spaces around each character of scripts that are written without, so that a phrase finds
    any part of a run; unicode61 would keep the run as one word."""
    if text.isascii():
        return text
    return _UNSPACED_RUN.sub(
        lambda run: f" {' '.join(unicodedata.normalize('NFKC', run[0]))} ", text
    )


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
