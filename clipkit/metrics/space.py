"""The health of an embedding space, and the distance between two batches of embeddings.

Vectors are (N, D), any float type, and must be finite. What takes pairs of vectors takes at most
2,000 of each batch (uniformity: 4,000), drawn by `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError

Float64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating]
_CHUNK = 8192
_BATCH_SAMPLE = 2000
_UNIFORMITY_SAMPLE = 4000


def variance(vectors: Rows) -> float:
    """Mean squared distance to the mean vector: the trace of the covariance. 0 if collapsed."""
    return float(covariance_spectrum(vectors).sum())


def covariance_spectrum(vectors: Rows) -> Float64:
    """Eigenvalues of the covariance (divided by N), largest first, float64 (D,)."""
    _check(vectors)
    centre, scatter = _mean(vectors), np.zeros((vectors.shape[1],) * 2)
    for start in range(0, len(vectors), _CHUNK):
        block = vectors[start : start + _CHUNK].astype(np.float64) - centre
        scatter += block.T @ block
    spectrum = np.linalg.eigvalsh(scatter / len(vectors))[::-1]
    return np.asarray(np.maximum(spectrum, 0.0), np.float64)


def effective_rank(spectrum: npt.ArrayLike) -> float:
    """exp of the entropy of a spectrum normalised to sum 1: r equal values give r.

    Roy & Vetterli 2007, "The effective rank", of the covariance matrix; 0 if all values are 0.
    """
    values = np.asarray(spectrum, np.float64)
    if values.sum() <= 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def alignment(left: Rows, right: Rows) -> float:
    """Mean squared distance of matching rows (Wang & Isola 2020, alpha = 2); 0 is perfect."""
    _check(left)
    _check(right)
    if left.shape != right.shape:
        raise InputError(
            f"{left.shape} and {right.shape} vectors; alignment compares matching rows"
        )
    total = 0.0
    for start in range(0, len(left), _CHUNK):
        block = slice(start, start + _CHUNK)
        total += float(((left[block].astype(np.float64) - right[block]) ** 2).sum())
    return total / len(left)


def uniformity(vectors: Rows, *, t: float = 2.0, seed: int = 0) -> float:
    """log mean exp(-t |x - y|^2) over pairs of rows; lower is more uniform, 0 is collapsed.

    Wang & Isola 2020, arXiv 2005.10242. All pairs among at most 4,000 rows drawn by seed.
    """
    if len(vectors) < 2:
        raise InputError(f"uniformity of {len(vectors)} vectors; pairs need at least 2")
    rows = _sample(vectors, _UNIFORMITY_SAMPLE, seed)
    pairs = np.exp(-t * _squared_distances(rows, rows))
    return math.log(_mean_off_diagonal(pairs))


def modality_gap(pictures: Rows, texts: Rows) -> float:
    """Distance between the modalities' mean vectors (Liang et al. 2022, arXiv 2203.02053)."""
    return mean_shift(pictures, texts)


def mean_shift(before: Rows, after: Rows) -> float:
    """Distance between the mean vectors of two batches."""
    _check_two(before, after)
    return float(np.linalg.norm(_mean(before) - _mean(after)))


def mmd2(x: Rows, y: Rows, *, seed: int = 0) -> float:
    """Squared maximum mean discrepancy, unbiased, so below 0 at times (Gretton et al. 2012).

    Gaussian kernel, its sigma the median distance within the pooled sample of <= 2,000 rows each.
    """
    x, y = _two_samples(x, y, seed)
    within_x, within_y, across = _three_distances(x, y)
    upper = [d[np.triu_indices(len(d), 1)] for d in (within_x, within_y)]
    scale = 2.0 * float(np.median(np.concatenate([*upper, across.ravel()])))
    if scale == 0:  # over half of the pairs coincide: any width tells the others from them
        scale = 2.0 * float(max(within_x.max(), within_y.max(), across.max())) or 1.0
    kernel_x, kernel_y = np.exp(-within_x / scale), np.exp(-within_y / scale)
    both = 2.0 * float(np.exp(-across / scale).mean())
    return _mean_off_diagonal(kernel_x) + _mean_off_diagonal(kernel_y) - both


