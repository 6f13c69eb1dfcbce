"""The SQLite files beneath the catalog: schema, migrations, connections, the writer's lock.

`Store` owns catalog.sqlite, `Thumbnails` the derived thumbnails.sqlite. catalog.py and queries.py say
what the rows mean; this module alone imports sqlite3.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from clipkit.catalog.rows import folder_text, split_paths
from clipkit.errors import CatalogBusy, ClipkitError, IndexDamaged, InputError

log = logging.getLogger(__name__)

Connection = sqlite3.Connection

APPLICATION_ID = 0x434C4B31  # "CLK1" in the file's header says whose SQLite file this is

# ERROR: a table is missing, or its definition cannot be read
UNUSABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

# Entry i migrates a catalog from version i to i + 1. A released entry is never edited.
MIGRATIONS: tuple[str, ...] = (
    f"""
    PRAGMA application_id = {APPLICATION_ID};
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO meta VALUES ('changes', 0), ('writer', 0);
    CREATE TABLE roots (path BLOB PRIMARY KEY) WITHOUT ROWID;
    -- live, dated and the row in texts follow from places, taken_at, captions and tags
    CREATE TABLE pictures (
        num INTEGER PRIMARY KEY, image_id TEXT NOT NULL UNIQUE, live INTEGER NOT NULL DEFAULT 0,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL,
        format TEXT NOT NULL, taken_at TEXT, dated TEXT, camera TEXT, added_at TEXT NOT NULL,
        tag_keys TEXT NOT NULL DEFAULT '', tags TEXT NOT NULL DEFAULT '',
        captions TEXT NOT NULL DEFAULT '');
    -- every fact that filters and counts need: 15 ms for 100,000, against 100 ms for the table
    CREATE INDEX pictures_facts ON pictures
        (dated, camera, format, width, height, tag_keys, bytes, added_at) WHERE live;
    CREATE INDEX pictures_dead ON pictures (num) WHERE NOT live;
    CREATE TABLE places (
        path BLOB PRIMARY KEY, num INTEGER NOT NULL REFERENCES pictures,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, folded TEXT NOT NULL) WITHOUT ROWID;
    CREATE INDEX places_num ON places (num);
    CREATE TABLE skipped (
        path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        reason TEXT NOT NULL, message TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE encoders (
        id INTEGER PRIMARY KEY, encoder_id TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
        config TEXT NOT NULL, dim INTEGER NOT NULL);
    CREATE TABLE vectors (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, num INTEGER NOT NULL REFERENCES pictures,
        encoder INTEGER NOT NULL REFERENCES encoders, vector BLOB NOT NULL, UNIQUE (encoder, num));
    CREATE TABLE snapshots (
        encoder_id TEXT PRIMARY KEY, name TEXT NOT NULL, last_seq INTEGER NOT NULL) WITHOUT ROWID;
    CREATE VIRTUAL TABLE texts USING fts5(
        names, captions, tags, tokenize = 'unicode61 remove_diacritics 2');
    """,
    # A table of its own: the depth of a path must not count in the bm25 of the texts.
    """
    CREATE VIRTUAL TABLE folder_texts USING fts5(
        folders, tokenize = 'unicode61 remove_diacritics 2');
    INSERT INTO folder_texts (rowid, folders)
        SELECT num, folder_text(group_concat(hex(path))) FROM places GROUP BY num;
    """,
)


class Store:
    """catalog.sqlite of one index folder.

    A reader keeps a pool of connections, one per call in flight, so any thread may call. A writer has
    one connection, shared by its threads one at a time, and holds writer.lock until `close()`.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        """Open; for writing also create and migrate. Raises InputError, IndexDamaged, CatalogBusy."""
        self.path = folder / "catalog.sqlite"
        self._mutex = threading.RLock()
        self._idle: list[sqlite3.Connection] = []
        self._lock: filelock.BaseFileLock | None = None
        self._closed = False
        if not self.path.is_file():
            parts = ("", "train", "validation", "test")
            if any((folder / part / "metadata.jsonl").is_file() for part in parts):
                raise InputError(f"{folder} is a dataset, not an index; name another folder")
        if write:
            self._lock = self._take_lock(folder)
            try:
                with self._translated():
                    self._idle.append(self._connect())
                    self._migrate(self._idle[0])
            except BaseException:
                self.close()
                raise
            return
        no_index = InputError(f"no index at {folder}; create one with: clipkit index FOLDER")
        if not self.path.is_file():
            raise no_index
        with self._translated(), closing(self._connect()) as db:
            version = self._version(db)
        if version == 0:  # a first writer died, or has not committed yet
            raise no_index
        if version < len(MIGRATIONS):  # only a writer may migrate
            Store(folder, write=True).close()

    @property
    def writable(self) -> bool:
        return self._lock is not None

    def _take_lock(self, folder: Path) -> filelock.BaseFileLock:
        # flock, not a file whose existence counts: the system frees it when the process dies
        lock = filelock.FileLock(folder / "writer.lock", timeout=0, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            if not isinstance(error, filelock.Timeout):
                why = error.strerror or error
                raise InputError(f"cannot write an index at {folder}: {why}") from None
            pid = 0
            if self.path.is_file():
                with self._translated(), closing(self._connect()) as db:
                    if self._version(db):
                        sql = "SELECT value FROM meta WHERE key = 'writer'"
                        pid = db.execute(sql).fetchone()[0]
            who = "this process" if pid == os.getpid() else f"process {pid or '(just starting)'}"
            raise CatalogBusy(
                f"{who} is writing to the index at {folder}; wait for it to end, or stop it:"
                " what it has committed is kept"
            ) from None
        return lock

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'rwc' if self.writable else 'rw'}",
            uri=True,
            timeout=30,
            isolation_level=None,  # transactions begin and end where this module says
            check_same_thread=False,
        )
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = NORMAL")  # with WAL: always consistent, survives a kill
        if not self.writable:
            db.execute("PRAGMA query_only = ON")
        return db

    def _version(self, db: sqlite3.Connection) -> int:
        """Return the schema version; 0 for a new file. Raises InputError for another program's file or a
        newer version."""
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != APPLICATION_ID and (application or version or tables):
            raise InputError(f"{self.path} is another program's SQLite file; name another folder")
        if version > len(MIGRATIONS):
            raise InputError(
                f"{self.path} has schema version {version}; this clipkit knows versions up to"
                f" {len(MIGRATIONS)}; upgrade clipkit"
            )
        return version

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = self._version(db)
        if version == 0:
            # seven 512-d vectors a page; 4096 wastes a quarter
            db.execute("PRAGMA page_size = 8192")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 67108864")
        db.create_function("folder_text", 1, lambda joined: folder_text(split_paths(joined)))
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            try:
                db.executescript(
                    f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT"
                )
            except sqlite3.Error:
                db.rollback()
                raise
        db.execute("UPDATE meta SET value = ? WHERE key = 'writer'", (os.getpid(),))

    def close(self) -> None:
        """Release files and lock; uncommitted changes are dropped. Calls in flight finish."""
        with self._mutex:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
            if self._lock:
                self._lock.release()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one committed state; for a writer, its own state."""
        if self._closed:
            raise InputError(f"the catalog at {self.path} was closed; open it again")
        if self._lock:
            with self._mutex, self._translated():
                yield self._idle[0]
            return
        with self._translated():
            try:
                db = self._idle.pop()
            except IndexError:
                db = self._connect()
            try:
                db.execute("BEGIN")
                yield db
            finally:
                db.rollback()
                self._idle.append(db)
                if self._closed:
                    self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the writer's connection, in the transaction that lasts until COMMIT or ROLLBACK."""
        if not self.writable:
            raise InputError(f"{self.path} is open for reading; open it with write=True")
        with self.connection() as db:
            if not db.in_transaction:
                db.execute("BEGIN IMMEDIATE")
            yield db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise SQLite's errors as clipkit's."""
        try:
            yield
        except IndexDamaged as error:
            raise self._damaged(str(error)) from error
        except (TypeError, ValueError, LookupError) as error:
            # a bug, or a flipped bit that made a path a number or hid a row: check the file
            with self._translated(), closing(self._connect()) as db:
                verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if verdict == "ok":
                raise
            raise self._damaged(verdict) from error
        except sqlite3.DatabaseError as error:
            # no code: Python found text that is not UTF-8, which clipkit never writes
            code = getattr(error, "sqlite_errorcode", None)
            if code is None and not isinstance(error, sqlite3.OperationalError):
                raise
            code = sqlite3.SQLITE_CORRUPT if code is None else code & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(error)) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise CatalogBusy(f"{self.path} was locked for 30 s; try again later") from error
            if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISUSE):
                raise  # a bug in clipkit, not a state of the disk
            raise ClipkitError(
                f"cannot use {self.path}: {error}; it needs free disk space and a writable folder"
            ) from error

    def _damaged(self, what: str) -> IndexDamaged:
        return IndexDamaged(
            f"{self.path} is damaged ({what}); restore it from a backup, or index the pictures"
            " again into a new folder: clipkit index FOLDER --index NEW_FOLDER"
        )


class Thumbnails:
    """thumbnails.sqlite: small pictures by image_id. Derived, so its faults are no errors: what cannot
    be read is absent, what cannot be written is dropped, and a damaged file is created again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def get(self, image_id: str) -> bytes | None:
        sql = "SELECT data FROM thumbnails WHERE image_id = ?"
        rows = self._run(lambda db: db.execute(sql, (image_id,)))
        return rows[0][0] if rows else None

    def put(self, thumbnails: Mapping[str, bytes]) -> None:
        if thumbnails:
            sql = "INSERT OR REPLACE INTO thumbnails VALUES (?, ?)"
            self._run(lambda db: db.executemany(sql, thumbnails.items()))

    def close(self) -> None:
        with self._mutex:
            if self._db:
                self._db.close()
            self._db = None

    def _run(self, action: Callable[[sqlite3.Connection], sqlite3.Cursor]) -> list[Any]:
        for _ in range(2):  # a file that was damaged or moved is created and tried once more
            try:
                with self._mutex:
                    if self._db is None:
                        self._db = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
                        self._db.execute("PRAGMA journal_mode = WAL")
                        self._db.execute("PRAGMA synchronous = NORMAL")
                        self._db.execute(
                            "CREATE TABLE IF NOT EXISTS thumbnails"
                            " (image_id TEXT PRIMARY KEY, data BLOB NOT NULL)"
                        )
                    with self._db:
                        return action(self._db).fetchall()
            except sqlite3.Error as error:
                self.close()
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in UNUSABLE:
                    for suffix in ("", "-wal", "-shm"):
                        with suppress(OSError):
                            Path(f"{self._path}{suffix}").unlink()
                log.warning("thumbnails at %s: %s", self._path, error)
        return []
