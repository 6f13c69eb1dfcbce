"""Pictures that say their own number, and a model that is told what to make of it: exact evaluations.

Picture (class c, number i) is one colour: red = 10 c (so up to 25 classes), green and blue = i. Towers
see a picture's mean colour, so a test derives every vector, and with it every figure, by hand.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit.errors import ImageError
from eval.data import Captioned, Labelled

Vector = npt.NDArray[np.float32]


class Numbered:
    """Pictures by (class, number); None is a file that cannot be decoded."""

    def __init__(self, numbers: Sequence[tuple[int, int] | None], *, suffix: str = "") -> None:
        self.numbers = list(numbers)
        self.suffix = suffix

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, row: int) -> str:
        return f"{row}{self.suffix}.png"

    def read(self, row: int) -> bytes:
        if (number := self.numbers[row]) is None:
            raise ImageError("file is empty (0 bytes)", reason="empty")
        c, i = number
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (10 * c, i % 256, i // 256)).save(buffer, "PNG")
        return buffer.getvalue()


class Told:
    """An encoder, its towers included, whose vectors are whatever two functions say.

    `see` gets (class, number), `read` a text; what they return is brought to unit length.
    """

    precision = "float32"
    device = "cpu"
    preferred_batch = 16
    preferred_side = 8

    def __init__(
        self,
        see: Callable[[int, int], Sequence[float] | Vector],
        read: Callable[[str], Sequence[float] | Vector],
        *,
        logit_scale: float = 100.0,
        name: str = "told",
    ) -> None:
        self.see, self.read = see, read
        self.logit_scale = logit_scale
        self.spec = self.encoder_id = self.space_id = self.known_id = name
        self.dim = len(read("photo 0"))
        self.loads = 0  # how often the towers were asked for

    def towers(self) -> Any:
        self.loads += 1
        return self

    def preprocess(self, image: Image.Image) -> Vector:
        return np.asarray(image, np.float32).mean(axis=(0, 1))

    def encode_images(self, images: Sequence[Vector]) -> Vector:
        rows = [self.see(round(r / 10), round(g) + 256 * round(b)) for r, g, b in images]
        return _unit(rows, self.dim)

    def encode_texts(self, texts: Sequence[str]) -> Vector:
        return _unit([self.read(text) for text in texts], self.dim)


def _unit(rows: Sequence[Any], dim: int) -> Vector:
    vectors = np.asarray(rows, np.float32).reshape(-1, dim)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def number_in(text: str) -> int:
    """The class that a prompt such as "a photo of kind7." names."""
    return int("".join(c for c in text if c.isdigit()) or 0)


def one_hot(c: int, dim: int) -> Vector:
    return np.eye(dim, dtype=np.float32)[c]


def oracle(classes: int, **options: Any) -> Told:
    """Knows every class: cosine 1 with the own, 0 with all others."""
    return Told(
        lambda c, _: one_hot(c, classes), lambda text: one_hot(number_in(text), classes), **options
    )


def collapsed(classes: int) -> Told:
    """Makes one vector of everything."""
    dim = max(classes, 2)
    return Told(lambda *_: np.ones(dim), lambda _: np.ones(dim), name="collapsed")


def labelled(labels: Sequence[int], count: int, /, **options: Any) -> Labelled:
    """A picture per label, numbered from 0, of classes "kind0", "kind1" ..."""
    given: dict[str, Any] = {
        "name": "numbered",
        "split": None,
        "pictures": Numbered([(c, i) for i, c in enumerate(labels)]),
        "classes": tuple(f"kind{c}" for c in range(count)),
        "labels": np.asarray(labels, np.int64),
        "targets": None,
    }
    return Labelled(**{**given, **options})


def captioned(pictures: int, per_picture: int = 2) -> Captioned:
    """Picture i, of class i, with captions "kind{i} a", "kind{i} b" ..."""
    return Captioned(
        name="numbered",
        split=None,
        pictures=Numbered([(i, i) for i in range(pictures)]),
        captions=tuple(
            f"kind{i} {'abcde'[j]}" for i in range(pictures) for j in range(per_picture)
        ),
        owner=np.repeat(np.arange(pictures), per_picture),
        tags=((),) * pictures,
    )
