"""The SQLite files beneath the catalog: schema, migrations, connections, the writer's lock.

`Store` owns catalog.sqlite, `Thumbnails` the derived thumbnails.sqlite. catalog.py and queries.py say
what the rows mean; this module alone imports sqlite3.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.arrays import Int64
from clipkit.catalog.schema import APPLICATION_ID, MIGRATIONS, add_functions
from clipkit.errors import CatalogBusy, ClipkitError, IndexDamaged, InputError

if TYPE_CHECKING:
    import filelock

log = logging.getLogger(__name__)


class Connection(sqlite3.Connection):
    """A connection to catalog.sqlite; `generation` is that of the file which it has open."""

    generation = 0


DEAD = "SELECT num FROM pictures WHERE NOT live"  # few, so NOT IN (dead) costs less than IN (live)
_READ_ONLY = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
_GENERATION = 2**32  # added to the change counter each time that another file takes the place

# ERROR: a table is missing, or its definition cannot be read
UNUSABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class Store:
    """catalog.sqlite of one index folder.

    A reader keeps a pool of connections, one per call in flight, so any thread may call. A writer has
    one connection, shared by its threads one at a time, and holds writer.lock until `close()`.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        """Open; for writing also create and migrate. Raises InputError, IndexDamaged, CatalogBusy."""
        self.path = folder / "catalog.sqlite"
        self._mutex = threading.RLock()
        self._idle: list[Connection] = []
        self._immutable = False  # on media where SQLite cannot make the files that WAL needs
        self._file: tuple[int, int] | None = None  # device and inode of what is open
        self.generation = 0  # rises when another file takes the place of catalog.sqlite
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
        self._file = self._on_disk()
        version = self._read_version()
        if version == 0:  # a first writer died, or has not committed yet
            raise no_index
        if version < len(MIGRATIONS):  # only a writer may migrate
            Store(folder, write=True).close()

    @property
    def writable(self) -> bool:
        return self._lock is not None

    def change_counter(self, db: Connection) -> int:
        row = db.execute("SELECT value FROM meta WHERE key = 'changes'").fetchone()
        return int(row[0]) + db.generation * _GENERATION

    def _on_disk(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return self._file  # it may be about to be replaced: answer from what is open
        return found.st_dev, found.st_ino

    def _read_version(self) -> int:
        """Return the schema version of a file that is only read, on read-only media too."""
        try:
            with self._translated(), closing(self._connect()) as db:
                return self._version(db)
        except ClipkitError as error:
            code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
            if code not in _READ_ONLY or _may_write(self.path.parent):
                raise
        wal = Path(f"{self.path}-wal")
        if wal.is_file() and wal.stat().st_size:
            raise ClipkitError(
                f"{self.path} is on read-only media and has uncollected changes in {wal.name};"
                " copy the folder to where it can be written, run clipkit status there, and copy it back"
            )
        self._immutable = True
        with self._translated(), closing(self._connect()) as db:
            version = self._version(db)
        if 0 < version < len(MIGRATIONS):
            raise InputError(
                f"{self.path} is of an older clipkit and on read-only media; copy the index to where"
                " it can be written and open it there"
            )
        return version

    def _take_lock(self, folder: Path) -> filelock.BaseFileLock:
        import filelock  # which a reader does not wait for

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

    def _connect(self) -> Connection:
        mode = "ro&immutable=1" if self._immutable else "rwc" if self.writable else "rw"
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=30,
            isolation_level=None,  # transactions begin and end where this module says
            check_same_thread=False,
            factory=Connection,
        )
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = NORMAL")  # with WAL: always consistent, survives a kill
        if not self.writable:
            db.execute("PRAGMA query_only = ON")
        return db

    def _version(self, db: Connection) -> int:
        """Return the schema version; 0 for a new file. Raises InputError for another program's file or a
        newer version."""
        # one statement, which sees one state: a writer may create the tables meanwhile
        application, version, tables = db.execute(
            "SELECT (SELECT application_id FROM pragma_application_id), user_version,"
            " (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        ).fetchone()
        if application != APPLICATION_ID and (application or version or tables):
            raise InputError(f"{self.path} is another program's SQLite file; name another folder")
        if version > len(MIGRATIONS):
            raise InputError(
                f"{self.path} has schema version {version}; this clipkit knows versions up to"
                f" {len(MIGRATIONS)}; upgrade clipkit"
            )
        return int(version)

    def _migrate(self, db: Connection) -> None:
        version = self._version(db)
        if version == 0:
            # seven 512-d vectors a page; 4096 wastes a quarter
            db.execute("PRAGMA page_size = 8192")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 67108864")
        add_functions(db)
        db.execute("PRAGMA foreign_keys = OFF")  # tables are replaced
        db.execute("PRAGMA cache_size = -262144")  # kB
        # all in one transaction, so that readers see no version between
        scripts = (*MIGRATIONS[version:], f"PRAGMA user_version = {len(MIGRATIONS)}")
        try:
            db.executescript(f"BEGIN IMMEDIATE; {'; '.join(scripts)}; COMMIT")
        except sqlite3.Error:
            db.rollback()
            raise
        db.execute("PRAGMA cache_size = -2000")
        db.execute("PRAGMA foreign_keys = ON")
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
    def connection(self, *, statements: int = 2) -> Iterator[Connection]:
        """Yield a connection that sees one committed state; for a writer, its own state. A caller with
        only one statement, which sees one state anyway, says so and saves two."""
        if self._closed:
            raise InputError(f"the catalog at {self.path} was closed; open it again")
        if self._lock:
            with self._mutex, self._translated():
                yield self._idle[0]
            return
        with self._translated():
            generation = self._follow_file()
            try:
                db = self._idle.pop()
            except IndexError:
                db = self._connect()
                db.generation = generation
            try:
                if statements > 1:
                    db.execute("BEGIN")
                yield db
            finally:
                db.rollback()
                with self._mutex:
                    if db.generation == self.generation:
                        self._idle.append(db)
                    else:
                        db.close()
                if self._closed:
                    self.close()

    def _follow_file(self) -> int:
        """Let go of the file that was open if another one has taken its place."""
        if self._on_disk() != self._file:
            with self._mutex:
                now = self._on_disk()
                if now != self._file:
                    while self._idle:
                        self._idle.pop().close()
                    self.generation += 1
                    self._file = now
                    self._immutable = False
                    self._read_version()
        return self.generation

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yield the writer's connection, in the transaction that lasts until COMMIT or ROLLBACK."""
        if not self.writable:
            raise InputError(f"{self.path} is open for reading; open it with write=True")
        with self.connection() as db:
            if not db.in_transaction:
                db.execute("BEGIN IMMEDIATE")
            yield db

    def shrink(self) -> None:
        """Give the disk space of deleted rows back, if it is a tenth of the file."""
        with self.connection() as db:
            free, pages, kind = (
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("freelist_count", "page_count", "auto_vacuum")
            )
            if free * 10 < pages:
                return
            try:
                if kind == 2:
                    # a step a page, each with a row of no columns, after which execute() would stop
                    db.executescript("PRAGMA incremental_vacuum")
                else:
                    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (
                sqlite3.OperationalError
            ) as error:  # the work is done; only space is not free yet
                log.warning("%s keeps the space of deleted rows: %s", self.path, error)

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

    def remove(self, image_ids: Iterable[str]) -> None:
        """Remove thumbnails and give their disk space back."""
        ids = [(image_id,) for image_id in image_ids]
        if ids and self._path.is_file():
            self._run(lambda db: db.executemany("DELETE FROM thumbnails WHERE image_id = ?", ids))
            self._run(lambda db: db.execute("VACUUM"))

    def close(self) -> None:
        with self._mutex:
            if self._db:
                self._db.close()
            self._db = None

    def _connect(self) -> sqlite3.Connection:
        if self._path.is_file() and not _may_write(self._path.parent):
            uri = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
            return sqlite3.connect(uri, uri=True, check_same_thread=False)
        db = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS thumbnails"
                " (image_id TEXT PRIMARY KEY, data BLOB NOT NULL)"
            )
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _run(self, action: Callable[[sqlite3.Connection], sqlite3.Cursor]) -> list[Any]:
        for _ in range(2):  # a file that was damaged or moved is created and tried once more
            try:
                with self._mutex:
                    if self._db is None:
                        self._db = self._connect()
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


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def next_epoch(db: Connection) -> None:
    """Make readers reload what they hold in memory: rows were removed that no other counter shows."""
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")


def parsed(joined: str | None) -> Int64:
    """Return the integers of SQL's group_concat, in its order."""
    return np.fromstring(joined or "", dtype=np.int64, sep=",")


def joined_nums(db: Connection, sql: str, args: Iterable[object] = ()) -> Int64:
    """Return the nums of a query for one group_concat, sorted."""
    # numpy parses one string five times faster than SQLite returns an integer per row
    nums = parsed(db.execute(sql, tuple(args)).fetchone()[0])
    return nums if (nums[1:] > nums[:-1]).all() else np.sort(nums)


def nums_json(nums: Iterable[int]) -> str:
    """Return nums for SQL's json_each."""
    return json.dumps(nums.tolist() if isinstance(nums, np.ndarray) else list(nums))
