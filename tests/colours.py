"""A model that knows colours only: what the page's tests search with. Real vectors, no weights.

A picture's vector is its mean colour, a text's the colour of the words it names, both as distance
from grey: "red" is (1, -1, -1) / sqrt 3, so cosine("red", a red picture) = 1 and
cosine("red", a blue picture) = (-1 + 1 - 1) / 3 = -1/3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
}


class ColourEncoder:
    encoder_id = space_id = "c010" * 4
    spec = "colours"
    dim = 3
    preferred_side = 16
    device = "cpu"
    preferred_batch = 4

    def describe(self) -> str:
        return "{}"

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB"), dtype=np.float32).mean(axis=(0, 1))

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        rows = [i if isinstance(i, np.ndarray) else self.preprocess(i) for i in images]
        return _unit(rows)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        known = [[WORDS[w] for w in text.lower().split() if w in WORDS] for text in texts]
        return _unit([np.mean(colours or [(200, 0, 200)], axis=0) for colours in known])


class ColourModel(ColourEncoder):
    """The encoder above as clipkit.lazy_encoder.LazyEncoder does: loaded from the start."""

    known_id = ColourEncoder.encoder_id
    state = "ready"

    def towers(self) -> ColourEncoder:
        return self

    def warm(self) -> None: ...

    def prepare_texts(self) -> None: ...


def paint(path: Path, colour: str, *, number: int = 0, size: tuple[int, int] = (90, 60)) -> Path:
    """A picture of one colour; `number` (below its pixels) makes it another picture of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, WORDS[colour])
    picture.putpixel((number % size[0], number // size[0]), (128, 128, 128))
    picture.save(path)
    return path


def _unit(rows: Sequence[Any]) -> np.ndarray:
    vectors = np.asarray(rows, dtype=np.float32).reshape(-1, 3) - 127.5
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
