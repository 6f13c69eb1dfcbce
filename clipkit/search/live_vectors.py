"""One encoder's vectors of the live pictures, kept up to date with the catalog.

They are parts: the catalog's snapshot, if it has one, and exact indexes in memory of the vectors that
are newer (of a greater seq). `follow` makes the next state from one by loading only new vectors, so a
running indexer costs a search milliseconds; a search uses one state from beginning to end. New parts
are merged like digits of a binary counter, up to MERGED rows: few parts, little copying. Where more is
new, the indexing process builds the next snapshot, which a `Follower` opens in the background.

A snapshot that is lost, damaged or another encoder's is never searched: the catalog is the truth.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Int64
from clipkit.catalog import Catalog
from clipkit.errors import ClipkitError, IndexDamaged
from clipkit.index import Snapshot, VectorIndex, load_snapshot, sampling_hash
from clipkit.picture_set import PictureSet
from clipkit.search.ranking import Rankings

log = logging.getLogger(__name__)

SAMPLE = 2_000  # pictures from which a query's scores by chance are estimated
MERGED = 50_000  # rows of the largest part that others are merged into


class SnapshotDamaged(IndexDamaged):
    """Rows of the snapshot were not what was written when a search read them."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An index, and which of its vectors are alive: those of live pictures without a newer vector."""

    index: Snapshot | VectorIndex
    ids: PictureSet  # of all its vectors
    alive: PictureSet


@dataclass(frozen=True, eq=False)
class LiveVectors:
    """One immutable state, which threads may share. Nums are the catalog's `num`."""

    catalog: Catalog
    encoder_id: str
    changes: int  # the catalog's change counter before this was read; -1: nothing was
    snapshot: str | None  # the name of the snapshot that is parts[0], if one is
    last_seq: int
    parts: tuple[Part, ...]  # oldest first
    newest: str | None = None  # the name of the snapshot that the catalog points to
    rankings: Rankings = field(default_factory=Rankings)  # of the last searches of this state

    @property
    def spec(self) -> str:
        """The encoder's spec, for messages; empty if the catalog does not know it."""
        specs = (row.spec for row in self.catalog.encoders() if row.encoder_id == self.encoder_id)
        return next(specs, "")

    @cached_property
    def pictures(self) -> PictureSet:
        """All pictures that a search can return."""
        pictures = PictureSet()
        for part in self.parts:
            pictures = pictures | part.alive if pictures else part.alive
        return pictures

    @cached_property
    def sample(self) -> Float32:
        """Vectors (S, D) of up to SAMPLE pictures; S = 0 for an empty library.

        This is a bottom-k sample: always the pictures whose nums have the least hash. A picture that is
        added or removed changes at most one of them. Of a snapshot the least are known when it is
        opened, so no row of it is read; where very many of these are dead, there are fewer.
        """
        own = np.empty(0, np.int64), np.empty((0, 0), np.float32)
        newer, bound = self.parts, 2**64 - 1
        if self.snapshot is not None:
            index, alive = self.parts[0].index, self.parts[0].alive
            assert isinstance(index, Snapshot)
            kept = alive.has(index.sample_ids)
            own, newer = (index.sample_ids[kept], index.sample[kept]), self.parts[1:]
            if len(index.sample_ids) < index.size:  # beyond the greatest of them, nothing is known
                bound = int(sampling_hash(index.sample_ids).max())
        nums = np.concatenate([own[0], *(part.alive.nums for part in newer)])
        hashes = sampling_hash(nums)
        chosen = hashes <= bound
        if np.count_nonzero(chosen) > SAMPLE:
            chosen = hashes <= np.partition(hashes, SAMPLE - 1)[SAMPLE - 1]
        of_own, of_newer = chosen[: len(own[0])], nums[len(own[0]) :][chosen[len(own[0]) :]]
        rows = [own[1][of_own], self.vectors_of(of_newer)]
        return np.concatenate([some for some in rows if len(some)] or rows[:1])

    def search(
        self,
        vector: Float32,
        k: int,
        *,
        allowed: PictureSet | None = None,
        floor: float = -np.inf,
    ) -> tuple[Int64, Float32]:
        """Return up to k nearest of the pictures in `allowed` (None: all): nums and cosines, by
        falling cosine, then by num. Those below `floor` may be left out. Raises SnapshotDamaged."""
        results = []
        for part in self.parts:
            alive = part.alive if allowed is None else part.alive & allowed
            if k and alive:
                with self._damage_named(part):
                    every = len(alive) == part.index.size
                    some = None if every else alive
                    if isinstance(part.index, Snapshot):
                        results += part.index.search(vector[None], k, allowed=some, floor=floor)
                    else:
                        results += part.index.search(vector[None], k, allowed=some)
        nums = np.concatenate([np.empty(0, np.int64), *(nums for nums, _ in results)])
        scores = np.concatenate([np.empty(0, np.float32), *(scores for _, scores in results)])
        if len(results) > 1:
            order = np.lexsort((nums, -scores))[:k]
            nums, scores = nums[order], scores[order]
        return nums, scores

    def vectors_of(self, nums: Int64) -> Float32:
        """Return the vectors (M, D) of those of the unique `nums` that are alive, in any order. Raises
        SnapshotDamaged."""
        rows = []
        for part in self.parts:
            own = nums[part.alive.has(nums)]
            if len(own):
                with self._damage_named(part):
                    rows.append(part.index.vectors_of(own))
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def blocks(self, rows: int) -> Iterator[tuple[Int64, Float32]]:
        """Yield nums (M,) and vectors (M, D) of all pictures, up to `rows` at a time, by num within each
        part. Raises SnapshotDamaged."""
        for part in self.parts:
            alive = part.alive.nums
            for start in range(0, len(alive), rows):
                nums = alive[start : start + rows]
                with self._damage_named(part):
                    yield nums, part.index.vectors_of(nums)

    def unit_vector(self, num: int | None) -> Float32 | None:
        """Return the unit vector (D,) of a picture; None if it is not among these."""
        rows = self.vectors_of(np.array([] if num is None else [num], dtype=np.int64))
        return rows[0] / np.linalg.norm(rows[0]) if len(rows) else None

    @contextmanager
    def _damage_named(self, part: Part) -> Iterator[None]:
        try:
            yield
        except IndexDamaged as error:
            if isinstance(part.index, VectorIndex):
                raise
            raise SnapshotDamaged(str(error)) from error


