"""The catalog's other queries, as functions over a connection: files, folders, rows, lists, counts."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from clipkit.catalog.rows import Facets, KnownFile, PictureRow
from clipkit.catalog.store import DEAD, Connection
from clipkit.catalog.texts import union
from clipkit.catalog.vectors import owner_of
from clipkit.errors import InputError
from clipkit.picture_set import PictureSet

_PAGE = 4096  # rows of a list that are read at once


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
    row: tuple[bytes, int, int, int | None, int], has_vector: PictureSet | None
) -> tuple[str, KnownFile]:
    path, size, mtime_ns, num, skipped = row
    state = "ok"
    if skipped:
        state = "skipped"
    elif has_vector is not None and num is not None and num not in has_vector:
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
        parts = path[:-1].split(sep)
        chain = [sep.join(parts[:end]) for end in range(len(parts), 0, -1)]
        depth = max((i for i, parent in enumerate(chain) if parent in tops), default=0)
        for parent in chain[: depth + 1]:
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


_SORTS = {"date": "newest", "name": "name"}  # the index pictures_by_{sort} is in this order


def listed(
    db: Connection, sort: str, among: PictureSet | None, after: object | None, limit: int
) -> tuple[list[int], list[Any] | None]:
    """See Catalog.listed."""
    if sort not in _SORTS:
        raise InputError(f"sort {sort!r} is not one of {', '.join(_SORTS)}")
    key = _SORTS[sort]
    position = _position(sort, after)
    page: list[int] = []
    if not limit or (among is not None and not len(among)):
        return page, None
    while True:
        where, args = (
            ("", []) if position is None else (f"AND ({key}, image_id) > (?, ?)", position)
        )
        rows = db.execute(
            f"SELECT num, {key}, image_id FROM pictures INDEXED BY pictures_by_{sort}"
            f" WHERE live {where} ORDER BY {key}, image_id LIMIT ?",
            (*args, min(max(limit, 256), _PAGE)),
        ).fetchall()
        if not rows:
            return page, None
        passing = list(range(len(rows)))
        if among is not None:
            nums = np.fromiter((num for num, *_ in rows), np.int64, len(rows))
            passing = np.flatnonzero(among.has(nums)).tolist()
        for at in passing:
            page.append(rows[at][0])
            if len(page) == limit:
                return page, list(rows[at][1:])
        position = list(rows[-1][1:])


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


def picture_counts(db: Connection) -> tuple[int, int, str | None]:
    """Return how many pictures are live, their bytes, and when the last was added."""
    counts: tuple[int, int, str | None] = db.execute(
        "SELECT count(*), coalesce(sum(bytes), 0),"
        " strftime('%Y-%m-%dT%H:%M:%S+00:00', max(added), 'unixepoch')"
        " FROM pictures INDEXED BY pictures_facts WHERE live"
    ).fetchone()
    return counts


def vector_count(db: Connection, encoder_id: str | None) -> int:
    """Return how many live pictures have a vector of an encoder."""
    sql = f"SELECT count(*) FROM vectors WHERE encoder = ? AND num NOT IN ({DEAD})"
    return int(db.execute(sql, (owner_of(db, encoder_id)[0],)).fetchone()[0])


def file_counts(db: Connection) -> tuple[int, int]:
    """Return the number of places and of skipped files."""
    counts: tuple[int, int] = db.execute(
        "SELECT (SELECT coalesce(sum(places), 0) FROM folders), (SELECT count(*) FROM skipped)"
    ).fetchone()
    return counts


def facets(db: Connection, limit: int) -> Facets:
    """See Catalog.facets."""
    labels = dict(db.execute("SELECT id, text FROM labels").fetchall())

    def most(sql: str) -> tuple[tuple[str, int], ...]:
        counts = [(labels[key], count) for key, count in db.execute(sql)]
        return tuple(sorted(counts, key=lambda item: (-item[1], item[0]))[:limit])

    facts = "FROM pictures INDEXED BY pictures_facts WHERE live"
    return Facets(
        most(f"SELECT format, count(*) {facts} GROUP BY format"),
        most(f"SELECT camera, count(*) {facts} AND camera IS NOT NULL GROUP BY camera"),
        most("SELECT tag, count(*) FROM picture_tags GROUP BY tag"),
    )


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
    # labels and folders have gone: what readers hold of them in memory is read anew
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
    return gone
