"""Classification: top-k hits, confusion, recall per class, average precision, k-NN votes, calibration.

Calibration of probabilities, by a reliability diagram and a temperature: Guo, Pleiss, Sun, Weinberger
2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Bool, Float64, Floats, Int64
from clipkit.errors import InputError

_LIMIT = math.log(1e4)  # of |log temperature|


def topk_hits(scores: npt.ArrayLike, labels: npt.ArrayLike, k: int) -> Float64:
    """Return whether each label (N,) is among the k best of scores (N, C): float64 (N,), 0 to 1.

    Ties count by their expectation under random order: a constant classifier hits k / C. The mean
    is acc@k.
    """
    values, truth = _labelled(scores, labels)
    own = values[np.arange(len(truth)), truth][:, None]
    greater, tie = (values > own).sum(axis=1), (values == own).sum(axis=1)
    return np.asarray(np.clip((k - greater) / tie, 0.0, 1.0), np.float64)


def predictions(scores: npt.ArrayLike) -> Int64:
    """Return the best class of each row of scores (N, C), int64 (N,); of equal ones the first."""
    return np.asarray(_finite(scores).argmax(axis=1), np.int64)


def confusion(labels: npt.ArrayLike, predicted: npt.ArrayLike, classes: int) -> Int64:
    """Count pairs, int64 (C, C): row = label, column = prediction."""
    truth, guess = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if truth.shape != guess.shape:
        raise InputError(f"{truth.shape} labels and {guess.shape} predictions; they must match")
    _check_labels(truth, classes)
    _check_labels(guess, classes)
    counts = np.bincount(truth * classes + guess, minlength=classes * classes)
    return np.asarray(counts.reshape(classes, classes), np.int64)


def per_class_recall(labels: npt.ArrayLike, hits: npt.ArrayLike, classes: int) -> Float64:
    """Return the mean of hits (N,) per class, float64 (C,); NaN for a class without rows.

    With `topk_hits(scores, labels, 1)` the mean over the classes is balanced accuracy.
    """
    truth = np.asarray(labels, np.int64)
    _check_labels(truth, classes)
    n = np.bincount(truth, minlength=classes)
    sums = np.bincount(truth, np.asarray(hits, np.float64), classes)
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan)


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Float64:
    """Return each class's AP, float64 (C,), of scores and targets (N, C); NaN without targets.

    The sum over thresholds of (recall gained) x (precision there), equal scores being one
    threshold, as sklearn.metrics.average_precision_score; the mean over classes is the mAP.
    """
    values, truth = _finite(scores), np.asarray(targets, np.bool_)
    if values.shape != truth.shape:
        raise InputError(f"scores {values.shape} and targets {truth.shape}; shapes must match")
    return np.array([_ap(s, t) for s, t in zip(values.T, truth.T, strict=True)], np.float64)


def knn_predict(
    neighbour_labels: npt.ArrayLike,
    similarities: npt.ArrayLike,
    classes: int,
    *,
    k: int,
    temperature: float = 0.07,
) -> Float64:
    """Return votes, float64 (Q, C), of the first k neighbours, weighted exp(similarity / temperature).

    neighbour_labels and similarities are (Q, K >= k), best first. Rows sum to 1. Wu et al. 2018,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978.
    """
    labels = np.asarray(neighbour_labels, np.int64)
    cosines = np.asarray(similarities, np.float64)
    if labels.ndim != 2 or labels.shape != cosines.shape or not 1 <= k <= labels.shape[1]:
        raise InputError(
            f"k is {k}, neighbours are {labels.shape}, similarities {cosines.shape};"
            " shapes must be equal, (queries, K), and k between 1 and K"
        )
    labels, cosines = labels[:, :k], cosines[:, :k]
    if not np.isfinite(cosines).all():
        raise InputError("a similarity is not finite (NaN or infinity); neighbours have no weight")
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise InputError(
            f"neighbour labels are {labels.min()} to {labels.max()}; there are {classes} classes"
        )
    weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    cell = np.arange(len(labels))[:, None] * classes + labels
    votes = np.bincount(cell.ravel(), weights.ravel(), len(labels) * classes)
    return np.asarray(votes.reshape(len(labels), classes), np.float64)


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
    values, truth = _labelled(probabilities, labels)
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

    values, truth = _labelled(logits, labels)
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


def _ap(scores: Float64, targets: Bool) -> float:
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each threshold
    hits = np.cumsum(targets[order])[ends]
    if hits[-1] == 0:
        return float("nan")
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float((gained * hits / (ends + 1)).sum())


def _finite(scores: npt.ArrayLike) -> Floats:
    values = np.asarray(scores)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"scores have shape {values.shape}; (rows, classes) is needed, none 0")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise InputError(
            f"row {bad[0]} of the scores is not finite (NaN or infinity);"
            " a model that gives such scores cannot be measured"
        )
    return values


def _labelled(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Int64]:
    """Return scores (N, C) and labels (N,) as arrays. Raises InputError if they are unfit."""
    values, truth = _finite(scores), np.asarray(labels, np.int64)
    if truth.shape != (len(values),):
        raise InputError(f"labels have shape {truth.shape}; {len(values)} rows need one each")
    _check_labels(truth, values.shape[1])
    return values, truth


def _check_labels(labels: Int64, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise InputError(
            f"label {labels[wrong[0]]} of row {wrong[0]} is none of the {classes} classes"
            f" (0 to {classes - 1})"
        )
