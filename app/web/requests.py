"""Requests of the page: one search, and the pictures that were dropped on it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

from clipkit.errors import InputError
from clipkit.images import Limits, decode, image_id, thumbnail
from clipkit.query import CHOICES
from clipkit.records import parse_object

PAGE_SIZE = 24  # pictures per page of results, and the step of "show more"
REQUEST_BYTES = 64_000  # of a search as it is sent
QUERY_MEGABYTES = 64  # one dropped picture
HELD_MEGABYTES = 256  # all dropped pictures in memory; the oldest go first
SAMPLE_SIDE = 160  # of a dropped picture as the page shows it, in pixels

_NAMES = ("picture", "similar", "folder", "sort", "orientation", "format", "camera")


class UnknownPictureError(InputError):
    """No picture has this id."""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One search: by words, by a dropped picture or one of the library, or by words and a picture."""

    words: str = ""
    picture: str | None = None  # id of a dropped picture
    similar: str | None = None  # image_id of a picture in the library
    folder: str | None = None  # FolderRow.key
    after: date | None = None
    until: date | None = None  # inclusive
    sort: str | None = None  # one of CHOICES["sort"]
    orientation: str | None = None  # one of CHOICES["orientation"]
    format: str | None = None
    camera: str | None = None  # its whole name
    size: int = 0  # least length of the longer side, in pixels
    k: int = PAGE_SIZE
    offset: int = 0  # results that the page has already: it is sent those after them

    @classmethod
    def from_page(cls, data: Mapping[str, Any]) -> SearchRequest:
        """Read what a browser sent; unknown keys are ignored. Raises InputError for a wrong value."""
        words = _text(data, "words").strip()
        names = {name: _text(data, name) or None for name in _NAMES}
        for name, choices in CHOICES.items():
            if names[name] and names[name] not in choices:
                raise InputError(
                    f"{name} is {names[name]!r}; it must be one of {', '.join(choices)}"
                )
        size = _text(data, "size")
        if size and not (size.isdecimal() and len(size) <= 7):
            raise InputError(f"size is {size!r}; it must be a number of pixels")
        k = _count(data, "k", least=1, default=PAGE_SIZE)
        offset = _count(data, "offset", least=0, default=0)
        after, until = _date(data, "after"), _date(data, "until")
        if after and until and after > until:
            raise InputError(f"the dates run from {after} to {until}; the first must not be later")
        return cls(
            words=words, after=after, until=until, size=int(size or 0), k=k, offset=offset, **names
        )

    @classmethod
    def from_json(cls, data: bytes) -> SearchRequest:
        """Read a JSON object as `from_page` does. Raises InputError."""
        try:
            return cls.from_page(parse_object(data))
        except ValueError as error:
            raise InputError(f"the search is no JSON object: {error}") from None

    @property
    def is_empty(self) -> bool:
        """True if there is neither a query nor a filter."""
        return self == SearchRequest(k=self.k, offset=self.offset)

    @property
    def before(self) -> date | None:
        """The first day after `until`."""
        return self.until + timedelta(days=1) if self.until and self.until < date.max else None

    @property
    def key(self) -> str:
        """Hex digits that identify the search, however many results are shown."""
        search = repr(replace(self, k=PAGE_SIZE)).encode(errors="replace")
        return hashlib.blake2b(search, digest_size=8).hexdigest()


class DroppedPictures:
    """The last dropped pictures, by content hash, in memory only. Threads may share it."""

    def __init__(self, *, limits: Limits) -> None:
        self._limits = limits
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Check that the bytes are a picture, keep them and return its id. Raises ImageError."""
        decode(data, target=SAMPLE_SIDE, limits=self._limits)
        picture_id = image_id(data)
        with self._lock:
            self._held[picture_id] = data
            self._held.move_to_end(picture_id)
            while len(self._held) > 1 and sum(map(len, self._held.values())) > HELD_MEGABYTES * 1e6:
                self._held.popitem(last=False)
        return picture_id

    def __getitem__(self, picture_id: str) -> bytes:
        with self._lock:
            data = self._held.get(picture_id)
        if data is None:
            raise UnknownPictureError("the dropped picture is no longer in memory; drop it again")
        return data

    def sample(self, picture_id: str) -> bytes:
        """Return the picture as a small JPEG."""
        picture = decode(self[picture_id], target=SAMPLE_SIDE, limits=self._limits)
        return thumbnail(picture.rgb, side=SAMPLE_SIDE)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {value!r}; it must be text")
    return value or ""


def _count(data: Mapping[str, Any], name: str, *, least: int, default: int) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least}")
    return value


def _date(data: Mapping[str, Any], name: str) -> date | None:
    value = _text(data, name)
    try:
        return date.fromisoformat(value) if value else None
    except ValueError:
        raise InputError(f"{value!r} is not a date; use the form 2023-05-31") from None
