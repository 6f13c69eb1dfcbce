"""What filters compare, in memory: arrays by num and by place, read when first needed and kept up to
date by the pictures' `version`.

A million pictures take 8 MB for each column that a filter has used, and about 40 MB for the names
and folders of their places. Sets that are asked for again (the pictures with a word, with a tag)
are kept too, the least recently used first to go.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipkit.arrays import Int64
from clipkit.catalog.store import Connection, joined_nums, nums_json, parsed
from clipkit.picture_set import Mask, PictureSet

MOST_CHANGED = 50_000  # pictures; after more changes everything is read anew
SET_BYTES = 64 * 2**20  # of memory for sets that are kept
MOST_RESULTS = 32  # answers that are kept until the next change

_FACTS = {  # column: what is read for it
    "dated": "-newest",
    "camera": "coalesce(camera, 0)",
    "format": "coalesce(format, 0)",
    "width": "width",
    "height": "height",
}


class Columns:
    """The facts of the live pictures as of the last `follow`. Use it while holding `lock`, which is
    taken before a connection is, so that no transaction is older than what is in memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._origin: object = None
        self._own = False  # what is read may not be committed
        self._clear(0)

    def _clear(self, changes: int) -> None:
        self.changes = changes
        self._live: Mask | None = None
        self._facts: dict[str, Int64] = {}
        self._places: Places | None = None
        self._sets: OrderedDict[object, tuple[int, PictureSet]] = OrderedDict()
        self.results: OrderedDict[object, PictureSet] = OrderedDict()

    def follow(self, db: Connection, generation: int, *, own: bool) -> None:
        """Bring what is in memory to the state that `db` sees. `own`: that state may hold changes
        that are not committed. `generation` tells catalog files apart."""
        rows = db.execute("SELECT key, value FROM meta WHERE key IN ('changes', 'epoch')")
        state = dict(rows.fetchall())
        changes, origin = state["changes"], (generation, state["epoch"])
        self._own = own
        if origin != self._origin:
            self._origin = origin
            self._clear(changes)
            return
        if changes == self.changes and not own:
            return
        self.results.clear()
        changed = changed_since(db, self.changes)
        if len(changed) > MOST_CHANGED:
            self._clear(changes)
            return
        if len(changed):
            self._renew(db, changed)
        self.changes = changes

    def _renew(self, db: Connection, changed: Int64) -> None:
        columns = list(self._facts)
        selected = ", ".join(["num", "live", *(_FACTS[name] for name in columns)])
        sql = f"SELECT {selected} FROM pictures WHERE num IN (SELECT value FROM json_each(?))"
        rows = np.array(db.execute(sql, (nums_json(changed),)).fetchall(), np.int64)
        nums, top = rows[:, 0], int(rows[:, 0].max()) + 1
        if self._live is not None:
            self._live = _grown(self._live, top)
            self._live[nums] = rows[:, 1] != 0
        for at, name in enumerate(columns, 2):
            self._facts[name] = _grown(self._facts[name], top)
            self._facts[name][nums] = rows[:, at]
        if self._places is not None:
            self._places.renew(db, changed)

    # ---- columns

    def live(self, db: Connection) -> Mask:
        """Return by num whether a picture is live; do not change it."""
        if self._live is None:
            sql = "SELECT group_concat(num) FROM pictures INDEXED BY pictures_facts WHERE live"
            nums = joined_nums(db, sql)
            self._live = np.zeros(int(nums.max(initial=-1)) + 1, np.bool_)
            self._live[nums] = True
        return self._live

    def fact(self, db: Connection, name: str) -> Int64:
        """Return a column by num, as long as `live`; what it says of pictures that are dead has no
        meaning."""
        live = self.live(db)
        if name not in self._facts:
            # numpy parses one string five times faster than SQLite returns an integer per row
            sql = (
                f"SELECT group_concat(num), group_concat({_FACTS[name]})"
                " FROM pictures INDEXED BY pictures_facts WHERE live"
            )
            nums, values = map(parsed, db.execute(sql).fetchone())
            column = np.zeros(len(live), np.int64)
            column[nums] = values
            self._facts[name] = column
        return self._facts[name]

    def places(self, db: Connection) -> Places:
        if self._places is None:
            self._places = Places.read(db)
        return self._places

    # ---- sets

    def kept(
        self,
        db: Connection,
        keys: Sequence[object],
        whole: Callable[[Sequence[int]], Sequence[PictureSet]],
        among: Callable[[int, Int64], Int64],
    ) -> list[PictureSet]:
        """Return sets of live pictures by key: what is kept under it, with what `among(position in
        keys, nums)` says of the pictures that have changed since; `whole(positions)` makes those that
        are not kept."""
        found: dict[int, PictureSet] = {}
        for at, key in enumerate(keys):
            changes, old = self._sets.pop(key, (0, None))
            if old is not None and (self._own or changes != self.changes):
                changed = changed_since(db, changes)
                if len(changed) > MOST_CHANGED:
                    old = None
                elif len(changed):
                    old = old - PictureSet.of_sorted(changed) | PictureSet(among(at, changed))
            if old is not None:
                found[at] = old
        missing = [at for at in range(len(keys)) if at not in found]
        if missing:
            found.update(zip(missing, whole(missing), strict=True))
        self._sets.update({key: (self.changes, found[at]) for at, key in enumerate(keys)})
        while len(self._sets) > 1 and sum(s.nbytes for _, s in self._sets.values()) > SET_BYTES:
            self._sets.popitem(last=False)
        return [found[at] for at in range(len(keys))]


