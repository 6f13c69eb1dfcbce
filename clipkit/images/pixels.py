"""Whatever mode Pillow decodes -> upright RGB on white.

Handles what `convert("RGB")` gets wrong: transparency (it drops the alpha channel and shows what lies
beneath), 16-bit greyscale (it clips at 255), and 32-bit integers and floats (it clips, too).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

_WHITE = (255, 255, 255)
_TRANSPOSE = {  # EXIF orientation -> what makes it upright (Exif 2.32, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A wide-gamut profile (Display P3, Adobe RGB, ProPhoto) is about 550 bytes; sRGB's is 3 kB and needless.
_LARGEST_PROFILE = 1024


def upright_rgb(image: ImageFile.ImageFile, orientation: int) -> Image.Image:
    """A plain Image of mode RGB. Its info holds a small ICC profile or nothing."""
    profile = image.info.get("icc_profile")
    in_rgb = image.mode in ("RGB", "RGBA", "P")
    if image.mode.startswith("I;16"):
        rgb = _from_16_bit(image).convert("RGB")
    elif image.mode in ("I", "F"):
        rgb = _from_numbers(image).convert("RGB")
    elif image.has_transparency_data:
        rgb = _on_white(image)
    elif image.mode == "RGB":
        rgb = image._new(image.im)  # these pixels without the file; a copy costs like decoding
    else:
        rgb = image.convert("RGB")
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    rgb.info = {}
    if in_rgb and isinstance(profile, bytes) and len(profile) <= _LARGEST_PROFILE:
        rgb.info["icc_profile"] = profile
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", rgba.size, _WHITE)
    white.paste(rgba, mask=rgba)
    return white


def _from_16_bit(image: ImageFile.ImageFile) -> Image.Image:
    """Scaled by the nominal range (16 bits, or a TIFF's 12): Pillow's own conversion clips at 255."""
    values = np.asarray(image)  # uint16 (H, W), either byte order
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _from_numbers(image: Image.Image) -> Image.Image:
    """32-bit integers and floats, for which no white is agreed: 0..1 or 0..255 if all values lie
    there, else stretched from the least to the greatest; NaN is black."""
    values = np.asarray(image, dtype=np.float64)  # (H, W)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 1 and image.mode == "F":
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    with np.errstate(all="ignore"):
        scaled = (values - low) / ((high - low) or 1.0) * 255
    grey = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round()
    return Image.fromarray(grey.astype(np.uint8))
