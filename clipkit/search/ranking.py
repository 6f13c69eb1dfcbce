"""The order of a search's pictures, computed as far as its pages are read.

A ranking grows in tiers, of TIERS and then of all pictures. Each is the order of the tier before,
followed by the rest of the larger one: no picture is doubled or lost from page to page, although an
approximate index may find a picture late. So the order depends on the state of the library and the
search alone, not on the sizes of the pages.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipkit.arrays import Float32, Float64, Int64
from clipkit.picture_set import PictureSet
from clipkit.search.name_matches import NameMatches

TIERS = (24, 256, 2_048, 16_384)  # the first is a page
MOST_BYTES, MOST_KEPT = 64 << 20, 32  # of the rankings that a Rankings keeps

Ranked = tuple[Int64, Float32, Float64]  # nums (N,), scores (N,), keys (N,), in any order


class Ranking:
    """The pictures of one search by (-key, image_id). Threads may share it.

    `best(count)` returns at least the `count` best of the pictures by their keys, with all that tie with
    the last of them; `image_ids` those of nums, by which ties are put in order. `names` are those that
    went into the keys.
    """

    def __init__(
        self,
        pictures: PictureSet,
        best: Callable[[int], Ranked],
        image_ids: Callable[[Sequence[int]], Mapping[int, str]],
        names: NameMatches | None = None,
    ) -> None:
        self.total = len(pictures)
        self.names = names or NameMatches()
        self._pictures = pictures
        self._best = best
        self._image_ids = image_ids
        self._lock = threading.Lock()
        self._nums = np.empty(0, np.int32)
        self._scores = np.empty(0, np.float32)
        self._keys = np.empty(0, np.float64)
        self._settled = 0  # before this place, ties are in their order
        self._tier = 0

    @property
    def nbytes(self) -> int:
        return self._nums.nbytes + self._scores.nbytes + self._keys.nbytes

    def page(self, start: int, stop: int) -> Ranked:
        """Return the pictures at the places from `start` (from 0) to before `stop`, fewer at the end."""
        with self._lock:
            while len(self._nums) < stop and self._grow():
                pass
            self._settle(stop)
            part = slice(start, stop)
            return (
                self._nums[part].astype(np.int64),
                self._scores[part].copy(),
                self._keys[part].copy(),
            )

    def after(self, place: int, key: float, image_id: str, num: int | None) -> int:
        """Return the place that follows the picture which was at `place` (from 1) and has this key.

        That is after the picture if it is here, and else after where its key and image_id would be.
        """
        if num is None or num not in self._pictures:
            num = None
        elif place and self.page(place - 1, place)[0].tolist() == [num]:
            return place
        with self._lock:
            while True:
                if num is not None and len(at := np.flatnonzero(self._nums == num)):
                    self._settle(int(at[0]) + 1)
                    return int(np.flatnonzero(self._nums == num)[0]) + 1
                lower = np.flatnonzero(self._keys < key)
                if (not len(lower) or num is not None) and self._grow():
                    continue
                end = int(lower[0]) if len(lower) else len(self._keys)
                self._settle(end)
                ties = self._nums[:end][self._keys[:end] == key].tolist()
                ids = self._image_ids(ties) if ties else {}
                return end - sum(ids.get(tie, "") > image_id for tie in ties)

    def _grow(self) -> bool:
        """Append the next tier; return whether there was one."""
        if self._tier > len(TIERS):
            return False
        count = TIERS[self._tier] if self._tier < len(TIERS) else self.total
        self._tier += 1
        nums, scores, keys = self._best(count)
        if max(count, len(nums)) >= self.total:
            count, self._tier = self.total, len(TIERS) + 1
        chosen = np.ones(len(nums), np.bool_)
        if count < len(nums) and count < self.total:
            chosen = keys >= np.partition(keys, len(keys) - count)[len(keys) - count]
        if len(self._nums):
            chosen &= ~np.isin(nums, self._nums)
        nums, scores, keys = nums[chosen], scores[chosen], keys[chosen]
        order = np.lexsort((nums, -keys))
        self._nums = np.concatenate([self._nums, nums[order].astype(np.int32)])
        self._scores = np.concatenate([self._scores, scores[order]])
        self._keys = np.concatenate([self._keys, keys[order]])
        return True

    def _settle(self, stop: int) -> None:
        """Put equal keys at the places before `stop` in the order of their image_ids."""
        stop = min(stop, len(self._keys))
        if stop <= self._settled:
            return
        following = np.flatnonzero(self._keys[stop:] != self._keys[stop - 1])
        stop = stop + int(following[0]) if len(following) else len(self._keys)
        start, self._settled = self._settled, stop
        keys, nums = self._keys[start:stop], self._nums[start:stop]
        same = keys[1:] == keys[:-1]
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        if not len(tied):
            return
        ids = self._image_ids(nums[tied].tolist())
        names = np.array([ids.get(num, "") for num in nums[tied].tolist()])
        order = tied[np.lexsort((names, np.cumsum(np.append(0, ~same))[tied]))]
        nums[tied] = nums[order]  # views: this writes into the ranking
        scores = self._scores[start:stop]
        scores[tied] = scores[order]


class Rankings:
    """The rankings of the last searches in one state of the library. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rankings: OrderedDict[str, Ranking] = OrderedDict()  # the least recently used first

    def get(self, search: str) -> Ranking | None:
        """Return the ranking of the search with this fingerprint, if it is kept."""
        with self._lock:
            ranking = self._rankings.get(search)
            if ranking is not None:
                self._rankings.move_to_end(search)
            return ranking

    def keep(self, search: str, ranking: Ranking) -> None:
        """Keep a ranking, which may grow; forget old ones beyond the limit, but never this one."""
        with self._lock:
            self._rankings[search] = ranking
            self._rankings.move_to_end(search)
            size = sum(kept.nbytes for kept in self._rankings.values())
            while len(self._rankings) > 1 and (
                size > MOST_BYTES or len(self._rankings) > MOST_KEPT
            ):
                size -= self._rankings.popitem(last=False)[1].nbytes
