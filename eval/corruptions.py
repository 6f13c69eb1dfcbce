"""Common corruptions of pictures, at the severities of ImageNet-C.

Ten of the fifteen corruptions of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261) and three
of its four additional ones, with its parameters per severity 1 to 5; left out are those that need
picture material or fractal noise (fog, frost, snow, spatter), glass blur and elastic transform. The
library that packages the originals no longer runs on today's NumPy and scikit-image, so they are
written anew here with NumPy and Pillow. Differences: Gaussian blur is Pillow's (box filters), blurs
mirror the picture at its border, and noise is seeded by the picture.

ImageNet-C's parameters are meant for 224 pixels, so every picture is first brought to that shorter
side; the originals were then cropped square, here the whole picture stays. Figures compare between
models measured here, and in kind but not in digits with published ones.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from clipkit.arrays import Float64
from clipkit.errors import InputError
from eval.features import Transform

Unit = Float64  # (H, W, 3) in 0..1
SIDE = 224  # pixels
_VERSION = 1  # raise it when a corruption's result changes: features are cached by it


def corruption(name: str, severity: int) -> Transform:
    """Return a corruption as a Transform. Raises InputError if it is unknown, or severity not 1 to 5."""
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown corruption {name!r}; {hint}known: {', '.join(CORRUPTIONS)}")
    function, levels = CORRUPTIONS[name]
    if severity not in range(1, 1 + len(levels)):
        raise InputError(
            f"severity is {severity}; it must be a whole number from 1 to {len(levels)}"
        )
    level = levels[severity - 1]

    def apply(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        return function(_at_standard_size(picture), level, rng)

    return Transform(f"corruption {name} {severity} at {SIDE}, version {_VERSION}", apply)


def _at_standard_size(picture: Image.Image, most: int = 16) -> Image.Image:
    """Resize so that the shorter side has SIDE pixels; crop a strip to `most` times its width."""
    width, height = picture.size
    keep_w, keep_h = min(width, most * height), min(height, most * width)
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    scale = SIDE / min(keep_w, keep_h)
    return picture.resize(
        (round(keep_w * scale), round(keep_h * scale)),
        Image.Resampling.BICUBIC,
        box=(left, top, left + keep_w, top + keep_h),
    )


def _unit(picture: Image.Image) -> Unit:
    return np.asarray(picture, np.float64) / 255


def _picture(values: Unit) -> Image.Image:
    # Truncated, not rounded, as the originals' np.uint8(...) does.
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


# ---- noise


def _gaussian_noise(picture: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    x = _unit(picture)
    return _picture(x + rng.normal(0, sigma, x.shape))


def _shot_noise(picture: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    return _picture(rng.poisson(_unit(picture) * photons) / photons)


def _impulse_noise(picture: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Add salt and pepper in equal parts, per channel."""
    x = _unit(picture)
    hit = rng.random(x.shape) < amount
    return _picture(np.where(hit, rng.integers(0, 2, x.shape), x))


def _speckle_noise(picture: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    x = _unit(picture)
    return _picture(x + x * rng.normal(0, sigma, x.shape))


# ---- blur


def _gaussian_blur(picture: Image.Image, sigma: float, _: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def _defocus_blur(
    picture: Image.Image, disk: tuple[int, float], _: np.random.Generator
) -> Image.Image:
    radius, soft = disk  # pixels; standard deviation of the disk's edge
    reach = max(8, radius) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
    near = np.exp(-(np.arange(-1, 2) ** 2) / (2 * soft**2))
    near /= near.sum()
    for axis in (0, 1):
        kernel = sum(w * np.roll(kernel, s, axis) for w, s in zip(near, (-1, 0, 1), strict=True))
    return _picture(_convolved(_unit(picture), kernel / kernel.sum(), reach))


def _convolved(x: Unit, kernel: Float64, reach: int) -> Unit:
    """Convolve x (H, W, 3) with a kernel (2 reach + 1, 2 reach + 1), mirrored at the border."""
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size)[:, :, None]
    blurred = np.fft.irfft2(spectrum, size, axes=(0, 1))
    return blurred[2 * reach :, 2 * reach :]


def _motion_blur(
    picture: Image.Image, motion: tuple[int, float], rng: np.random.Generator
) -> Image.Image:
    """Blur along a one-sided Gaussian trail within 45 degrees of the horizontal."""
    radius, sigma = motion
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    angle = np.deg2rad(rng.uniform(-45, 45))
    x = _unit(picture)
    padded = np.pad(x, ((width, width), (width, width), (0, 0)), mode="symmetric")
    total = np.zeros_like(x)
    for step, weight in enumerate(weights / weights.sum()):
        top = width + round(step * np.sin(angle))
        left = width + round(step * np.cos(angle))
        total += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    return _picture(total)


def _zoom_blur(picture: Image.Image, zooms: Sequence[float], _: np.random.Generator) -> Image.Image:
    width, height = picture.size
    total = _unit(picture)
    for zoom in zooms:
        dx, dy = (width - width / zoom) / 2, (height - height / zoom) / 2
        box = (dx, dy, width - dx, height - dy)
        total += _unit(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return _picture(total / (len(zooms) + 1))


# ---- light and colour


def _brightness(picture: Image.Image, added: float, _: np.random.Generator) -> Image.Image:
    """Add to HSV's value."""
    x = _unit(picture)
    value = x.max(axis=2, keepdims=True)
    wanted = np.minimum(value + added, 1)
    # Black has no hue to scale: it becomes grey.
    return _picture(np.where(value > 0, x * wanted / np.maximum(value, 1e-9), wanted))


def _contrast(picture: Image.Image, factor: float, _: np.random.Generator) -> Image.Image:
    x = _unit(picture)
    mean = x.mean(axis=(0, 1), keepdims=True)
    return _picture((x - mean) * factor + mean)


def _saturate(
    picture: Image.Image, line: tuple[float, float], _: np.random.Generator
) -> Image.Image:
    """Set HSV's saturation s to factor x s + added; grey, which has no hue, turns red."""
    factor, added = line
    x = _unit(picture)
    value, least = x.max(axis=2, keepdims=True), x.min(axis=2, keepdims=True)
    chroma = value - least
    saturation = np.clip(factor * chroma / np.maximum(value, 1e-9) + added, 0, 1)
    # How far each channel is below the value, as a share of the chroma.
    below = np.where(chroma > 0, (value - x) / np.maximum(chroma, 1e-9), [0.0, 1.0, 1.0])
    return _picture(value - below * saturation * value)


# ---- digital


def _jpeg_compression(picture: Image.Image, quality: int, _: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=["JPEG"]) as compressed:  # our own bytes
        return compressed.convert("RGB")


def _pixelate(picture: Image.Image, scale: float, _: np.random.Generator) -> Image.Image:
    width, height = picture.size
    small = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


_ZOOMS = [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]
_Function = Callable[[Image.Image, Any, np.random.Generator], Image.Image]
# name -> function and its parameter at severity 1 to 5: those of ImageNet-C's make_imagenet_c.py
CORRUPTIONS: dict[str, tuple[_Function, Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, tuple(np.arange(1, end, step).tolist() for end, step in _ZOOMS)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}
