"""Read a photo's orientation, capture date and camera from EXIF, which is a small TIFF file.

Pillow's own reader is not used on untrusted bytes: it warns, and it copies every value a directory
claims, so that 1 MB of overlapping tags becomes 50 GB of memory. This one reads the few tags that
clipkit needs, follows no loops, copies nothing else and never raises on bad input: a broken tag is
absent. `amplifies` finds such directories before Pillow's TIFF and AVIF readers parse them.

Layout: TIFF 6.0 section 2, BigTIFF (libtiff.gitlab.io/libtiff/specification/bigtiff.html), Exif 2.32.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

_MAKE, _MODEL, _ORIENTATION, _DATE_TIME = 271, 272, 274, 306
_EXIF, _GPS, _INTEROP = 34665, 34853, 40965
_DATE_TIME_ORIGINAL = 36867

_UNIT = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_ASCII = 2
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}

_MOST_ENTRIES = 0xFFFF
_MOST_NUMBER_BYTES = 4_000_000  # Pillow turns each number of a tag into a Python object
_SHARED_BYTES = 1 << 16  # tags may share values honestly, but not many
_LONGEST_TEXT = 256

_DATE = re.compile(r"(\d{4})[:\-/.](\d\d)[:\-/.](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_FIRST_YEAR, _LAST_YEAR = 1826, 2100  # the first photograph; beyond, a clock that was never set


class Entry(NamedTuple):
    """One tag of a directory and the position of its value."""

    kind: int  # type of its items, a key of _UNIT
    start: int  # byte offset from the TIFF header
    size: int  # bytes claimed; start + size may lie beyond the data


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts from a picture's EXIF: orientation 1..8 (1 = upright), date as ISO 8601, camera."""

    orientation: int = 1
    taken_at: str | None = None
    camera: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tiff:
    """A TIFF header and its directories."""

    data: bytes | memoryview
    order: str  # "<" or ">"
    big: bool
    first: int  # offset of the first directory

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Tiff | None:
        """Parse a header; return None if `data` does not begin with one."""
        head = bytes(data[:16])
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            return None
        if 43 in head[2:4]:  # some writers contradict their byte order here, see Pillow
            return cls(data, order, True, _unpack(order + "Q", head, 8) or 0)
        if 42 in head[2:4]:
            return cls(data, order, False, _unpack(order + "I", head, 4) or 0)
        return None

    def directory(self, offset: int) -> dict[int, Entry]:
        """Return the tags of the directory at `offset`, as far as they are within the data."""
        # An entry is tag, kind, count and either the value or its offset, whichever fits.
        form, room = ("HHQ8s", 8) if self.big else ("HHI4s", 4)
        width = struct.calcsize("<" + form)
        count = _unpack(self.order + ("Q" if self.big else "H"), self.data, offset) or 0
        start = offset + (8 if self.big else 2)
        inside = max(0, len(self.data) - start) // width
        body = self.data[start : start + min(count, inside, _MOST_ENTRIES) * width]
        entries: dict[int, Entry] = {}
        for index, (tag, kind, items, value) in enumerate(
            struct.iter_unpack(self.order + form, body)
        ):
            size = items * _UNIT.get(kind, 0)
            if size > room:
                where = struct.unpack(self.order + ("Q" if self.big else "I"), value)[0]
            else:
                where = start + (index + 1) * width - room
            if size:
                entries[tag] = Entry(kind, where, size)
        return entries

    def number(self, entry: Entry | None) -> int | None:
        """Return the entry's first value if it is an unsigned integer."""
        if entry is None or entry.kind not in _INTEGERS:
            return None
        return _unpack(self.order + _INTEGERS[entry.kind], self.data, entry.start)

    def text(self, entry: Entry | None) -> str:
        """Return the entry's text without unprintable characters; "" if it has none."""
        if entry is None or entry.kind != _ASCII:
            return ""
        raw = bytes(self.data[entry.start : entry.start + min(entry.size, _LONGEST_TEXT)])
        raw = raw.split(b"\0", 1)[0]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    def amplifies(self) -> bool:
        """Tell whether reading all tags costs far more memory than the data has bytes."""
        count = _unpack(self.order + ("Q" if self.big else "H"), self.data, self.first) or 0
        if count > _MOST_ENTRIES:
            return True
        claimed = numbers = 0
        pending, seen = [self.first], set[int]()
        while pending:
            offset = pending.pop()
            if offset in seen:
                continue
            seen.add(offset)
            entries = self.directory(offset)
            for entry in entries.values():
                if entry.start + entry.size <= len(self.data):  # Pillow stops at one that is not
                    claimed += entry.size
                    numbers += entry.size if _UNIT[entry.kind] > 1 else 0
            if len(seen) < 4:  # Pillow follows these three, and no others
                links = (self.number(entries.get(tag)) for tag in (_EXIF, _GPS, _INTEROP))
                pending += [link for link in links if link is not None]
        return claimed > len(self.data) + _SHARED_BYTES or numbers > _MOST_NUMBER_BYTES


def read_facts(blob: bytes) -> Facts:
    """Read the facts of an EXIF block (with or without its "Exif" prefix) or of a whole TIFF file."""
    while blob[:6] == b"Exif\0\0":
        blob = blob[6:]
    tiff = Tiff.parse(blob)
    if tiff is None:
        return Facts()
    main = tiff.directory(tiff.first)
    link = tiff.number(main.get(_EXIF))
    photo = tiff.directory(link) if link is not None else {}
    orientation = tiff.number(main.get(_ORIENTATION)) or 1
    return Facts(
        orientation=orientation if orientation <= 8 else 1,
        taken_at=_date(tiff.text(photo.get(_DATE_TIME_ORIGINAL)))
        or _date(tiff.text(main.get(_DATE_TIME))),
        camera=_camera(tiff.text(main.get(_MAKE)), tiff.text(main.get(_MODEL))),
    )


def _unpack(form: str, data: bytes | memoryview, offset: int) -> int | None:
    if offset + struct.calcsize(form) > len(data):
        return None
    return int(struct.unpack_from(form, data, offset)[0])


def _date(text: str) -> str | None:
    match = _DATE.match(text)
    if match is None:
        return None
    try:
        moment = datetime(*(int(part) for part in match.groups()))  # type: ignore[arg-type]
    except ValueError:  # month 13, "0000:00:00", hour 24
        return None
    return moment.isoformat() if _FIRST_YEAR <= moment.year <= _LAST_YEAR else None


def _camera(make: str, model: str) -> str | None:
    """Join make and model, unless the model repeats the make: "NIKON CORPORATION", "NIKON D850" ->
    "NIKON D850"."""
    if model and model.split()[0].casefold() in make.casefold().split():
        return model
    return f"{make} {model}".strip() or None
