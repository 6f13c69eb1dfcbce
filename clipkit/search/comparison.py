"""A vector compared with the library's pictures: the nearest, lifted by names, fused with phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Float64, Int64
from clipkit.picture_set import PictureSet
from clipkit.search.live_vectors import LiveVectors
from clipkit.search.name_matches import NameMatches, lift
from clipkit.search.ranking import Ranked

# Pictures with words of the query in their names are compared in blocks, each this many times larger.
FIRST_NAMED, NAMED_GROWTH = 1_000, 16
WHOLE = 2_000  # pictures of a block that are all compared; the index does so for as few in any case
RRF_K = 60  # Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion", SIGIR, section 2

# (weight, nums, a key for each, the best least): equal keys are a tie
PhraseRanking = tuple[float, Int64, npt.NDArray[np.floating]]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What decides the order of the pictures of a search. `best` is for a Ranking."""

    live: LiveVectors
    vector: Float32  # (D,) unit
    allowed: PictureSet | None  # those that pass filters and phrases; None: all
    without: int | None  # a num that is left out: the example itself
    names: NameMatches
    spread: float  # of the cosines of the library's sample
    phrases: Sequence[PhraseRanking] = ()  # of fewer pictures than can be compared one by one

    @property
    def pictures(self) -> PictureSet:
        """All pictures that are ranked."""
        every = self.live.pictures
        some = every if self.allowed is None else every & self.allowed
        return some if self.without is None else some - PictureSet([self.without])

    def best(self, count: int) -> Ranked:
        """Return at least the `count` best pictures, with all that tie with the last of them."""
        every = len(self.live.pictures if self.allowed is None else self.allowed)
        count += self.without is not None
        if self.phrases or count >= every:
            nums, scores = self.live.search(self.vector, every, allowed=self.allowed)
        else:
            nums, scores = self._with_named(count, *self._nearest(count))
        if self.without is not None:
            others = nums != self.without
            nums, scores = nums[others], scores[others]
        keys = scores + self.names.bonus(nums, self.spread)
        if self.phrases:
            keys = reciprocal_rank_fusion([(1.0, nums, -keys), *self.phrases], nums)
        return nums, scores, keys

    def _nearest(self, k: int) -> tuple[Int64, Float32]:
        """Return the k nearest and all that tie with the last of them."""
        limit = k + 1
        while True:
            nums, scores = self.live.search(self.vector, limit, allowed=self.allowed)
            if len(nums) < limit or scores[-1] < scores[k - 1]:
                return nums, scores
            limit *= 4

    def _with_named(self, k: int, nums: Int64, scores: Float32) -> tuple[Int64, Float32]:
        """Return the nearest and, of the others, those that their names may lift to the k best.

        The cosines of these are at most the least of the nearest, so they are compared in blocks of
        falling bonus until that is too little: a small block whole, of a larger one as many as can
        still win, which where all have one bonus are the k nearest of it. An approximate index may
        miss one of these as it may any other picture.
        """
        least = scores.min(initial=1.0)
        threshold = _kth(scores + self.names.bonus(nums, self.spread), k)
        for block in self.names.blocks(FIRST_NAMED, NAMED_GROWTH):
            most = float(lift(block.coverage, self.spread))
            if most + least < threshold:
                break
            named = block.pictures if self.allowed is None else block.pictures & self.allowed
            limit = len(named) if len(named) <= WHOLE else 4 * (k + 1)  # few reach the floor
            while True:
                more, cosines = self.live.search(
                    self.vector, limit, allowed=named, floor=threshold - most
                )
                new = ~PictureSet(nums).has(more)
                both = np.concatenate([nums, more[new]]), np.concatenate([scores, cosines[new]])
                threshold = _kth(both[1] + self.names.bonus(both[0], self.spread), k)
                if len(more) < limit or limit >= len(named) or cosines[-1] + most < threshold:
                    break
                if block.even and cosines[-1] < cosines[k - 1]:
                    break
                limit *= 4
            nums, scores = both
        return nums, scores


def _kth(keys: npt.NDArray[np.floating], k: int) -> float:
    """Return the k-th greatest key; minus infinity if there are fewer."""
    return float(np.partition(keys, len(keys) - k)[len(keys) - k]) if len(keys) >= k else -np.inf


def reciprocal_rank_fusion(rankings: Sequence[PhraseRanking], nums: Int64) -> Float64:
    """Return a key for each of `nums` (N,), the greater the better: sum of weight / (RRF_K + rank).

    `rankings` are (weight, nums, their keys, the best least). Ranks count from 1 among `nums`, skipping
    all others, and equal keys share the best rank of them: they leave it to the other rankings which
    comes first. A num that is not in a ranking gets nothing from it.
    """
    order = np.argsort(nums)
    keys = np.zeros(len(nums))
    for weight, ranking, its_keys in rankings:
        asked = np.isin(ranking, nums)
        ranked, its_keys = ranking[asked], its_keys[asked]
        positions = order[np.searchsorted(nums, ranked, sorter=order)]
        keys[positions] += weight / (RRF_K + 1 + np.searchsorted(np.sort(its_keys), its_keys))
    return keys.round(12)  # so that 1/61 + 1/62 and 1/62 + 1/61 tie exactly
