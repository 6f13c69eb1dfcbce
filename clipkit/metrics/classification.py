"""Classification from scores: top-k hits, confusion, recall per class, average precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def topk_hits(scores: npt.ArrayLike, labels: npt.ArrayLike, k: int) -> Float64:
    """Is the label (N,) among the k best of scores (N, C)? float64 (N,), 0 to 1.

    Ties count by their expectation under random order: a constant classifier hits k / C. The mean
    is acc@k.
    """
    values, truth = check_labelled(scores, labels)
    own = values[np.arange(len(truth)), truth][:, None]
    greater, tie = (values > own).sum(axis=1), (values == own).sum(axis=1)
    return np.asarray(np.clip((k - greater) / tie, 0.0, 1.0), np.float64)


def predictions(scores: npt.ArrayLike) -> Int64:
    """The best class of each row of scores (N, C); of equal ones the first."""
    return np.asarray(_finite(scores).argmax(axis=1), np.int64)


def confusion(labels: npt.ArrayLike, predicted: npt.ArrayLike, classes: int) -> Int64:
    """Counts, int64 (C, C): row = label, column = prediction."""
    truth, said = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if truth.shape != said.shape:
        raise InputError(f"{truth.shape} labels and {said.shape} predictions; they must match")
    _check_labels(truth, classes)
    _check_labels(said, classes)
    counts = np.bincount(truth * classes + said, minlength=classes * classes)
    return np.asarray(counts.reshape(classes, classes), np.int64)


def per_class_recall(labels: npt.ArrayLike, hits: npt.ArrayLike, classes: int) -> Float64:
    """Mean of hits (N,) over each class's rows, float64 (C,); NaN for a class without rows.

    With `topk_hits(scores, labels, 1)` the mean over the classes is balanced accuracy.
    """
    truth = np.asarray(labels, np.int64)
    _check_labels(truth, classes)
    n = np.bincount(truth, minlength=classes)
    sums = np.bincount(truth, np.asarray(hits, np.float64), classes)
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan)


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Float64:
    """AP of each class, float64 (C,), of scores and targets (N, C); NaN for a class without any.

    The sum over thresholds of (recall gained) x (precision there), equal scores being one
    threshold, as sklearn.metrics.average_precision_score; the mean over classes is the mAP.
    """
    values, truth = _finite(scores), np.asarray(targets, np.bool_)
    if values.shape != truth.shape:
        raise InputError(f"scores {values.shape} and targets {truth.shape}; shapes must match")
    return np.array([_ap(s, t) for s, t in zip(values.T, truth.T, strict=True)], np.float64)


def _ap(scores: Float64, targets: Bool) -> float:
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each threshold
    found = np.cumsum(targets[order])[ends]
    if found[-1] == 0:
        return float("nan")
    gained = np.diff(found, prepend=0) / found[-1]
    return float((gained * found / (ends + 1)).sum())


def _finite(scores: npt.ArrayLike) -> npt.NDArray[np.floating]:
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


def check_labelled(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], Int64]:
    """Scores (N, C), finite, and labels (N,) that are classes of them; else InputError."""
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
