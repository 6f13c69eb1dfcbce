"""Health of an embedding space, and a two-sample test of two batches of embeddings.

Vectors are (N, D), any float type, and must be finite; functions raise InputError if they are not.

The two-sample test takes three statistics: the shift of the mean, squared maximum mean discrepancy
(Gretton et al. 2012) and energy distance (Szekely & Rizzo 2013). All shuffles of the batches are
evaluated at once: distances are computed once, and a shuffle is a row of zeros and ones in a matrix
product. The verdict is the smallest of the three p-values, compared with the smallest under every
shuffle (Westfall & Young 1993), so that three tests raise no more false alarms than one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float64, Floats
from clipkit.errors import InputError

_CHUNK = 8192
_UNIFORMITY_SAMPLE = 4000


def variance(vectors: Floats) -> float:
    """Return the mean squared distance to the mean vector: the covariance's trace, 0 if collapsed."""
    return float(covariance_spectrum(vectors).sum())


def covariance_spectrum(vectors: Floats) -> Float64:
    """Return the eigenvalues of the covariance (divided by N), largest first, float64 (D,)."""
    _check(vectors)
    centre, scatter = _mean(vectors), np.zeros((vectors.shape[1],) * 2)
    for start in range(0, len(vectors), _CHUNK):
        block = vectors[start : start + _CHUNK].astype(np.float64) - centre
        scatter += block.T @ block
    spectrum = np.linalg.eigvalsh(scatter / len(vectors))[::-1]
    return np.asarray(np.maximum(spectrum, 0.0), np.float64)


def effective_rank(spectrum: npt.ArrayLike) -> float:
    """Return exp of the entropy of a spectrum normalised to sum 1: r equal values give r.

    Roy & Vetterli 2007, "The effective rank", of the covariance matrix; 0 if all values are 0.
    """
    values = np.asarray(spectrum, np.float64)
    if values.sum() <= 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def alignment(left: Floats, right: Floats) -> float:
    """Return the mean squared distance of matching rows (Wang & Isola 2020, alpha = 2); 0 is perfect."""
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


def uniformity(vectors: Floats, *, seed: int = 0) -> float:
    """Return log mean exp(-2 |x - y|^2) over pairs of rows; lower is more uniform, 0 is collapsed.

    Wang & Isola 2020, arXiv 2005.10242. All pairs among at most 4,000 rows drawn by seed.
    """
    if len(vectors) < 2:
        raise InputError(f"uniformity of {len(vectors)} vectors; pairs need at least 2")
    _check(vectors)
    rows = _sample(vectors, _UNIFORMITY_SAMPLE, np.random.default_rng(seed))
    pairs, n = np.exp(-2 * _squared_distances(rows)), len(rows)
    return math.log(float(pairs.sum() - np.trace(pairs)) / (n * (n - 1)))


def mean_shift(before: Floats, after: Floats) -> float:
    """Return the distance between the mean vectors of two batches; of pictures and texts it is the
    modality gap (Liang et al. 2022, arXiv 2203.02053)."""
    _check_two(before, after)
    return float(np.linalg.norm(_mean(before) - _mean(after)))


def hubness(neighbours: npt.ArrayLike, n: int) -> float:
    """Return the skewness of how often each of n rows is a neighbour; 0 is even, > 1 means hubs.

    neighbours (Q, K) are row numbers; negative ones (no neighbour found) are skipped. Radovanovic,
    Nanopoulos, Ivanovic 2010, "Hubs in Space".
    """
    listed = np.asarray(neighbours, np.int64).ravel()
    if n < 1 or (listed.size and listed.max() >= n):
        raise InputError(f"{n} rows and a neighbour {listed.max(initial=-1)}; numbers go below n")
    counts = np.bincount(listed[listed >= 0], minlength=n)
    if counts.min() == counts.max():  # scipy returns NaN
        return 0.0
    from scipy.stats import skew

    return float(skew(counts))


def neighbour_overlap(left: npt.ArrayLike, right: npt.ArrayLike) -> Float64:
    """Return the share of common neighbours, row by row: two (N, K), each row distinct -> (N,).

    Negative numbers (no neighbour found) are in common with nothing.
    """
    a, b = np.asarray(left, np.int64), np.asarray(right, np.int64)
    if a.ndim != 2 or a.shape != b.shape or a.shape[1] == 0:
        raise InputError(f"neighbours {a.shape} and {b.shape}; both must be (N, K), K at least 1")
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    common = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)
    return np.asarray(common.sum(axis=1) / a.shape[1], np.float64)