def follow(
    catalog: Catalog,
    encoder_id: str,
    old: LiveVectors | None = None,
    *,
    unusable: Collection[str] = (),
) -> LiveVectors:
    """Return the state of the catalog as it is now; `old` itself if nothing has changed since.

    `old` keeps its snapshot. Without it, the one that the catalog points to is loaded, unless it is
    `unusable`. The cost is that of what changed, but for copying a bitmap of the snapshot's nums.
    """
    if old is None:
        old = _start(catalog, encoder_id, unusable)
    changes = catalog.change_counter()
    if old.changes == changes:
        return old
    # In this order, each read at a later state than the one before: a picture removed in between is
    # dead for the next call, which sees another change counter, and its row is not found.
    gone = catalog.dead()
    pointer = catalog.snapshot(encoder_id)
    new = catalog.vectors(encoder_id, after_seq=old.last_seq)
    parts = list(old.parts)
    if not new.vectors.shape[1]:  # the encoder is not registered, or not any more
        parts = []
    elif len(new.nums):
        parts.append(_exact(new.nums, new.vectors))
        _merge(parts, first=old.snapshot is not None)
    alive = []
    for part in reversed(parts):
        alive.append(Part(part.index, part.ids, part.ids - gone))
        gone = gone | part.ids if part is not parts[0] else gone
    return replace(
        old,
        changes=changes,
        last_seq=max(new.last_seq, old.last_seq),
        parts=tuple(reversed(alive)),
        newest=pointer.name if pointer else None,
        rankings=Rankings(),
    )


