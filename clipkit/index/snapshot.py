"""Snapshot: an immutable index on disk, of which a process loads some 80 bytes a vector.

    snapshots/000007/
        codes.faiss      one-bit codes of the rotated vectors, scanned for candidates; loaded
        vectors.f16      half-precision rows, sorted by id; read for candidates only
        rows.crc32       a checksum a row; loaded
        ids.npy          int64 (N,), sorted; loaded
        sample.f16, sample_ids.npy   a fixed random sample of the rows; loaded
        manifest.json    sizes, hashes, facts, measured recall; written last

A query scans the codes and scores the candidates exactly, by the same sum as a VectorIndex, so a
score does not depend on the kind. How many candidates depends on the query: all whose estimated
cosine is above the k-th best exact one less a margin, which was raised when the snapshot was built
until recall@10 reached its goal. So few are read where the best are far ahead, and more where they
lie close together, as far from the query, for a large k or under a filter.

What is loaded whole is checked by SHA-256, a row whenever it is read (rows.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import IndexDamaged
from clipkit.index.checked_files import (
    MANIFEST,
    REMEDY,
    check_file,
    check_size,
    read_facts,
    read_file,
)
from clipkit.index.kinds import (
    KINDS,
    Floats,
    Hits,
    Ids,
    Mask,
    best,
    decoded,
    read_structure,
    searches,
    threads,
)
from clipkit.index.rows import StoredRows
from clipkit.index.vector_index import checked_queries, rows_of
from clipkit.picture_set import PictureSet

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)  # the codes of version 2 are one structure, scanned by one thread
CODES, IDS, SAMPLE, SAMPLE_IDS = "codes.faiss", "ids.npy", "sample.f16", "sample_ids.npy"
SAMPLE_ROWS = (
    2_560  # 2,000 of them are live while fewer than a tenth of the snapshot's rows is dead
)
_DAMAGED = "damaged"  # present in the folder of a snapshot that was found damaged

# The first scan for k looks for _DEPTH + _DEPTH_PER_HIT * k candidates. Of captions' searches in a
# million, one in 20 has more than 1,500 for k = 40, 2,500 for k = 100, 10,000 for k = 1,000.
_DEPTH, _DEPTH_PER_HIT = 2_048, 12
_SURE_K = 2_048  # up to this k, a search goes on until its candidates are certain
_MOST = 2**18  # ... but scores no more candidates than this (0.7 s); of so many allowed rows, all
_MOST_DEEP = 2**15  # candidates for a larger k, if that is more than eight per hit


@dataclass(frozen=True, slots=True)
class Manifest:
    """The facts that are saved with a snapshot."""

    kind: str
    dim: int
    size: int
    encoder_id: str  # in an index, the space_id of the model
    last_seq: int
    settings: Mapping[str, Any]  # "margin" of the candidates, and the kind's own
    recall_at_10: (
        float  # measured on `queries` queries made of its own vectors; the exact kind has 1
    )
    queries: int
    build_seconds: float
    bytes: int  # of all files but the manifest


def sampling_hash(ids: Ids) -> npt.NDArray[np.uint64]:
    """Hash ids to a fixed random order by the finalizer of splitmix64 (Steele et al. 2014).

    The sample of a snapshot are its SAMPLE_ROWS ids of the least hash (a bottom-k sample): an id that
    is added or removed changes at most one of them.
    """
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a snapshot. Raises IndexDamaged if it is missing, damaged or older."""
    return _manifest(folder, read_facts(folder))


def check_cheaply(folder: Path) -> Manifest:
    """Return the manifest if the sizes of all files are right and no search has found damage.

    Reads the manifest alone. Raises IndexDamaged otherwise.
    """
    facts = read_facts(folder)
    manifest = _manifest(folder, facts)
    for name in facts["files"]:
        check_size(folder, facts, name)
    if (folder / _DAMAGED).exists():
        raise IndexDamaged(f"{folder} was found damaged by a search; {REMEDY}")
    return manifest


def _manifest(folder: Path, facts: Mapping[str, Any]) -> Manifest:
    version = facts.get("format_version")
    if version not in READABLE_VERSIONS:
        age = (
            "an older format"
            if isinstance(version, int) and version < FORMAT_VERSION
            else "a format"
        )
        raise IndexDamaged(
            f"{folder / MANIFEST} is of {age} ({version}; this clipkit reads {FORMAT_VERSION}); {REMEDY}"
        )
    return Manifest(**{name: facts[name] for name in Manifest.__dataclass_fields__})


