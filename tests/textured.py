"""A picture with detail at every scale, for the tests of images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def textured(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Detail at every scale, like a photo's: noise of several sizes, added up."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((6, 90), (24, 50), (96, 30), (384, 15)):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += weight * (np.asarray(Image.fromarray(noise).resize(size)) / 255.0 - 0.5)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))
