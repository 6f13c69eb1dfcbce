"""What a page may ask with: one search as it sends it, and the pictures that were dropped on it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from clipkit.errors import InputError
from clipkit.images import Limits, decode, image_id, thumbnail

PAGE = 24  # pictures per page of results, and the step of "show more"
QUERY_MEGABYTES = 64  # one dropped picture
HELD_MEGABYTES = 256  # all dropped pictures that are remembered; the oldest go first
SAMPLE_SIDE = 160  # a dropped picture as the page shows it


class UnknownPictureError(InputError):
    """No picture has this id."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One search: words, a dropped picture, both, or a picture of the library to find the like of."""

    words: str = ""
    picture: str | None = None  # id of a dropped picture
    similar: str | None = None  # image_id of a picture in the library
    folder: str | None = None  # a folder's key, see workspace.folder_key
    after: date | None = None
    until: date | None = None  # inclusive, as people mean it
    k: int = PAGE

    @classmethod
    def from_page(cls, data: Mapping[str, Any]) -> Ask:
        """Read what a browser sent. InputError for what is no value; unknown keys are ignored."""
        texts = {name: _text(data, name) for name in ("words", "picture", "similar", "folder")}
        k = data.get("k", PAGE)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(f"k is {k!r}; it must be a whole number from 1")
        after, until = _date(data, "after"), _date(data, "until")
        if after and until and after > until:
            raise InputError(f"the dates run from {after} to {until}; the first must not be later")
        return cls(
            words=texts["words"].strip(),
            picture=texts["picture"] or None,
            similar=texts["similar"] or None,
            folder=texts["folder"] or None,
            after=after,
            until=until,
            k=k,
        )

    @property
    def is_empty(self) -> bool:
        """Nothing is asked, not even a filter."""
        return self == Ask(k=self.k)

    @property
    def before(self) -> date | None:
        """The first day after `until`."""
        return self.until + timedelta(days=1) if self.until and self.until < date.max else None


class DroppedPictures:
    """The last dropped pictures, by content hash, in memory only. Threads may share it."""

    def __init__(self, *, limits: Limits) -> None:
        self._limits = limits
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Check that it is a picture and remember it; its id. Raises ImageError."""
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
            raise UnknownPictureError("the dropped picture is no longer remembered; drop it again")
        return data

    def sample(self, picture_id: str) -> bytes:
        """A small JPEG of it."""
        picture = decode(self[picture_id], target=SAMPLE_SIDE, limits=self._limits)
        return thumbnail(picture.rgb, side=SAMPLE_SIDE)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {value!r}; it must be text")
    return value or ""


def _date(data: Mapping[str, Any], name: str) -> date | None:
    value = _text(data, name)
    try:
        return date.fromisoformat(value) if value else None
    except ValueError:
        raise InputError(f"the date {value!r} is none; write it like 2023-05-31") from None
