"""Probes of an embedding space that need one labelled set and no training: its own nearest neighbours
and a linear classifier in closed form. Quick enough for every evaluation of a training run.

Vectors are unit rows, float32 (N, D); labels int64 (N,), any numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clipkit.arrays import Float32, Float64, Int64
from clipkit.errors import InputError

TEMPERATURE = 0.07  # a neighbour counts exp(cosine / 0.07): Wu et al. 2018, arXiv 1805.01978
_BLOCK = 512  # rows of similarities at a time
_FOLDS = 5
_RIDGE = 1e-2  # of the mean eigenvalue of the covariance


def neighbour_votes(vectors: Float32, labels: Int64, k: int) -> Int64:
    """Return the label that the k nearest other rows vote for: int64 (N,).

    Of equal votes the smaller label wins. Raises InputError for fewer than two rows.
    """
    classes, own = np.unique(labels, return_inverse=True)
    result = np.empty(len(vectors), np.int64)
    for rows, cosines in _others(vectors):
        count = min(k, len(vectors) - 1)
        near = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = np.exp((np.take_along_axis(cosines, near, 1) - 1) / TEMPERATURE)
        votes = np.zeros((len(cosines), len(classes)))
        np.add.at(votes, (np.arange(len(cosines))[:, None], own[near]), weights)
        result[rows] = classes[votes.argmax(1)]
    return result


def neighbour_losses(vectors: Float32, labels: Int64) -> Float64:
    """Return how surprising each row's label is to all other rows' votes, -log of its share: (N,).

    0 for a row whose label no other row has: nothing could be right. Its mean is the soft nearest
    neighbour loss (Frosst et al. 2019, arXiv 1902.01889) at TEMPERATURE, of cosines.
    """
    losses = np.zeros(len(vectors))
    for rows, cosines in _others(vectors):
        weights = np.exp((cosines.astype(np.float64) - 1) / TEMPERATURE)
        same = (weights * (labels[rows, None] == labels)).sum(1)
        seen = same > 0
        losses[rows][seen] = np.log(weights.sum(1)[seen] / same[seen])
    return losses


def ridge_accuracy(vectors: Float32, labels: Int64, *, seed: int = 0) -> float:
    """Return the accuracy of a linear classifier, least squares on one-hot labels with a little ridge,
    each fifth of the rows classified by what was fitted on the others.

    A logistic regression (`clipkit eval probe`) is more accurate; this one moves with it, and takes
    milliseconds.
    """
    count = len(vectors)
    if count < 2:
        raise InputError(f"a linear probe of {count} vectors; it needs at least 2")
    classes, own = np.unique(labels, return_inverse=True)
    targets = np.eye(len(classes))[own]
    fold = np.random.default_rng(seed).permutation(count) % min(_FOLDS, count)
    right = 0
    for number in range(fold.max() + 1):
        held, rest = fold == number, fold != number
        fitted = vectors[rest].astype(np.float64)
        centre, mean = fitted.mean(0), targets[rest].mean(0)
        fitted -= centre
        covariance = fitted.T @ fitted
        ridge = max(_RIDGE * np.trace(covariance) / len(covariance), 1e-12)
        weights = np.linalg.solve(
            covariance + ridge * np.eye(len(covariance)), fitted.T @ (targets[rest] - mean)
        )
        scores = (vectors[held] - centre) @ weights + mean
        right += int((scores.argmax(1) == own[held]).sum())
    return right / count


def _others(vectors: Float32) -> Iterator[tuple[slice, Float32]]:
    """Yield blocks of rows, and their cosines with all rows; -inf with themselves."""
    if len(vectors) < 2:
        raise InputError(f"neighbours of {len(vectors)} vectors; there must be at least 2")
    for start in range(0, len(vectors), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(vectors)))
        cosines = vectors[rows] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(rows.start, rows.stop)] = -np.inf
        yield rows, cosines