def energy_distance(x: Rows, y: Rows, *, seed: int = 0) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs, at least 0 (Szekely & Rizzo 2013).

    Of at most 2,000 rows each, drawn by seed.
    """
    x, y = _two_samples(x, y, seed)
    within_x, within_y, across = (float(np.sqrt(d).mean()) for d in _three_distances(x, y))
    return max(0.0, 2.0 * across - within_x - within_y)


def permutation_p(
    statistic: Callable[[Float64, Float64], float],
    x: Rows,
    y: Rows,
    *,
    seed: int = 0,
    permutations: int = 199,
    sample: int = 500,
) -> float:
    """P-value of "x and y come from one distribution": share of shuffles with as large a statistic.

    At most `sample` rows of each, drawn by seed. The smallest value is 1 / (permutations + 1).
    """
    _check_two(x, y)
    x, y = _sample(x, sample, seed), _sample(y, sample, seed + 1)
    pooled, rng = np.concatenate([x, y]), np.random.default_rng(seed)
    seen, extreme = statistic(x, y), 0
    tolerance = 1e-12 * max(1.0, abs(seen))  # the same split, summed in another order, counts
    for _ in range(permutations):
        shuffled = pooled[rng.permutation(len(pooled))]
        extreme += statistic(shuffled[: len(x)], shuffled[len(x) :]) >= seen - tolerance
    return (extreme + 1) / (permutations + 1)


def hubness(neighbours: npt.ArrayLike, n: int) -> float:
    """Skewness of how often each of n rows is someone's neighbour; 0 is even, > 1 means hubs.

    neighbours (Q, K) are row numbers; negative ones (no neighbour found) are skipped. Radovanovic,
    Nanopoulos, Ivanovic 2010, "Hubs in Space".
    """
    listed = np.asarray(neighbours, np.int64).ravel()
    if n < 1 or (listed.size and listed.max() >= n):
        raise InputError(f"{n} rows and a neighbour {listed.max(initial=-1)}; numbers go below n")
    counts = np.bincount(listed[listed >= 0], minlength=n).astype(np.float64)
    deviation = counts - counts.mean()
    spread = float((deviation**2).mean())
    return float((deviation**3).mean()) / spread**1.5 if spread else 0.0


def neighbour_overlap(left: npt.ArrayLike, right: npt.ArrayLike) -> Float64:
    """Share of the K neighbours in common, row by row: two (N, K), each row distinct -> (N,).

    Negative numbers (no neighbour found) are in common with nothing.
    """
    a, b = np.asarray(left, np.int64), np.asarray(right, np.int64)
    if a.ndim != 2 or a.shape != b.shape or a.shape[1] == 0:
        raise InputError(f"neighbours {a.shape} and {b.shape}; both must be (N, K), K at least 1")
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    common = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)
    return np.asarray(common.sum(axis=1) / a.shape[1], np.float64)


def _check(vectors: Rows) -> None:
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"vectors have shape {vectors.shape}; (n, dimensions) is needed, none 0")
    for start in range(0, len(vectors), _CHUNK):
        good = np.isfinite(vectors[start : start + _CHUNK]).all(axis=1)
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            raise InputError(f"vector {row} is not finite (NaN or infinity); leave it out")


def _check_two(x: Rows, y: Rows) -> None:
    _check(x)
    _check(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"vectors of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")


def _mean(vectors: Rows) -> Float64:
    return np.asarray(vectors.mean(axis=0, dtype=np.float64), np.float64)


def _sample(vectors: Rows, most: int, seed: int) -> Float64:
    _check(vectors)
    if len(vectors) > most:
        rows = np.random.default_rng(seed).choice(len(vectors), most, replace=False)
        vectors = vectors[np.sort(rows)]
    return vectors.astype(np.float64)


def _two_samples(x: Rows, y: Rows, seed: int) -> tuple[Float64, Float64]:
    _check_two(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError(f"batches of {len(x)} and {len(y)} vectors; each needs at least 2")
    return _sample(x, _BATCH_SAMPLE, seed), _sample(y, _BATCH_SAMPLE, seed + 1)


def _squared_distances(x: Float64, y: Float64) -> Float64:
    squares = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    return np.asarray(np.maximum(squares - 2.0 * (x @ y.T), 0.0), np.float64)


def _three_distances(x: Float64, y: Float64) -> tuple[Float64, Float64, Float64]:
    """Squared distances within x, within y (their diagonals exactly 0), and across."""
    within_x, within_y = _squared_distances(x, x), _squared_distances(y, y)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    return within_x, within_y, _squared_distances(x, y)


def _mean_off_diagonal(square: Float64) -> float:
    n = len(square)
    return float(square.sum() - np.trace(square)) / (n * (n - 1))
