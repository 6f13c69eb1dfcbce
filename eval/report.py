"""EvalReport: what every evaluator returns, and how it is kept.

A report is a folder: `report.json` (everything but the samples), `report.md`, `report.html`, and
`samples.npz` (the values per picture that a paired test between two models needs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.metrics import Interval

__all__ = ["EvalReport"]


@dataclass(frozen=True, slots=True, eq=False)
class EvalReport:
    """One evaluation of one model on one dataset.

    `metrics` are Intervals (value, low, high, n), fractions where the field prints percent, by names
    such as "text_to_image/R@1" or "acc@1"; a metric without an honest interval has low and high NaN.
    `details` hold what a page can show: see page.py for the keys it knows.
    """

    task: str  # "retrieval", "zeroshot", "probe", "space", "drift", "index", "robustness"
    dataset: str  # as it was named
    split: str | None
    model: str  # its spec
    encoder_id: str
    n: Mapping[str, int]  # {"pictures": 1000, "captions": 5000}
    metrics: Mapping[str, Interval]
    settings: Mapping[str, Any]  # what changes the numbers: templates, tie rule, precision, seeds
    fingerprint: str  # of the data
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    created_at: str = ""  # UTC, ISO
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