@dataclass(eq=False, slots=True)
class Places:
    """The places of the live pictures, in no order. A place that is gone has num -1."""

    nums: Int64  # (P,)
    folders: Int64  # (P,) ids
    names: bytes  # the folded names, each with a NUL at its end
    ends: Int64  # (P,) of each name's NUL in `names`
    folder_paths: dict[
        int, tuple[bytes, str]
    ]  # by id: stored, folded; a separator at the end of both

    @classmethod
    def read(cls, db: Connection) -> Places:
        places = cls(np.empty(0, np.int64), np.empty(0, np.int64), b"", np.empty(0, np.int64), {})
        places._append(db, "")
        return places

    def renew(self, db: Connection, changed: Int64) -> None:
        """Read the places of changed pictures again."""
        gone = PictureSet.of_sorted(changed).has(self.nums)
        self.nums[gone] = -1
        if np.count_nonzero(self.nums < 0) > len(self.nums) // 2:
            fresh = Places.read(db)
            self.nums, self.folders = fresh.nums, fresh.folders
            self.names, self.ends, self.folder_paths = fresh.names, fresh.ends, fresh.folder_paths
            return
        self._append(db, "WHERE num IN (SELECT value FROM json_each(?))", nums_json(changed))

    def _append(self, db: Connection, where: str, *args: str) -> None:
        sql = (
            "SELECT group_concat(num), group_concat(folder),"
            f" CAST(group_concat(name, char(0)) AS BLOB) FROM places {where}"
        )
        nums, folders, names = db.execute(sql, args).fetchone()
        if nums is not None:
            names += b"\0"
            ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
            self.nums = np.concatenate([self.nums, parsed(nums)])
            self.folders = np.concatenate([self.folders, parsed(folders)])
            self.ends = np.concatenate([self.ends, ends + len(self.names)])
            self.names += names
        sql = "SELECT id, path, folded FROM folders WHERE id > ?"
        for key, path, folded in db.execute(sql, (max(self.folder_paths, default=0),)):
            self.folder_paths[key] = path, folded

    def of(self, places: Mask) -> Mask:
        """Return the pictures that have one of these places, a mask over nums."""
        nums = self.nums[places & (self.nums >= 0)]
        mask = np.zeros(int(nums.max(initial=-1)) + 1, np.bool_)
        mask[nums] = True
        return mask

    def in_folders(self, wanted: Callable[[bytes, str], bool]) -> Mask:
        """Return which places (P,) lie directly in a folder for whose path, as stored and folded,
        `wanted` holds."""
        flags = np.zeros(max(self.folder_paths, default=0) + 1, np.bool_)
        for key, (path, folded) in self.folder_paths.items():
            flags[key] = wanted(path, folded)
        return flags[self.folders]

    def containing(self, part: str) -> Mask:
        """Return which places (P,) have a folded text in their folded path."""
        found = self.in_folders(lambda _, folded: part in folded) | self._named(part)
        for at, sign in enumerate(part):  # partly in the folder, partly in the name
            if sign == "/":
                head, tail = part[: at + 1], part[at + 1 :]
                found |= self.in_folders(lambda _, folded, head=head: folded.endswith(head)) & (  # type: ignore[misc]
                    self._named(tail, start=True)
                )
        return found

    def _named(self, part: str, *, start: bool = False) -> Mask:
        """Return which places have a text in their names; with `start`, at the beginning."""
        found = np.zeros(len(self.nums), np.bool_)
        if not part:
            return ~found
        names, needle = self.names, part.encode()
        if start:
            names, needle = b"\0" + names, b"\0" + needle
        # split is C's loop: 1,000,000 matches in 0.1 s
        lengths = np.fromiter(map(len, names.split(needle)), np.int64)[:-1]
        at = np.cumsum(lengths) + np.arange(len(lengths)) * len(needle)
        found[np.searchsorted(self.ends, at)] = True
        return found


def changed_since(db: Connection, changes: int) -> Int64:
    """Return the nums of the pictures that have changed since that value of the change counter."""
    sql = (
        "SELECT group_concat(num) FROM pictures INDEXED BY pictures_version"
        " WHERE version > 0 AND version > ?"
    )
    return joined_nums(db, sql, (changes,))


def _grown(values: np.ndarray, top: int) -> np.ndarray:
    if top <= len(values):
        return values
    grown = np.zeros(top, values.dtype)
    grown[: len(values)] = values
    return grown
