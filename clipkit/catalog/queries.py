"""The catalog's queries, as functions over a connection, and the derived values that make them fast.

Derived per picture, and renewed by `settle` in the transaction that changes what they depend on:

    live    it has a place
    dated   taken_at, else when its oldest present file was last modified
    texts   the FTS5 row (of live pictures only): words of the file names, captions, tags
    folder_texts   likewise: words of the names of the folders that the files are in
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64
from clipkit.catalog.rows import (
    BREAK,
    ISO_DATE,
    CatalogStats,
    Facets,
    KnownFile,
    PictureRow,
    StoredVectors,
    below,
    clean,
    fold,
    fold_path,
    folder_text,
    local_time,
    name_words,
    split_paths,
    tag_keys,
)
from clipkit.catalog.store import Connection
from clipkit.errors import IndexDamaged, InputError

DEAD = "SELECT num FROM pictures WHERE NOT live"  # few, so NOT IN (dead) costs less than IN (live)
_ORIENTATIONS = {
    "landscape": "width > height",
    "portrait": "width < height",
    "square": "width = height",
}


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions on pictures, all of which must hold.

    `after` (inclusive) and `before` (exclusive) are ISO date prefixes, "2023", "2023-05" or
    "2023-05-01", each meaning the start of that period. A picture without an EXIF date counts as
    taken when its oldest present file was last modified (local time).
    Any of `folders` (the place lies below it; one that is not absolute may be anywhere in the
    path), `cameras` (substring) and `formats` (whole, as Pillow names them: "jpeg") may hold; all
    of `paths` (substring of the place) and `tags` (whole) must. `folders` and `paths` must hold for
    one and the same place. Letter case and Unicode form matter for absolute `folders` only.
    """

    after: str | None = None
    before: str | None = None
    paths: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    min_width: int = 0
    min_height: int = 0
    min_side: int = 0  # of the longer side
    camera: str | None = None  # whole, as stored
    orientation: str | None = None  # "landscape", "portrait" or "square"


def settle(db: Connection, nums: Iterable[int], *, new: set[int]) -> None:
    """Update the derived values of the pictures `nums`; those in `new` were never committed.

    This is one pass in the order of nums, since FTS5 flushes a segment whenever rowids go backwards.
    """
    for num in sorted(nums):
        was_live, taken_at, captions, tags = db.execute(
            "SELECT live, taken_at, captions, tags FROM pictures WHERE num = ?", (num,)
        ).fetchone()
        places = db.execute("SELECT path, mtime_ns FROM places WHERE num = ?", (num,)).fetchall()
        dated = taken_at
        if places:
            dated = taken_at or local_time(min(mtime_ns for _, mtime_ns in places))
            paths = [os.fsdecode(path) for path, _ in places]
            db.execute(
                "INSERT OR REPLACE INTO texts (rowid, names, captions, tags) VALUES (?, ?, ?, ?)",
                (num, *(text.replace("\n", BREAK) for text in (name_words(paths), captions, tags))),
            )
            sql = "INSERT OR REPLACE INTO folder_texts (rowid, folders) VALUES (?, ?)"
            db.execute(sql, (num, folder_text(paths)))
        else:
            db.execute("DELETE FROM texts WHERE rowid = ?", (num,))
            db.execute("DELETE FROM folder_texts WHERE rowid = ?", (num,))
        sql = "UPDATE pictures SET live = ?, dated = ? WHERE num = ?"
        db.execute(sql, (bool(places), dated, num))
        if places and not was_live and num not in new:
            # live again: a snapshot made meanwhile left it out, so its vectors count as new
            db.execute(
                "INSERT OR REPLACE INTO vectors (num, encoder, vector)"
                " SELECT num, encoder, vector FROM vectors WHERE num = ?",
                (num,),
            )


def joined_nums(db: Connection, sql: str, args: Iterable[object]) -> Int64:
    """Return the nums of a query for one group_concat, sorted."""
    # numpy parses one string five times faster than SQLite returns an integer per row
    joined = db.execute(sql, tuple(args)).fetchone()[0]
    return np.sort(np.fromstring(joined or "", dtype=np.int64, sep=","))


