"""Do two batches of vectors come from one distribution? Three statistics, one calibrated verdict.

The statistics are those of clipkit.metrics.space. Here all shuffles of the batches are evaluated at
once: the distances are computed once, and a shuffle is a row of zeros and ones in a matrix product.
The verdict is the smallest of the three p-values, compared with the smallest under every shuffle
(Westfall & Young 1993), so that asking three questions does not raise false alarms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError

Float64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Tested:
    """One statistic between the batches, and what it is between shuffled ones."""

    value: float
    usual: float  # median over shuffles
    bound: float  # exceeded by 5 % of the shuffles
    p_value: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`p_value` of "one distribution", from all three statistics.

    `detectable`: a shift of the mean this long, in whatever direction, is found nine times in ten.
    """

    tests: dict[str, Tested]
    p_value: float
    detectable: float
    sizes: tuple[int, int]  # rows that were compared


def compare_batches(
    before: Rows,
    after: Rows,
    *,
    level: float = 0.05,
    permutations: int = 499,
    sample: int = 2000,
    seed: int = 0,
) -> Verdict:
    """Test (N, D) against (M, D), at most `sample` rows of each, drawn by seed.

    InputError: fewer than 2 rows in a batch, other dimensions, values that are not finite, or too
    few permutations for a p-value of `level`.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level}; it must lie between 0 and 1, such as 0.05")
    if permutations + 1 < 1 / level:
        raise InputError(
            f"{permutations} permutations give no p-value below {1 / (permutations + 1):.3g}; "
            f"take at least {round(1 / level) - 1} for a level of {level:g}"
        )
    metrics.mean_shift(before, after)  # refuses what cannot be compared
    random = np.random.default_rng(seed)
    x, y = (_drawn(rows, sample, random) for rows in (before, after))
    if min(len(x), len(y)) < 2:
        raise InputError(f"batches of {len(x)} and {len(y)} vectors; each needs at least 2")
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
    tests = {
        name: Tested(
            float(values[0]),
            float(np.median(values[1:])),
            float(np.quantile(values[1:], 0.95)),
            float(share[0]),
        )
        for name, values, share in zip(names, shuffled, at_least, strict=True)
    }
    return Verdict(tests, p_value, _detectable(pooled, apart[1:], alone), (n, m))


def _drawn(rows: Rows, most: int, random: np.random.Generator) -> Float64:
    if len(rows) > most:
        rows = rows[np.sort(random.choice(len(rows), most, replace=False))]
    return rows.astype(np.float64)


def _pairwise(pooled: Float64, member: Float64, n: int, m: int) -> tuple[Float64, Float64]:
    """Unbiased MMD^2 and energy distance for each row of member (R, n + m), n ones; (R,) each."""
    squares = np.einsum("ij,ij->i", pooled, pooled)
    squared = np.maximum(squares[:, None] + squares - 2 * pooled @ pooled.T, 0)
    np.fill_diagonal(squared, 0)
    scale = 2 * float(np.median(squared[np.triu_indices(n + m, 1)]))
    scale = scale or 2 * float(squared.max()) or 1.0  # as metrics.mmd2 where most rows coincide
    kernel_xx, kernel_yy, kernel_xy = _sums(np.exp(-squared / scale), member)
    within = (kernel_xx - n) / (n * (n - 1)) + (kernel_yy - m) / (m * (m - 1))  # kernel(x, x) = 1
    far_xx, far_yy, far_xy = _sums(np.sqrt(squared), member)
    energy = 2 * far_xy / (n * m) - far_xx / n**2 - far_yy / m**2
    return within - 2 * kernel_xy / (n * m), np.maximum(energy, 0)


def _sums(table: Float64, member: Float64) -> tuple[Float64, Float64, Float64]:
    """Sums of a symmetric table (n, n) within the members, within the others, and across; (R,) each."""
    rows = table.sum(axis=1)
    inside: Float64 = np.einsum("ri,ri->r", member @ table, member)
    across = member @ rows - inside
    return inside, rows.sum() - inside - 2 * across, across


def _share_at_least(values: Float64) -> Float64:
    """(R,): the share of all values that are as large as each but for rounding, itself included."""
    slack = 1e-12 * max(1.0, float(np.abs(values).max()))
    below = np.searchsorted(np.sort(values), values - slack)
    return np.asarray(1 - below / len(values), np.float64)


def _detectable(pooled: Float64, noise: Float64, alone: float) -> float:
    """The length of a mean shift that is found nine times in ten.

    noise (R, D) are the differences of shuffled means. On top of one of them, e, a shift of length d
    along u measures |d u + e|, which reaches the length b that is found once d is at least
    sqrt((e u)^2 + b^2 - |e|^2) - e u. Asked along the widest direction, where noise hides most.
    """
    lengths = np.linalg.norm(noise, axis=1)
    found = float(np.quantile(lengths, 1 - alone))
    widest = np.linalg.eigh(np.cov(pooled, rowvar=False))[1][:, -1]
    along = noise @ widest
    needed = np.sqrt(np.maximum(0, along**2 + found**2 - lengths**2)) - along
    return float(np.quantile(needed, 0.9))
