"""The catalog's other queries, as functions over a connection: files, folders, rows, lists, counts."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from clipkit.catalog.columns import State
from clipkit.catalog.rows import Facets, KnownFile, PictureRow
from clipkit.catalog.store import DEAD, Connection, joined_nums, next_epoch, parsed
from clipkit.catalog.texts import union
from clipkit.errors import InputError
from clipkit.picture_set import PictureSet

_PAGE = 4096  # rows of a list that are read at once
_MOST_WALKED = 4 * _PAGE  # rows, before the whole order is read into memory


# ---- files


def known_files(
    db: Connection, low: bytes, high: bytes, limit: int
) -> list[tuple[bytes, int, int, int | None, int]]:
    """Return up to `limit` places and skipped files from the path `low` on, below `high`: path, size,
    mtime_ns, num, and whether the file was skipped."""
    sql = (
        "SELECT places.path, coalesce(skipped.size, places.size),"
        " coalesce(skipped.mtime_ns, places.mtime_ns), num, skipped.path IS NOT NULL"
        " FROM places LEFT JOIN skipped ON skipped.path = places.path"
        " WHERE places.path >= ?1 AND places.path < ?2"
        " UNION ALL SELECT path, size, mtime_ns, NULL, 1 FROM skipped"
        " WHERE path >= ?1 AND path < ?2"
        " AND NOT EXISTS (SELECT 1 FROM places WHERE places.path = skipped.path)"
        " ORDER BY 1 LIMIT ?3"
    )
    return db.execute(sql, (low, high, limit)).fetchall()


def known_file(
    row: tuple[bytes, int, int, int | None, int], has_vector: bytes | None
) -> tuple[str, KnownFile]:
    """Return path and file of a row of `known_files`; `has_vector[num]` tells what is not pending."""
    path, size, mtime_ns, num, skipped = row
    state = "ok"
    if skipped:
        state = "skipped"
    elif has_vector is not None and num is not None and not has_vector[num : num + 1] > b"\0":
        state = "pending"
    return os.fsdecode(path), KnownFile(size, mtime_ns, state, num)


def places_below(db: Connection, span: tuple[bytes, bytes]) -> int:
    sql = "SELECT coalesce(sum(places), 0) FROM folders WHERE path >= ? AND path < ?"
    return int(db.execute(sql, span).fetchone()[0])


def folder_id(db: Connection, path: bytes, folded: str) -> int:
    """Return the id of a folder, whose path ends with a separator; a new one is added."""
    row = db.execute("SELECT id FROM folders WHERE path = ?", (path,)).fetchone()
    if row is None:
        sql = "INSERT INTO folders (path, folded) VALUES (?, ?)"
        return int(db.execute(sql, (path, folded)).lastrowid or 0)
    return int(row[0])


def folders(db: Connection, limit: int) -> list[tuple[str, int]]:
    """Return the folders with the most places: roots, folders below them, and their counts."""
    sep = os.sep.encode()
    tops = {path.rstrip(sep) for (path,) in db.execute("SELECT path FROM roots")}
    total: Counter[bytes] = Counter()
    for path, count in db.execute("SELECT path, places FROM folders WHERE places"):
        folder = path[:-1]
        chain, depth = [folder], 1
        while folder:
            folder = folder.rpartition(sep)[0]
            chain.append(folder)
            if folder in tops:
                depth = len(chain)
        for parent in chain[:depth]:
            total[parent] += count
    best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return [(os.fsdecode(folder or sep), count) for folder, count in best]


def roots(db: Connection) -> tuple[str, ...]:
    stored = [os.fsdecode(root) for (root,) in db.execute("SELECT path FROM roots ORDER BY path")]
    return tuple(root.rstrip(os.sep) or os.sep for root in stored)


# ---- pictures


def picture_rows(db: Connection, nums: Iterable[int]) -> dict[int, PictureRow]:
    """Return the rows of those of these pictures that are live, by num."""
    rows = db.execute(
        "SELECT pictures.num, image_id, width, height, (SELECT text FROM labels WHERE id = format),"
        " bytes, taken_at, dated, (SELECT text FROM labels WHERE id = camera),"
        " strftime('%Y-%m-%dT%H:%M:%S+00:00', added, 'unixepoch'), path, captions, tags"
        " FROM pictures JOIN places USING (num)"
        " WHERE live AND num IN (SELECT value FROM json_each(?)) ORDER BY pictures.num, path",
        (json.dumps([int(num) for num in nums]),),
    )
    gathered: dict[int, tuple[list[Any], list[tuple[bytes, str, str]]]] = {}
    for num, *facts, path, captions, tags in rows:
        gathered.setdefault(num, (facts, []))[1].append((path, captions, tags))
    result: dict[int, PictureRow] = {}
    for num, ((image_id, *facts), places) in gathered.items():
        paths = [path for path, *_ in places]
        shortest = os.fsdecode(min(paths, key=lambda path: (len(path), path)))
        texts = (tuple(filter(None, text.split("\n"))) for text in union(places))
        result[num] = PictureRow(
            num, image_id, shortest, tuple(map(os.fsdecode, paths)), *facts, *texts
        )
    return result


def dead(db: Connection) -> PictureSet:
    """See Catalog.dead."""
    return PictureSet.of_sorted(joined_nums(db, f"SELECT group_concat(num) FROM ({DEAD})"))


_SORTS = {"date": "newest", "name": "name"}  # the index pictures_by_{sort} is in this order


def listed(
    state: State,
    sort: str,
    among: PictureSet | None,
    after: object | None,
    limit: int,
) -> tuple[list[int], list[Any] | None]:
    """See Catalog.listed."""
    if sort not in _SORTS:
        raise InputError(f"sort {sort!r} is not one of {', '.join(_SORTS)}")
    position = _position(sort, after)
    page: list[int] = []
    end = position
    if not limit or (among is not None and not len(among)):
        return page, None
    walked = 0
    while among is None or (walked < _MOST_WALKED and not state.is_kept(("order", sort))):
        rows = _walk(state.db, sort, position, min(max(limit + 1, 256), _PAGE))
        if not rows:
            return page, None
        walked += len(rows)
        passing = list(range(len(rows)))
        if among is not None:
            nums = np.fromiter((num for num, *_ in rows), np.int64, len(rows))
            passing = np.flatnonzero(among.has(nums)).tolist()
        for at in passing:
            if len(page) == limit:  # there is another: this is not the end
                return page, end
            page.append(rows[at][0])
            end = list(rows[at][1:])
        position = list(rows[-1][1:])
    assert among is not None
    return _in_order(state, sort, among, position, limit, page)


def _walk(
    db: Connection, sort: str, position: Sequence[Any] | None, limit: int
) -> list[tuple[int, Any, str]]:
    """Return the next rows (num, key, image_id) of a sort's index."""
    key = _SORTS[sort]
    where = "" if position is None else f"AND ({key}, image_id) > (?, ?)"
    return db.execute(
        f"SELECT num, {key}, image_id FROM pictures INDEXED BY pictures_by_{sort}"
        f" WHERE live {where} ORDER BY {key}, image_id LIMIT ?",
        (*(position or ()), limit),
    ).fetchall()


