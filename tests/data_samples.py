"""Small true-to-form captioned pictures for the dataset tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.sources import Broken, Options, Row, open_source


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """A random picture with detail at all scales, as photos have; no seed looks like another's."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 127.5)
    for side in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        layer = noise.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 127.5) / (side / 4)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def save(path: Path, seed: int, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)
    return path


def save_all(folder: Path, *names: str) -> None:
    """A picture for each name, told apart by their place in the list."""
    for seed, name in enumerate(names):
        save(folder / name, seed)


def rows_of(
    path: str | Path, *, kind: str | None = None, options: Options | None = None
) -> list[Row | Broken]:
    return list(open_source(path, kind=kind, options=options).rows())


def told(rows: list[Row | Broken]) -> list[tuple[object, ...]]:
    """(name, captions, split) of a pair, (row, reason) of a broken row."""
    return [
        (r.place, r.reason) if isinstance(r, Broken) else (r.name, r.captions, r.split)
        for r in rows
    ]


@dataclass(frozen=True)
class Record:
    """A line of a built dataset's metadata, as it stands in the file."""

    image_id: str
    path: str
    captions: tuple[str, ...]
    split: str
    meta: dict[str, Any]  # every other column


def read_dataset(folder: Path) -> Iterator[Record]:
    """Read a built dataset without clipkit's own readers."""
    for split in ("train", "validation", "test"):
        path = folder / split / "metadata.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            fields = json.loads(line)
            name, captions = fields.pop("file_name"), tuple(fields.pop("captions"))
            yield Record(fields.pop("image_id"), f"{split}/{name}", captions, split, fields)