def matching(db: Connection, filters: Filters) -> Int64:
    """See Catalog.matching."""
    where = ["live"]
    args: list[object] = []

    def need(condition: str, *values: object) -> None:
        where.append(condition)
        args.extend(values)

    for sign, date in ((">=", filters.after), ("<", filters.before)):
        if date is not None:
            if not ISO_DATE.fullmatch(date):
                raise InputError(
                    f"{date!r} is not a date; use the form 2023, 2023-05 or 2023-05-01"
                )
            need(f"dated {sign} ?", date)
    if filters.cameras:
        # few distinct ones: compared in Python, which folds the case of all Unicode
        sql = "SELECT DISTINCT camera FROM pictures WHERE live AND camera IS NOT NULL"
        wanted = [fold(camera) for camera in filters.cameras]
        cameras = [c for (c,) in db.execute(sql) if any(w in fold(c) for w in wanted)]
        need("camera IN (SELECT value FROM json_each(?))", json.dumps(cameras))
    if filters.formats:
        formats = [clean(name).upper() for name in filters.formats]
        need("upper(format) IN (SELECT value FROM json_each(?))", json.dumps(formats))
    if filters.min_width:
        need("width >= ?", filters.min_width)
    if filters.min_height:
        need("height >= ?", filters.min_height)
    if filters.min_side:
        need("max(width, height) >= ?", filters.min_side)
    if filters.camera is not None:
        need("camera = ?", clean(filters.camera))
    if filters.orientation is not None:
        if filters.orientation not in _ORIENTATIONS:
            choices = ", ".join(_ORIENTATIONS)
            raise InputError(f"orientation {filters.orientation!r} is not one of {choices}")
        need(_ORIENTATIONS[filters.orientation])
    for tag in filters.tags:
        need("instr(tag_keys, ?)", tag_keys(" ".join(tag.split())))
    if filters.paths or filters.folders:  # one place must fulfil both
        place = ["instr(folded, ?)"] * len(filters.paths)
        values: list[object] = [fold_path(path) for path in filters.paths]
        if filters.folders:
            ways = []
            for folder in filters.folders:
                absolute = os.path.isabs(folder)
                ways.append("path >= ? AND path < ?" if absolute else "instr(folded, ?)")
                part = fold_path(os.path.normpath(folder))
                values += below(folder) if absolute else [f"/{part}/"]
            place.append(f"({' OR '.join(ways)})")
        need(f"num IN (SELECT num FROM places WHERE {' AND '.join(place)})", *values)
    sql = f"SELECT group_concat(num) FROM pictures WHERE {' AND '.join(where)}"
    return joined_nums(db, sql, args)


def phrase(db: Connection, text: str) -> dict[int, float]:
    """See Catalog.phrase."""
    prefix = "*" if text.rstrip().endswith("*") else ""
    sql = (
        "SELECT num, min(rank) AS best FROM (SELECT rowid AS num, rank FROM texts WHERE texts MATCH ?1"
        " UNION ALL SELECT rowid, 0 FROM folder_texts WHERE folder_texts MATCH ?1)"
        " GROUP BY num ORDER BY best, num"
    )
    return dict(db.execute(sql, (_quoted(text) + prefix,)))


def having(db: Connection, words: Sequence[Iterable[str]]) -> list[Int64]:
    """See Catalog.having."""
    sql = (
        "SELECT (SELECT group_concat(num) FROM ("
        "SELECT rowid AS num FROM texts WHERE texts MATCH word.value UNION ALL"
        " SELECT rowid FROM folder_texts WHERE folder_texts MATCH word.value))"
        " FROM json_each(?) AS word ORDER BY word.key"
    )
    matches = [" OR ".join(map(_quoted, spellings)) for spellings in words]
    found = []
    for (joined,) in db.execute(sql, (json.dumps(matches),)):
        # two ascending runs, which a stable sort only merges; np.unique takes five times as long
        nums = np.sort(np.fromstring(joined or "", dtype=np.int64, sep=","), kind="stable")
        found.append(nums[np.diff(nums, prepend=-1) > 0])
    return found


