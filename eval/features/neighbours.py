"""Exact nearest neighbours for evaluators, through the index that the product searches with."""

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
LOOKED_AT = 10_000  # pictures, drawn at random, whose neighbours an evaluator looks for
_BLOCK = 1024  # rows asked for at a time


def check_unit(what: str, rows: Float32) -> None:
    """InputError, naming the row, unless all rows (N, D) are finite and of unit length."""
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
    """Rows and cosines, both (Q, k), of the k nearest others of `rows` (Q,), which are all by default.

    vectors (N, D), unit rows (InputError if not), k < N. Equal cosines are in the order of rows, or of
    a random order by `seed`: where two models collapse, the first rows would be everyone's neighbours
    in both, as if the models agreed. Raises Stopped once `stop` is set.
    """
    asking = np.arange(len(vectors)) if rows is None else rows
    found, scores = nearest_known(
        vectors[asking], vectors, k + 1, seed=seed, on_progress=on_progress, stop=stop
    )
    # the row itself is not a neighbour; with many copies it may not even be among the k + 1
    own = found == asking[:, None]
    own[~own.any(axis=1), -1] = True
    return found[~own].reshape(-1, k), scores[~own].reshape(-1, k)


def nearest_known(
    queries: Float32,
    known: Float32,
    k: int,
    *,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Int64, Float32]:
    """Rows of `known` (N, D) and cosines, both (Q, k), nearest to each query (Q, D); k <= N."""
    ids = np.arange(len(known))
    if seed is not None:
        ids = np.random.default_rng(seed).permutation(ids)
    index = VectorIndex.build(ids, known, kind="exact")
    blocks = list(_ask(index, queries, k, on_progress, stop))
    found = np.concatenate([block[0] for block in blocks])
    return np.argsort(ids)[found], np.concatenate([block[1] for block in blocks])


def _ask(
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
