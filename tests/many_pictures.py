"""A large library that exists in the catalog only: random vectors, one thumbnail, no files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from colours import ColourEncoder
from PIL import Image

from clipkit.catalog import Catalog


def fill(folder: Path, count: int) -> None:
    """Make an index of `count` pictures in 40 folders; their shapes repeat every seven."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((count, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    buffer = io.BytesIO()
    Image.new("RGB", (320, 240), (90, 120, 150)).save(buffer, "JPEG")
    with Catalog.open(folder, write=True) as catalog:
        encoder_id = ColourEncoder.encoder_id
        catalog.register_encoder(encoder_id, spec="colours", config_json="{}", dim=3)
        nums = []
        for number in range(count):
            name = f"{number:032x}"
            facts = {"width": 320, "height": 180 + 40 * (number % 7), "format": "JPEG"}
            num = catalog.add_picture(image_id=name, bytes=1000, **facts)
            place = f"/photos/{number % 40}/{number}.jpg"
            catalog.add_place(num, place, size=1000, mtime_ns=10**18 + number)
            catalog.put_thumbnail(name, buffer.getvalue())
            nums.append(num)
        catalog.add_vectors(encoder_id, np.array(nums), vectors)
        catalog.commit()
