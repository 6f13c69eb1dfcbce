"""The embedding space's figures against closed forms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from clipkit.errors import InputError
from clipkit.metrics import (
    TwoSampleTest,
    alignment,
    compare_batches,
    covariance_spectrum,
    effective_rank,
    hubness,
    mean_shift,
    neighbour_overlap,
    uniformity,
    variance,
)

Float64 = npt.NDArray[np.float64]


def normal(n: int, dim: int, *, seed: int = 0) -> Float64:
    return np.random.default_rng(seed).standard_normal((n, dim))


def sphere(n: int, dim: int, *, seed: int = 0) -> Float64:
    vectors = normal(n, dim, seed=seed)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_spectrum_is_the_covariances() -> None:
    """Over several chunks and from float16; its sum is the variance."""
    vectors = (normal(9000, 5) * [4, 3, 2, 1, 0] + 10).astype(np.float16)
    expected = np.linalg.eigvalsh(np.cov(vectors.T.astype(float), bias=True))[::-1]
    found = covariance_spectrum(vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert (found >= 0).all()
    around = vectors - vectors.astype(float).mean(axis=0)
    assert variance(vectors) == pytest.approx((around**2).sum(axis=1).mean())


def test_effective_rank_by_hand() -> None:
    """r equal values: r. (1/2, 1/4, 1/4): entropy 1.5 ln 2, rank 2^1.5. Nothing: 0."""
    assert effective_rank([2.0] * 7 + [0.0] * 3) == pytest.approx(7)
    assert effective_rank([2.0, 1, 1]) == pytest.approx(2**1.5)
    assert effective_rank([0.0, 0.0]) == 0.0
    low = normal(5000, 4) @ np.linalg.qr(normal(30, 4, seed=1))[0].T  # 4 of 30 dimensions
    assert effective_rank(covariance_spectrum(low)) == pytest.approx(4, rel=0.01)
    assert effective_rank(covariance_spectrum(np.ones((10, 3)))) == 0.0


def test_uniformity_of_the_sphere() -> None:
    """On the unit sphere of three dimensions the cosine c is uniform in -1..1, so
    E exp(-2 (2 - 2c)) = exp(-4) sinh(4) / 4. Collapsed: log 1 = 0. Two opposite points: -8."""
    expected = math.log(math.exp(-4) * math.sinh(4) / 4)
    assert uniformity(sphere(6000, 3)) == pytest.approx(expected, abs=0.02)
    assert uniformity(np.ones((20, 3))) == pytest.approx(0, abs=1e-12)
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    assert uniformity(sphere(5000, 8), seed=1) == uniformity(sphere(5000, 8), seed=1)


def test_alignment_and_gap_by_hand() -> None:
    left, right = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [0, -1]])
    assert alignment(left, left) == 0
    assert alignment(left, right) == 2  # squared distances 0 and 4
    assert mean_shift(left, right) == 1  # means (1/2, 1/2) and (1/2, -1/2)
    assert mean_shift(np.zeros((3, 2)), np.full((9, 2), [3.0, 4.0])) == 5


def compared(x: npt.ArrayLike, y: npt.ArrayLike, *, seed: int = 0) -> TwoSampleTest:
    return compare_batches(np.asarray(x, float), np.asarray(y, float), permutations=99, seed=seed)


def test_one_distribution_is_not_far_from_itself() -> None:
    """Of 99 shuffles none comes near a real shift, so p is the smallest possible, 1 / 100."""
    x, y = normal(400, 6), normal(400, 6, seed=1)
    same, other = compared(x, y).statistics, compared(x, y + 0.5).statistics
    for name in ("mmd2", "energy_distance"):
        assert abs(same[name].value) < 0.03 < other[name].value
        assert other[name].p_value == pytest.approx(0.01)
        assert compared(x, x).statistics[name].p_value > 0.9
        assert compared(np.ones((9, 2)), np.ones((9, 2))).statistics[name].p_value == 1.0


def test_energy_distance_by_hand() -> None:
    """Points {0, 2} and {1, 3}: E|X-Y| = (1+3+1+1)/4, within each (0+2+2+0)/4: 3 - 1 - 1 = 1."""
    statistics = compared([[0.0], [2]], [[1.0], [3]]).statistics
    assert statistics["energy_distance"].value == pytest.approx(1)


def test_mmd_by_hand() -> None:
    """Two points twice: distances within 0, across d; the median among (0, 0, d x 4) is d, so
    sigma = d and MMD2 = 1 + 1 - 2 exp(-1/2). Unbiased: it may fall below 0."""
    apart = compared(np.zeros((2, 1)), np.full((2, 1), 3.0)).statistics["mmd2"]
    assert apart.value == pytest.approx(2 - 2 * math.exp(-0.5))
    assert compared([[0.0], [1]], [[0.0], [1]]).statistics["mmd2"].value < 0
    assert compared(np.ones((4, 2)), np.ones((4, 2))).statistics["mmd2"].value == 0


def test_large_batches_are_sampled() -> None:
    x = normal(50_000, 4).astype(np.float16)
    first, again = (compare_batches(x, x[::-1], permutations=19, seed=3) for _ in range(2))
    assert first == again and first.sizes == (2000, 2000)
    assert abs(first.statistics["mmd2"].value) < 0.01


def test_hubness_by_hand() -> None:
    """Row 0 is everyone's neighbour: counts (4, 0, 0, 0), skewness 2 / sqrt 3. Evenly: 0."""
    assert hubness([[0], [0], [0], [0]], 4) == pytest.approx(2 / math.sqrt(3))
    assert hubness([[1], [2], [3], [0]], 4) == 0
    assert hubness([[1, -1], [2, -1], [3, -1], [0, -1]], 4) == 0
    with pytest.raises(InputError, match="a neighbour 4"):
        hubness([[4]], 4)


def test_overlap_by_hand() -> None:
    found = neighbour_overlap([[1, 2, 3, 4], [5, 6, -1, -1]], [[4, 9, 1, 8], [6, 7, -1, -1]])
    assert found.tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match="both must be"):
        neighbour_overlap([[1, 2]], [[1]])


def test_vectors_that_are_not_finite_are_named() -> None:
    broken = normal(10, 2)
    broken[7, 1] = math.nan
    for call in (
        covariance_spectrum,
        uniformity,
        partial(alignment, normal(10, 2)),
        partial(mean_shift, normal(10, 2)),
        partial(compare_batches, normal(10, 2)),
    ):
        with pytest.raises(InputError, match="vector 7 is not finite"):
            call(broken)
    with pytest.raises(InputError, match="2 and 3 dimensions"):
        compare_batches(normal(5, 2), normal(5, 3))
    with pytest.raises(InputError, match="at least 2"):
        compare_batches(normal(1, 2), normal(5, 2))
    with pytest.raises(InputError, match="none 0"):
        variance(np.zeros((0, 3)))