def _start(catalog: Catalog, encoder_id: str, unusable: Collection[str]) -> LiveVectors:
    """Return a state with the catalog's snapshot, or with nothing, before anything else is read."""
    pointer = catalog.snapshot(encoder_id)
    if pointer is not None and pointer.name not in unusable:
        snapshot = load_snapshot(catalog, encoder_id, pointer)
        if snapshot is not None:
            ids = PictureSet.of_sorted(snapshot.ids)
            part = Part(snapshot, ids, ids)
            return LiveVectors(catalog, encoder_id, -1, pointer.name, pointer.last_seq, (part,))
    return LiveVectors(catalog, encoder_id, -1, None, 0, ())


class Follower:
    """The newest state of a catalog's vectors, for threads to share.

    Only the first load makes searches wait. Afterwards one thread at a time makes the next state while
    the others go on with the present one, and a new snapshot is opened in the background.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._making = threading.Lock()
        self._state: LiveVectors | None = None
        self._unusable: set[str] = set()  # names of snapshots that were found damaged
        self.opening: threading.Thread | None = None  # the last to open a snapshot

    def has(self, encoder_id: str) -> bool:
        """Return whether `current` would return without loading an encoder's vectors first."""
        state = self._state
        return state is not None and state.encoder_id == encoder_id

    def current(self, encoder_id: str) -> LiveVectors:
        """Return the vectors as of now, or as of a moment ago while another thread looks."""
        state = self._state
        first = state is None or state.encoder_id != encoder_id
        if self._making.acquire(blocking=first):
            try:
                state = self._state
                if state is None or state.encoder_id != encoder_id:
                    state = None
                state = follow(self._catalog, encoder_id, state, unusable=self._unusable)
                self._state = state
                if state.newest not in (None, state.snapshot, *self._unusable):
                    self._open(state)
            finally:
                self._making.release()
        assert state is not None
        return state

    def without_snapshot(self, damaged: LiveVectors, why: IndexDamaged) -> LiveVectors:
        """Return a state without the snapshot of this one, which is not loaded again."""
        with self._making:
            state = self._state
            if damaged.snapshot is not None and damaged.snapshot not in self._unusable:
                log.warning("snapshot not used, searching the catalog's vectors instead: %s", why)
                self._unusable.add(damaged.snapshot)
            if state is None or state.snapshot in self._unusable:
                state = follow(self._catalog, damaged.encoder_id, unusable=self._unusable)
                self._state = state
            return state

    def _open(self, state: LiveVectors) -> None:
        """Open the snapshot that the catalog points to in a thread of its own."""
        if self.opening is None or not self.opening.is_alive():
            arguments = (state.encoder_id, state.newest)
            self.opening = threading.Thread(
                target=self._change_over, args=arguments, name="clipkit-snapshot", daemon=True
            )
            self.opening.start()

    def _change_over(self, encoder_id: str, name: str) -> None:
        try:
            fresh = _start(self._catalog, encoder_id, self._unusable)
            if fresh.snapshot is None:
                self._unusable.add(name)  # the present parts have everything, too
                return
            fresh = follow(self._catalog, encoder_id, fresh)
            with self._making:
                if self._state is not None and self._state.encoder_id == encoder_id:
                    self._state = follow(self._catalog, encoder_id, fresh)
        except ClipkitError as error:  # such as that the catalog was closed; the next search looks
            log.info("snapshot %s was not opened: %s", name, error)


def _exact(nums: Int64, vectors: npt.NDArray[np.float16]) -> Part:
    ids = PictureSet(nums)
    return Part(VectorIndex.build(nums, vectors, kind="exact"), ids, ids)


def _merge(parts: list[Part], *, first: bool) -> None:
    """Join the newest parts while one is at least half as large as the one before it, up to MERGED rows.

    The snapshot (parts[0], if `first`) stays as it is. A num in two parts keeps its newer vector.
    """
    while len(parts) > 1 + first:
        older, newer = parts[-2:]
        if 2 * len(newer.ids) < len(older.ids) or len(newer.ids) + len(older.ids) > MERGED:
            return
        assert isinstance(older.index, VectorIndex) and isinstance(newer.index, VectorIndex)
        ids = older.ids | newer.ids
        parts[-2:] = [Part(VectorIndex.joined(older.index, newer.index), ids, ids)]
