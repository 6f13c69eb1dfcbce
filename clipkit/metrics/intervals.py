"""95 % intervals and paired tests by resampling.

The units that were sampled are resampled: pictures, not their captions (`groups`). Everything is
deterministic by `seed`. Of more than 5,000 units, 5,000 equal blocks are formed at random and
resampled in their place: variance and skewness of the mean stay the same (to 1 % of the width),
and a million units cost what five thousand do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float64, Int64
from clipkit.errors import InputError

_UNITS = 5000
_EXACT = 16  # up to so many differences all 2^16 sign patterns are counted
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, its bounds, and the number of units (pictures, if grouped) that it comes from.

    The bounds are NaN where there is no honest interval, as for one unit.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def without_bounds(cls, value: float, n: int) -> Self:
        """Return a figure whose bounds are NaN."""
        return cls(float(value), math.nan, math.nan, n)


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean of (after - before), its interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def mean_interval(
    samples: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    fraction: bool = True,
) -> Interval:
    """Return the mean of samples (n,) and its interval; samples of equal `groups` (n,) are one unit.

    Samples that all lie in 0..1 (hits, recalls, reciprocal ranks) get Wilson's score interval with
    the effective number of units, mean (1 - mean) / variance of the mean: it is the plain Wilson
    interval for ungrouped hits, stays inside 0..1, and has a width even where all are hits or none
    is (Wilson 1927; Korn & Graubard 1998). Pass `fraction=False` for figures that only happen to lie
    in 0..1, such as losses or the ranks of a perfect model. All others get the BCa bootstrap
    (Efron 1987), whose width is zero if all samples are equal.
    """
    total, size = _units(samples, groups, level=level)
    value, n = float(total.sum() / size.sum()), len(total)
    if n == 1:
        return Interval.without_bounds(value, 1)
    values = np.asarray(samples, np.float64)
    if fraction and values.min() >= 0 and values.max() <= 1:
        low, high = _wilson(value, total, size, level)
    else:
        low, high = _bca_mean(value, total, size, level, resamples, seed)
    return Interval(value, low, high, n)


def statistic_interval(
    statistic: Callable[[Int64], float],
    n: int,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return any statistic of n rows, such as a median or an mAP, with its bias-corrected bootstrap.

    `statistic` gets row numbers, int64 (n,): first 0..n-1, then `resamples` times as many drawn
    with replacement. The interval covers what sampling did; a statistic that is biased by its
    nature, as ECE is upwards while it is near 0, stays biased.
    """
    _check(n, level)
    value = float(statistic(np.arange(n)))
    if n == 1:
        return Interval.without_bounds(value, 1)
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    return Interval(value, *_corrected(drawn, value, _NORMAL.inv_cdf((1 + level) / 2)), n)


