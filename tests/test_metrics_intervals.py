"""Intervals cover what they promise, tests reject as often as they promise, edges are no zeros."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.metrics import corrected_p, mean_interval, paired_test, statistic_interval

Float64 = npt.NDArray[np.float64]


@pytest.mark.parametrize(
    ("p", "n"),
    [(p, n) for p in (0.05, 0.2, 0.5, 0.9) for n in (100, 300, 1000) if (p, n) != (0.05, 100)],
)
def test_hits_are_covered_95_times_in_100(p: float, n: int) -> None:
    """Exact: the binomial probability of every count of hits whose interval holds p, summed.

    Without p = 0.05 of 100: 5 hits are too few for any interval to come near 95 %.
    """
    covered = 0.0
    for hits in range(n + 1):
        found = mean_interval(np.arange(n) < hits)
        if found.low <= p <= found.high:
            covered += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)
    assert 0.93 <= covered <= 0.97


def clustered(rng: np.random.Generator) -> tuple[Float64, Float64]:
    """200 pictures of 1 to 9 captions, each picture's hits from its own chance, beta(1/2, 1)."""
    groups = np.repeat(np.arange(200), rng.integers(1, 10, 200))
    return (rng.random(len(groups)) < rng.beta(0.5, 1, 200)[groups]).astype(float), groups


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (clustered, 1 / 3),
        (lambda rng: (rng.beta(0.3, 3, 100), None), 1 / 11),
        (lambda rng: (rng.exponential(1, 100), None), 1.0),
        (lambda rng: (rng.choice([-1.0, 0, 1], 100, p=[0.03, 0.9, 0.07]), None), 0.04),
    ],
    ids=["captions of pictures", "skewed fractions", "exponential", "rare differences"],
)
def test_means_are_covered_95_times_in_100(
    draw: Callable[[np.random.Generator], tuple[Float64, Float64 | None]], truth: float
) -> None:
    rng, covered, rounds = np.random.default_rng(0), 0, 1500  # 1500 know it to 0.6 points
    for seed in range(rounds):
        samples, groups = draw(rng)
        found = mean_interval(samples, groups=groups, resamples=400, seed=seed)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / rounds <= 0.97


