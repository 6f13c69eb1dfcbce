"""Can a classifier's probabilities be believed? Reliability, ECE, NLL, temperature.

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


def softmax(logits: npt.ArrayLike) -> Float64:
    """Logits (N, C) -> probabilities, float64 (N, C)."""
    values = np.asarray(logits, np.float64)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)


def reliability(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15
) -> list[ReliabilityBin]:
    """The predictions by confidence, in `bins` of equal width; bins without any are left out.

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


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15
) -> float:
    """Mean |confidence - accuracy| over the predictions, both averaged per bin (ECE)."""
    found = reliability(probabilities, labels, bins)
    gaps = sum(b.n * abs(b.confidence - b.accuracy) for b in found)
    return gaps / sum(b.n for b in found)


def negative_log_likelihood(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, temperature: float = 1.0
) -> float:
    """Mean -log softmax(logits / temperature)[label], in nats; from logits, so never infinite."""
    values, truth = check_labelled(logits, labels)
    return float(-_from_own(values, truth, 1 / temperature)[1].mean())


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T).

    The NLL is convex in 1/T, so its one stationary point is found by Newton's method inside a
    shrinking bracket. Where there is none, the result runs towards the limits: 1e-4 if every label
    is on top, 1e4 if the logits are worse than chance.
    """
    values, truth = check_labelled(logits, labels)
    low, high, at = -_LIMIT, _LIMIT, 0.0  # of log(1/T)
    for turn in range(60):
        slope, curvature = _derivatives(values, truth, math.exp(at))
        low, high = (at, high) if slope < 0 else (low, at)
        # Newton's step by 1/T, relative to it; by halves once that has not settled in 20 turns.
        step = -slope / max(curvature * math.exp(at), 1e-300)
        newton = at + math.log1p(step) if step > -1 else low
        if abs(newton - at) < 1e-12:
            break
        at = newton if low < newton < high and turn < 20 else (low + high) / 2
    return math.exp(-at)


def _from_own(
    values: npt.NDArray[np.floating], truth: npt.NDArray[np.int64], inverse: float
) -> tuple[Float64, Float64]:
    """(logits less the label's own (N, C), log-probability of the label (N,)), at 1/T."""
    gaps = values.astype(np.float64)
    gaps -= gaps[np.arange(len(truth)), truth][:, None]
    scaled = gaps * inverse
    top = scaled.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))
    return gaps, -log_sum


def _derivatives(
    values: npt.NDArray[np.floating], truth: npt.NDArray[np.int64], inverse: float
) -> tuple[float, float]:
    """First and second derivative of the mean NLL by 1/T: mean and variance of the logits."""
    gaps, own = _from_own(values, truth, inverse)
    probabilities = np.exp(gaps * inverse + own[:, None])
    mean = np.einsum("ij,ij->i", probabilities, gaps)
    square = np.einsum("ij,ij,ij->i", probabilities, gaps, gaps)
    return float(mean.mean()), float((square - mean**2).mean())
