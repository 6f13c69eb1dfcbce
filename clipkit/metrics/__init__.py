"""Metrics of models and spaces, their intervals and tests, from numpy arrays.

Importing this loads numpy alone; scipy is imported by the functions that need it.
"""

from __future__ import annotations

from clipkit.metrics.classification import (
    ReliabilityBin,
    average_precision,
    confusion,
    fit_temperature,
    knn_predict,
    per_class_recall,
    predictions,
    reliability,
    topk_hits,
)
from clipkit.metrics.intervals import (
    Interval,
    Paired,
    corrected_p,
    mean_interval,
    paired_test,
    statistic_interval,
)
from clipkit.metrics.probes import neighbour_losses, neighbour_votes, ridge_accuracy
from clipkit.metrics.ranking import Ranking, rank_captions, rank_pairs
from clipkit.metrics.space import (
    Statistic,
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

__all__ = [
    "Interval",
    "Paired",
    "Ranking",
    "ReliabilityBin",
    "Statistic",
    "TwoSampleTest",
    "alignment",
    "average_precision",
    "compare_batches",
    "confusion",
    "corrected_p",
    "covariance_spectrum",
    "effective_rank",
    "fit_temperature",
    "hubness",
    "knn_predict",
    "mean_interval",
    "mean_shift",
    "neighbour_losses",
    "neighbour_overlap",
    "neighbour_votes",
    "paired_test",
    "per_class_recall",
    "predictions",
    "rank_captions",
    "rank_pairs",
    "reliability",
    "ridge_accuracy",
    "statistic_interval",
    "topk_hits",
    "uniformity",
    "variance",
]
