"""The parts of a catalog that are kept in memory: columns of facts by num, places, and sets of pictures.

A million pictures take 8 MB for each column that a filter has used, and about 40 MB for the names
and folders of their places. Sets that are asked for again (the pictures with a word, with a tag, those
that pass a filter) are kept too, the least recently used first to go.

Everything that is kept is immutable and belongs to one committed state. It is brought up to date when
it is used next, from the pictures whose `version` has risen, by one thread; only threads that need
the same value wait for that.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np

from clipkit.arrays import Int64
from clipkit.catalog import vectors
from clipkit.catalog.store import Connection, joined_nums, nums_json, parsed
from clipkit.picture_set import Mask, PictureSet

T = TypeVar("T")

MOST_CHANGED = 50_000  # pictures; after more changes everything is read anew
SET_BYTES = 64 * 2**20  # of memory for sets that are kept
MOST_SETS = 1_000  # that are kept

_FACTS = {  # column: what is read for it
    "dated": "-newest",
    "camera": "coalesce(camera, 0)",
    "format": "coalesce(format, 0)",
    "width": "width",
    "height": "height",
}
_LIVE = "FROM pictures INDEXED BY pictures_facts WHERE live"

_Stamp = tuple[int, int, int]  # of a committed state: generation of the file, epoch, changes


class Outdated(Exception):
    """Another thread has read a later state meanwhile: read again."""


class _Entry:
    """A value that is kept, the state that it is of, and the lock of the thread that makes the next."""

    __slots__ = ("kept", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: tuple[_Stamp, Any] = ((-1, 0, 0), None)


class Columns:
    """The memory that the threads of a catalog share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the dictionaries
        self._entries: dict[object, _Entry] = {}
        self._sets: OrderedDict[object, _Entry] = OrderedDict()  # the last used last

    def entry(self, key: object) -> _Entry:
        with self._lock:
            return self._entries.setdefault(key, _Entry())

    def entry_of_set(self, key: object) -> _Entry:
        with self._lock:
            entry = self._sets.setdefault(key, _Entry())
            self._sets.move_to_end(key)
            return entry

    def drop_sets(self) -> None:
        """Drop the sets that were used least recently, until the others keep to their limits."""
        with self._lock:
            sizes = [getattr(entry.kept[1], "nbytes", 0) for entry in self._sets.values()]
            most = sum(sizes)
            while len(self._sets) > 1 and (most > SET_BYTES or len(self._sets) > MOST_SETS):
                most -= sizes.pop(0)
                self._sets.popitem(last=False)