# ---- the two-sample test


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic between the batches, and its distribution over shuffled batches."""

    value: float
    usual: float  # median over shuffles
    bound: float  # exceeded by 5 % of the shuffles
    p_value: float


@dataclass(frozen=True, slots=True)
class TwoSampleTest:
    """The result of `compare_batches`. `p_value` is of "both have one distribution", from all three
    statistics. `detectable`: a mean shift of this length, in any direction, is detected nine times in
    ten."""

    statistics: Mapping[str, Statistic]  # mean_shift, mmd2, energy_distance
    p_value: float
    detectable: float
    sizes: tuple[int, int]  # rows that were compared


def compare_batches(
    before: Floats,
    after: Floats,
    *,
    level: float = 0.05,
    permutations: int = 499,
    sample: int = 2000,
    seed: int = 0,
) -> TwoSampleTest:
    """Test whether (N, D) and (M, D) have one distribution, on at most `sample` rows of each.

    Raises InputError for fewer than 2 rows in a batch, different dimensions, values that are not
    finite, or too few permutations for a p-value of `level`.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level}; it must lie between 0 and 1, such as 0.05")
    if permutations + 1 < 1 / level:
        raise InputError(
            f"{permutations} permutations give no p-value below {1 / (permutations + 1):.3g}; "
            f"take at least {round(1 / level) - 1} for a level of {level:g}"
        )
    _check_two(before, after)
    if min(len(before), len(after)) < 2:
        raise InputError(
            f"batches of {len(before)} and {len(after)} vectors; each needs at least 2"
        )
    random = np.random.default_rng(seed)
    x, y = (_sample(rows, sample, random) for rows in (before, after))
    pooled, n, m = np.concatenate([x, y]), len(x), len(y)
    member = np.zeros((permutations + 1, n + m))  # row 0 is the batches as they are
    member[:, :n] = 1
    member[1:] = random.permuted(member[1:], axis=1)
    # sums * (1 / n + 1 / m) - total / m is the difference of the means
    apart = (member @ pooled) * (1 / n + 1 / m) - pooled.sum(axis=0) / m
    shuffled = np.stack([np.linalg.norm(apart, axis=1), *_pairwise(pooled, member, n, m)])
    at_least = np.stack([_share_at_least(values) for values in shuffled])
    smallest = at_least.min(axis=0)
    p_value = float((smallest <= smallest[0] + 1e-12).mean())
    alone = float(np.quantile(smallest[1:], level))  # the p-value that one statistic needs
    names = ("mean_shift", "mmd2", "energy_distance")
    statistics = {
        name: Statistic(
            float(values[0]),
            float(np.median(values[1:])),
            float(np.quantile(values[1:], 0.95)),
            float(share[0]),
        )
        for name, values, share in zip(names, shuffled, at_least, strict=True)
    }
    return TwoSampleTest(statistics, p_value, _detectable(pooled, apart[1:], alone), (n, m))


def _pairwise(pooled: Float64, member: Float64, n: int, m: int) -> tuple[Float64, Float64]:
    """Return unbiased MMD^2 and energy distance for each row of member (R, n + m), n ones; (R,) each.

    MMD has a Gaussian kernel whose sigma is the median distance; unbiased, it may fall below 0.
    """
    squared = _squared_distances(pooled)
    np.fill_diagonal(squared, 0)
    scale = 2 * float(np.median(squared[np.triu_indices(n + m, 1)]))
    # If over half of the pairs coincide, any width tells the others from them.
    scale = scale or 2 * float(squared.max()) or 1.0
    kernel_xx, kernel_yy, kernel_xy = _sums(np.exp(-squared / scale), member)
    within = (kernel_xx - n) / (n * (n - 1)) + (kernel_yy - m) / (m * (m - 1))  # kernel(x, x) = 1
    far_xx, far_yy, far_xy = _sums(np.sqrt(squared), member)
    energy = 2 * far_xy / (n * m) - far_xx / n**2 - far_yy / m**2
    return within - 2 * kernel_xy / (n * m), np.maximum(energy, 0)


def _sums(table: Float64, member: Float64) -> tuple[Float64, Float64, Float64]:
    """Return sums of a symmetric table (n, n) within members, within others, and across; (R,) each."""
    rows = table.sum(axis=1)
    inside: Float64 = np.einsum("ri,ri->r", member @ table, member)
    across = member @ rows - inside
    return inside, rows.sum() - inside - 2 * across, across


def _share_at_least(values: Float64) -> Float64:
    """Return, for each value (R,), the share of all that are at least as large, up to rounding."""
    slack = 1e-12 * max(1.0, float(np.abs(values).max()))
    below = np.searchsorted(np.sort(values), values - slack)
    return np.asarray(1 - below / len(values), np.float64)


def _detectable(pooled: Float64, noise: Float64, alone: float) -> float:
    """Return the length of a mean shift that is detected nine times in ten.

    noise (R, D) are the differences of shuffled means. On top of one of them, e, a shift of length d
    along u measures |d u + e|, which reaches the detected length b once d is at least
    sqrt((e u)^2 + b^2 - |e|^2) - e u. Measured along the widest direction, where noise hides most.
    """
    lengths = np.linalg.norm(noise, axis=1)
    bound = float(np.quantile(lengths, 1 - alone))
    widest = np.linalg.eigh(np.atleast_2d(np.cov(pooled, rowvar=False)))[1][:, -1]
    along = noise @ widest
    needed = np.sqrt(np.maximum(0, along**2 + bound**2 - lengths**2)) - along
    return float(np.quantile(needed, 0.9))


# ---- checks and samples


def _check(vectors: Floats) -> None:
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"vectors have shape {vectors.shape}; (n, dimensions) is needed, none 0")
    for start in range(0, len(vectors), _CHUNK):
        good = np.isfinite(vectors[start : start + _CHUNK]).all(axis=1)
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            raise InputError(f"vector {row} is not finite (NaN or infinity); leave it out")


def _check_two(x: Floats, y: Floats) -> None:
    _check(x)
    _check(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"vectors of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")


def _mean(vectors: Floats) -> Float64:
    return np.asarray(vectors.mean(axis=0, dtype=np.float64), np.float64)


def _sample(vectors: Floats, most: int, random: np.random.Generator) -> Float64:
    if len(vectors) > most:
        vectors = vectors[np.sort(random.choice(len(vectors), most, replace=False))]
    return vectors.astype(np.float64)


def _squared_distances(rows: Float64) -> Float64:
    squares = np.einsum("ij,ij->i", rows, rows)
    return np.asarray(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0), np.float64)
