"""Plain definitions of figures that the library computes in another way, to compare with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from clipkit.metrics import reliability

Float64 = npt.NDArray[np.float64]


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15
) -> float:
    """Return the ECE: mean |confidence - accuracy| over the predictions, both averaged per bin."""
    groups = reliability(probabilities, labels, bins)
    return sum(b.n * abs(b.confidence - b.accuracy) for b in groups) / sum(b.n for b in groups)


def negative_log_likelihood(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, temperature: float = 1.0
) -> float:
    """Return the mean of -log softmax(logits / temperature)[label], in nats."""
    scaled = np.asarray(logits, np.float64) / temperature
    return float(-log_softmax(scaled, axis=1)[np.arange(len(scaled)), labels].mean())


def mean_shift(x: Float64, y: Float64) -> float:
    """Return the distance of the means."""
    return float(np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)))


def energy_distance(x: Float64, y: Float64) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs (Szekely & Rizzo 2013)."""
    return float(2 * distances(x, y).mean() - distances(x, x).mean() - distances(y, y).mean())


def mmd2(x: Float64, y: Float64) -> float:
    """Return the unbiased squared MMD with a Gaussian kernel, its sigma the median distance of the
    pooled rows (Gretton et al. 2012)."""
    pooled = np.concatenate([x, y])
    sigma = np.median(distances(pooled, pooled)[np.triu_indices(len(pooled), 1)])

    def kernel(a: Float64, b: Float64) -> Float64:
        return np.exp(-(distances(a, b) ** 2) / (2 * sigma**2))

    def within(a: Float64) -> float:
        n = len(a)
        return float((kernel(a, a).sum() - n) / (n * (n - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def distances(x: Float64, y: Float64) -> Float64:
    """Return the Euclidean distances of rows, float64 (N, M)."""
    return np.asarray(np.linalg.norm(x[:, None] - y[None], axis=2), np.float64)