def _quoted(text: str) -> str:
    return '"' + clean(text).replace('"', '""') + '"'  # inside quotes FTS5 knows no operators


def known_files(
    db: Connection, span: tuple[bytes, bytes], encoder_id: str | None
) -> dict[str, KnownFile]:
    """Return the places and skipped files in a range of paths."""
    has_vector, args = "1", tuple[Any, ...]()
    if encoder_id is not None:
        args = (encoder_key(db, encoder_id)[0],)
        vectors = db.execute("SELECT count(*) FROM vectors WHERE encoder = ?", args).fetchone()
        if vectors == db.execute("SELECT count(*) FROM pictures").fetchone():
            args = ()  # every picture has one: nothing to look up
        else:
            has_vector = "EXISTS (SELECT 1 FROM vectors WHERE encoder = ? AND num = places.num)"
    where = "WHERE path >= ? AND path < ?"
    places = db.execute(
        f"SELECT path, size, mtime_ns, num, {has_vector} FROM places {where}", (*args, *span)
    )
    files = {
        os.fsdecode(path): KnownFile(size, mtime_ns, "ok" if done else "pending", num)
        for path, size, mtime_ns, num, done in places
    }
    for path, size, mtime_ns in db.execute(
        f"SELECT path, size, mtime_ns FROM skipped {where}", span
    ):
        files[os.fsdecode(path)] = KnownFile(size, mtime_ns, "skipped", None)
    return files


def folders(db: Connection, limit: int) -> list[tuple[str, int]]:
    """Return the folders with the most places: roots, folders below them, and their counts."""
    sep = os.sep.encode()
    direct = Counter(path.rpartition(sep)[0] for (path,) in db.execute("SELECT path FROM places"))
    tops = {path.rstrip(sep) for (path,) in db.execute("SELECT path FROM roots")}
    total: Counter[bytes] = Counter()
    for folder, count in direct.items():
        parts = folder.split(sep)
        chain = [sep.join(parts[:end]) for end in range(len(parts), 0, -1)]
        depth = max((i for i, parent in enumerate(chain) if parent in tops), default=0)
        for parent in chain[: depth + 1]:
            total[parent] += count
    best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return [(os.fsdecode(folder or sep), count) for folder, count in best]


def facets(db: Connection, limit: int) -> Facets:
    """See Catalog.facets. The index of live pictures holds all three columns: no row is read."""

    def counts(column: str) -> Counter[str]:
        sql = f"SELECT {column}, count(*) FROM pictures WHERE live GROUP BY {column}"
        return Counter({value: count for value, count in db.execute(sql) if value})

    tags: Counter[str] = Counter()
    for keys, count in counts("tag_keys").items():
        tags.update(dict.fromkeys(filter(None, keys.split("\n")), count))
    most = (
        sorted(values.items(), key=lambda item: (-item[1], item[0]))[:limit]
        for values in (counts("format"), counts("camera"), tags)
    )
    return Facets(*map(tuple, most))


def picture_rows(db: Connection, nums: Iterable[int]) -> dict[int, PictureRow]:
    """Return the rows of those of these pictures that are live, by num."""
    rows = db.execute(
        "SELECT num, image_id, (SELECT group_concat(hex(path)) FROM places WHERE num = pictures.num),"
        " width, height, format, bytes, taken_at, dated, camera, added_at, captions, tags"
        " FROM pictures WHERE live AND num IN (SELECT value FROM json_each(?))",
        (json.dumps([int(num) for num in nums]),),
    )
    result: dict[int, PictureRow] = {}
    for num, image_id, joined, *facts, captions, tags in rows:
        places = sorted(split_paths(joined))
        path = min(places, key=lambda path: (len(path), path))
        facts += [tuple(filter(None, text.split("\n"))) for text in (captions, tags)]
        result[num] = PictureRow(num, image_id, path, tuple(places), *facts)
    return result


