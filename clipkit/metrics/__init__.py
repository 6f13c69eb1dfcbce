"""The figures that models are judged by, and how far to trust them: numpy only."""

from __future__ import annotations

from clipkit.metrics.intervals import (
    Interval,
    Paired,
    mean_interval,
    paired_test,
    statistic_interval,
)

__all__ = ["Interval", "Paired", "mean_interval", "paired_test", "statistic_interval"]
