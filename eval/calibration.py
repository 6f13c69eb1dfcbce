"""How far a classifier's probabilities can be believed, and the temperature that mends them.

The temperature (Guo et al. 2017, arXiv 1706.04599) is fitted on one half of the pictures, divided by
class; expected calibration error (ECE, 15 bins of equal width) and negative log-likelihood (NLL) are
given for the other half, before and after. ECE is never 0 for finitely many pictures: compare it with
the one after the temperature, on the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.metrics import Interval
from eval.classification import percent, stratified_halves

__all__ = ["calibration"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_BINS = 15


def calibration(
    logits: Float32, labels: Int64, *, seed: int = 0
) -> tuple[dict[str, Interval], list[dict[str, Any]], str]:
    """Of logits (N, C), N >= 2, and labels (N,): (metrics, reliability diagrams, a sentence)."""
    fitted_on, measured_on = stratified_halves(labels, seed=seed)
    temperature = metrics.fit_temperature(logits[fitted_on], labels[fitted_on])
    found = {"temperature": Interval(temperature, math.nan, math.nan, len(fitted_on))}
    diagrams = []
    held_out, truth = logits[measured_on].astype(np.float64), labels[measured_on]
    for title, prefix, divisor in (
        ("As the model says it", "", 1.0),
        (f"After temperature {temperature:.2f}", "calibrated/", temperature),
    ):
        scaled = held_out / divisor
        probabilities = metrics.softmax(scaled)
        found[f"{prefix}ECE"] = _ece_interval(probabilities, truth, seed)
        # From logits, so that it is finite where a probability is too small for a number.
        loss = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
        found[f"{prefix}NLL"] = metrics.mean_interval(loss, seed=seed, fraction=False)
        bins = metrics.reliability(probabilities, truth, bins=_BINS)
        names = ("low", "high", "confidence", "accuracy", "n")
        diagrams.append({"title": title, "bins": [{k: getattr(b, k) for k in names} for b in bins]})
    right = float((held_out.argmax(axis=1) == truth).mean())
    sure = float(metrics.softmax(held_out).max(axis=1).mean())
    return found, diagrams, _words(found, sure, right)


def _ece_interval(probabilities: Float64, labels: Int64, seed: int) -> Interval:
    """`metrics.expected_calibration_error`, reduced to what a resampled row adds to its bin."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bin_of = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    return metrics.statistic_interval(
        lambda rows: float(np.abs(np.bincount(bin_of[rows], gap[rows])).sum() / len(rows)),
        len(labels),
        seed=seed,
    )


def _words(found: Mapping[str, Interval], sure: float, right: float) -> str:
    said = f"Its probabilities promise {percent(sure)} right answers and {percent(right)} are right"
    if found["ECE"].low <= found["calibrated/ECE"].high:
        return f"{said}: they can be believed about as well as a temperature could make them."
    way = "too sure of itself" if sure > right else "too unsure of itself"
    return (
        f"{said}: it is {way}. Divide its logits by {found['temperature'].value:.2f}, and the mean gap "
        f"between promise and truth falls from {percent(found['ECE'].value)} to "
        f"{percent(found['calibrated/ECE'].value)}."
    )