def roots(db: Connection) -> tuple[str, ...]:
    stored = [os.fsdecode(root) for (root,) in db.execute("SELECT path FROM roots ORDER BY path")]
    return tuple(root.rstrip(os.sep) or os.sep for root in stored)


def stats(db: Connection, encoder_id: str | None) -> CatalogStats:
    pictures, size, newest = db.execute(
        "SELECT count(*), coalesce(sum(bytes), 0), max(added_at) FROM pictures WHERE live"
    ).fetchone()
    sql = f"SELECT count(*) FROM vectors WHERE encoder = ? AND num NOT IN ({DEAD})"
    sql = f"SELECT ({sql}), (SELECT count(*) FROM places), (SELECT count(*) FROM skipped)"
    vectors, places, skipped = db.execute(sql, (encoder_key(db, encoder_id)[0],)).fetchone()
    return CatalogStats(pictures, vectors, places, skipped, size, roots(db), newest)


# ---- vectors: half-precision blobs, each under a seq that only ever rises


def encoder_key(db: Connection, encoder_id: str | None) -> tuple[int | None, int]:
    """Return the encoder's row id and dim, or (None, 0), which match no vector, if it is not
    registered."""
    space = "coalesce(config ->> '$.space_id', encoder_id)"
    sql = (
        f"SELECT min(id), dim FROM encoders WHERE {space} ="
        f" (SELECT {space} FROM encoders WHERE encoder_id = ?) HAVING min(id)"
    )
    row: tuple[int, int] | None = db.execute(sql, (encoder_id,)).fetchone()
    return row or (None, 0)


def add_vectors(
    db: Connection, encoder_id: str, nums: Int64, vectors: npt.NDArray[np.floating]
) -> None:
    """See Catalog.add_vectors; vectors that the pictures have are replaced."""
    key, dim = encoder_key(db, encoder_id)
    if key is None:
        raise InputError(f"encoder {encoder_id} is not registered in this catalog")
    if vectors.shape != (len(nums), dim):
        raise InputError(f"vectors have shape {vectors.shape}; expected {(len(nums), dim)}")
    with np.errstate(over="ignore"):  # an overflow is refused below
        halves = np.ascontiguousarray(vectors, dtype="<f2")
    if not np.isfinite(halves).all():
        raise InputError("vectors hold values that are not finite in half precision")
    db.executemany(
        "INSERT OR REPLACE INTO vectors (num, encoder, vector) VALUES (?, ?, ?)",
        ((int(num), key, row.tobytes()) for num, row in zip(nums, halves, strict=True)),
    )


def read_vectors(db: Connection, encoder_id: str, after_seq: int) -> StoredVectors:
    """See Catalog.vectors."""
    key, dim = encoder_key(db, encoder_id)
    # room for at least as many rows as will come; the count takes time, so only for a large gap
    room = max(0, db.execute("SELECT coalesce(max(seq), 0) FROM vectors").fetchone()[0] - after_seq)
    if room > 10_000:
        sql = "SELECT count(*) FROM vectors WHERE encoder = ?"
        room = min(room, db.execute(sql, (key,)).fetchone()[0])
    nums, vectors = np.empty(room, np.int64), np.empty((room, dim), np.float16)
    done, last_seq = 0, after_seq
    # +encoder: walk in the order of seq; through the index, SQLite would sort all the blobs
    rows = db.execute(
        "SELECT seq, num, vector FROM vectors"
        f" WHERE +encoder = ? AND seq > ? AND num NOT IN ({DEAD}) ORDER BY seq",
        (key, after_seq),
    )
    while chunk := rows.fetchmany(512):  # few enough to stay in the processor's cache
        seqs, some, blobs = zip(*chunk, strict=True)
        data = b"".join(blobs)
        if len(data) != len(chunk) * dim * 2:
            raise IndexDamaged(f"vectors {seqs[0]} to {seqs[-1]} are not of {dim} dimensions")
        upto = done + len(chunk)
        nums[done:upto] = some
        vectors[done:upto] = np.frombuffer(data, "<f2").reshape(-1, dim)
        done, last_seq = upto, seqs[-1]
    return StoredVectors(nums[:done], vectors[:done], last_seq)
