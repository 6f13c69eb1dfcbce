"""The probability that a hit is right, from its cosine.

What a cosine means differs by model: 0.3 is a perfect match for one and chance for another. A
`Calibration` is a logistic regression that is fitted on labelled captions and kept in the model's
folder (FILE):

    log odds = constant + cosine * c - size * log(N)

where c is the hit's cosine and N the number of pictures in the library: the more there are, the higher
is the best cosine by luck. The built-in model's is fitted by data_prep/builtin_model/strength.py, a
training run's on its validation split, which has one size, so that `size` is given. It is for texts:
cosines between two pictures are another distribution. The cosine above the query's mean, and above the
best that normal luck would bring, were tried too; on a dataset left out they made the loss higher.

A probability is conservative: a picture that fits counts as wrong where its captions do not say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import checkpoint
from clipkit.arrays import Bool, Float32, Float64, Int64
from clipkit.durable import write_whole
from clipkit.errors import ModelError

FILE = "strength.json"
STRONG = 0.5  # of being right: more likely than not
FAIR = 0.3
FEWEST_CAPTIONS, MOST_CAPTIONS = 100, 1_000  # of which a calibration is fitted
RIGHT_SHARE = 0.01  # of a library that is right for one of its captions, where no data say it
FEWEST_PICTURES = 1_000  # N is never less: smaller libraries would be too sure
USUAL_SIZE = 0.2  # the built-in model's, rounded, for models without a calibration to start from


@dataclass(frozen=True, slots=True)
class Calibration:
    """See the module. `encoder_id` names the only encoder for whose cosines it holds."""

    encoder_id: str
    constant: float
    cosine: float
    size: float = 0.0  # what a library e times as large takes from the log odds
    fitted_on: Mapping[str, Any] = field(default_factory=dict)  # for the reader: data and counts

    def probabilities(self, cosines: npt.ArrayLike, pictures: npt.ArrayLike) -> Float64:
        """Return the probability of being right for cosines (H,), in [0, 1], in a library of so many
        `pictures`, a number or (H,)."""
        lost = self.size * np.log(np.maximum(pictures, FEWEST_PICTURES))
        logits = self.constant + self.cosine * np.asarray(cosines, np.float64) - lost
        return np.asarray(1 / (1 + np.exp(-logits)))

    def write(self, folder: Path) -> None:
        """Write FILE into a model's folder, all or nothing."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / FILE, text.encode("utf-8"))


def band(probability: float) -> str:
    """Return "strong", "fair" or "weak"."""
    return "strong" if probability >= STRONG else "fair" if probability >= FAIR else "weak"


def read(spec: str, encoder_id: str) -> Calibration | None:
    """Read the calibration of the model that a spec names; None if it has none for this encoder.

    Raises ModelError for a file that is not a calibration.
    """
    folder = checkpoint.find_folder(spec)
    if folder is None:
        return None
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        calibration = Calibration(**content)
        if not np.isfinite([calibration.constant, calibration.cosine, calibration.size]).all():
            raise ValueError("a number is not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / FILE} is not a calibration of strengths ({error}); copy the model again, or "
            "delete this file to search without strengths"
        ) from error
    return calibration if calibration.encoder_id == encoder_id else None


def fit(
    cosines: Float64,
    pictures: Int64,
    right: Bool,
    weights: Float64,
    *,
    encoder_id: str,
    size: float | None = None,
    fitted_on: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit a calibration to P pairs of a text and a picture.

    All arrays are (P,): `pictures` is the number of pictures in a pair's library, and `right` has
    both values. Give `size` for libraries of one size, which cannot tell it.
    """
    logs = np.log(np.maximum(pictures, FEWEST_PICTURES))
    features = np.stack([cosines, -logs], axis=1) if size is None else cosines[:, None]
    slopes, constant = _logistic(features, right, weights / weights.sum())
    if size is None:
        size = float(slopes[1])
    else:
        constant += size * float(np.average(logs, weights=weights))
    return Calibration(
        encoder_id=encoder_id,
        constant=round(constant, 3),
        cosine=round(float(slopes[0]), 3),
        size=round(size, 3),
        fitted_on=dict(fitted_on or {}),
    )


def fit_captions(
    pictures: Float32,
    captions: Float32,
    owner: Int64,
    *,
    encoder_id: str,
    size: float = USUAL_SIZE,
) -> Calibration | None:
    """Fit a calibration, all but its `size`, to captioned pictures; None for fewer than
    FEWEST_CAPTIONS captions.

    pictures (N, D) and captions (M, D) are unit rows; owner (M,) is each caption's picture. The owner
    is right for a caption, all others count as wrong, weighted as if RIGHT_SHARE of a library were
    right.
    """
    if len(captions) < FEWEST_CAPTIONS or len(pictures) < 2:
        return None
    step = -(-len(captions) // MOST_CAPTIONS)
    captions, owner = captions[::step], owner[::step]
    cosines = (captions @ pictures.T).astype(np.float64)  # (M, N)
    right = np.zeros(cosines.shape, bool)
    right[np.arange(len(captions)), owner] = True
    weights = np.where(right, RIGHT_SHARE, (1 - RIGHT_SHARE) / (len(pictures) - 1))
    fitted_on = {"captions": len(captions), "pictures": len(pictures)}
    return fit(
        cosines.ravel(),
        np.full(cosines.size, len(pictures)),
        right.ravel(),
        weights.ravel(),
        encoder_id=encoder_id,
        size=size,
        fitted_on=fitted_on,
    )


def _logistic(features: Float64, right: Bool, weights: Float64) -> tuple[Float64, float]:
    """Fit a logistic regression by Newton's method: slopes (F,) and constant.

    A small ridge on the slopes of the standardised features keeps separable data finite.
    """
    centre, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
    x = np.column_stack([(features - centre) / scale, np.ones(len(features))])
    ridge = np.diag([1e-4] * features.shape[1] + [1e-9])
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -50, 50)))
        gradient = x.T @ (weights * (p - right)) + ridge @ beta
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        beta -= step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))  # no wild first steps
        if np.abs(step).max() < 1e-8:
            break
    slopes = beta[:-1] / scale
    return slopes, float(beta[-1] - slopes @ centre)
