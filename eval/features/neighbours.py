"""Exact nearest neighbours for evaluators, by the index that search uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError
from clipkit.index import VectorIndex
from eval.features import OnProgress, Stopped

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
LOOKED_AT = 10_000  # pictures, drawn at random, whose neighbours an evaluator searches
_BLOCK = 1024  # queries searched at a time


def check_unit(what: str, rows: Float32) -> None:
    """Raise InputError, naming the row, unless all rows (N, D) are finite and of unit length."""
    lengths = np.linalg.norm(rows.astype(np.float32, copy=False), axis=1)
    for row in np.flatnonzero(~(np.abs(lengths - 1) < 0.01)):  # so written, NaN is unfit
        raise InputError(f"{what} {row} has length {lengths[row]:.4g}; unit vectors are expected")


def neighbours(
    vectors: Float32,
    k: int,
    *,
    rows: Int64 | None = None,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Int64, Float32]:
    """Return rows and cosines, both (Q, k), of the k nearest other vectors of `rows` (Q,), default all.

    vectors: (N, D), unit rows, k < N. Equal cosines are in the order of rows, or in a random order by
    `seed`: if two models collapse, the first rows would be the neighbours of all pictures in both, as
    if the models agreed. Raises InputError if the rows are not unit vectors, Stopped once `stop` is set.
    """
    queries = np.arange(len(vectors)) if rows is None else rows
    nearest, scores = nearest_known(
        vectors[queries], vectors, k + 1, seed=seed, on_progress=on_progress, stop=stop
    )
    # the row itself is no neighbour; with many copies it may not be among the k + 1
    own = nearest == queries[:, None]
    own[~own.any(axis=1), -1] = True
    return nearest[~own].reshape(-1, k), scores[~own].reshape(-1, k)


def nearest_known(
    queries: Float32,
    vectors: Float32,
    k: int,
    *,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Int64, Float32]:
    """Return the rows of `vectors` (N, D), k <= N, nearest to each query (Q, D), and their cosines:
    both (Q, k)."""
    ids = np.arange(len(vectors))
    if seed is not None:
        ids = np.random.default_rng(seed).permutation(ids)
    index = VectorIndex.build(ids, vectors, kind="exact")
    blocks = list(_search(index, queries, k, on_progress, stop))
    nearest = np.concatenate([block[0] for block in blocks])
    return np.argsort(ids)[nearest], np.concatenate([block[1] for block in blocks])


def _search(
    index: VectorIndex,
    queries: Float32,
    k: int,
    on_progress: OnProgress | None,
    stop: threading.Event | None,
) -> Iterator[tuple[Int64, Float32]]:
    for start in range(0, len(queries), _BLOCK):
        if stop is not None and stop.is_set():
            raise Stopped("stopped while looking for neighbours; encoded pictures are kept")
        hits = index.search(queries[start : start + _BLOCK], k)
        yield np.stack([ids for ids, _ in hits]), np.stack([scores for _, scores in hits])
        if on_progress is not None:
            done = min(start + _BLOCK, len(queries))
            on_progress("looking for neighbours", done, len(queries))