def paired_test(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Test whether `after` (n,) differs from `before` (n,), the same samples measured twice.

    The interval of the mean difference is `mean_interval`'s bootstrap. The p-value is the share of
    sign patterns, one sign per unit, under which the mean difference is at least as far from zero
    (Fisher's randomisation test): all patterns if at most 16 units differ, else `resamples` of them.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        raise InputError(
            f"paired samples have shapes {first.shape} and {second.shape};"
            " measure both models on the same pictures"
        )
    change = second - first
    interval = mean_interval(change, groups=groups, level=level, seed=seed, fraction=False)
    total, _ = _units(change, groups, level=level)
    p = _sign_flip_p(total[total != 0], resamples, seed)
    return Paired(interval.value, interval.low, interval.high, p, interval.n)


def corrected_p(changes: npt.ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Float64:
    """Return two-sided p-values (M,) of M figures' changes (M, N), each measured on the same N units,
    corrected together: the probability that any is called changed where none is, is at most the level.

    Step-down maxT (Westfall & Young 1993, Resampling-Based Multiple Testing, algorithm 4.1): a
    unit's sign flips in all figures at once, so those that move together, as MRR and recall do, are
    not corrected as if they were independent, as by Holm's correction of `paired_test`.
    Sign patterns as in `paired_test`. Raises InputError unless changes are finite and two-dimensional.
    """
    change = np.asarray(changes, np.float64)
    if change.ndim != 2 or not np.isfinite(change).all():
        raise InputError(
            f"changes have shape {change.shape}; finite numbers are needed, shape (figures, units)"
        )
    change = change[:, (change != 0).any(axis=0)]
    change = np.stack([_blocks(row, seed) for row in change]) if len(change) else change
    size = np.sqrt((change**2).sum(axis=1, keepdims=True))
    change = np.divide(change, size, out=np.zeros_like(change), where=size > 0)
    seen = np.abs(change.sum(axis=1))
    order = np.argsort(-seen, kind="stable")
    change, limit = change[order], seen[order] - 1e-9  # equal sums, added in another order, count
    extreme, patterns = np.zeros(len(change)), 0
    for signs in _sign_patterns(change.shape[1], resamples, seed):
        sums = np.abs(signs @ change.T)
        highest = np.maximum.accumulate(sums[:, ::-1], axis=1)[:, ::-1]  # of it and all below
        extreme += (highest >= limit).sum(axis=0)
        patterns += len(signs)
    result = np.empty(len(change))
    result[order] = np.maximum.accumulate(extreme / max(1, patterns))
    return result


def _check(n: int, level: float) -> None:
    if n == 0:
        raise InputError("0 samples have no interval; measure at least one")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; it must lie between 0 and 1, such as 0.95")


def _units(
    samples: npt.ArrayLike, groups: npt.ArrayLike | None, *, level: float
) -> tuple[Float64, Float64]:
    """Return per unit the sum of its samples and their number."""
    total = np.asarray(samples, np.float64)
    if total.ndim != 1:
        raise InputError(f"samples have shape {total.shape}; one number each is needed, shape (n,)")
    _check(len(total), level)
    if not np.isfinite(total).all():
        row = int(np.flatnonzero(~np.isfinite(total))[0])
        raise InputError(f"sample {row} is {total[row]}; every sample must be a finite number")
    size = np.ones_like(total)
    if groups is not None:
        of = np.asarray(groups)
        if of.shape != total.shape:
            raise InputError(
                f"groups have shape {of.shape}, samples {total.shape}; they must match"
            )
        unit = np.unique(of, return_inverse=True)[1]
        total, size = _sum_by(unit, total), _sum_by(unit, size)
    return total, size


def _blocks(values: Float64, seed: int) -> Float64:
    """Return sums of values over at most 5,000 blocks of units, the same blocks for the same seed."""
    if len(values) <= _UNITS:
        return values
    return _sum_by(np.random.default_rng(seed).permutation(len(values)) % _UNITS, values)


def _sum_by(label: Int64, values: Float64) -> Float64:
    return np.asarray(np.bincount(label, values), np.float64)


def _wilson(value: float, total: Float64, size: Float64, level: float) -> tuple[float, float]:
    """Return Wilson's interval of a fraction, its n set so that p (1 - p) / n is the variance seen."""
    variance = float(((total - value * size) ** 2).sum() / size.sum() ** 2)
    bernoulli = value * (1 - value)
    if bernoulli <= 1e-12:  # all 0 or all 1: no variance seen, each unit counts once
        effective = float(len(total))
    elif variance <= 1e-18:  # equal values in between, such as a collapsed model's chance
        return value, value
    else:
        effective = bernoulli / variance
    z2 = _NORMAL.inv_cdf((1 + level) / 2) ** 2
    centre = (value + z2 / (2 * effective)) / (1 + z2 / effective)
    half = math.sqrt(z2 * (bernoulli / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


def _bca_mean(
    value: float, total: Float64, size: Float64, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the BCa interval of the mean; its acceleration is the units' influence in closed form."""
    total, size = _blocks(total, seed), _blocks(size, seed)
    influence = total - value * size
    spread = float((influence**2).sum())
    if spread == 0:
        return value, value
    acceleration = float((influence**3).sum()) / (6 * spread**1.5)
    rng, n = np.random.default_rng(seed), len(total)
    drawn = []
    for start in range(0, resamples, step := max(1, 2_000_000 // n)):
        rows = rng.integers(0, n, (min(step, resamples - start), n))
        drawn.append(total[rows].sum(axis=1) / size[rows].sum(axis=1))
    # Resampling n units is too sure by sqrt(1 - 1/n) and by Student's t over the normal quantile
    # (Hesterberg 2015, "expanded percentile"); t by the first term of its expansion in 1/(n - 1).
    z = _NORMAL.inv_cdf((1 + level) / 2)
    z = math.sqrt(n / (n - 1)) * (z + (z**3 + z) / (4 * (n - 1)))
    return _corrected(np.concatenate(drawn), value, z, acceleration)


def _corrected(
    drawn: Float64, value: float, z: float, acceleration: float = 0.0
) -> tuple[float, float]:
    """Return the quantiles at -z and z, shifted for bias and skewness (Efron 1987, (3.9))."""
    below = float(((drawn < value).mean() + (drawn <= value).mean()) / 2)
    edge = 0.5 / len(drawn)
    bias = _NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    # Beyond its pole the formula turns round; there the outermost value is meant.
    shares = [
        _NORMAL.cdf(bias + shift / max(1 - acceleration * shift, 1e-3))
        for shift in (bias - z, bias + z)
    ]
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)


def _sign_flip_p(differences: Float64, resamples: int, seed: int) -> float:
    """Return the share of sign patterns whose sum is as far from zero as the one seen."""
    differences = _blocks(differences, seed)  # flipped together: a subgroup, as valid a test
    seen = abs(float(differences.sum()))
    seen -= 1e-9 * float(np.abs(differences).sum())  # equal sums, added in another order, count
    extreme = patterns = 0
    for signs in _sign_patterns(len(differences), resamples, seed):
        extreme += int((np.abs(signs @ differences) >= seen).sum())
        patterns += len(signs)
    return extreme / patterns


def _sign_patterns(n: int, resamples: int, seed: int) -> Iterator[Float64]:
    """Yield rows of n signs, -1 or 1: all patterns of few units, else `resamples` random ones and the
    pattern seen, which is one of them."""
    if n <= _EXACT:
        bits = np.arange(1 << n)[:, None] >> np.arange(n) & 1
        yield np.asarray(1 - 2 * bits, np.float64)
        return
    yield np.ones((1, n))
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, 4_000_000 // n)):
        flips = rng.integers(0, 2, (min(step, resamples - start), n), dtype=np.int8)
        yield np.asarray(2 * flips - 1, np.float64)
