"""A catalog to write to and one that reads beside it, filled with pictures that are only told of.

Picture `number` has the image_id `image_id(number)` and a vector that says its number. Tests import
the fixtures by name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.catalog import Catalog

ENCODER = "enc-1"
DIM = 4
SECOND = 10**9  # in nanoseconds
NOON_2020 = (
    int(time.mktime((2020, 6, 15, 12, 0, 0, 0, 0, -1))) * SECOND
)  # local time, as Filters say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def writer(folder: Path) -> Iterator[Catalog]:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="builtin", config_json="{}", dim=DIM)
        yield catalog


@pytest.fixture
def reader(writer: Catalog) -> Iterator[Catalog]:
    """Sees what `writer` has committed."""
    writer.commit()
    with Catalog.open(writer.folder) as catalog:
        yield catalog


def image_id(number: int) -> str:
    return f"{number:032x}"


def vector_of(number: int) -> np.ndarray:
    """A unit vector (1, DIM) whose first two values say the number, up to 511."""
    angle = number * np.pi / 1024
    return np.array([[np.cos(angle), np.sin(angle), 0, 0]], np.float32)


def number_of(vector: np.ndarray) -> int:
    return round(float(np.arctan2(vector[1], vector[0])) * 1024 / np.pi)


def add(catalog: Catalog, number: int, *paths: str, mtime_ns: int = NOON_2020, **facts: Any) -> int:
    """Picture `number` at `paths`, with a vector that says its number; not committed."""
    known: dict[str, Any] = {"width": 640, "height": 480, "format": "JPEG", "bytes": 1000}
    texts = {key: facts.pop(key) for key in ("captions", "tags") if key in facts}
    num = catalog.add_picture(image_id=image_id(number), **{**known, **facts})
    for path in paths:
        catalog.add_place(num, path, size=1000, mtime_ns=mtime_ns, **texts)
    if catalog.vector(num, ENCODER) is None:
        catalog.add_vectors(ENCODER, np.array([num]), vector_of(number))
    return num


def found(catalog: Catalog, text: str) -> list[int]:
    """The pictures with a phrase, the best first."""
    nums, bm25 = catalog.phrase(text)
    ranks = np.zeros(len(nums)) if bm25 is None else bm25
    return sorted(nums, key=lambda num: ranks[list(nums).index(num)])
