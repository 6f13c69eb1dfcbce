"""Single pictures that a report shows."""

from __future__ import annotations

from typing import Any

from eval.data import Pictures
from eval.features import thumbnail_if_there


def exhibit(
    pictures: Pictures | None, row: int, *, expected: str, got: str, score: float | None = None
) -> dict[str, Any]:
    """A picture, and what is said of it, as an item of a report's details["mistakes"]."""
    # The page says "no picture" where there is none.
    thumbnail = None if pictures is None else thumbnail_if_there(pictures, row)
    name = f"picture {row}" if pictures is None else pictures.name(row)
    return {
        "name": name,
        "expected": expected,
        "got": got,
        "score": score,
        "thumbnail": thumbnail or "",
    }
