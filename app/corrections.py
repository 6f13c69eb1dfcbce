"""Corrections: results of a text query that people marked right or wrong, stored and exported.

They are stored in the index's folder as corrections.jsonl, an append-only file with a line per mark:

    {"image_id": "0123...", "query": "a red car", "right": true, "at": "2026-05-01T12:30:00+00:00"}

`right` null removes the mark. For one picture and one query the last line counts. The file is separate
from the catalog, which its one writer may hold for as long as an indexing run lasts. A picture is named
by its content, so that marks survive moved files and a new index in the same folder. `export` yields
the format that clipkit.sources reads as "corrections".
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import filelock

from clipkit.catalog import Catalog, PictureRow
from clipkit.durable import sync_folder
from clipkit.errors import CatalogBusy, ClipkitError, InputError
from clipkit.query import Query, Term, format, parse
from clipkit.records import parse_object
from clipkit.wording import printable
from data_prep.clean import Rules, same_caption

log = logging.getLogger(__name__)

FILE, LOCK = "corrections.jsonl", "corrections.lock"
MOST_LETTERS = Rules().max_chars  # of a marked query: no longer caption is built into a dataset
MOST_BYTES = 64_000_000  # of the file: some 400,000 marks
LOCK_SECONDS = 10.0  # another process holds the lock for a few milliseconds
EXPORTED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Correction:
    """A mark that says whether a picture is right for a query."""

    image_id: str
    query: str
    right: bool
    at: str  # UTC, ISO


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark to store; `right` None removes it."""

    picture: str
    query: str  # normalised
    right: bool | None

    @classmethod
    def of_query(cls, picture: str, text: str, right: bool | None) -> Self:
        """Return the mark of a picture for what stands in the search box.

        Raises QueryError, and InputError for a query that is not of words alone.
        """
        query = marked_words(parse(text))
        if query is None:
            raise InputError(
                "only results of a search by words can be marked, with or without filters and up to "
                f"{MOST_LETTERS:,} characters; -words, +pictures and quoted phrases are not possible"
            )
        return cls(picture, query, right)


def marked_words(query: Query) -> str | None:
    """Return the words of a query in one line, which a right picture shows. None where a mark would
    not be about the words alone: a wrong hit of `dog -leash` may well be a dog."""
    if query.exclude or query.examples or query.phrases:
        return None
    words = " ".join(term.text for term in query.terms)
    # Control characters that only reorder text are no part of the words and cannot be shown.
    words = " ".join("".join(c for c in words if printable(c) == c).split())
    return words if words and len(words) <= MOST_LETTERS else None


def as_query(words: str) -> str:
    """Return the query for which `marked_words` returns these words: a mark is sent with it."""
    return format(Query(terms=(Term(words),)))


class Corrections:
    """The corrections of one index folder. Threads and processes may share them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = filelock.FileLock(folder / LOCK, timeout=LOCK_SECONDS, thread_local=False)
        self._writing = threading.Lock()  # between threads, as _lock is between processes
        self._mutex = threading.Lock()  # of what was read: a search never waits for a writer
        self._forget()

    def _forget(self) -> None:
        self._read = 0  # bytes of the file that are in _marks
        self._inode = 0
        # Both by same_caption(query): in the order of the file, and as a page of results needs them.
        self._marks: dict[tuple[str, str], Correction] = {}  # by (query, image_id)
        self._right: dict[str, dict[str, bool]] = {}  # by query, then image_id

    # Each of these may raise ClipkitError if the file cannot be read or written.

    def total(self) -> int:
        """Count the marks that are in force."""
        with self._mutex:
            self._follow()
            return len(self._marks)

    def of(self, query: str) -> Mapping[str, bool]:
        """Return right or wrong by image_id, for the pictures that are marked for this query."""
        with self._mutex:
            self._follow()
            return dict(self._right.get(same_caption(query), {}))

    def all(self) -> list[Correction]:
        """Return every mark that is in force, the oldest first."""
        with self._mutex:
            self._follow()
            return list(self._marks.values())

    def put(self, mark: Mark) -> None:
        """Store a mark in place of an earlier one, or remove that; it is on disk on return.

        Raises CatalogBusy if another process keeps the lock and InputError if the file is full.
        """
        with self._writing, self._locked():
            before = self.of(mark.query).get(mark.picture)
            if mark.right != before:
                self._append(
                    {
                        "image_id": mark.picture,
                        "query": mark.query,
                        "right": mark.right,
                        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    }
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock between processes; raise the system's errors as clipkit's."""
        try:
            with self._lock:
                yield
        except filelock.Timeout:
            raise CatalogBusy(
                f"another process holds {self._lock.lock_file}; try again, or stop that process"
            ) from None
        except OSError as error:
            raise self._unusable(error) from error

    def _append(self, fields: dict[str, Any]) -> None:
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = json.dumps(fields).encode() + b"\n"
            if size + len(line) > MOST_BYTES:
                raise InputError(
                    f"{self.path} has {size / 1e6:.0f} MB; the limit is {MOST_BYTES / 1e6:.0f} MB; "
                    "export the corrections, then move the file away"
                )
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line  # a power cut left half a line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if not size:
            sync_folder(self.path.parent)

    def _follow(self) -> None:
        """Read the lines added since the last call; all of them if the file was replaced."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._forget()
                    self._inode = status.st_ino
                if status.st_size == self._read:
                    return
                file.seek(self._read)
                # A line without an end is still being written.
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            self._forget()
            return
        except OSError as error:
            raise self._unusable(error) from error
        self._read += len(whole) + len(newline)
        for line in whole.splitlines():
            if line.strip():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            fields = parse_object(line)
            image_id, query, at = (fields[name] for name in ("image_id", "query", "at"))
            right = fields["right"]
            if not all(isinstance(text, str) for text in (image_id, query, at)):
                raise ValueError("image_id, query and at must be strings")
            if not (right is None or isinstance(right, bool)):
                raise ValueError("right must be true, false or null")
        except (ValueError, KeyError) as error:
            log.warning("%s: line skipped: %s", self.path, error)
            return
        key = same_caption(query)
        self._marks.pop((key, image_id), None)
        self._right.setdefault(key, {}).pop(image_id, None)
        if right is not None:
            self._marks[key, image_id] = Correction(image_id, query, right, at)
            self._right[key][image_id] = right

    def _unusable(self, error: OSError) -> ClipkitError:
        return ClipkitError(
            f"cannot use {self.path}: {error.strerror or error}; it needs free disk space and a "
            "folder that may be written"
        )


def export(marks: Sequence[Correction], catalog: Catalog) -> Iterator[dict[str, Any]]:
    """Yield the rows for `clipkit data build`, which name pictures by their absolute paths.

    A mark has no row if its picture has left the index or its files were deleted or changed.
    """
    for start in range(0, len(marks), EXPORTED_AT_ONCE):
        some = marks[start : start + EXPORTED_AT_ONCE]
        nums = {mark.image_id: catalog.has_picture(mark.image_id) or 0 for mark in some}  # 0: none
        rows = catalog.rows(set(nums.values()))
        for mark in some:
            num = nums[mark.image_id]
            path = _path(rows[num]) if num in rows else None
            if path is not None:
                yield {"picture": path, **asdict(mark)}


def _path(row: PictureRow) -> str | None:
    """Return the first place whose file still has the picture's size, as reading every file would take
    minutes."""
    for path in row.places:
        try:
            if os.stat(path).st_size == row.bytes:
                return path
        except OSError:
            continue
    return None
