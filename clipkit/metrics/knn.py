"""k nearest neighbours as a classifier of frozen embeddings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError


def knn_predict(
    neighbour_labels: npt.ArrayLike,
    similarities: npt.ArrayLike,
    classes: int,
    *,
    k: int,
    temperature: float = 0.07,
) -> npt.NDArray[np.float64]:
    """Votes of the first k neighbours, weighted exp(similarity / temperature): float64 (Q, C).

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
