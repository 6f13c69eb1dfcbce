"""The figures that models are judged by, and how far to trust them: numpy only."""

from __future__ import annotations

from clipkit.metrics.calibration import (
    ReliabilityBin,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
)
from clipkit.metrics.classification import (
    average_precision,
    confusion,
    per_class_recall,
    predictions,
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
from clipkit.metrics.knn import knn_predict
from clipkit.metrics.ranking import Ranking, rank_captions, rank_pairs
from clipkit.metrics.space import (
    alignment,
    covariance_spectrum,
    effective_rank,
    energy_distance,
    hubness,
    mean_shift,
    mmd2,
    modality_gap,
    neighbour_overlap,
    permutation_p,
    uniformity,
    variance,
)

__all__ = [
    "Interval",
    "Paired",
    "Ranking",
    "ReliabilityBin",
    "alignment",
    "average_precision",
    "confusion",
    "corrected_p",
    "covariance_spectrum",
    "effective_rank",
    "energy_distance",
    "expected_calibration_error",
    "fit_temperature",
    "hubness",
    "knn_predict",
    "mean_interval",
    "mean_shift",
    "mmd2",
    "modality_gap",
    "negative_log_likelihood",
    "neighbour_overlap",
    "paired_test",
    "per_class_recall",
    "permutation_p",
    "predictions",
    "rank_captions",
    "rank_pairs",
    "reliability",
    "softmax",
    "statistic_interval",
    "topk_hits",
    "uniformity",
    "variance",
]
