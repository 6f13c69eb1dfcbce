"""A set of pictures by their nums, the small integers that a catalog counts pictures by.

One type for filters, phrases and what is live: few are held as a sorted array, many as a bitmap, and
every operation takes either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64

Mask = npt.NDArray[np.bool_]

_SHARE = 16  # an array while it holds less than 1 in 16 of the nums up to its greatest


class PictureSet:
    """An immutable set of nums (integers from 0 on). Threads may share it."""

    __slots__ = ("_mask", "_nums", "_size")

    def __init__(self, nums: npt.ArrayLike = ()) -> None:
        """Make the set of these nums, in any order; repeated ones count once."""
        # as np.unique, which imports numpy.ma
        nums = np.sort(np.asarray(nums, dtype=np.int64), axis=None)
        self._take(nums[np.append(True, nums[1:] != nums[:-1])[: len(nums)]])

    @classmethod
    def of_sorted(cls, nums: Int64) -> PictureSet:
        """Make the set of nums that are sorted and unique; the array is not copied."""
        made = cls.__new__(cls)
        made._take(nums)
        return made

    @classmethod
    def of_mask(cls, mask: Mask) -> PictureSet:
        """Make the set of the nums i where mask[i], bool (M,), is set; the array is not copied."""
        made = cls.__new__(cls)
        made._size = int(np.count_nonzero(mask))
        made._mask, made._nums = (mask, None)
        if made._size * _SHARE < len(mask):
            made._mask, made._nums = None, np.flatnonzero(mask)
        return made

    def _take(self, nums: Int64) -> None:
        self._size = len(nums)
        self._nums: Int64 | None = nums
        self._mask: Mask | None = None
        if self._size and self._size * _SHARE >= int(nums[-1]) + 1:
            self._mask = np.zeros(int(nums[-1]) + 1, np.bool_)
            self._mask[nums] = True

    @property
    def nums(self) -> Int64:
        """The nums (N,), sorted."""
        if self._nums is None:
            assert self._mask is not None
            self._nums = np.flatnonzero(self._mask)
        return self._nums

    def mask(self) -> Mask:
        """Return bool (M,) by num, up to the greatest num at least; do not change it."""
        if self._mask is not None:
            return self._mask
        mask = np.zeros(self._top, np.bool_)
        mask[self.nums] = True
        return mask

    def has(self, nums: Int64) -> Mask:
        """Tell for each of `nums` (M,), in any order, whether it is in the set."""
        nums = np.asarray(nums, dtype=np.int64)
        if not self._size:
            return np.zeros(len(nums), np.bool_)
        if self._mask is not None:
            if len(nums) and nums.max() < len(self._mask) and nums.min() >= 0:
                found: Mask = self._mask[nums]
                return found
            found = (nums >= 0) & (nums < len(self._mask))
            found[found] = self._mask[nums[found]]
            return found
        at = np.searchsorted(self.nums, nums)
        return np.asarray(self.nums[np.minimum(at, self._size - 1)] == nums)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(one.nbytes for one in (self._nums, self._mask) if one is not None)

    def among(self, nums: Int64) -> Mask:
        """Tell for each of `nums` (M,), sorted and unique, whether it is in the set: `has`, but quick
        for a long array."""
        if len(self) * _SHARE < len(nums):
            found = np.zeros(len(nums), np.bool_)
            at = np.searchsorted(nums, self.nums)
            inside = at < len(nums)
            at = at[inside]
            found[at[nums[at] == self.nums[inside]]] = True
            return found
        if self._mask is not None and len(nums) and nums[0] >= 0:
            first, last = int(nums[0]), int(nums[-1])
            if last - first + 1 == len(nums) and last < len(self._mask):  # without a gap
                return self._mask[first : last + 1].copy()
        return self.has(nums)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return iter(self.nums.tolist())

    def __contains__(self, num: int) -> bool:
        return bool(self.has(np.array([num], np.int64))[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PictureSet) and np.array_equal(self.nums, other.nums)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._size:,} pictures>"

    def __and__(self, other: PictureSet) -> PictureSet:
        if self._mask is not None and other._mask is not None:
            both = min(len(self._mask), len(other._mask))
            return PictureSet.of_mask(self._mask[:both] & other._mask[:both])
        few, many = (self, other) if len(self) <= len(other) else (other, self)
        return PictureSet.of_sorted(few.nums[many.has(few.nums)])

    def __sub__(self, other: PictureSet) -> PictureSet:
        if self._mask is not None and other._mask is not None:
            left = self._mask.copy()
            both = min(len(self._mask), len(other._mask))
            left[:both] &= ~other._mask[:both]
            return PictureSet.of_mask(left)
        if self._mask is not None:
            left = self._mask.copy()
            left[other.nums[: np.searchsorted(other.nums, len(left))]] = False
            return PictureSet.of_mask(left)
        return PictureSet.of_sorted(self.nums[~other.has(self.nums)])

    def __or__(self, other: PictureSet) -> PictureSet:
        if self._mask is None and other._mask is None:
            # two sorted runs, which a stable sort only merges
            nums = np.sort(np.concatenate([self.nums, other.nums]), kind="stable")
            return PictureSet.of_sorted(nums[np.append(True, nums[1:] != nums[:-1])[: len(nums)]])
        long, short = (self, other) if self._top >= other._top else (other, self)
        mask = np.zeros(long._top, np.bool_)
        for one in (long, short):
            if one._mask is not None:
                mask[: len(one._mask)] |= one._mask
            else:
                mask[one.nums] = True
        return PictureSet.of_mask(mask)

    @property
    def _top(self) -> int:
        """One more than the greatest num that it could hold."""
        if self._mask is not None:
            return len(self._mask)
        return int(self.nums[-1]) + 1 if self._size else 0
