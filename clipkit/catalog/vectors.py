"""Encoders and their vectors: half-precision blobs, each under a seq that only ever rises.

Encoders of one space have the same picture tower. Their vectors are kept once, under the row of the
one that came first: their `owner`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64
from clipkit.catalog.rows import EncoderRow, StoredVectors
from clipkit.catalog.store import DEAD, Connection, next_epoch
from clipkit.errors import IndexDamaged, InputError

NORM_TOLERANCE = 0.01  # half precision alone moves the length of a unit vector by less than 0.001
_COLUMNS = "encoder_id, spec, config, dim, space_id"


def encoders(db: Connection) -> list[EncoderRow]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM encoders ORDER BY id")
    return [EncoderRow(*row) for row in rows]


def active_encoder(db: Connection) -> EncoderRow | None:
    """See Catalog.active_encoder."""
    sql = (
        f"SELECT {_COLUMNS} FROM encoders"
        " ORDER BY id = (SELECT value FROM meta WHERE key = 'active') DESC, id DESC LIMIT 1"
    )
    row = db.execute(sql).fetchone()
    return EncoderRow(*row) if row else None


def owner_of(db: Connection, encoder_id: str | None) -> tuple[int | None, int]:
    """Return the row id under which an encoder's vectors are kept, and their dim; (None, 0), which
    match no vector, if it is not registered."""
    sql = "SELECT owner, dim FROM encoders WHERE encoder_id = ?"
    row: tuple[int, int] | None = db.execute(sql, (encoder_id,)).fetchone()
    return row or (None, 0)


def count(db: Connection, owner: int, *, after_seq: int = 0) -> int:
    """Count an owner's vectors with seq > `after_seq`, those of dead pictures too."""
    last = db.execute("SELECT coalesce(max(seq), 0) FROM vectors").fetchone()[0]
    if not after_seq and len(db.execute("SELECT DISTINCT owner FROM encoders").fetchall()) == 1:
        # SQLite counts a table without a condition eight times faster
        return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])
    # few by their seqs; else all of the encoder in its index, since rows are long
    encoder = "+encoder" if last - after_seq < 10_000 else "encoder"
    sql = f"SELECT count(*) FROM vectors WHERE {encoder} = ? AND seq > ?"
    return int(db.execute(sql, (owner, after_seq)).fetchone()[0])


def owner_name(db: Connection, encoder_id: str) -> str:
    """Return the encoder under whose id the snapshot of an encoder's space is kept; itself, if it is
    not registered."""
    sql = "SELECT encoder_id FROM encoders WHERE id = ?"
    row = db.execute(sql, owner_of(db, encoder_id)[:1]).fetchone()
    return str(row[0]) if row else encoder_id


def space_name(db: Connection, encoder_id: str) -> str:
    """See Catalog.vector_space."""
    sql = "SELECT space_id FROM encoders WHERE encoder_id = ?"
    row = db.execute(sql, (encoder_id,)).fetchone()
    return str(row[0]) if row and row[0] else encoder_id


def refused(db: Connection, encoder_id: str) -> int:
    """See Catalog.refused_pictures."""
    sql = (
        "SELECT count(DISTINCT num) FROM skipped JOIN places USING (path) WHERE reason = 'no-vector'"
        " AND NOT EXISTS (SELECT 1 FROM vectors WHERE encoder = ? AND vectors.num = places.num)"
    )
    return int(db.execute(sql, owner_of(db, encoder_id)[:1]).fetchone()[0])


def register(
    db: Connection, encoder_id: str, spec: str, config_json: str, dim: int, space_id: str | None
) -> None:
    """See Catalog.register_encoder."""
    newest = "INSERT OR IGNORE INTO meta SELECT 'active', id FROM encoders ORDER BY id DESC LIMIT 1"
    db.execute(newest)  # of an index made before there was an active one
    sql = "SELECT id, owner, dim, space_id FROM encoders WHERE encoder_id = ?"
    row = db.execute(sql, (encoder_id,)).fetchone()
    if row is None:
        sql = "INSERT INTO encoders (encoder_id, spec, config, dim) VALUES (?, ?, ?, ?)"
        number = db.execute(sql, (encoder_id, spec, config_json, dim)).lastrowid
        db.execute("UPDATE encoders SET owner = id WHERE id = ?", (number,))
        db.execute(newest)
        row = (number, number, dim, None)
    number, owner, dim, known = row
    if space_id is None or known is not None:
        return
    first = db.execute(
        "SELECT owner FROM encoders WHERE space_id = ? AND dim = ? ORDER BY id LIMIT 1",
        (space_id, dim),
    ).fetchone()
    db.execute("UPDATE encoders SET space_id = ? WHERE id = ?", (space_id, number))
    if first is not None and first[0] != owner:
        _join(db, owner, first[0])


def _join(db: Connection, owner: int, into: int) -> None:
    """Give the vectors of one owner to another of the same space; where both have one it stays."""
    db.execute(
        "INSERT OR IGNORE INTO vectors (num, encoder, vector)"
        " SELECT num, ?, vector FROM vectors WHERE encoder = ? ORDER BY seq",
        (into, owner),
    )
    db.execute("DELETE FROM vectors WHERE encoder = ?", (owner,))
    sql = "DELETE FROM snapshots WHERE encoder_id = (SELECT encoder_id FROM encoders WHERE id = ?)"
    db.execute(sql, (owner,))
    db.execute("UPDATE encoders SET owner = ? WHERE owner = ?", (into, owner))
    next_epoch(db)


