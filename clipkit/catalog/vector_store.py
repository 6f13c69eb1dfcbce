"""Vectors computed once, by what they are made from: one SQLite file that processes may share.

A row's key says what was encoded (the hash of a picture's bytes or of a text), its space says with
what (encoder, precision, version, kind): another checkpoint or another file never finds it. The
store is derived data. Every row carries a digest, and a file that fails it, or that SQLite cannot
read, is renamed to `*.damaged` and replaced by a new one: damage costs time, never a wrong answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from clipkit.arrays import Float32
from clipkit.catalog.store import UNUSABLE
from clipkit.errors import ClipkitError

log = logging.getLogger(__name__)

T = TypeVar("T")

FLUSH_SECONDS = 30.0  # a killed process loses no more than this
_FLUSH_ROWS = 4096  # ... and holds no more than this in memory
_PARAMETERS = 500  # keys in one statement
_FACTS = b"facts"
# A rollback journal and not WAL: readers need no write access, and one file is all there is.
_SCHEMA = """
    PRAGMA page_size = 16384;
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS vectors (
        space TEXT NOT NULL, key BLOB NOT NULL, content BLOB NOT NULL, digest BLOB NOT NULL,
        PRIMARY KEY (space, key));
    COMMIT;
"""


class VectorStore:
    """Vectors of one space by key. Threads may share it; use it in a `with` block.

    New vectors are written every 30 seconds and when the block ends, also after an error. With
    `path` None nothing is kept.
    """

    def __init__(self, path: Path | None, space: str) -> None:
        self.path, self.space = path, space
        self._mutex = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._new: dict[bytes, bytes] = {}  # put, but not written yet
        self._flushed_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._close()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Float32]:
        """Return the stored vectors, float32 (D,), of those `keys` that have one."""
        with self._mutex:
            wanted = dict.fromkeys(keys)
            rows = {key: self._new[key] for key in wanted if key in self._new}
            rows |= self._read(self.space, [key for key in wanted if key not in rows])
            return {key: np.frombuffer(row, "<f4") for key, row in rows.items()}

    def put(self, keys: Sequence[bytes], vectors: Float32) -> None:
        """Store vectors (N, D) under `keys`, in place of those that are there."""
        if self.path is None:
            return
        with self._mutex:
            rows = np.ascontiguousarray(vectors, "<f4")
            self._new.update((k, row.tobytes()) for k, row in zip(keys, rows, strict=True))
            waited = time.monotonic() - self._flushed_at
            if waited > FLUSH_SECONDS or len(self._new) >= _FLUSH_ROWS:
                self.flush()

    def flush(self) -> None:
        """Write what was put."""
        with self._mutex:
            if self._new:
                self._write(self.space, self._new)
                self._new = {}
            self._flushed_at = time.monotonic()

    def facts(self, space: str) -> dict[str, Any]:
        """Return what `put_facts` stored for `space`; empty if nothing."""
        with self._mutex:
            rows = self._read(space, [_FACTS])
        facts: dict[str, Any] = json.loads(rows[_FACTS]) if rows else {}
        return facts

    def put_facts(self, space: str, facts: Mapping[str, Any]) -> None:
        """Store a few facts, as JSON, for `space`."""
        with self._mutex:
            self._write(space, {_FACTS: json.dumps(facts).encode()})

    def spaces(self) -> dict[str, int]:
        """Return how many rows each space of the file has."""
        if self.path is None or not self.path.exists():
            return {}
        with self._mutex:
            sql = "SELECT space, count(*) FROM vectors GROUP BY space"
            return dict(self._run(lambda db: db.execute(sql).fetchall()))

    def remove(self, spaces: Iterable[str]) -> None:
        """Remove all rows of `spaces`, and give their room on the disk back if nobody reads just now.

        Other processes may use the file meanwhile: they compute again what they no longer find.
        """
        rows = [(space,) for space in spaces]

        def delete(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM vectors WHERE space = ?", rows)
            db.execute("COMMIT")
            with suppress(sqlite3.OperationalError):  # locked, or no room for a copy
                db.execute("VACUUM")

        if rows and self.path is not None and self.path.exists():
            with self._mutex:
                self._run(delete)

    # ---- SQL

    def _read(self, space: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        if self.path is None or not keys or (self._db is None and not self.path.exists()):
            return {}

        def select(db: sqlite3.Connection) -> dict[bytes, bytes]:
            rows: dict[bytes, bytes] = {}
            for start in range(0, len(keys), _PARAMETERS):
                some = keys[start : start + _PARAMETERS]
                marks = ",".join("?" * len(some))
                sql = (
                    f"SELECT key, content, digest FROM vectors WHERE space = ? AND key IN ({marks})"
                )
                for key, content, digest in db.execute(sql, (space, *some)):
                    if _digest(space, key, content) != digest:
                        raise _Damaged(f"the vector {key.hex()} is not what was written")
                    rows[key] = content
            return rows

        return self._run(select)

    def _write(self, space: str, rows: Mapping[bytes, bytes]) -> None:
        if self.path is None:
            return

        def insert(db: sqlite3.Connection) -> None:
            # IMMEDIATE: a lock taken later could not be waited for
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)",
                ((space, key, row, _digest(space, key, row)) for key, row in rows.items()),
            )
            db.execute("COMMIT")

        self._run(insert)

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Run `action` on the file; once more, on a new file, if it turns out to be damaged."""
        for first in (True, False):
            try:
                if self._db is None:
                    self._db = self._connect()
                try:
                    return action(self._db)
                finally:
                    if self._db.in_transaction:
                        self._db.rollback()
            except (sqlite3.Error, TypeError, OSError) as error:
                if first and _means_damage(error):
                    self._set_aside(error)
                    continue
                raise ClipkitError(
                    f"cannot use {self.path}: {error}; it needs free disk space, a writable folder, "
                    "and no other process that locks it for more than a minute"
                ) from error
        raise AssertionError

    def _connect(self) -> sqlite3.Connection:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self._inode = os.stat(self.path).st_ino
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchone():
                db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _close(self) -> None:
        with self._mutex:
            if self._db is not None:
                self._db.close()
            self._db = None

    def _set_aside(self, error: Exception) -> None:
        """Rename the damaged file, unless another process did so and has begun a new one."""
        assert self.path is not None
        self._close()
        with suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.replace(self.path, f"{self.path}.damaged")
                Path(f"{self.path}-journal").unlink(missing_ok=True)
        log.warning("set aside the damaged vectors in %s: %s", self.path, error)


class _Damaged(sqlite3.DatabaseError):
    """A row that is not what was written."""


def _means_damage(error: Exception) -> bool:
    """Whether the file itself is at fault, and not the disk, its rights or a lock."""
    if isinstance(error, _Damaged | TypeError):  # TypeError: a flipped bit made a blob a number
        return True
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in UNUSABLE


def _digest(space: str, key: bytes, content: bytes) -> bytes:
    state = hashlib.blake2b(space.encode(), digest_size=8)
    state.update(len(key).to_bytes(4, "big") + key)
    state.update(content)
    return state.digest()
