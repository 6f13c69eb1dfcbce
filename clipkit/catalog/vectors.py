"""Vectors in and out of the catalog: fp16 blobs, each under a seq that only ever rises.

Functions over a connection for catalog.py to call. "Newer than a snapshot" is `seq > its last_seq`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipkit.catalog.rows import Int64, StoredVectors
from clipkit.catalog.store import Connection
from clipkit.errors import IndexDamaged, InputError

DEAD = "SELECT num FROM pictures WHERE NOT live"  # few, so NOT IN (dead) costs less than IN (live)


def encoder(db: Connection, encoder_id: str | None) -> tuple[int | None, int]:
    """The encoder's row id and dim; (None, 0), which matches no vector, if it is not registered."""
    sql = "SELECT id, dim FROM encoders WHERE encoder_id = ?"
    row: tuple[int, int] | None = db.execute(sql, (encoder_id,)).fetchone()
    return row or (None, 0)


def add(db: Connection, encoder_id: str, nums: Int64, vectors: npt.NDArray[np.floating]) -> None:
    """Store rows (N, D) under new seqs, in place of those that the pictures `nums` (N,) have."""
    key, dim = encoder(db, encoder_id)
    if key is None:
        raise InputError(f"encoder {encoder_id} is not registered in this catalog")
    if vectors.shape != (len(nums), dim):
        raise InputError(f"vectors have shape {vectors.shape}; expected {(len(nums), dim)}")
    with np.errstate(over="ignore"):  # an overflow is told below, as an error
        halves = np.ascontiguousarray(vectors, dtype="<f2")
    if not np.isfinite(halves).all():
        raise InputError("vectors hold values that are not finite in half precision")
    db.executemany(
        "INSERT OR REPLACE INTO vectors (num, encoder, vector) VALUES (?, ?, ?)",
        ((int(num), key, row.tobytes()) for num, row in zip(nums, halves, strict=True)),
    )


def read(db: Connection, encoder_id: str, after_seq: int) -> StoredVectors:
    """The encoder's vectors of live pictures with seq > `after_seq`, in the order of seq."""
    key, dim = encoder(db, encoder_id)
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
