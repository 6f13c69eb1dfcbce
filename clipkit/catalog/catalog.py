"""The Catalog class: see the package."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64
from clipkit.catalog import queries, texts, vectors
from clipkit.catalog.columns import Columns, Outdated, State
from clipkit.catalog.filters import Filters, check, matching
from clipkit.catalog.rows import (
    AnyPath,
    CatalogStats,
    EncoderRow,
    Facets,
    KnownFile,
    Phrase,
    PictureRow,
    SkippedRow,
    SnapshotPointer,
    StoredVectors,
    below,
    clean,
    fold_path,
    folder_of,
    lines,
    name_of,
)
from clipkit.catalog.store import DEAD, Connection, Store, Thumbnails
from clipkit.errors import InputError
from clipkit.picture_set import PictureSet

T = TypeVar("T")

_PAGE = 4096  # known files that are read at once


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
        self._columns = Columns()
        self._forget()

    def _forget(self) -> None:
        """Reset the bookkeeping for the next transaction."""
        self._touched: set[int] = set()  # nums whose derived values are to be renewed
        self._new: set[int] = set()  # nums first added in this transaction
        self._made: dict[str, bytes] = {}  # thumbnails, written in one go after the commit
        self._purged: list[str] = []  # image_ids, whose thumbnails go after the commit
        self._changed = False
        self._shrink = False

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
    def _reading(self, *, statements: int = 2) -> Iterator[Connection]:
        with self._store.connection(statements=statements) as db:
            self._settle(db)
            yield db

    def _of_state(self, read: Callable[[State], T]) -> T:
        """Return `read(state)` of one committed state, again if another thread has read a later one."""
        while True:
            with self._reading() as db, suppress(Outdated):
                return read(State(db, self._columns, own=self._store.writable))

    # ---- writing: files and pictures

    def add_root(self, root: AnyPath) -> None:
        """Add an indexed folder. A place belongs to every root above it."""
        with self._store.transaction() as db:
            added = db.execute("INSERT OR IGNORE INTO roots VALUES (?)", _span(root)[:1]).rowcount
            self._changed |= bool(added)  # folders are listed and searched from their roots

    def remove_root(self, root: AnyPath) -> int:
        """Remove a folder and all that lies below it, and purge; return how many places.

        Raises InputError for a folder of which the catalog has nothing.
        """
        span = _span(root)
        below_it = "path >= ? AND path < ?"
        with self._store.transaction() as db:
            removed = db.execute(f"DELETE FROM roots WHERE {below_it}", span).rowcount
            self._changed |= bool(removed)
            skipped = db.execute(f"DELETE FROM skipped WHERE {below_it}", span).rowcount
            rows = db.execute(f"DELETE FROM places WHERE {below_it} RETURNING num", span).fetchall()
            followed = db.execute(
                "DELETE FROM text_fingerprints WHERE folder >= ? AND folder < ?", span
            ).rowcount
            if not (removed or skipped or rows or followed):
                roots = ", ".join(queries.roots(db)) or "none"
                raise InputError(f"{root} is not in the index; its folders are: {roots}")
            if rows:
                self._touch(*(num for (num,) in rows))
            self.purge()
            return len(rows)

    def known_files(
        self, root: AnyPath, *, encoder_id: str | None = None
    ) -> Iterator[tuple[str, KnownFile]]:
        """Yield every file of the catalog below `root`, in the order of the paths' bytes.

        With `encoder_id`, a file whose picture has no vector of that encoder is "pending" instead
        of "ok". A place whose file could not be read the last time (`add_skipped` with `keep_place`)
        is "skipped" and has its picture's num. The catalog may change meanwhile: a file that is added
        before the path that was yielded last is not seen, one behind it is.
        """
        low, high = _span(root)
        has_vector = None
        if encoder_id is not None:
            has_vector = self.live_nums(encoder_id).mask().tobytes()
        while True:
            with self._store.connection(statements=1) as db:
                rows = queries.known_files(db, low, high, _PAGE)
            yield from (queries.known_file(row, has_vector) for row in rows)
            if len(rows) < _PAGE:
                return
            low = rows[-1][0] + b"\0"  # the least path that is greater

    def places_below(self, folder: AnyPath) -> int:
        """Count the places below `folder`: those that an unmounted disk would seem to delete."""
        with self._store.connection(statements=1) as db:
            return queries.places_below(db, _span(folder))

    def has_picture(self, image_id: str) -> int | None:
        """Return the num of the picture with this content, dead or alive; None if it is unknown or was
        purged."""
        sql = "SELECT num FROM pictures WHERE image_id = ? AND format"
        with self._store.connection(statements=1) as db:
            row = db.execute(sql, (image_id,)).fetchone()
            return row[0] if row else None

    def is_live(self, num: int) -> bool:
        """Return whether the picture has a place."""
        with self._store.connection(statements=1) as db:
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
        thumbnail: bytes | None = None,
    ) -> int:
        """Add a picture and return its num; with a known `image_id`, change only the thumbnail. One
        that was purged comes back under its old num with these facts."""
        with self._store.transaction() as db:
            if thumbnail is not None:
                self._made[image_id] = thumbnail
            if (known := self.has_picture(image_id)) is not None:
                return known
            codes = [texts.label(db, clean(text)) if text else None for text in (format, camera)]
            now = int(time.time())
            facts = (width, height, bytes, *codes, taken_at, now, image_id)
            names = "width, height, bytes, format, camera, taken_at, added"
            marks = ", ".join("?" * 7)
            sql = f"UPDATE pictures SET ({names}) = ({marks}) WHERE image_id = ? RETURNING num"
            row = db.execute(sql, facts).fetchone()
            if row is None:
                sql = f"INSERT INTO pictures ({names}, image_id) VALUES ({marks}, ?) RETURNING num"
                row = db.execute(sql, facts).fetchone()
                self._new.add(row[0])
            db.execute("UPDATE meta SET value = ? WHERE key = 'added'", (now,))
            return int(row[0])

    def add_place(
        self,
        num: int,
        path: AnyPath,
        *,
        size: int,
        mtime_ns: int,
        captions: Sequence[str] = (),
        tags: Sequence[str] = (),
    ) -> bool:
        """Record that the picture `num` is at `path` (absolute), with the captions and tags that
        this file has, in place of what was there; return whether the picture is new there.

        A picture's captions and tags are those of all its places, in the order of the paths' bytes.
        """
        raw = os.fsencode(path)
        folder = folder_of(raw)
        with self._store.transaction() as db:
            old = db.execute("SELECT num FROM places WHERE path = ?", (raw,)).fetchone()
            db.execute("DELETE FROM skipped WHERE path = ?", (raw,))
            number = queries.folder_id(db, folder, fold_path(folder))
            db.execute(
                "INSERT INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET"
                " num = excluded.num, size = excluded.size, mtime_ns = excluded.mtime_ns,"
                " captions = excluded.captions, tags = excluded.tags",
                (raw, num, size, mtime_ns, number, name_of(raw), lines(captions), lines(tags)),
            )
            self._touch(num, *(old or ()))
            return bool(old != (num,))

    def set_place_texts(
        self, path: AnyPath, *, captions: Sequence[str], tags: Sequence[str]
    ) -> None:
        """Replace the captions and tags of the file at `path`; nothing is written if they are the same
        or the path is not a place."""
        raw, new = os.fsencode(path), (lines(captions), lines(tags))
        with self._store.transaction() as db:
            sql = "SELECT num, captions, tags FROM places WHERE path = ?"
            row = db.execute(sql, (raw,)).fetchone()
            if row is not None and row[1:] != new:
                sql = "UPDATE places SET captions = ?, tags = ? WHERE path = ?"
                db.execute(sql, (*new, raw))
                self._touch(row[0])

    def text_fingerprint(self, folder: AnyPath) -> str | None:
        """Return what `set_text_fingerprint` noted for a folder; None if nothing."""
        sql = "SELECT fingerprint FROM text_fingerprints WHERE folder = ?"
        with self._store.connection(statements=1) as db:
            row = db.execute(sql, _span(folder)[:1]).fetchone()
            return row[0] if row else None

    def set_text_fingerprint(self, folder: AnyPath, fingerprint: str | None) -> None:
        """Note the state of the files with captions in a folder, as of which its places' texts are;
        None forgets it."""
        row = (_span(folder)[0], fingerprint)
        with self._store.transaction() as db:
            if fingerprint is None:
                db.execute("DELETE FROM text_fingerprints WHERE folder = ?", row[:1])
            else:
                db.execute("INSERT OR REPLACE INTO text_fingerprints VALUES (?, ?)", row)

    def add_skipped(
        self,
        path: AnyPath,
        *,
        size: int,
        mtime_ns: int,
        reason: str,
        message: str,
        keep_place: bool = False,
    ) -> None:
        """Record that the file at `path` cannot be indexed, until it is added or removed. With
        `keep_place`, a picture that was there stays in the search: its file cannot be read now, but
        may be again."""
        with self._store.transaction() as db:
            if not keep_place:
                self.remove_places([path])
            row = (os.fsencode(path), size, mtime_ns, clean(reason), clean(message))
            db.execute("INSERT OR REPLACE INTO skipped VALUES (?, ?, ?, ?, ?)", row)

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

    def purge(self) -> int:
        """Remove all that is kept of dead pictures: vectors, facts and thumbnails (captions and tags
        went with their places); return how many pictures that were.

        Their nums and image_ids stay, so that no num is ever used again. The next commit gives the
        disk space back.
        """
        with self._store.transaction() as db:
            self._settle(db)
            purged = queries.purge(db)
            self._purged += purged
            self._changed |= bool(purged)
            return len(purged)

    # ---- writing: encoders, vectors, snapshots

    def register_encoder(
        self, encoder_id: str, *, spec: str, config_json: str, dim: int, space_id: str | None = None
    ) -> None:
        """Add an encoder, whose vectors can then be stored; of a known one, only a `space_id` that was
        not told before is noted.

        Encoders of one space share their vectors and snapshot. The active encoder stays what it is;
        the first of an index becomes it.
        """
        with self._store.transaction() as db:
            before = vectors.encoders(db)
            vectors.register(db, encoder_id, spec, config_json, dim, space_id)
            self._changed |= vectors.encoders(db) != before

    def activate_encoder(self, encoder_id: str) -> None:
        """Make an encoder the active one; one that is not registered changes nothing."""
        with self._store.transaction() as db:
            before = vectors.active_encoder(db)
            sql = (
                "INSERT OR REPLACE INTO meta SELECT 'active', id FROM encoders WHERE encoder_id = ?"
            )
            db.execute(sql, (encoder_id,))
            self._changed |= vectors.active_encoder(db) != before

    def drop_encoder(self, encoder_id: str) -> int:
        """Remove an encoder and return how many vectors went with it: none while another encoder of its
        space uses them. Raises InputError for the active encoder and for one not registered."""
        with self._store.transaction() as db:
            removed = vectors.drop(db, encoder_id)
            self._changed = self._shrink = True
            return removed

    def move_encoder(self, encoder_id: str, spec: str) -> None:
        """Record the spec by which an encoder is found now; one not registered changes nothing."""
        with self._store.transaction() as db:
            db.execute("UPDATE encoders SET spec = ? WHERE encoder_id = ?", (spec, encoder_id))

    def add_vectors(self, encoder_id: str, nums: Int64, rows: npt.NDArray[np.floating]) -> None:
        """Store unit vectors (N, D) of the pictures `nums` (N,) in half precision, under new seqs.

        Raises InputError if the encoder is not registered, the shape is wrong, a value is not finite
        or a vector is not of length 1.
        """
        with self._store.transaction() as db:
            vectors.add(db, encoder_id, nums, rows)
            self._changed = True

    def point_to_snapshot(self, encoder_id: str, *, name: str, last_seq: int) -> None:
        """Make snapshots/`name` the current one of the encoder's space and commit, all in one
        transaction."""
        with self._store.transaction() as db:
            sql = "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)"
            db.execute(sql, (vectors.owner_name(db, encoder_id), name, last_seq))
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
            self._thumbnails.remove(self._purged)
            shrink = self._shrink or bool(self._purged)
            self._forget()
            if shrink:
                self._store.shrink()

    def _touch(self, *nums: int) -> None:
        self._touched.update(nums)
        self._changed = True

    def _settle(self, db: Connection) -> None:
        if self._touched:
            texts.settle(db, self._touched, new=self._new)
            self._touched.clear()

    # ---- reading: vectors

    def encoders(self) -> list[EncoderRow]:
        """Return the registered encoders, the oldest first."""
        with self._store.connection(statements=1) as db:
            return vectors.encoders(db)

    def active_encoder(self) -> EncoderRow | None:
        """Return the encoder that answers where no other is named; None in an empty index."""
        with self._store.connection(statements=1) as db:
            return vectors.active_encoder(db)

    def vector_space(self, encoder_id: str) -> str:
        """Return the space_id of an encoder; its encoder_id, where none is known."""
        with self._store.connection(statements=1) as db:
            return vectors.space_name(db, encoder_id)

    def refused_pictures(self, encoder_id: str) -> int:
        """Count the pictures without a vector of the encoder of which a place is skipped as
        "no-vector": the model that read it last gave none."""
        with self._store.connection() as db:
            return vectors.refused(db, encoder_id)

    def vectors(self, encoder_id: str, *, after_seq: int = 0) -> StoredVectors:
        """Return the encoder's vectors of live pictures with seq > `after_seq`, in the order of seq.

        Shapes are (0,) and (0, 0) for an encoder that is not registered. A picture that was dead and
        came back gets a new seq: it can be in an older snapshot and here, so use each num once.
        """
        with self._reading() as db:
            return vectors.newer(db, encoder_id, after_seq)

    def vector_chunks(self, encoder_id: str, *, rows: int = 65_536) -> Iterator[StoredVectors]:
        """Yield the encoder's vectors of live pictures in the order of num, up to `rows` at a time, all
        of one committed state and each with the same `last_seq`. A catalog that writes should not do
        this while it has other work: its threads wait until the last chunk was taken."""
        with self._reading() as db:
            yield from vectors.chunks(db, encoder_id, rows)

    def count_vectors(self, encoder_id: str, *, after_seq: int) -> int:
        """Count the encoder's vectors of live pictures with seq > `after_seq`."""
        with self._reading() as db:
            owner, _ = vectors.owner_of(db, encoder_id)
            if owner is None:
                return 0
            sql = f"SELECT count(*) FROM vectors WHERE encoder = ? AND seq > ? AND num IN ({DEAD})"
            dead = db.execute(sql, (owner, after_seq)).fetchone()[0]
            return vectors.count(db, owner, after_seq=after_seq) - int(dead)

    def vector(self, num: int, encoder_id: str) -> npt.NDArray[np.float16] | None:
        """Return the vector (D,) of a picture, dead or alive; None without one of this encoder."""
        with self._store.connection() as db:
            sql = "SELECT vector FROM vectors WHERE encoder = ? AND num = ?"
            row = db.execute(sql, (vectors.owner_of(db, encoder_id)[0], num)).fetchone()
            return np.frombuffer(row[0], "<f2") if row else None

    def live_nums(self, encoder_id: str) -> PictureSet:
        """Return the live pictures that have a vector of this encoder."""
        return self._of_state(lambda state: self._live_nums(state, encoder_id))

    def _live_nums(self, state: State, encoder_id: str) -> PictureSet:
        owner, _ = vectors.owner_of(state.db, encoder_id)
        if owner is None:
            return PictureSet()
        return state.with_vector(owner) - queries.dead(state.db)

    def dead(self) -> PictureSet:
        """Return the pictures without a place."""
        with self._reading() as db:
            return queries.dead(db)

    def snapshot(self, encoder_id: str) -> SnapshotPointer | None:
        """Return the current snapshot of the encoder's space, or None."""
        sql = "SELECT name, last_seq FROM snapshots WHERE encoder_id = ?"
        with self._store.connection() as db:
            row = db.execute(sql, (vectors.owner_name(db, encoder_id),)).fetchone()
            return SnapshotPointer(*row) if row else None

    def change_counter(self) -> int:
        """Return a number that differs after every commit after which a search or a count may differ,
        and after another file has taken the place of catalog.sqlite. It only rises."""
        with self._store.connection(statements=1) as db:
            return self._store.change_counter(db)

    # ---- reading: pictures

    def rows(self, nums: Iterable[int]) -> dict[int, PictureRow]:
        """Return the rows of these pictures, by num; dead and unknown ones are left out."""
        with self._reading(statements=1) as db:
            return queries.picture_rows(db, nums)

    def image_ids(self, nums: Iterable[int]) -> dict[int, str]:
        """Return the image_ids of these pictures, by num; unknown ones are left out."""
        sql = "SELECT num, image_id FROM pictures WHERE num IN (SELECT value FROM json_each(?))"
        with self._reading(statements=1) as db:
            return dict(db.execute(sql, (json.dumps([int(num) for num in nums]),)))

    def row(self, image_id: str) -> PictureRow | None:
        """Return the live picture with this content, or None."""
        num = self.has_picture(image_id)
        return None if num is None else self.rows([num]).get(num)

    def matching(self, filters: Filters) -> PictureSet:
        """Return the live pictures that pass, with or without vectors. Raises InputError for a
        malformed date or an unknown orientation."""
        check(filters)
        return self._of_state(lambda state: matching(state, filters))

    def read_columns(self) -> None:
        """Read into memory what filters compare (for a million pictures in 1 s, 100 MB), which the
        first filters would wait for. Other readers do not wait meanwhile."""
        self._of_state(State.read_columns)

    def listed(
        self,
        sort: str,
        *,
        among: PictureSet | None = None,
        after: object | None = None,
        limit: int,
    ) -> tuple[list[int], object | None]:
        """Return the next `limit` live pictures (of `among`) and the position after them, None at the
        end.

        `sort` is "date" (the newest first, those without a date last) or "name" (of the file at the
        shortest path, in its folded form); equal ones go by image_id. `after` is the position that an
        earlier call returned, which JSON can hold. Raises InputError for any other.
        """
        return self._of_state(lambda state: queries.listed(state, sort, among, after, limit))

    def phrase(self, text: str) -> Phrase:
        """Return the live pictures with this phrase in file name, folder, caption or tag, and their
        bm25: negative, 0 where only a folder has the phrase, and None where more than 20,000 pictures
        have it, which are all equal then.

        Any text is valid and none is an operator. Words match whole, whatever their letter case and
        diacritics, except that a `*` at the end leaves the end of the last word open; scripts written
        without spaces match within their runs.
        """
        return self._of_state(lambda state: texts.phrase(state, text))

    def having(self, words: Sequence[Iterable[str]]) -> list[PictureSet]:
        """Return for each word, given as its spellings, the live pictures that have one of them in file
        name, folder, caption or tag."""
        spellings = [tuple(word) for word in words]
        return self._of_state(lambda state: texts.having(state, spellings))

    def thumbnail(self, image_id: str) -> bytes | None:
        """Return the stored thumbnail, a small JPEG, or None."""
        return self._made.get(image_id) or self._thumbnails.get(image_id)

    def put_thumbnail(self, image_id: str, data: bytes) -> None:
        """Store a thumbnail. Readers may, since thumbnails are derived."""
        self._thumbnails.put({image_id: data})

    # ---- reading: the whole

    def roots(self) -> tuple[str, ...]:
        """Return the indexed folders, sorted."""
        with self._store.connection(statements=1) as db:
            return queries.roots(db)

    def stats(self, encoder_id: str | None = None) -> CatalogStats:
        """Count what is live."""

        def read(state: State) -> CatalogStats:
            pictures, size, newest, places, skipped = queries.counts(state.db)
            vectors = len(self._live_nums(state, encoder_id)) if encoder_id else 0
            roots = queries.roots(state.db)
            return CatalogStats(pictures, vectors, places, skipped, size, roots, newest)

        return self._of_state(read)

    def skipped(self) -> list[SkippedRow]:
        """Return the files that could not be indexed, sorted by path."""
        with self._store.connection(statements=1) as db:
            rows = db.execute("SELECT path, reason, message FROM skipped ORDER BY path")
            return [SkippedRow(os.fsdecode(path), *why) for path, *why in rows]

    def skips(self) -> dict[str, int]:
        """Count the files that could not be indexed, by reason."""
        with self._store.connection(statements=1) as db:
            return dict(db.execute("SELECT reason, count(*) FROM skipped GROUP BY reason"))

    def folders(self, limit: int = 100) -> list[tuple[str, int]]:
        """Return the folders with the most places below them, roots included, with that number."""
        return self._of_state(
            lambda state: list(
                state.per_change(("folders", limit), lambda: queries.folders(state.db, limit))
            )
        )

    def facets(self, limit: int = 200) -> Facets:
        """Return the `limit` most frequent formats, cameras and tags of the live pictures."""
        return self._of_state(
            lambda state: state.per_change(("facets", limit), lambda: queries.facets(state, limit))
        )


def _span(folder: AnyPath) -> tuple[bytes, bytes]:
    """Return the range of stored paths below a folder; its first is the folder's own, with the
    separator at its end."""
    return below(os.path.abspath(folder))
