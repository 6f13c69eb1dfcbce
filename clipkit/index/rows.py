"""The vectors of a snapshot on disk: `vectors.f16`, rows sorted by id, and `rows.crc32` beside it.

Both are memory-mapped, and a row is checked each time that it is read: its CRC-32 (zlib's) starts
from the row's id, so another row in its place is noticed too. 400 random rows cost 0.3 ms so. A hash
per block of some thousand rows would make a search that re-scores 400 random rows of a million read
and verify nearly all blocks, a gigabyte. A changed byte in either file is an error, never a result.

An I/O error of the disk under a mapping ends the process (SIGBUS); a lock-free read per row would
instead give up the interpreter's lock 400 times a query, each time behind every other busy thread.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clipkit.errors import IndexDamaged
from clipkit.index.checked_files import REMEDY, FileWriter, check_size
from clipkit.index.kinds import CHUNK, Floats, Ids, cosines, decoded

VECTORS, CHECKSUMS = "vectors.f16", "rows.crc32"
_BLOCK = (
    512  # rows decoded at a time when scoring: 1 MB of float32 at 512 dimensions stays in cache
)
# Rows read at random before their pages are given back to the system, which keeps them in its cache:
# each maps its neighbours too, so that a hundred searches would map most of a gigabyte.
_RESIDENT = 512
_DENSE = 16  # from one row in 16 on, the file is read in order, which needs no page fault a row

Halves = npt.NDArray[np.float16]
Checksums = npt.NDArray[np.uint32]


def checksums(ids: Ids, rows: Halves) -> Checksums:
    """Return the CRC-32, uint32 (N,), of contiguous `rows` (N, D), each starting from its id."""
    view, width, crc32 = (
        rows.reshape(-1).view(np.uint8).data,
        rows.itemsize * rows.shape[1],
        zlib.crc32,
    )
    starts = range(0, width * len(rows), width)
    seeds = (ids & 0xFFFFFFFF).tolist()
    return np.fromiter(
        (crc32(view[at : at + width], seed) for at, seed in zip(starts, seeds, strict=True)),
        np.uint32,
        len(rows),
    )


class RowsWriter:
    """Both files of a new snapshot, for a `with` block; `ids` and `entries` are complete at its end."""

    def __init__(self, folder: Path) -> None:
        self._vectors = FileWriter(folder / VECTORS, hashed=False)
        self._checksums = FileWriter(folder / CHECKSUMS, hashed=False)
        self._ids: list[Ids] = [np.empty(0, np.int64)]

    def __enter__(self) -> Self:
        self._vectors.__enter__()
        self._checksums.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self._vectors.__exit__(kind, error, at)
        finally:
            self._checksums.__exit__(kind, error, at)

    def add(self, ids: Ids, rows: Halves) -> None:
        """Append rows (N, D) under ids (N,), which rise from call to call."""
        rows = np.ascontiguousarray(rows, "<f2")
        self._vectors.write(rows)
        self._checksums.write(checksums(ids, rows).astype("<u4", copy=False))
        self._ids.append(ids)

    @property
    def ids(self) -> Ids:
        """All ids written, int64 (N,)."""
        return np.concatenate(self._ids)

    @property
    def entries(self) -> dict[str, Any]:
        """Both files' entries in the manifest."""
        return {VECTORS: self._vectors.entry, CHECKSUMS: self._checksums.entry}


class MappedRows:
    """The rows of a snapshot, each checked when it is read. Threads may share it.

    Every method may raise IndexDamaged, naming the file and the row.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], ids: Ids, dim: int) -> None:
        """Map both files of `folder` after checking their sizes."""
        self.ids = ids
        self.dim = dim
        self._touched = 0  # rows read at random since the pages were last given back
        self.size = len(ids)
        self._path = check_size(folder, facts, VECTORS)
        self._map = _mapped(self._path, self.size * dim * 2)
        crc = _mapped(check_size(folder, facts, CHECKSUMS), self.size * 4)
        self._rows: Halves = np.frombuffer(self._map or b"", "<f2").reshape(self.size, dim)
        self._checksums: Checksums = np.frombuffer(crc or b"", "<u4")

    def blocks(
        self, rows: Ids | None = None, *, count: int = _BLOCK
    ) -> Iterator[tuple[slice, Floats]]:
        """Yield (slice of `rows`, their vectors float32) for all of `rows` (None: every row), at most
        `count` of the file at a time. Many rows must be sorted."""
        total = self.size if rows is None else len(rows)
        if rows is not None and total * _DENSE < self.size:
            for start in range(0, total, count):
                part = slice(start, min(start + count, total))
                yield part, self._verified(rows[part], self._rows[rows[part]])
                self._touched += part.stop - part.start
                if self._touched > _RESIDENT:
                    self._touched = 0
                    self._advise("MADV_DONTNEED", 0, self.size)
            return
        count = max(count, CHUNK // 4)
        for first in range(0, self.size, count):
            last = min(first + count, self.size)
            self._advise("MADV_WILLNEED", first, last)
            block = self._rows[first:last].copy()
            self._advise("MADV_DONTNEED", first, last)  # its pages stay in the system's cache
            if rows is None:
                yield slice(first, last), self._verified(np.arange(first, last), block)
                continue
            low, high = np.searchsorted(rows, (first, last))
            if low < high:
                some = rows[low:high]
                yield slice(low, high), self._verified(some, block[some - first])

    def scores(self, query: Floats, rows: Ids | None = None) -> Floats:
        """Return the cosines, float32 (M,), of `rows` (None: all) with one query (D,)."""
        out = np.empty(self.size if rows is None else len(rows), np.float32)
        for part, vectors in self.blocks(rows):
            cosines(vectors, query, out[part])
        return out

    def read(self, rows: Ids) -> Floats:
        """Return the vectors of `rows`, in any order: float32 (M, D)."""
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), self.dim), np.float32)
        for part, vectors in self.blocks(rows[order]):
            out[order[part]] = vectors
        return out

    def drawn(self, count: int, seed: int) -> Floats:
        """Draw `count` rows (all if there are fewer) without replacement: float32 (M, D)."""
        rows = np.random.default_rng(seed).choice(self.size, min(count, self.size), replace=False)
        return self.read(np.sort(rows))

    def chunks(self) -> Iterator[Floats]:
        """Yield all rows in order, float32 (M, D), some thousand at a time."""
        for _, vectors in self.blocks(count=CHUNK // 4):
            yield vectors

    def _verified(self, rows: Ids, halves: Halves) -> Floats:
        """Return `halves`, which were read as `rows`, as float32, if they are what was written."""
        wrong = np.flatnonzero(checksums(self.ids[rows], halves) != self._checksums[rows])
        if len(wrong):
            num = self.ids[rows[wrong[0]]]
            raise IndexDamaged(
                f"{self._path} is not what was written: the CRC-32 of the vector of picture {num} "
                f"differs; {REMEDY}"
            )
        return decoded(halves)

    def _advise(self, advice: str, first: int, last: int) -> None:
        """Tell the system how the rows first..last are read, where it takes such advice."""
        if self._map is not None and hasattr(mmap, advice):
            width = 2 * self.dim
            start = first * width // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(getattr(mmap, advice), start, last * width - start)


def _mapped(path: Path, size: int) -> mmap.mmap | None:
    """Map a file that is read at random; None for one of no bytes."""
    if path.stat().st_size != size:
        raise IndexDamaged(f"{path} has {path.stat().st_size} bytes, not {size}; {REMEDY}")
    if not size:
        return None
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # no reading ahead: one page is needed
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