def manifest_facts(manifest: Manifest, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest file holds."""
    return {"format_version": FORMAT_VERSION, **asdict(manifest), "files": dict(files)}


class Snapshot:
    """A snapshot that is open for searching. Threads may share it.

    `ids` int64 (N,) are sorted; `sample` float32 (S, D) are the vectors of `sample_ids`, a fixed random
    sample of its rows, the same whatever else is in the snapshot (see `sampling_hash`).
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        rows: StoredRows,
        structure: Any,
        sample: tuple[Ids, Floats],
    ) -> None:
        """Use `open` instead."""
        self.folder = folder
        self.manifest = manifest
        self.ids = rows.ids
        self.size = rows.size
        self.dim = rows.dim
        self.sample_ids, self.sample = sample
        self._rows = rows
        self._structure = structure
        self._scan = kind.scan if (kind := KINDS.get(manifest.kind)) else None

    @classmethod
    def open(cls, folder: Path) -> Snapshot:
        """Open a snapshot: load and check all but its rows.

        Raises IndexDamaged naming the file, if one is not what was written.
        """
        with _remembered(folder):
            check_cheaply(folder)
            facts = read_facts(folder)
            manifest = _manifest(folder, facts)
            ids = read_file(folder, facts, IDS, (manifest.size,), np.int64)
            count = min(manifest.size, SAMPLE_ROWS)
            sample_ids = read_file(folder, facts, SAMPLE_IDS, (count,), np.int64)
            sample = read_file(folder, facts, SAMPLE, (count, manifest.dim), np.float16)
            rows = StoredRows(folder, facts, ids, manifest.dim)
            structure = None
            if CODES in facts["files"]:
                structure = read_structure(check_file(folder, facts, CODES), manifest.size)
        return cls(folder, manifest, rows, structure, (sample_ids, decoded(sample)))

    def search(
        self,
        queries: Floats,
        k: int,
        *,
        allowed: PictureSet | None = None,
        floor: float = -np.inf,
    ) -> list[Hits]:
        """Return the k nearest vectors of each of `queries` (Q, D), finite.

        For each query (ids int64 (k',), scores float32 (k',)), sorted by (-score, id), where k' is
        min(k, size, number allowed); scores are cosines if the queries are unit rows. `allowed`
        restricts the search to these ids; unknown ones are ignored. Rows that score less than `floor`
        may be left out, which saves reading them. Raises InputError for k < 1 and queries that cannot be
        compared, IndexDamaged if a row that is read is not what was written.
        """
        queries = checked_queries(queries, k, self.dim)
        mask = None if allowed is None else allowed.among(self.ids)
        with _remembered(self.folder), threads(1), searches.one():
            count = self.size if mask is None else int(np.count_nonzero(mask))
            if not count:
                return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
            k = min(k, count)
            # Scanning the codes of 512 rows costs as much as scoring one exactly.
            if self._scan is None or 8 * k > count or count < _DEPTH // 4 + self.size // 512:
                return [self._exactly(query, k, mask) for query in queries]
            return [self._by_codes(query, k, count, mask, floor) for query in queries]

    def vectors_of(self, ids: Ids) -> Floats:
        """Return the stored vectors of these ids, in their order: float32 (M, D).

        Raises InputError for unknown ids, IndexDamaged if a row is not what was written.
        """
        with _remembered(self.folder):
            return self._rows.read(rows_of(self.ids, ids))

    def _exactly(self, query: Floats, k: int, mask: Mask | None) -> Hits:
        rows = None if mask is None else np.flatnonzero(mask)
        scores = self._rows.scores(query, rows)
        return best(self.ids, np.arange(self.size) if rows is None else rows, scores, k)

    def _by_codes(self, query: Floats, k: int, count: int, mask: Mask | None, floor: float) -> Hits:
        """Search one query by the codes; `count` rows are allowed."""
        assert self._scan is not None
        settings = self._settings(k, count, filtered=mask is not None)
        limit = min(count, _MOST if k <= _SURE_K else max(_MOST_DEEP, 8 * k))
        depth = min(_DEPTH + _DEPTH_PER_HIT * k, limit)
        scan = self._scan(self._structure, query, depth, settings, mask)
        if len(scan.rows) < min(2 * k, count):  # the probed lists hold too few that are allowed
            settings = {**settings, "nprobe": self.size}  # every list
            scan = self._scan(self._structure, query, depth, settings, mask)
            if len(scan.rows) < min(2 * k, count):
                return self._exactly(query, k, mask)
        margin = settings["margin"]
        first = np.sort(scan.rows[: 2 * k + 64][scan.estimates[: 2 * k + 64] >= floor - margin])
        scores = self._rows.scores(query, first)
        if len(scores) >= k:
            floor = max(floor, float(np.partition(scores, len(scores) - k)[len(scores) - k]))
        least = floor - margin  # the least estimate of a candidate
        while scan.others >= least and depth < limit:
            depth = min(4 * depth, limit)
            scan = self._scan(self._structure, query, depth, settings, mask)
        if scan.others >= least and count <= 4 * _MOST and k <= _SURE_K:
            return self._exactly(query, k, mask)
        candidates = scan.rows[scan.estimates >= least]
        others = np.setdiff1d(candidates, first, assume_unique=True)
        others.sort()
        scores = np.concatenate([scores, self._rows.scores(query, others)])
        return best(self.ids, np.concatenate([first, others]), scores, k)

    def _settings(self, k: int, count: int, *, filtered: bool) -> Mapping[str, Any]:
        """Return the settings for a search for k of `count` allowed rows.

        More than ten hits, with which recall was measured, lie in more lists.
        A filter that leaves a tenth of the rows leaves a tenth of them in a list, so ten times as many
        lists hold as many; and what it leaves may lie in other lists than the nearest rows of all.
        """
        settings = self.manifest.settings
        if "nprobe" not in settings:
            return settings
        lists = settings["nprobe"] * max(1.0, k / 10) ** 0.25
        if filtered:
            lists *= 4 * self.size / count
        return {**settings, "nprobe": int(np.ceil(lists))}


@contextmanager
def _remembered(folder: Path) -> Iterator[None]:
    """Leave a mark in the folder if it is found damaged, so that the next refresh builds a new one."""
    try:
        yield
    except IndexDamaged as error:
        with suppress(OSError):  # on read-only media each reader finds out for itself
            (folder / _DAMAGED).write_text(f"{error}\n", "utf-8")
        raise
