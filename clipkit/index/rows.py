"""The vectors of a snapshot on disk: `vectors.f16`, rows sorted by id, and `rows.crc32` beside it.

A row is checked each time that it is read: its CRC-32 (zlib's) starts from the row's id, so another row
in its place is noticed too. 400 random rows cost 0.3 ms so. A hash per block of some thousand rows
would make a search that re-scores 400 random rows of a million read and verify nearly all blocks, a
gigabyte. A changed byte in either file is an error, never a result.

Rows are read by pread, not through a mapping: each page fault of one maps its neighbours too (28 us
and some 100 kB a row, measured at 1 GB), and an I/O error of the disk would end the process (SIGBUS).
It is called so that it keeps the interpreter's lock: to take that again after each of 400 rows would
be to wait 400 times for every busy thread. Only systems without pread map the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping
from itertools import repeat
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
_DENSE = 16  # from one row in 16 on, the file is read in order, which needs no call a row

_pread: Any = None
if os.name == "posix":
    _pread = ctypes.PyDLL(None).pread  # PyDLL keeps the interpreter's lock
    _pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong)
    _pread.restype = ctypes.c_ssize_t

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


class StoredRows:
    """The rows of a snapshot, each checked when it is read. Threads may share it.

    Every method may raise IndexDamaged, naming the file and the row.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], ids: Ids, dim: int) -> None:
        """Open both files of `folder` after checking their sizes."""
        self.ids = ids
        self.dim = dim
        self.size = len(ids)
        self._path = check_size(folder, facts, VECTORS)
        _check_length(self._path, self.size * dim * 2)
        path = check_size(folder, facts, CHECKSUMS)
        _check_length(path, self.size * 4)
        self._checksums: Checksums = np.fromfile(path, "<u4")
        self._file = -1
        self._rows: Halves = np.empty((0, dim), np.float16)  # the mapping, where there is no pread
        if _pread is not None:
            self._file = os.open(self._path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
        elif self.size:
            with self._path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows = np.frombuffer(mapped, "<f2").reshape(self.size, dim)

    def blocks(
        self, rows: Ids | None = None, *, count: int = _BLOCK
    ) -> Iterator[tuple[slice, Floats]]:
        """Yield (slice of `rows`, their vectors float32) for all of `rows` (None: every row), at most
        `count` of the file at a time. Many rows must be sorted."""
        total = self.size if rows is None else len(rows)
        if rows is not None and total * _DENSE < self.size:
            for start in range(0, total, count):
                part = slice(start, min(start + count, total))
                yield part, self._verified(rows[part], self._gathered(rows[part]))
            return
        count = max(count, CHUNK // 4)
        for first in range(0, self.size, count):
            last = min(first + count, self.size)
            block = self._block(first, last)
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

    def _block(self, first: int, last: int) -> Halves:
        """Read the rows first..last."""
        if _pread is None:
            return self._rows[first:last].copy()
        width = 2 * self.dim
        try:
            data = os.pread(self._file, (last - first) * width, first * width)
        except OSError as error:
            raise IndexDamaged(
                f"{self._path} cannot be read ({error.strerror}); {REMEDY}"
            ) from error
        if len(data) != (last - first) * width:
            raise IndexDamaged(f"{self._path} has become shorter; {REMEDY}")
        return np.frombuffer(data, "<f2").reshape(-1, self.dim)

    def _gathered(self, rows: Ids) -> Halves:
        """Read rows from anywhere."""
        if _pread is None:
            return self._rows[rows]
        out, width = np.empty((len(rows), self.dim), np.float16), 2 * self.dim
        places = range(out.ctypes.data, out.ctypes.data + out.nbytes, width)
        starts = (rows * width).tolist()
        sizes = list(map(_pread, repeat(self._file), places, repeat(width), starts))
        if sizes.count(width) < len(rows):
            for at in np.flatnonzero(np.array(sizes) != width).tolist():
                out[at] = self._block(int(rows[at]), int(rows[at]) + 1)[0]  # which tells why
        return out


def _check_length(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        raise IndexDamaged(f"{path} has {path.stat().st_size} bytes, not {size}; {REMEDY}")
