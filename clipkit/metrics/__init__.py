"""The figures that models are judged by, and how far to trust them: numpy only."""

from __future__ import annotations

from clipkit.metrics.intervals import (
    Interval,
    Paired,
    mean_interval,
    paired_test,
    statistic_interval,
)
from clipkit.metrics.ranking import Ranking, rank_captions, rank_pairs

__all__ = [
    "Interval",
    "Paired",
    "Ranking",
    "mean_interval",
    "paired_test",
    "rank_captions",
    "rank_pairs",
    "statistic_interval",
]
