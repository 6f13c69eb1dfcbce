"""What an indexing run tells of itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `done` of `total` files that needed work; `rate` in files per second."""

    phase: Literal["walking", "embedding", "finishing"]
    seen: int = 0
    done: int = 0
    total: int = 0
    added: int = 0
    moved: int = 0
    skipped: int = 0
    rate: float = 0.0
    eta_seconds: float | None = None
    current: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, in files. `reasons` counts the newly skipped by their reason; those known to
    be bad and unchanged are `skipped_before`. A file that moved is neither added nor removed."""

    added: int
    duplicates: int
    moved: int
    removed: int
    unchanged: int
    skipped_before: int
    skipped: int
    reasons: Mapping[str, int]
    unavailable: tuple[str, ...]
    stopped: bool
    embedded: int
    seconds: float

    @property
    def pictures_per_second(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0


class Rate:
    """Files per second over the last half minute."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, files: int) -> None:
        now = time.monotonic()
        self._marks.append((now, self._marks[-1][1] + files))
        while now - self._marks[0][0] > 30 and len(self._marks) > 2:
            self._marks.popleft()

    def per_second(self) -> float:
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0
