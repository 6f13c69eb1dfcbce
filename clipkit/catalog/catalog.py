"""The Catalog class: see the package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64
from clipkit.catalog import queries
from clipkit.catalog.queries import Filters
from clipkit.catalog.rows import (
    AnyPath,
    CatalogStats,
    EncoderRow,
    Facets,
    KnownFile,
    PictureRow,
    SkippedRow,
    SnapshotPointer,
    StoredVectors,
    below,
    clean,
    fold_path,
    lines,
    tag_keys,
)
from clipkit.catalog.store import Connection, Store, Thumbnails


class Catalog:
    """One index folder's catalog, opened with `Catalog.open`; a context manager, or `close()` it.

    Reading: any number of catalogs, processes and threads at once; each call sees one committed
    state. Writing: one catalog per index, from any thread. Everything since the last `commit()` is
    one transaction; a `with` block commits at its end and drops what is uncommitted on an exception.
    A writing catalog reads its own uncommitted state.
    Every call may raise IndexDamaged, or ClipkitError when the disk is full or unreadable.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self._store = store
        self._thumbnails = Thumbnails(folder / "thumbnails.sqlite")
        self._forget()

    def _forget(self) -> None:
        """Reset the bookkeeping for the next transaction."""
        self._touched: set[int] = set()  # nums whose derived values are to be renewed
        self._new: set[int] = set()  # nums first added in this transaction
        self._made: dict[str, bytes] = {}  # thumbnails, written in one go after the commit
        self._changed = False

    @classmethod
    def open(cls, folder: AnyPath, *, write: bool = False) -> Self:
        """Open the index in `folder`; with `write=True` create it if absent, as its one writer.

        An older schema is migrated. Raises InputError if there is no index to read, or if the folder
        is a dataset, another program's or of a newer schema, and CatalogBusy if another process
        (named by its id) is writing.
        """
        folder = Path(folder)
        return cls(folder, Store(folder, write=write))

    def close(self) -> None:
        """Release files and lock; uncommitted changes are dropped."""
        self._store.close()
        self._thumbnails.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._store.writable:
                self.commit()
        finally:
            self.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._store.connection() as db:
            self._settle(db)
            yield db

    # ---- writing: files and pictures

    def add_root(self, root: AnyPath) -> None:
        """Add an indexed folder. A place belongs to every root above it."""
        with self._store.transaction() as db:
            added = db.execute("INSERT OR IGNORE INTO roots VALUES (?)", _root(root)[:1]).rowcount
            self._changed |= bool(added)  # folders are listed and searched from their roots

    def remove_root(self, root: AnyPath) -> int:
        """Remove a folder and all places below it; return how many places."""
        with self._store.transaction() as db:
            removed = db.execute("DELETE FROM roots WHERE path = ?", _root(root)[:1]).rowcount
            self._changed |= bool(removed)
            return len(self.remove_places(self.known_files(root)))

    def known_files(self, root: AnyPath, *, encoder_id: str | None = None) -> dict[str, KnownFile]:
        """Return every file of the catalog below `root`, by path; with `encoder_id`, a file whose
        picture has no vector of that encoder is "pending" instead of "ok"."""
        with self._store.connection() as db:
            return queries.known_files(db, _root(root), encoder_id)

    def places_below(self, folder: AnyPath) -> int:
        """Count the places below `folder`: those that an unmounted disk would seem to delete."""
        sql = "SELECT count(*) FROM places WHERE path >= ? AND path < ?"
        with self._store.connection() as db:
            return int(db.execute(sql, _root(folder)).fetchone()[0])

    def has_picture(self, image_id: str) -> int | None:
        """Return the num of the picture with this content, dead or alive; None if it is unknown."""
        with self._store.connection() as db:
            row = db.execute("SELECT num FROM pictures WHERE image_id = ?", (image_id,)).fetchone()
            return row[0] if row else None

    def is_live(self, num: int) -> bool:
        """Return whether the picture has a place."""
        with self._store.connection() as db:
            sql = "SELECT 1 FROM places WHERE num = ? LIMIT 1"
            return db.execute(sql, (num,)).fetchone() is not None

    def add_picture(
        self,
        *,
        image_id: str,
        width: int,
        height: int,
        format: str,
        bytes: int,
        taken_at: str | None = None,
        camera: str | None = None,
        captions: Sequence[str] = (),
        tags: Sequence[str] = (),
        thumbnail: bytes | None = None,
    ) -> int:
        """Add a picture and return its num; with a known `image_id`, change only the thumbnail."""
        with self._store.transaction() as db:
            if thumbnail is not None:
                self._made[image_id] = thumbnail
            num = self.has_picture(image_id)
            if num is None:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                camera = clean(camera) if camera else None
                cursor = db.execute(
                    "INSERT INTO pictures (image_id, width, height, format, bytes, taken_at, camera,"
                    " added_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (image_id, width, height, format, bytes, taken_at, camera, now),
                )
                num = int(cursor.lastrowid or 0)
                self._new.add(num)
                self.set_texts(num, captions=captions, tags=tags)
            return num

    def set_texts(self, num: int, *, captions: Sequence[str], tags: Sequence[str]) -> None:
        """Replace a picture's captions and tags; nothing is written if they are the same."""
        new = (lines(captions), lines(tags))
        with self._store.transaction() as db:
            sql = "SELECT captions, tags FROM pictures WHERE num = ?"
            if db.execute(sql, (num,)).fetchone() != new:
                sql = "UPDATE pictures SET captions = ?, tags = ?, tag_keys = ? WHERE num = ?"
                db.execute(sql, (*new, tag_keys(new[1]), num))
                self._touch(num)

    def add_place(self, num: int, path: AnyPath, *, size: int, mtime_ns: int) -> bool:
        """Record that the picture `num` is at `path` (absolute), in place of any other; return whether
        that is new."""
        raw = os.fsencode(path)
        with self._store.transaction() as db:
            old = db.execute("SELECT num FROM places WHERE path = ?", (raw,)).fetchone()
            db.execute("DELETE FROM skipped WHERE path = ?", (raw,))
            sql = "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?)"
            db.execute(sql, (raw, num, size, mtime_ns, fold_path(os.fsdecode(path))))
            self._touch(num, *(old or ()))
            return bool(old != (num,))

    def add_skipped(
        self, path: AnyPath, *, size: int, mtime_ns: int, reason: str, message: str
    ) -> None:
        """Record that the file at `path` cannot be indexed, until it is added or removed."""
        with self._store.transaction() as db:
            self.remove_places([path])
            row = (os.fsencode(path), size, mtime_ns, clean(reason), clean(message))
            db.execute("INSERT INTO skipped VALUES (?, ?, ?, ?, ?)", row)

    def remove_places(self, paths: Iterable[AnyPath]) -> list[int]:
        """Remove deleted files, skipped ones too; return the num of each removed place."""
        removed: list[int] = []
        with self._store.transaction() as db:
            for path in paths:
                raw = (os.fsencode(path),)
                db.execute("DELETE FROM skipped WHERE path = ?", raw)
                rows = db.execute("DELETE FROM places WHERE path = ? RETURNING num", raw).fetchall()
                removed += [num for (num,) in rows]
            if removed:
                self._touch(*removed)
        return removed

    # ---- writing: encoders, vectors, snapshots

    def register_encoder(self, encoder_id: str, *, spec: str, config_json: str, dim: int) -> None:
        """Add an encoder, whose vectors can then be stored; a known one is left as it is.

        The active encoder stays what it is; the first of an index becomes it.
        """
        newest = (
            "INSERT OR IGNORE INTO meta SELECT 'active', id FROM encoders ORDER BY id DESC LIMIT 1"
        )
        with self._store.transaction() as db:
            db.execute(newest)  # of an index made before there was an active one
            sql = "INSERT OR IGNORE INTO encoders VALUES (NULL, ?, ?, ?, ?)"
            db.execute(sql, (encoder_id, spec, config_json, dim))
            db.execute(newest)

    def activate_encoder(self, encoder_id: str) -> None:
        """Make an encoder the active one; one that is not registered changes nothing."""
        with self._store.transaction() as db:
            sql = (
                "INSERT OR REPLACE INTO meta SELECT 'active', id FROM encoders WHERE encoder_id = ?"
            )
            db.execute(sql, (encoder_id,))

    def move_encoder(self, encoder_id: str, spec: str) -> None:
        """Record the spec by which an encoder is found now; one not registered changes nothing."""
        with self._store.transaction() as db:
            db.execute("UPDATE encoders SET spec = ? WHERE encoder_id = ?", (spec, encoder_id))

    def add_vectors(self, encoder_id: str, nums: Int64, vectors: npt.NDArray[np.floating]) -> None:
        """Store vectors (N, D) of the pictures `nums` (N,) in half precision, under new seqs.

        Raises InputError if the encoder is not registered, the shape is wrong or a value is not
        finite.
        """
        with self._store.transaction() as db:
            queries.add_vectors(db, encoder_id, nums, vectors)
            self._changed = True

    def point_to_snapshot(self, encoder_id: str, *, name: str, last_seq: int) -> None:
        """Make snapshots/`name` the current one and commit, all in one transaction."""
        with self._store.transaction() as db:
            sql = "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)"
            db.execute(sql, (encoder_id, name, last_seq))
            self._changed = True  # so that searchers change over
            self.commit()

    # ---- writing: transactions

    def commit(self) -> None:
        """Commit: everything since the last one becomes durable and visible to readers at once."""
        with self._store.transaction() as db:
            self._settle(db)
            if self._changed:
                db.execute("UPDATE meta SET value = value + 1 WHERE key = 'changes'")
            db.execute("COMMIT")
            self._thumbnails.put(self._made)
            self._forget()

    def _touch(self, *nums: int) -> None:
        self._touched.update(nums)
        self._changed = True

    def _settle(self, db: Connection) -> None:
        if self._touched:
            queries.settle(db, self._touched, new=self._new)
            self._touched.clear()

    # ---- reading: vectors

    def encoders(self) -> list[EncoderRow]:
        """Return the registered encoders, the oldest first."""
        sql = "SELECT encoder_id, spec, config, dim FROM encoders ORDER BY id"
        with self._store.connection() as db:
            return [EncoderRow(*row) for row in db.execute(sql)]

    def active_encoder(self) -> EncoderRow | None:
        """Return the encoder that answers where no other is named; None in an empty index."""
        sql = (
            "SELECT encoder_id, spec, config, dim FROM encoders"
            " ORDER BY id = (SELECT value FROM meta WHERE key = 'active') DESC, id DESC LIMIT 1"
        )
        with self._store.connection() as db:
            row = db.execute(sql).fetchone()
            return EncoderRow(*row) if row else None

    def vectors(self, encoder_id: str, *, after_seq: int = 0) -> StoredVectors:
        """Return the encoder's vectors of live pictures with seq > `after_seq`, in the order of seq.

        Shapes are (0,) and (0, 0) for an encoder that is not registered. A picture that was dead and
        came back gets a new seq: it can be in an older snapshot and here, so use each num once.
        """
        with self._reading() as db:
            return queries.read_vectors(db, encoder_id, after_seq)

    def count_vectors(self, encoder_id: str, *, after_seq: int) -> int:
        """Count the encoder's vectors of live pictures with seq > `after_seq`."""
        with self._reading() as db:
            sql = (
                "SELECT count(*) FROM vectors WHERE encoder = ? AND seq > ?"
                f" AND num NOT IN ({queries.DEAD})"
            )
            args = (queries.encoder_key(db, encoder_id)[0], after_seq)
            return int(db.execute(sql, args).fetchone()[0])

    def vector(self, num: int, encoder_id: str) -> npt.NDArray[np.float16] | None:
        """Return the vector (D,) of a picture, dead or alive; None without one of this encoder."""
        with self._store.connection() as db:
            sql = "SELECT vector FROM vectors WHERE encoder = ? AND num = ?"
            row = db.execute(sql, (queries.encoder_key(db, encoder_id)[0], num)).fetchone()
            return np.frombuffer(row[0], "<f2") if row else None

    def live_nums(self, encoder_id: str) -> Int64:
        """Return the nums of the live pictures that have a vector of this encoder, sorted."""
        sql = f"SELECT group_concat(num) FROM vectors WHERE encoder = ? AND num NOT IN ({queries.DEAD})"
        with self._reading() as db:
            return queries.joined_nums(db, sql, (queries.encoder_key(db, encoder_id)[0],))

    def snapshot(self, encoder_id: str) -> SnapshotPointer | None:
        """Return the encoder's current snapshot, or None."""
        sql = "SELECT name, last_seq FROM snapshots WHERE encoder_id = ?"
        with self._store.connection() as db:
            row = db.execute(sql, (encoder_id,)).fetchone()
            return SnapshotPointer(*row) if row else None

    def change_counter(self) -> int:
        """Return a number that rises with every commit after which a search or a count may differ."""
        with self._store.connection() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'changes'").fetchone()
            return int(row[0])

    # ---- reading: pictures

    def rows(self, nums: Iterable[int]) -> dict[int, PictureRow]:
        """Return the rows of these pictures, by num; dead and unknown ones are left out."""
        with self._reading() as db:
            return queries.picture_rows(db, nums)

    def row(self, image_id: str) -> PictureRow | None:
        """Return the live picture with this content, or None."""
        num = self.has_picture(image_id)
        return None if num is None else self.rows([num]).get(num)

    def matching(self, filters: Filters) -> Int64:
        """Return the nums of the live pictures that pass, sorted, with or without vectors. Raises
        InputError for a malformed date or an unknown orientation."""
        with self._reading() as db:
            return queries.matching(db, filters)

    def newest(self, limit: int, *, among: Int64 | None = None) -> list[int]:
        """Return the nums of the last dated live pictures (of `among`), the newest first and those
        without a date last."""
        chosen = "" if among is None else "AND num IN (SELECT value FROM json_each(?))"
        args = [] if among is None else [json.dumps(among.tolist())]
        sql = f"SELECT num FROM pictures WHERE live {chosen} ORDER BY dated DESC, image_id LIMIT ?"
        with self._reading() as db:
            return [num for (num,) in db.execute(sql, (*args, min(limit, 2**63 - 1)))]

    def phrase(self, text: str) -> dict[int, float]:
        """Return the live pictures with this phrase in file name, folder, caption or tag: the bm25 by
        num, the best first. It is negative, and 0 where only a folder has the phrase.

        Any text is valid and none is an operator. Words match whole, whatever their letter case and
        diacritics, except that a `*` at the end leaves the end of the last word open; scripts written
        without spaces match by their whole runs only.
        """
        with self._reading() as db:
            return queries.phrase(db, text)

    def having(self, words: Sequence[Iterable[str]]) -> list[Int64]:
        """Return for each word, given as its spellings, the nums of the live pictures that have one of
        them in file name, folder, caption or tag, sorted."""
        with self._reading() as db:
            return queries.having(db, words)

    def thumbnail(self, image_id: str) -> bytes | None:
        """Return the stored thumbnail, a small JPEG, or None."""
        return self._made.get(image_id) or self._thumbnails.get(image_id)

    def put_thumbnail(self, image_id: str, data: bytes) -> None:
        """Store a thumbnail. Readers may, since thumbnails are derived."""
        self._thumbnails.put({image_id: data})

    # ---- reading: the whole

    def roots(self) -> tuple[str, ...]:
        """Return the indexed folders, sorted."""
        with self._store.connection() as db:
            return queries.roots(db)

    def stats(self, encoder_id: str | None = None) -> CatalogStats:
        """Count what is live."""
        with self._reading() as db:
            return queries.stats(db, encoder_id)

    def skipped(self) -> list[SkippedRow]:
        """Return the files that could not be indexed, sorted by path."""
        with self._store.connection() as db:
            rows = db.execute("SELECT path, reason, message FROM skipped ORDER BY path")
            return [SkippedRow(os.fsdecode(path), *why) for path, *why in rows]

    def skips(self) -> dict[str, int]:
        """Count the files that could not be indexed, by reason."""
        with self._store.connection() as db:
            return dict(db.execute("SELECT reason, count(*) FROM skipped GROUP BY reason"))

    def folders(self, limit: int = 100) -> list[tuple[str, int]]:
        """Return the folders with the most places below them, roots included, with that number."""
        with self._reading() as db:
            return queries.folders(db, limit)

    def facets(self, limit: int = 200) -> Facets:
        """Return the `limit` most frequent formats, cameras and tags of the live pictures."""
        with self._reading() as db:
            return queries.facets(db, limit)


def _root(folder: AnyPath) -> tuple[bytes, bytes]:
    return below(os.path.abspath(folder))