def _in_order(
    state: State,
    sort: str,
    among: PictureSet,
    position: Sequence[Any] | None,
    limit: int,
    page: list[int],
) -> tuple[list[int], list[Any] | None]:
    """Fill a page from the order of all nums in memory: for pictures that are few and far between, or
    far down."""
    key = _SORTS[sort]
    sql = (
        f"SELECT group_concat(num) FROM (SELECT num FROM pictures INDEXED BY pictures_by_{sort}"
        f" WHERE live ORDER BY {key}, image_id)"
    )
    order = state.kept_set(("order", sort), lambda: parsed(state.db.execute(sql).fetchone()[0]))

    def place(num: Any) -> tuple[Any, str]:
        sql = f"SELECT {key}, image_id FROM pictures WHERE num = ?"
        found: tuple[Any, str] = state.db.execute(sql, (int(num),)).fetchone()
        return found

    flags = np.zeros(int(order.max(initial=0)) + 1, np.bool_)
    flags[among.nums[among.nums < len(flags)]] = True
    start = bisect_right(order, tuple(position), key=place) if position else 0
    for at in range(start, len(order), 2**16):
        some = order[at : at + 2**16]
        page += some[flags[some]][: limit + 1 - len(page)].tolist()
        if len(page) > limit:  # there is another: this is not the end
            return page[:limit], list(place(page[limit - 1]))
    return page, None


