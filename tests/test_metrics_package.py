"""The metrics package as a whole: what it offers, and what it does not drag in."""

from __future__ import annotations

import subprocess
import sys

from clipkit import metrics


def test_everything_offered_is_there_and_sorted() -> None:
    assert metrics.__all__ == sorted(set(metrics.__all__))
    assert all(
        getattr(metrics, name).__module__.startswith("clipkit.metrics.") for name in metrics.__all__
    )


def test_numpy_is_enough() -> None:
    heavy = ["torch", "scipy", "sklearn", "faiss"]
    code = f"import clipkit.metrics, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
