"""Rank fusion, derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

from clipkit.search.comparison import reciprocal_rank_fusion


def best_first(*nums: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(nums), np.arange(len(nums))


def test_fusion_sums_weight_over_sixty_plus_rank() -> None:
    """Picture 7 is first and second, 8 second and first: they tie. 9 is in one ranking only.
    With weight 2 for the second ranking, 8 leads: 1/62 + 2/61 > 1/61 + 2/62."""
    nums = np.array([9, 7, 8])
    first, second = best_first(7, 8, 9), best_first(8, 7)
    keys = reciprocal_rank_fusion([(1.0, *first), (1.0, *second)], nums)
    assert keys == pytest.approx([1 / 63, 1 / 61 + 1 / 62, 1 / 61 + 1 / 62])
    assert keys[1] == keys[2]
    keys = reciprocal_rank_fusion([(1.0, *first), (2.0, *second)], nums)
    assert keys == pytest.approx([1 / 63, 1 / 61 + 2 / 62, 1 / 62 + 2 / 61])


def test_a_tie_is_a_tie_in_whatever_order_it_is_summed() -> None:
    """Ranks 1, 2, 7 and 1, 7, 2: in floating point (1/61 + 1/62) + 1/67 < (1/61 + 1/67) + 1/62."""
    others = list(range(10, 20))
    ways = best_first(1, 3), best_first(3, 1), best_first(3, *others[:5], 1)
    first = [(1.0, *way) for way in ways]
    second = [first[0], first[2], first[1]]
    nums = np.array([1, 3, *others])
    keys = [reciprocal_rank_fusion(order, nums)[0] for order in (first, second)]
    assert keys[0] == keys[1] == pytest.approx(1 / 61 + 1 / 62 + 1 / 67)


def test_equal_keys_share_a_rank_and_leave_the_order_to_the_others() -> None:
    """7, 8 and 9 tie in the first ranking: each gets 1/61 from it, 5 behind them 1/64. The second
    decides among them."""
    tied = np.array([9, 5, 8, 7]), np.array([-2.0, -1.0, -2.0, -2.0])
    nums = np.array([5, 7, 8, 9])
    assert reciprocal_rank_fusion([(1.0, *tied)], nums) == pytest.approx([1 / 64] + [1 / 61] * 3)
    keys = reciprocal_rank_fusion([(1.0, *tied), (1.0, *best_first(8, 7, 9, 5))], nums)
    assert nums[np.argsort(-keys)].tolist() == [8, 7, 9, 5]


def test_ranks_count_among_the_asked_pictures_only() -> None:
    """Of the ranking 5, 6, 7 only 7 is asked for: its rank is 1, not 3."""
    keys = reciprocal_rank_fusion([(1.0, *best_first(5, 6, 7))], np.array([7]))
    assert keys == pytest.approx([1 / 61])


def test_no_pictures_get_no_keys() -> None:
    none = np.empty(0, np.int64)
    assert reciprocal_rank_fusion([(1.0, *best_first(1))], none).shape == (0,)
    assert reciprocal_rank_fusion([(1.0, none, none)], np.array([1])) == pytest.approx([0])
