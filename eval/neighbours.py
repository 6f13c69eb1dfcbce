"""Exact nearest neighbours for evaluators, through the index that the product searches with."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from clipkit.index import VectorIndex
from eval.features import OnProgress, Stopped

__all__ = ["nearest_known", "neighbours"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
_BLOCK = 1024  # rows asked for at a time


def neighbours(
    vectors: Float32,
    k: int,
    *,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Int64, Float32]:
    """Rows and cosines, both (N, k), of each row's k nearest others, by (-cosine, row).

    vectors (N, D), unit rows (InputError if not), k < N. Raises Stopped once `stop` is set.
    """
    found = nearest_known(vectors, vectors, k + 1, on_progress=on_progress, stop=stop)
    rows, scores = found
    # the row itself is not a neighbour; with many copies it may not even be among the k + 1
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True
    return rows[~own].reshape(-1, k), scores[~own].reshape(-1, k)


def nearest_known(
    queries: Float32,
    known: Float32,
    k: int,
    *,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Int64, Float32]:
    """Rows of `known` (N, D) and cosines, both (Q, k), nearest to each query (Q, D); k <= N."""
    index = VectorIndex.build(np.arange(len(known)), known, kind="exact")
    blocks = list(_ask(index, queries, k, on_progress, stop))
    rows = np.concatenate([block[0] for block in blocks])
    return rows, np.concatenate([block[1] for block in blocks])


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