class State:
    """One state of the catalog, as a connection sees it, with what is kept in memory of it.

    `own` is for the writer, whose state may hold changes that are not committed. Any method may raise
    Outdated.
    """

    def __init__(self, db: Connection, columns: Columns, *, own: bool) -> None:
        self.db = db
        self._columns = columns
        self._own = own
        rows = db.execute("SELECT key, value FROM meta WHERE key IN ('changes', 'epoch')")
        meta = dict(rows.fetchall())
        self._stamp: _Stamp = (db.generation, meta["epoch"], meta["changes"])
        self._changed: dict[int, Int64] = {}

    def per_change(self, key: object, make: Callable[[], T]) -> T:
        """Return `make()`, or what it returned for this key since the last change."""
        return self._value(self._columns.entry(key), make)

    def is_kept(self, key: object) -> bool:
        """Return whether `kept_set` would return at once."""
        return not self._own and self._columns.entry_of_set(key).kept[0] == self._stamp

    def kept_set(
        self, key: object, make: Callable[[], T], among: Callable[[Int64], Int64] | None = None
    ) -> T:
        """Return the set of pictures, or array of nums, that is kept under a key; else `make()`.

        With `among`, one that was kept before the last change is corrected by what it says of the
        changed pictures: which of them belong to the set, in any order.
        """

        def renew(old: Any, changed: Int64) -> Any:
            assert among is not None
            return old - PictureSet.of_sorted(changed) | PictureSet(among(changed))

        entry = self._columns.entry_of_set(key)
        before = entry.kept
        value: T = self._value(entry, make, renew if among else None)
        if entry.kept is not before:
            self._columns.drop_sets()
        return value

    def _value(
        self,
        entry: _Entry,
        make: Callable[[], T],
        renew: Callable[[T, Int64], T] | None = None,
        *,
        unchanged: bool = True,
    ) -> T:
        """Return the value of an entry as of this state: what is there, or `renew(value, changed)` where
        the changes are few, or `make()`. `unchanged`: without a changed picture, the value stays."""
        stamp, value = entry.kept
        if stamp != self._stamp or self._own:
            with entry.lock:
                stamp, value = entry.kept
                if stamp > self._stamp:
                    raise Outdated
                if stamp != self._stamp or self._own:
                    changed = None
                    if renew is not None and stamp[:2] == self._stamp[:2]:
                        changed = self._changed_since(stamp[2])
                    if renew is None or changed is None or len(changed) > MOST_CHANGED:
                        value = make()
                    elif len(changed) or not unchanged:
                        value = renew(value, changed)
                    entry.kept = self._stamp, value
        found: T = value
        return found

    def _changed_since(self, changes: int) -> Int64:
        """Return the nums of the pictures that have changed since that value of the change counter."""
        if changes not in self._changed:
            sql = (
                "SELECT group_concat(num) FROM pictures INDEXED BY pictures_version"
                " WHERE version > 0 AND version > ?"
            )
            self._changed[changes] = joined_nums(self.db, sql, (changes,))
        return self._changed[changes]

    # ---- columns

    def live(self) -> Mask:
        """Return by num whether a picture is live; do not change it."""
        return self._value(self._columns.entry("live"), self._read_live, self._renewed("live"))

    def fact(self, name: str) -> Int64:
        """Return a column by num, as long as `live`; what it says of pictures that are dead has no
        meaning. Do not change it."""
        entry = self._columns.entry(("fact", name))
        return self._value(entry, lambda: self._read_fact(name), self._renewed(_FACTS[name]))

    def _read_live(self) -> Mask:
        count = self.db.execute(f"SELECT count(*) {_LIVE}").fetchone()[0]
        # of all nums, dead ones too: a new column then has the length of one that was updated
        last = self.db.execute("SELECT coalesce(max(num), 0) FROM pictures").fetchone()[0]
        live = np.ones(last + 1, np.bool_)
        live[0] = False
        if count != last:
            live[:] = False
            live[joined_nums(self.db, f"SELECT group_concat(num) {_LIVE}")] = True
        return live

    def _read_fact(self, name: str) -> Int64:
        # numpy parses one string five times faster than SQLite returns an integer per row
        values = parsed(
            self.db.execute(f"SELECT group_concat({_FACTS[name]}) {_LIVE}").fetchone()[0]
        )
        live = self.live()
        column = np.zeros(len(live), np.int64)
        column[live] = values
        return column

    def read_columns(self) -> None:
        """Have all that filters compare in memory."""
        for name in _FACTS:
            self.fact(name)
        self.places()

    def _renewed(self, expression: str) -> Callable[[Any, Int64], Any]:
        """Return the function that reads an expression of changed pictures into a copy of a column."""

        def renew(old: np.ndarray, changed: Int64) -> np.ndarray:
            sql = f"SELECT num, {expression} FROM pictures WHERE num IN (SELECT value FROM json_each(?))"
            rows = np.array(self.db.execute(sql, (nums_json(changed),)).fetchall(), np.int64)
            column = np.zeros(max(len(old), int(changed[-1]) + 1), old.dtype)
            column[: len(old)] = old
            column[rows[:, 0]] = rows[:, 1]
            return column

        return renew

    def with_vector(self, owner: int) -> PictureSet:
        """Return the pictures, dead or alive, that have a vector of an encoder."""

        def read() -> tuple[int, PictureSet]:
            count = vectors.count(self.db, owner)
            sql = "SELECT max(num) FROM vectors WHERE encoder = ?"
            if count and count == self.db.execute(sql, (owner,)).fetchone()[0]:
                return newest(), PictureSet.of_sorted(np.arange(1, count + 1))
            sql = "SELECT group_concat(num) FROM vectors WHERE encoder = ?"
            return newest(), PictureSet.of_sorted(joined_nums(self.db, sql, (owner,)))

        def renew(old: tuple[int, PictureSet], _: Int64) -> tuple[int, PictureSet]:
            # +encoder: in the order of seq, not through the encoder's index
            sql = "SELECT group_concat(num) FROM vectors WHERE +encoder = ? AND seq > ?"
            return newest(), old[1] | PictureSet(joined_nums(self.db, sql, (owner, old[0])))

        def newest() -> int:
            found = self.db.execute("SELECT coalesce(max(seq), 0) FROM vectors").fetchone()
            return int(found[0])

        entry = self._columns.entry(("vectors", owner))
        return self._value(entry, read, renew, unchanged=False)[1]

    def places(self) -> Places:
        """Return the places of the live pictures."""
        places: Places = self._value(
            self._columns.entry("places"),
            lambda: Places.read(self.db),
            lambda old, changed: old.renewed(self.db, changed),
        )
        return places


