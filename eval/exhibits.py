"""Single pictures that a report shows."""

from __future__ import annotations

from typing import Any

from clipkit.errors import ImageError
from eval.features import thumbnail_uri
from eval.source import Pictures

__all__ = ["exhibit"]


def exhibit(
    pictures: Pictures | None, row: int, *, expected: str, got: str, score: float | None = None
) -> dict[str, Any]:
    """A picture, and what is said of it, as an item of a report's details["mistakes"]."""
    thumbnail = ""
    if pictures is not None:
        try:
            thumbnail = thumbnail_uri(pictures, row)
        except ImageError:  # it went since it was encoded: the page says "no picture"
            thumbnail = ""
    name = f"picture {row}" if pictures is None else pictures.name(row)
    return {"name": name, "expected": expected, "got": got, "score": score, "thumbnail": thumbnail}
