"""Pictures that a request brings or wants: how many are decoded at once, and what is kept in memory.

A picture of 400 kB can need gigabytes when it is decoded. Every route decodes in one of a few places;
who finds the waiting line full is told to come back (ServerBusy).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, TypeVar

from clipkit.embed import Budget
from clipkit.errors import ClipkitError, InputError
from clipkit.images import Limits, decode, image_id, thumbnail

QUERY_MEGABYTES = 64  # one picture of a request
QUERY_MEGAPIXELS = 50.0  # the same, decoded; one of the library may have more
HELD_MEGABYTES = 256  # all dropped pictures in memory; the oldest go first
SAMPLE_SIDE = 160  # of a dropped picture as the page shows it, in pixels

V = TypeVar("V")


class UnknownPictureError(InputError):
    """No picture has this id."""


class ServerBusy(ClipkitError):
    """All places are taken and the waiting line is full; `retry_after` is in seconds."""

    retry_after = 2


class Places:
    """Run at most `count` callers at a time; at most `waiting` more wait, up to `seconds` each."""

    def __init__(self, subject: str, count: int, *, waiting: int, seconds: float) -> None:
        self._subject = subject
        self._seconds = seconds
        self._free = threading.Semaphore(count)
        self._line = threading.Semaphore(count + waiting)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one of the places. Raises ServerBusy if the line is full or does not move."""
        if not self._line.acquire(blocking=False):
            raise self._busy()
        try:
            if not self._free.acquire(timeout=self._seconds):
                raise self._busy()
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._line.release()

    def _busy(self) -> ServerBusy:
        return ServerBusy(
            f"the server is busy {self._subject} for others; try again in a few seconds"
        )


class Decoding:
    """Lets pictures be decoded while they have together at most `megapixels`; a larger one alone. Who
    waits for room has one of the `places`."""

    def __init__(self, places: Places, megapixels: float) -> None:
        self._places = places
        self._budget = Budget(megapixels * 1e6)

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield the `admit` of one call of `images.decode`. Raises ServerBusy."""
        with self._places.take(), self._budget.share() as admit:
            yield admit


def query_limits(limits: Limits) -> Limits:
    """Return the limits of a picture that comes with a request."""
    return replace(
        limits,
        max_megapixels=min(limits.max_megapixels, QUERY_MEGAPIXELS),
        max_megabytes=min(limits.max_megabytes, QUERY_MEGABYTES),
    )


class Recent(Generic[V]):
    """The values used last, up to a number of bytes in all. Threads may share it."""

    def __init__(self, megabytes: float) -> None:
        self._bytes = megabytes * 1e6
        self._values: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        """Return a value, which counts as used now; None if it is not held."""
        with self._lock:
            if (found := self._values.get(key)) is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: str, value: V, size: int) -> None:
        """Hold a value of `size` bytes; the least recently used ones make room, not the new one."""
        with self._lock:
            self._used += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, size
            while self._used > self._bytes and len(self._values) > 1:
                self._used -= self._values.popitem(last=False)[1][1]


class DroppedPictures:
    """The last dropped pictures, by content hash, in memory only. Threads may share it."""

    def __init__(self, *, limits: Limits, decoding: Decoding) -> None:
        self._limits = query_limits(limits)
        self._decoding = decoding
        self._held: Recent[tuple[bytes, bytes]] = Recent(HELD_MEGABYTES)

    def add(self, data: bytes) -> str:
        """Check that the bytes are a picture, keep them and return its id.

        Raises ImageError, and ServerBusy while too many others are decoded.
        """
        picture_id = image_id(data)
        if self._held.get(picture_id) is None:
            with self._decoding.share() as admit:
                picture = decode(data, target=SAMPLE_SIDE, limits=self._limits, admit=admit)
                sample = thumbnail(picture.rgb, side=SAMPLE_SIDE)
            self._held.put(picture_id, (data, sample), len(data) + len(sample))
        return picture_id

    def __getitem__(self, picture_id: str) -> bytes:
        """Return a dropped picture's bytes. Raises UnknownPictureError."""
        return self._get(picture_id)[0]

    def sample(self, picture_id: str) -> bytes:
        """Return the picture as a small JPEG. Raises UnknownPictureError."""
        return self._get(picture_id)[1]

    def _get(self, picture_id: str) -> tuple[bytes, bytes]:
        if (held := self._held.get(picture_id)) is None:
            raise UnknownPictureError(
                f"no picture {picture_id} in this library; one that was dropped has left the server's "
                "memory: drop it again"
            )
        return held