class Places:
    """The places of the live pictures, in no order; immutable. A place that is gone has num -1."""

    def __init__(self) -> None:
        self.nums = np.empty(0, np.int64)  # (P,)
        self.folders = np.empty(0, np.int64)  # (P,) positions in the lists of folders
        self.names = b""  # the folded names, each with a NUL at its end
        self.ends = np.empty(0, np.int64)  # (P,) of each name's NUL in `names`
        self.folder_paths: list[bytes] = []  # as stored: with a separator at the end
        self.folder_names: list[str] = []  # the same, folded
        self._folder_ids = np.empty(0, np.int64)  # sorted
        self._copies = np.empty(0, np.int64)  # positions of pictures with more than one place

    @classmethod
    def read(cls, db: Connection) -> Places:
        places = cls()
        places._append(db, "")
        return places

    def renewed(self, db: Connection, changed: Int64) -> Places:
        """Return the places with those of changed pictures read again."""
        places = copy(self)
        places.nums = np.where(PictureSet.of_sorted(changed).has(self.nums), -1, self.nums)
        if np.count_nonzero(places.nums < 0) > len(places.nums) // 2:
            return Places.read(db)
        places._append(db, "WHERE num IN (SELECT value FROM json_each(?))", nums_json(changed))
        return places

    def _append(self, db: Connection, where: str, *args: str) -> None:
        last = int(self._folder_ids[-1]) if len(self._folder_ids) else 0
        sql = "SELECT id, path, folded FROM folders WHERE id > ? ORDER BY id"
        if new := db.execute(sql, (last,)).fetchall():
            ids, paths, folded = zip(*new, strict=True)
            self._folder_ids = np.concatenate([self._folder_ids, np.array(ids, np.int64)])
            self.folder_paths = [*self.folder_paths, *paths]
            self.folder_names = [*self.folder_names, *folded]
        sql = (
            "SELECT group_concat(num), group_concat(folder),"
            f" CAST(group_concat(name, char(0)) AS BLOB) FROM places {where}"
        )
        nums, folders, names = db.execute(sql, args).fetchone()
        if nums is not None:
            names += b"\0"
            ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
            positions = np.searchsorted(self._folder_ids, parsed(folders))
            self.nums = np.concatenate([self.nums, parsed(nums)])
            self.folders = np.concatenate([self.folders, positions])
            self.ends = np.concatenate([self.ends, ends + len(self.names)])
            self.names += names
        self._copies = np.flatnonzero(np.bincount(self.nums + 1)[self.nums + 1] > 1)

    def of(self, places: Mask) -> Mask:
        """Return the pictures that have one of these places (P,), a mask over nums."""
        mask = np.zeros(int(self.nums.max(initial=-1)) + 2, np.bool_)
        mask[self.nums] = places  # of several places the last decides, so ...
        copies = self._copies[places[self._copies]]
        mask[self.nums[copies]] = True
        return mask[:-1]  # without what is gone

    def in_folders(self, wanted: Sequence[bool] | Mask) -> Mask:
        """Return which places (P,) lie directly in one of the folders for which `wanted`, in the order
        of the lists of folders, holds."""
        found: Mask = np.array(wanted, np.bool_)[self.folders]
        return found

    def containing(self, part: str) -> Mask:
        """Return which places (P,) have a folded text in their folded path."""
        found = self.in_folders([part in folder for folder in self.folder_names])
        found |= self._named(part.encode())
        for at, sign in enumerate(part):  # partly in the folder, partly in the name
            if sign == "/":
                head, tail = part[: at + 1], part[at + 1 :]
                ending = self.in_folders([folder.endswith(head) for folder in self.folder_names])
                if ending.any():
                    found |= ending & self._named(tail.encode(), start=True)
        return found

    def _named(self, part: bytes, *, start: bool = False) -> Mask:
        """Return which places (P,) have a text in their names; with `start`, at the beginning."""
        found = np.zeros(len(self.nums), np.bool_)
        if not part:
            return ~found
        names = b"\0" + self.names if start else self.names
        part = b"\0" + part if start else part
        if len(part) > len(names):
            return found
        # Byte by byte in numpy: the first two in all names, the others where these are found.
        data = np.frombuffer(names, np.uint8)
        last = len(data) - len(part)  # where it may begin
        begins = data[: last + 1] == part[0]
        if len(part) > 1:
            begins &= data[1 : last + 2] == part[1]
        at = np.flatnonzero(begins)
        for offset, byte in enumerate(part[2:], 2):
            at = at[data[at + offset] == byte]
        found[np.searchsorted(self.ends, at)] = True
        return found