def drop(db: Connection, encoder_id: str) -> int:
    """See Catalog.drop_encoder."""
    sql = "SELECT id, owner FROM encoders WHERE encoder_id = ?"
    row = db.execute(sql, (encoder_id,)).fetchone()
    if row is None:
        names = ", ".join(other.encoder_id for other in encoders(db)) or "none"
        raise InputError(f"encoder {encoder_id} is not in this index; it has {names}")
    active = active_encoder(db)
    if active is not None and active.encoder_id == encoder_id:
        raise InputError(
            f"encoder {encoder_id} ({active.spec}) is the one that the index answers with;"
            " use another one first: clipkit use MODEL"
        )
    number, owner = row
    heir = db.execute(
        "SELECT id, encoder_id FROM encoders WHERE owner = ? AND id != ? ORDER BY id LIMIT 1",
        (number, number),
    ).fetchone()
    if owner != number:  # another one's vectors
        db.execute("DELETE FROM encoders WHERE id = ?", (number,))
        return 0
    if heir is not None:  # vectors and snapshot stay where they are, under the heir's name
        sql = "UPDATE OR REPLACE snapshots SET encoder_id = ? WHERE encoder_id = ?"
        db.execute(sql, (heir[1], encoder_id))
        sql = "SELECT encoder_id, spec, config, dim, space_id FROM encoders WHERE id = ?"
        facts = db.execute(sql, (heir[0],)).fetchone()
        db.execute("DELETE FROM encoders WHERE id = ?", (heir[0],))
        sql = "UPDATE encoders SET encoder_id = ?, spec = ?, config = ?, dim = ?, space_id = ?"
        db.execute(f"{sql} WHERE id = ?", (*facts, number))
        sql = "UPDATE meta SET value = ? WHERE key = 'active' AND value = ?"
        db.execute(sql, (number, heir[0]))
        return 0
    removed = db.execute("DELETE FROM vectors WHERE encoder = ?", (number,)).rowcount
    db.execute("DELETE FROM snapshots WHERE encoder_id = ?", (encoder_id,))
    db.execute("DELETE FROM encoders WHERE id = ?", (number,))
    next_epoch(db)
    return removed


def add(db: Connection, encoder_id: str, nums: Int64, vectors: npt.NDArray[np.floating]) -> None:
    """See Catalog.add_vectors; vectors that the pictures have are replaced."""
    key, dim = owner_of(db, encoder_id)
    if key is None:
        raise InputError(f"encoder {encoder_id} is not registered in this catalog")
    if vectors.shape != (len(nums), dim):
        raise InputError(f"vectors have shape {vectors.shape}; expected {(len(nums), dim)}")
    with np.errstate(over="ignore"):  # an overflow is refused below
        halves = np.ascontiguousarray(vectors, dtype="<f2")
    if not np.isfinite(halves).all():
        raise InputError("vectors hold values that are not finite in half precision")
    lengths = np.linalg.norm(halves.astype(np.float32), axis=1)
    if (wrong := np.abs(lengths - 1) > NORM_TOLERANCE).any():
        at = int(np.argmax(wrong))
        raise InputError(
            f"the vector of picture {int(nums[at])} has length {lengths[at]:.3g}; vectors must have"
            f" length 1, within {NORM_TOLERANCE}: a search compares directions"
        )
    db.executemany(
        "INSERT OR REPLACE INTO vectors (num, encoder, vector) VALUES (?, ?, ?)",
        ((int(num), key, row.tobytes()) for num, row in zip(nums, halves, strict=True)),
    )


def newer(db: Connection, encoder_id: str, after_seq: int) -> StoredVectors:
    """See Catalog.vectors."""
    key, dim = owner_of(db, encoder_id)
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
        last_seq = seqs[-1]
        fresh, usable = _unpacked(some, blobs, dim)
        upto = done + len(usable)
        nums[done:upto], vectors[done:upto] = fresh, usable
        done = upto
    return StoredVectors(nums[:done], vectors[:done], last_seq)


def chunks(db: Connection, encoder_id: str, rows: int) -> Iterator[StoredVectors]:
    """See Catalog.vector_chunks."""
    key, dim = owner_of(db, encoder_id)
    sql = "SELECT coalesce(max(seq), 0) FROM vectors WHERE encoder = ?"
    last_seq = db.execute(sql, (key,)).fetchone()[0]
    cursor = db.execute(
        f"SELECT num, vector FROM vectors WHERE encoder = ? AND num NOT IN ({DEAD}) ORDER BY num",
        (key,),
    )
    while chunk := cursor.fetchmany(rows):
        nums, blobs = zip(*chunk, strict=True)
        del chunk
        fresh, usable = _unpacked(nums, blobs, dim)
        del blobs
        if len(fresh):
            yield StoredVectors(fresh, usable, last_seq)


def _unpacked(
    nums: tuple[int, ...], blobs: tuple[bytes, ...], dim: int
) -> tuple[Int64, npt.NDArray[np.float16]]:
    """Return the nums and vectors of rows, without the zero vectors that older indexes may hold: no
    direction, so no search could rank them."""
    data = b"".join(blobs)
    if len(data) != len(nums) * dim * 2:
        raise IndexDamaged(
            f"vectors of pictures {nums[0]} to {nums[-1]} are not of {dim} dimensions"
        )
    vectors = np.frombuffer(data, "<f2").reshape(-1, dim)
    numbers = np.array(nums, np.int64)
    usable = vectors.any(axis=1)
    return (numbers, vectors) if usable.all() else (numbers[usable], vectors[usable])
