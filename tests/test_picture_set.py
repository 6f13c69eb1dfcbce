"""Sets of pictures: whichever way they are held, they do what Python's sets do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.picture_set import PictureSet

few = st.lists(st.integers(0, 5000), max_size=40)
dense = st.integers(0, 300).map(lambda n: list(range(n)))
any_nums = few | dense | st.tuples(few, dense).map(lambda two: two[0] + two[1])


def made_both_ways(nums: list[int]) -> list[PictureSet]:
    mask = np.zeros(max(nums, default=0) + 3, np.bool_)
    mask[np.array(nums, np.int64)] = True
    return [PictureSet(nums), PictureSet.of_mask(mask)]


@given(any_nums, any_nums)
def test_it_does_what_sets_do(a: list[int], b: list[int]) -> None:
    for left in made_both_ways(a):
        for right in made_both_ways(b):
            assert (left & right).nums.tolist() == sorted(set(a) & set(b))
            assert (left | right).nums.tolist() == sorted(set(a) | set(b))
            assert (left - right).nums.tolist() == sorted(set(a) - set(b))
            assert len(left | right) == len(set(a) | set(b))
            assert left.has(np.array(b, np.int64)).tolist() == [num in set(a) for num in b]
            assert (left == right) == (set(a) == set(b))
            assert left.among(right.nums).tolist() == [num in set(a) for num in sorted(set(b))]
        gapless = np.arange(10, 3000)
        assert left.among(gapless).tolist() == left.has(gapless).tolist()


@given(any_nums, st.integers(-5, 6000))
def test_it_knows_its_members(nums: list[int], num: int) -> None:
    for one in made_both_ways(nums):
        assert (num in one) == (num in set(nums))
        assert list(one) == sorted(set(nums))


def test_operations_leave_their_sets_as_they_are() -> None:
    left, right = PictureSet(range(100)), PictureSet(range(50, 150))
    _ = left - right, left & right, left | right
    assert (left.nums.tolist(), right.nums.tolist()) == (list(range(100)), list(range(50, 150)))


def test_it_says_how_many_it_holds_and_is_no_key() -> None:
    assert repr(PictureSet(range(1234))) == "<1,234 pictures>"
    with pytest.raises(TypeError):
        hash(PictureSet())
