"""One encoder's vectors of the live pictures, in memory, kept up to date with the catalog.

They are parts, each an immutable VectorIndex: the catalog's snapshot, if it has one, and exact parts
with the vectors that are newer (of a greater seq). `follow` makes the next state from one by loading
only new vectors, so a running indexer costs a search milliseconds; a search uses one state from
beginning to end. New parts are merged like digits of a binary counter: few parts, little copying.

A snapshot that is lost, damaged or another encoder's is never searched: the catalog is the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Int64
from clipkit.catalog import Catalog
from clipkit.index import Snapshot, VectorIndex, load_snapshot
from clipkit.picture_set import PictureSet

SAMPLE = 2_000  # pictures from which a query's scores by chance are estimated
FEW_DEAD = 1_000  # dead rows that are cheaper to skip among the hits than to mask in the search


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An index, and which of its vectors are alive: those of live pictures without a newer vector."""

    index: VectorIndex | Snapshot
    nums: Int64  # (N,) of all its vectors, sorted
    alive: Int64  # (M,) of those that are alive, sorted


@dataclass(frozen=True, eq=False)
class LiveVectors:
    """One immutable state, which threads may share. Nums are the catalog's `num`."""

    catalog: Catalog
    encoder_id: str
    changes: int  # the catalog's change counter before this was read
    snapshot: str | None  # the name of the snapshot that the catalog points to, usable or not
    last_seq: int
    parts: tuple[Part, ...]  # oldest first; parts[0] is the snapshot's if `from_snapshot`
    from_snapshot: bool

    @property
    def spec(self) -> str:
        """The encoder's spec, for messages; empty if the catalog does not know it."""
        specs = (row.spec for row in self.catalog.encoders() if row.encoder_id == self.encoder_id)
        return next(specs, "")

    @cached_property
    def nums(self) -> Int64:
        """The nums of all pictures that a search can return, sorted."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *(p.alive for p in self.parts)]))

    @cached_property
    def sample(self) -> Float32:
        """Vectors (S, D) of up to SAMPLE pictures; S = 0 for an empty library.

        This is a bottom-k sample: always the pictures whose nums have the least hash. A picture that
        is added or removed changes at most one of them.
        """
        nums = self.nums
        if len(nums) > SAMPLE:
            nums = nums[np.argpartition(_hash(nums), SAMPLE)[:SAMPLE]]
        return self.vectors_of(nums)

    def search(
        self, vector: Float32, k: int, *, allowed: Int64 | None = None
    ) -> tuple[Int64, Float32]:
        """Return up to k nearest of the pictures in `allowed` (sorted nums; None: all): nums and
        cosines, by falling cosine, then by num."""
        results = [_search_part(part, vector, k, allowed) for part in self.parts]
        nums = np.concatenate([np.empty(0, np.int64), *(nums for nums, _ in results)])
        scores = np.concatenate([np.empty(0, np.float32), *(scores for _, scores in results)])
        order = np.lexsort((nums, -scores))[:k]
        return nums[order], scores[order]

    def vectors_of(self, nums: Int64) -> Float32:
        """Return the vectors (M, D) of those of the unique `nums` that are alive, in any order."""
        rows = [
            part.index.vectors_of(np.intersect1d(part.alive, nums, assume_unique=True))
            for part in self.parts
        ]
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def blocks(self, rows: int) -> Iterator[tuple[Int64, Float32]]:  # for Classify
        """Yield nums (M,) and vectors (M, D) of all live pictures, up to `rows` at a time, by num."""
        for start in range(0, len(self.nums), rows):
            nums = self.nums[start : start + rows]
            ours = [np.intersect1d(p.alive, nums, assume_unique=True) for p in self.parts]
            vectors = [p.index.vectors_of(o) for p, o in zip(self.parts, ours, strict=True)]
            yield nums, np.concatenate(vectors)[np.argsort(np.concatenate(ours))]

    def unit_vector(self, num: int | None) -> Float32 | None:
        """Return the unit vector (D,) of a picture; None if it is not among these."""
        rows = self.vectors_of(np.array([] if num is None else [num], dtype=np.int64))
        return rows[0] / np.linalg.norm(rows[0]) if len(rows) else None


def follow(catalog: Catalog, encoder_id: str, old: LiveVectors | None = None) -> LiveVectors:
    """Return the state of the catalog as it is now; `old` itself if nothing has changed since."""
    changes = catalog.change_counter()
    if old is not None and old.changes == changes:
        return old
    # In this order, each read at a later state than the one before: a picture added in between is
    # loaded but not yet live, one removed is live but not loaded. Neither is returned until the next
    # call, which sees another change counter.
    live = catalog.live_nums(encoder_id).nums
    pointer = catalog.snapshot(encoder_id)
    name = pointer.name if pointer else None
    if old is not None and old.snapshot == name:
        parts, from_snapshot, last_seq = list(old.parts), old.from_snapshot, old.last_seq
    else:
        loaded = load_snapshot(catalog, encoder_id, pointer)
        parts = [Part(loaded, loaded.ids, alive=loaded.ids)] if loaded else []
        from_snapshot = bool(parts)
        last_seq = pointer.last_seq if pointer and parts else 0
    new = catalog.vectors(encoder_id, after_seq=last_seq)
    if len(new.nums):
        parts.append(_exact(new.nums, new.vectors))
    alive = _alive(_merge(parts, keep_first=from_snapshot), live)
    return LiveVectors(catalog, encoder_id, changes, name, new.last_seq, alive, from_snapshot)


def _exact(nums: Int64, vectors: npt.NDArray[np.float16]) -> Part:
    nums_sorted = np.sort(nums)
    return Part(VectorIndex.build(nums, vectors, kind="exact"), nums_sorted, nums_sorted)


def _merge(parts: Sequence[Part], *, keep_first: bool) -> list[Part]:
    """Join the newest parts while one is at least half as large as the one before it.

    The snapshot (`keep_first`) stays as it is. A num in two parts keeps its newer vector.
    """
    merged = list(parts)
    while len(merged) > 1 + keep_first and 2 * len(merged[-1].nums) >= len(merged[-2].nums):
        newer, older = merged.pop(), merged.pop()
        only_old = np.setdiff1d(older.nums, newer.nums, assume_unique=True)
        vectors = np.concatenate(
            [older.index.vectors_of(only_old), newer.index.vectors_of(newer.nums)]
        )
        # the parts' codes are half precision already: nothing is lost
        merged.append(_exact(np.concatenate([only_old, newer.nums]), vectors.astype(np.float16)))
    return merged


def _alive(parts: Sequence[Part], live: Int64) -> tuple[Part, ...]:
    """Return the parts with their `alive` updated: those live now and in no newer part."""
    ends = [int(nums[-1]) + 1 for nums in (live, *(part.nums for part in parts)) if len(nums)]
    wanted = np.zeros(max(ends, default=0), dtype=bool)  # by num: nums are small integers
    wanted[live] = True
    renewed = []
    for part in reversed(parts):
        alive = part.nums[wanted[part.nums]]
        wanted[alive] = False
        renewed.append(Part(part.index, part.nums, alive))
    return tuple(reversed(renewed))


def _search_part(
    part: Part, vector: Float32, k: int, allowed: Int64 | None
) -> tuple[Int64, Float32]:
    """Search one part as LiveVectors.search does."""
    dead, mask = len(part.nums) - len(part.alive), None
    if allowed is not None:
        mask, dead = part.alive[np.isin(part.alive, allowed, assume_unique=True)], 0
    elif dead > FEW_DEAD:
        mask, dead = part.alive, 0
    if k == 0 or (mask is not None and not len(mask)):
        return np.empty(0, np.int64), np.empty(0, np.float32)
    only = None if mask is None else PictureSet.of_sorted(mask)
    nums, scores = part.index.search(vector[None, :], k + dead, allowed=only)[0]
    if dead:
        alive = np.isin(nums, part.alive)
        nums, scores = nums[alive], scores[alive]
    return nums[:k], scores[:k]


def _hash(nums: Int64) -> npt.NDArray[np.uint64]:
    """Hash integers to a fixed random order by the finalizer of splitmix64 (Steele et al. 2014)."""
    x = nums.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
