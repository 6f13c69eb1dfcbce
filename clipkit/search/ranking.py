"""How rankings are joined and how strong a hit is. Pure numpy; the thresholds live here only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RRF_K = 60  # Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion", SIGIR, section 2
# Strength is a z-score: by how many standard deviations a cosine is above the mean of the same
# query's cosines to a random sample of the library.
STRONG_Z = 4.0
FAIR_Z = 2.5
FEWEST_FOR_Z = 30  # in a smaller library the sample says too little about the spread


def reciprocal_rank_fusion(
    rankings: Sequence[tuple[float, npt.NDArray[np.int64]]], nums: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """A key for each of `nums` (N,), the greater the better: sum of weight / (RRF_K + rank).

    `rankings` are (weight, nums best first). Ranks run from 1 among `nums`, others are passed over;
    what a ranking does not hold gets nothing from it.
    """
    order = np.argsort(nums)
    keys = np.zeros(len(nums))
    for weight, ranking in rankings:
        ranked = ranking[np.isin(ranking, nums)]
        places = order[np.searchsorted(nums, ranked, sorter=order)]
        keys[places] += weight / (RRF_K + 1 + np.arange(len(ranked)))
    return keys.round(12)  # 1/61 + 1/62 and 1/62 + 1/61 tie, whatever was added first


def strengths(scores: npt.NDArray[np.float32], sample: npt.NDArray[np.float32]) -> list[str]:
    """The band of each cosine, given the sample's cosines (S,), S >= 1, to the same query.

    A z-score of at least STRONG_Z is "strong", of at least FAIR_Z "fair", the rest "weak". With
    fewer than FEWEST_FOR_Z in the sample, or no spread in it, no hit can be told to stand out:
    what is not below the mean is "fair", the rest "weak".
    """
    mean, spread = float(sample.mean(dtype=np.float64)), float(sample.std(dtype=np.float64))
    if len(sample) < FEWEST_FOR_Z or spread < 1e-6:
        return ["fair" if score >= mean - 1e-6 else "weak" for score in scores.tolist()]
    bands = []
    for score in scores.tolist():
        z = (score - mean) / spread
        bands.append("strong" if z >= STRONG_Z else "fair" if z >= FAIR_Z else "weak")
    return bands