def test_captions_of_one_picture_are_not_counted_as_so_many_pictures() -> None:
    """A picture's five captions always agree here, so 500 samples know as much as 100."""
    hits = np.random.default_rng(0).random(100) < 0.4
    groups = np.repeat(np.arange(100), 5)
    apart, together = mean_interval(hits), mean_interval(np.repeat(hits, 5), groups=groups)
    assert (together.n, together.value) == (100, pytest.approx(apart.value))
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high))


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10), z2 = 3.8415: 0.490, 0.943."""
    found = mean_interval([1] * 8 + [0] * 2)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


def test_wilson_of_many_is_exact() -> None:
    """20,000 of 100,000 hits: +- 1.96 sqrt(.16 / 100,000) = .00248 to three digits, no resampling."""
    found = mean_interval(np.arange(100_000) < 20_000)
    assert found == mean_interval(np.arange(100_000)[::-1] < 20_000, seed=5)
    assert (found.high - found.low) / 2 == pytest.approx(0.002479, abs=1e-6)


def test_all_or_none_still_has_a_width() -> None:
    """No hit in n: up to z2 / (n + z2), "the rule of four"; all hits: the same below 1."""
    z2 = 1.959964**2
    none, everything = mean_interval(np.zeros(50)), mean_interval(np.ones(50))
    assert (none.low, none.high) == (0.0, pytest.approx(z2 / (50 + z2), abs=1e-6))
    assert (everything.low, everything.high) == (pytest.approx(50 / (50 + z2), abs=1e-6), 1.0)
    ranks = mean_interval(np.ones(50), fraction=False)
    assert (ranks.low, ranks.high) == (1.0, 1.0)  # a mean rank below 1 does not exist


def test_chance_of_a_collapsed_model_is_certain() -> None:
    found = mean_interval(np.full(30, 0.001))
    assert found.low == found.value == found.high == pytest.approx(0.001)


def test_one_sample_says_nothing_about_its_bounds_and_none_is_an_error() -> None:
    one = mean_interval([0.5])
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(statistic_interval(lambda rows: float(rows.sum()), 1).low)
    for empty in (lambda: mean_interval([]), lambda: statistic_interval(lambda _: 0.0, 0)):
        with pytest.raises(InputError, match="0 samples have no interval"):
            empty()


def test_what_cannot_be_averaged_is_named() -> None:
    with pytest.raises(InputError, match="sample 1 is nan"):
        mean_interval([1.0, math.nan])
    with pytest.raises(InputError, match=r"shape \(1, 2\)"):
        mean_interval([[1.0, 2.0]])
    with pytest.raises(InputError, match="must match"):
        mean_interval([1.0, 2.0], groups=[1])
    with pytest.raises(InputError, match="level is 95"):
        mean_interval([1.0, 2.0], level=95)
    with pytest.raises(InputError, match="the same pictures"):
        paired_test([1.0], [1.0, 2.0])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 5))
def test_bounds_enclose_the_value_within_0_and_1(samples: list[float], seed: int) -> None:
    found = mean_interval(samples, seed=seed)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert found == mean_interval(samples, seed=seed)


def test_the_seed_decides() -> None:
    samples = np.random.default_rng(0).exponential(1, 40)
    assert mean_interval(samples, seed=1) == mean_interval(samples, seed=1)
    assert mean_interval(samples, seed=1) != mean_interval(samples, seed=2)


def test_a_million_samples_take_no_time_and_keep_their_width() -> None:
    """Mean of a million from N(0, 1): +- 1.96 / 1000, of which blocks may cost a few percent."""
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 1, (2, 1_000_000))
    began = time.perf_counter()
    found = mean_interval(before, fraction=False)
    paired = paired_test(before, after)
    assert time.perf_counter() - began < 20  # 1 s alone; a shared machine gets its time
    assert (found.high - found.low) / 2 == pytest.approx(1.96e-3, rel=0.08)
    assert (paired.high - paired.low) / 2 == pytest.approx(1.96e-3 * math.sqrt(2), rel=0.08)
    assert found.n == paired.n == 1_000_000


def test_the_median_is_covered() -> None:
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        samples = rng.lognormal(0, 1, 101)  # median 1
        found = statistic_interval(
            lambda rows, x=samples: float(np.median(x[rows])), 101, resamples=200, seed=seed
        )
        covered += found.low <= 1 <= found.high
    assert 0.91 <= covered / 200 <= 0.99  # 200 rounds know it to 1.5 points


def test_the_sign_flip_test_rejects_a_true_null_5_times_in_100() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 40):  # every pattern; a sample of them
        changes = rng.normal(0, 1, (600, n))
        p = np.array([paired_test(np.zeros(n), c, resamples=300).p_value for c in changes])
        assert 0.03 <= (p <= 0.05).mean() <= 0.07  # 600 rounds know it to 0.9 points
        assert 0.45 <= (p <= 0.5).mean() <= 0.55


def test_p_values_by_hand() -> None:
    """All 3 better by 1: of 8 sign patterns, +++ and --- are as far from 0: p = 1/4.

    Changes 1, 1, -1, 0: the sum is 1, and every one of the 8 patterns of the three that differ
    is at least as far: p = 1.
    """
    assert paired_test([1, 2, 3], [2, 3, 4]).p_value == 0.25
    assert paired_test([0, 0, 1, 0], [1, 1, 0, 0]).p_value == 1.0


def test_identical_samples_do_not_differ() -> None:
    samples = np.random.default_rng(0).random(1000)
    found = paired_test(samples, samples)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_small_difference_is_found_where_n_is_large() -> None:
    """+0.01 on noise of 1 at n = 200,000 is 4.5 standard errors: p is the least there is."""
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 200_000)
    found = paired_test(before, before + rng.normal(0.01, 1, 200_000), resamples=999)
    assert found.p_value == 1 / 1000
    assert 0 < found.low < found.difference < found.high < 0.02


def test_captions_of_a_picture_flip_together() -> None:
    """Five equal changes in each of 4 pictures are 4 coins, not 20: p = 2 / 16."""
    groups = np.repeat(np.arange(4), 5)
    found = paired_test(np.zeros(20), np.ones(20), groups=groups)
    assert (found.p_value, found.n) == (0.125, 4)


# ---- many figures at once


def test_corrected_p_values_by_hand() -> None:
    """Changes a = 1, 1, 1 and b = 1, 1, -1: in units of their norm, sums of 3 and of 1.

    Of 8 sign patterns, four make a or b as far from 0 as 3: p = 1/2 for a. b comes second, and each
    pattern makes it at least as far as 1: p = 1. A figure that did not change has p = 1.
    """
    found = corrected_p([[1, 1, -1], [1, 1, 1], [0, 0, 0]])
    assert found.tolist() == [1.0, 0.5, 1.0]
    assert corrected_p(np.zeros((2, 5))).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match=r"changes have shape \(3,\)"):
        corrected_p([1, 2, 3])


@pytest.mark.parametrize("n", [12, 60])
def test_figures_that_are_the_same_count_once(n: int) -> None:
    """Fails for corrections that look at the number of tests only: Holm's would say three times as
    much of three copies, in other units."""
    change = np.random.default_rng(0).normal(0.6, 1, n)
    alone = paired_test(np.zeros(n), change).p_value
    assert corrected_p([change, 100 * change, -change]) == pytest.approx([alone] * 3)


def test_five_families_in_a_hundred_are_called_changed_by_chance() -> None:
    """Eight figures that go together (0.8): of true nulls, 5 % have any p of 0.05 or less. With one
    that did change, the others still do."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(0, 1, (2000, 1, 40)), rng.normal(0, 1, (2000, 8, 40))
    changes = 0.8**0.5 * shared + 0.2**0.5 * own
    p = np.array([corrected_p(rows, resamples=300, seed=i) for i, rows in enumerate(changes)])
    assert 0.03 <= (p.min(axis=1) <= 0.05).mean() <= 0.07  # 2,000 rounds know it to 0.5 points
    changes[:, 0] += 2
    p = np.array([corrected_p(rows, resamples=300, seed=i) for i, rows in enumerate(changes)])
    assert (p[:, 0] <= 0.05).all() and 0.02 <= (p[:, 1:].min(axis=1) <= 0.05).mean() <= 0.07
