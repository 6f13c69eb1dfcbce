"""A real catalog and a fake encoder of four hand-placed directions.

"dog", "beach", "leash" and "car" are the axes of a four-dimensional space; a picture's vector says
how much of each it shows. Vectors are kept in half precision, so cosines are right to 1e-3.
Tests import the fixtures by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipkit.catalog import Catalog
from clipkit.search import Searcher, SearchResult

AXES = ("dog", "beach", "leash", "car")


class FakeEncoder:
    """A text's vector is the sum of its words' axes; a picture's is its mean red, green and blue."""

    preferred_side = 8
    precision = "float32"
    known_id: str | None

    def __init__(self, encoder_id: str = "fake-1", spec: str = "fake") -> None:
        self.encoder_id = self.known_id = encoder_id
        self.spec = spec
        self.texts: list[str] = []  # all that was ever encoded
        self.pictures = 0

    def towers(self) -> Any:
        return self

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.texts += texts
        rows = [[float(axis in text.split()) for axis in AXES] for text in texts]
        return unit(rows)

    def encode_images(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        self.pictures += len(images)
        return unit([[*np.asarray(image).mean(axis=(0, 1)), 0.0] for image in images])


def unit(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float32]:
    array = np.array(rows, dtype=np.float32).reshape(-1, 4)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


class Writer:
    """Fills a catalog; pictures are named by one word, their image_id is that word's hash."""

    def __init__(self, folder: Path) -> None:
        self.catalog = Catalog.open(folder, write=True)
        self.register("fake-1", "fake")

    def register(self, encoder_id: str, spec: str) -> None:
        self.catalog.register_encoder(encoder_id, spec=spec, config_json="{}", dim=4)
        self.catalog.commit()

    def add(
        self,
        name: str,
        vector: Sequence[float] | None,
        *,
        encoder_id: str = "fake-1",
        image_id: str | None = None,
        commit: bool = True,
        captions: Sequence[str] = (),
        tags: Sequence[str] = (),
        width: int = 640,
        height: int = 480,
        taken_at: str | None = None,
        camera: str | None = None,
    ) -> int:
        num = self.catalog.add_picture(
            image_id=image_id or key(name),
            width=width,
            height=height,
            format="JPEG",
            bytes=1000,
            taken_at=taken_at,
            camera=camera,
        )
        self.catalog.add_place(
            num, path(name), size=1000, mtime_ns=num * 10**9, captions=captions, tags=tags
        )
        if vector is not None:
            self.catalog.add_vectors(encoder_id, np.array([num]), unit([vector]))
        if commit:
            self.catalog.commit()
        return num

    def remove(self, name: str) -> None:
        self.catalog.remove_places([path(name)])
        self.catalog.commit()


def key(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def path(name: str) -> str:
    return f"{name}.jpg" if name.startswith("/") else f"/pictures/{name}.jpg"


def names(result: SearchResult) -> list[str]:
    ranks = [hit.rank for hit in result.hits]
    assert ranks == list(range(1, len(ranks) + 1)), ranks
    return [Path(hit.picture.path).stem for hit in result.hits]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path / "index")
    yield writer
    writer.catalog.close()


@pytest.fixture
def catalog(writer: Writer) -> Iterator[Catalog]:
    with Catalog.open(writer.catalog.folder) as catalog:
        yield catalog


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def searcher(catalog: Catalog, encoder: FakeEncoder) -> Searcher:
    return Searcher(catalog, encoder)


class NotNeeded:
    """An encoder that nobody may load; only loading would tell its id."""

    spec, known_id, precision = "not needed", None, "float32"

    @property
    def encoder_id(self) -> str:
        return str(self.towers().encoder_id)

    def towers(self) -> Any:
        raise AssertionError("the encoder is not needed for this")

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows: npt.NDArray[np.float32] = self.towers().encode_texts(texts)
        return rows


def fill(writer: Writer) -> None:
    """Cosines to "dog": swim 0.6, walk 0.6, run 0.8, drive 0."""
    writer.add("swim", [0.6, 0.8, 0, 0])
    writer.add("walk", [0.6, 0, 0.8, 0])
    writer.add("run", [0.8, 0.6, 0, 0])
    writer.add("drive", [0, 0, 0, 1])
