"""Calibration of a classifier's probabilities: reliability diagram and temperature.

Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.metrics.classification import check_labelled, predictions

Float64 = npt.NDArray[np.float64]
_LIMIT = math.log(1e4)  # of |log temperature|


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The n predictions with a confidence in (low, high]: their mean confidence and accuracy."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


def reliability(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15
) -> list[ReliabilityBin]:
    """Group predictions by confidence into `bins` of equal width; empty bins are left out.

    Edges are as in sklearn.calibration.calibration_curve, (low, high], 0 going to the first. A
    prediction is the first of the most probable classes.
    """
    values, truth = check_labelled(probabilities, labels)
    confidence = values.max(axis=1).astype(np.float64)
    right = predictions(values) == truth
    edges = np.linspace(0.0, 1.0, bins + 1)
    of = np.searchsorted(edges[1:-1], confidence)
    n = np.bincount(of, minlength=bins)
    sure, correct = np.bincount(of, confidence, bins), np.bincount(of, right, bins)
    return [
        ReliabilityBin(
            float(edges[b]),
            float(edges[b + 1]),
            float(sure[b] / n[b]),
            float(correct[b] / n[b]),
            int(n[b]),
        )
        for b in np.flatnonzero(n)
    ]


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the temperature T that minimises the NLL of softmax(logits / T), logits (N, C).

    The NLL is convex in 1/T, so its minimum is the root of its slope, searched by Brent's method.
    Where there is no root, the result is a limit: 1e-4 if every label has the largest logit, 1e4 if
    the logits are worse than chance. 1 if the logits say nothing.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    values, truth = check_labelled(logits, labels)
    gaps = values.astype(np.float64)
    gaps -= gaps[np.arange(len(truth)), truth][:, None]

    def slope(log_inverse: float) -> float:
        """Return the derivative of the mean NLL by 1/T: the mean logit less the label's own."""
        probabilities = softmax(gaps * math.exp(log_inverse), axis=1)
        return float(np.einsum("ij,ij->i", probabilities, gaps).mean())

    if not gaps.any():
        return 1.0
    if slope(-_LIMIT) >= 0:
        return math.exp(_LIMIT)
    if slope(_LIMIT) <= 0:
        return math.exp(-_LIMIT)
    return math.exp(-float(brentq(slope, -_LIMIT, _LIMIT, xtol=1e-12)))