def _position(sort: str, after: object | None) -> list[Any] | None:
    """Check a position of a list, which may come from outside."""
    if after is None:
        return None
    if isinstance(after, list | tuple) and len(after) == 2 and isinstance(after[1], str):
        key = after[0]
        if (type(key) is int and abs(key) < 2**63) if sort == "date" else isinstance(key, str):
            return list(after)
    raise InputError(f"{after!r} is no position in a list by {sort}; begin again without one")


# ---- counts


def counts(db: Connection) -> tuple[int, int, str | None, int, int]:
    """Return how many pictures are live, their bytes, when one was last added, and the numbers of
    places and of skipped files."""
    meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
    places, skipped = db.execute(
        "SELECT (SELECT coalesce(sum(places), 0) FROM folders), (SELECT count(*) FROM skipped)"
    ).fetchone()
    added = datetime.fromtimestamp(meta["added"], UTC).isoformat(timespec="seconds")
    newest = added if meta["pictures"] else None
    return meta["pictures"], meta["bytes"], newest, places, skipped


def facets(state: State, limit: int) -> Facets:
    """See Catalog.facets."""
    labels = dict(state.db.execute("SELECT id, text FROM labels").fetchall())

    def most(counts: Iterable[tuple[int, int]]) -> tuple[tuple[str, int], ...]:
        named = [(labels[key], count) for key, count in counts]
        return tuple(sorted(named, key=lambda item: (-item[1], item[0]))[:limit])

    def values(fact: str) -> Iterable[tuple[int, int]]:
        counts = np.bincount(state.fact(fact)[state.live()]).tolist()
        return ((key, count) for key, count in enumerate(counts) if key and count)

    tags = state.db.execute("SELECT tag, count(*) FROM picture_tags GROUP BY tag")
    return Facets(most(values("format")), most(values("camera")), most(tags))


# ---- what is left of dead pictures


def purge(db: Connection) -> list[str]:
    """Remove what is kept of dead pictures, but their num and image_id; return the image_ids."""
    gone = [
        i for (i,) in db.execute(f"SELECT image_id FROM pictures WHERE num IN ({DEAD}) AND format")
    ]
    if not gone:
        return []
    for (encoder,) in db.execute("SELECT id FROM encoders").fetchall():
        db.execute(f"DELETE FROM vectors WHERE encoder = ? AND num IN ({DEAD})", (encoder,))
    db.execute(
        "UPDATE pictures SET width = 0, height = 0, bytes = 0, format = NULL, camera = NULL,"
        " taken_at = NULL, added = 0, dated = NULL, newest = 0, name = '' WHERE NOT live AND format"
    )
    db.execute("DELETE FROM folders WHERE NOT places")
    db.execute("DELETE FROM text_fingerprints WHERE folder NOT IN (SELECT path FROM folders)")
    db.execute(
        "DELETE FROM labels WHERE id NOT IN (SELECT format FROM pictures WHERE format"
        " UNION SELECT camera FROM pictures WHERE camera UNION SELECT tag FROM picture_tags)"
    )
    next_epoch(db)
    return gone
