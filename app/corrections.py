"""Corrections: what people say of the results of a text query, right or wrong, kept and exported.

Kept in the index's folder as corrections.jsonl, a line for each mark as it is made, only ever added to:

    {"image_id": "0123...", "query": "a red car", "right": true, "at": "2026-05-01T12:30:00+00:00"}

`right` null takes the mark back. For one picture and one query the last line counts. The file is apart
from the catalog, whose one writer may hold it for as long as an indexing run lasts; a picture is named
by its content, so that marks outlive moved files and an index that is made anew in its folder. What
`export` hands out is the format that clipkit.sources reads as "corrections".
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
MOST_LETTERS = Rules().max_chars  # of a query that is marked: `clipkit data build` takes no longer
MOST_BYTES = 64_000_000  # of the file: some 400,000 marks
MARK_BYTES = 64_000  # of a mark as it is sent
LOCK_SECONDS = 10.0  # another process holds the lock for a few milliseconds
EXPORTED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Correction:
    """What was said of one picture and one query."""

    image_id: str
    query: str
    right: bool
    at: str  # UTC, ISO


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark as it is sent; `right` None takes it back."""

    picture: str
    query: str  # normalised
    right: bool | None

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read {"picture": image_id, "query": what was typed, "right": true, false or null}.

        QueryError, InputError: what is no such mark, or a query that is not of words alone.
        """
        try:
            fields = parse_object(data)
        except ValueError as error:
            raise InputError(f"a mark is one JSON object: {error}") from None
        picture, typed, right = (fields.get(name) for name in ("picture", "query", "right"))
        if not isinstance(picture, str) or not re.fullmatch("[0-9a-f]{32}", picture):
            raise InputError(
                f"picture is {picture!r:.80}; a picture is named by its content hash, 32 hex digits"
            )
        if not isinstance(typed, str):
            raise InputError(f"query is {typed!r:.80}; it must be the text that was searched for")
        if "right" not in fields or not (right is None or isinstance(right, bool)):
            raise InputError(f"right is {right!r:.80}; it must be true, false, or null to unmark")
        query = marked_words(parse(typed))
        if query is None:
            raise InputError(
                "only results of words alone can be marked, with or without filters, up to "
                f"{MOST_LETTERS:,} characters: not those of -words, +pictures or quoted phrases"
            )
        return cls(picture, query, right)


def marked_words(query: Query) -> str | None:
    """The words that were looked for, as one line: what a right picture shows. None where a mark would
    not speak of the words alone: a wrong hit of `dog -leash` may well be a dog."""
    if query.exclude or query.examples or query.phrases:
        return None
    words = " ".join(term.text for term in query.terms)
    # Marks that only reorder text are no part of what is said, and cannot be shown.
    words = " ".join("".join(c for c in words if printable(c) == c).split())
    return words if words and len(words) <= MOST_LETTERS else None


def as_query(words: str) -> str:
    """What `said` gave, written so that it is said again: the query to send a mark with."""
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
        # Both by same_caption(query): in the order of the file, and what a page of results asks for.
        self._marks: dict[tuple[str, str], Correction] = {}  # by (query, image_id)
        self._right: dict[str, dict[str, bool]] = {}  # by query, then image_id

    # Each of these may raise ClipkitError if the file cannot be read or written.

    def total(self) -> int:
        """How many marks count."""
        with self._mutex:
            self._follow()
            return len(self._marks)

    def of(self, query: str) -> Mapping[str, bool]:
        """Right or wrong by image_id, for the pictures that were marked for this query."""
        with self._mutex:
            self._follow()
            return dict(self._right.get(same_caption(query), {}))

    def all(self) -> list[Correction]:
        """Every mark that counts, the oldest first."""
        with self._mutex:
            self._follow()
            return list(self._marks.values())

    def put(self, mark: Mark) -> None:
        """Keep a mark in place of an earlier one, or take that back; on disk when this returns.

        CatalogBusy: another process does not let go of the lock. InputError: the file is full.
        """
        with self._writing, self._alone():
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
    def _alone(self) -> Iterator[None]:
        """The lock between processes, and the system's errors as sentences."""
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
                    f"{self.path} has {size / 1e6:.0f} MB; the limit is {MOST_BYTES / 1e6:.0f}; export "
                    "the corrections, then move that file away"
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
        """Take in the lines that were added since; all of them if the file is another one now."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._forget()
                    self._inode = status.st_ino
                if status.st_size == self._read:
                    return
                file.seek(self._read)
                # What follows the last line's end is still being written.
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
            log.warning("%s: a line left out: %s", self.path, error)
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
    """The rows of corrections.jsonl for `clipkit data build`, pictures by their absolute paths.

    A mark whose picture has left the index, or whose files are gone or changed since, has no row.
    """
    for start in range(0, len(marks), EXPORTED_AT_ONCE):
        some = marks[start : start + EXPORTED_AT_ONCE]
        nums = {mark.image_id: catalog.has_picture(mark.image_id) or 0 for mark in some}  # 0: none
        rows = catalog.rows(set(nums.values()))
        for mark in some:
            num = nums[mark.image_id]
            path = _place(rows[num]) if num in rows else None
            if path is not None:
                yield {
                    "picture": path,
                    "query": mark.query,
                    "right": mark.right,
                    "image_id": mark.image_id,
                    "at": mark.at,
                }


def _place(row: PictureRow) -> str | None:
    """The first place that still holds the picture, told by its size: reading every file would take
    minutes."""
    for path in row.places:
        try:
            if os.stat(path).st_size == row.bytes:
                return path
        except OSError:
            continue
    return None
