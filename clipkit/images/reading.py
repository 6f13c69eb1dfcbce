"""Untrusted bytes -> an upright RGB picture. The one place for it, shared by training and serving.

    bytes ── headers: format, size, bombs ──▶ Pillow plugin ──▶ RGB, alpha on white ──▶ upright

Only Pillow decodes (torchvision's PNG reader crashes on flipped bits), and only eight of its
plugins, chosen by content and called directly: `Image.open` would try others, treat multi-picture
JPEGs apart, and hold every caller to Pillow's own process-wide pixel limit.

Two things are set for the whole process, because Pillow has no narrower way: its warnings about
damaged metadata are silenced (`_hush`; the error or the picture is the answer), and its pixel limit
is raised when, and only when, a caller's own limit is above it (`_open`).
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from clipkit.errors import ImageError, InputError
from clipkit.images.exif import read_facts
from clipkit.images.headers import check_pixels, ends_early, refuse, sniff, sniff_unsupported

# The files that indexing walks; the format itself is determined by the content.
SUFFIXES: frozenset[str] = frozenset(
    ".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif".split()
)

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

_STRIP_PIXELS = 2**20

_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a picture: pixels of the original (1 MP = 10^6) and bytes (1 MB = 10^6)."""

    max_megapixels: float = 100.0
    max_megabytes: float = 256.0

    def __post_init__(self) -> None:
        for name in ("max_megapixels", "max_megabytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be a positive number")

    @property
    def pixels(self) -> int:
        return int(self.max_megapixels * 1e6)

    def check_bytes(self, size: int) -> None:
        """Raise ImageError ("empty", "too-large") for a file of `size` bytes."""
        if size == 0:
            raise ImageError("file is empty (0 bytes); restore it from a copy", reason="empty")
        if size > self.max_megabytes * 1e6:
            raise ImageError(
                f"file is {size / 1e6:.0f} MB; the limit is {self.max_megabytes:g} MB; "
                "shrink it or raise --max-megabytes",
                reason="too-large",
            )


_LIMITS = Limits()


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture and the facts in its file."""

    rgb: Image.Image  # mode RGB, upright, alpha on white; may be smaller than the original
    width: int  # of the original, upright
    height: int
    format: str  # "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"
    taken_at: str | None  # "2023-05-01T12:30:00", the camera's local time
    camera: str | None  # "Canon EOS 80D"


def image_id(data: bytes) -> str:
    """Return a picture's identity: BLAKE2b-128 of the file's bytes, 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bytes(path: Path, *, limits: Limits = _LIMITS) -> bytes:
    """Read a regular file; never block on a pipe, never read a file above the limit.

    Raises ImageError: "not-a-file", "empty", "too-large", "unreadable" (missing, forbidden, a loop of
    links, a disk error). Messages do not name the file: the caller does, and escapes its name.
    """
    try:
        # Checked before opening (opening a device can act) and after (it may have been replaced).
        _check_regular(path.stat())
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            _check_regular(status)
            limits.check_bytes(status.st_size)
            # Of a growing file the beginning is read; decoding will report it as truncated.
            parts = []
            left = status.st_size
            while left > 0 and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ImageError(
            f"file cannot be read: {why}; check that it exists and may be read", reason="unreadable"
        ) from error
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    limits.check_bytes(len(data))
    return data


def decode(
    data: bytes,
    *,
    target: int | None = None,
    limits: Limits = _LIMITS,
    admit: Callable[[int], None] | None = None,
) -> Picture:
    """Decode the first frame to an upright RGB picture. Any thread may call it.

    `target` is the side in pixels that a tower needs: a JPEG is then decoded at 1/2, 1/4 or 1/8 of
    its size as long as its shorter side stays at least 2 x `target` (the resized picture differs by
    less than a JPEG's own noise). With None, and for every other format, the size is the full one.

    `admit` is called with the number of pixels that will be decoded, before there is memory for them:
    it may block until there is room.

    Raises ImageError for anything wrong with the bytes: "empty", "too-large", "too-many-pixels",
    "not-a-picture", "unsupported-format", "truncated", "broken"; no other exception, no warning, and
    no part of a picture.
    """
    if target is None:
        return _decode(data, limits, lambda size: size, admit)
    if target < 1:
        raise ValueError(f"target is {target}; it must be at least 1 pixel")
    return _decode(data, limits, lambda _: (2 * target, 2 * target), admit)


def thumbnail(picture_rgb: Image.Image, *, side: int = 320, quality: int = 75) -> bytes:
    """Encode a small JPEG, longest side at most `side`; a smaller picture is not enlarged.

    Indexing makes one of every picture, so it must be cheap. JPEG and not WebP: at 320 pixels and
    the same error, 0.4 ms and 14 kB against 3.3 ms and 12 kB. Hamming and not bicubic: from 1000 x
    750, 3 ms against 9 ms, 0.7 levels of 255 away from Lanczos.
    """
    size = _fit(picture_rgb.size, side)
    if size != picture_rgb.size:
        picture_rgb = picture_rgb.resize(size, Image.Resampling.HAMMING, reducing_gap=1.5)
    return _jpeg(picture_rgb, quality=quality, subsampling=2)


def encode_for_web(
    data: bytes,
    *,
    max_side: int = 2048,
    limits: Limits = _LIMITS,
    admit: Callable[[int], None] | None = None,
) -> tuple[bytes, str]:
    """Return (bytes, MIME type) of a picture that any browser shows, longest side at most `max_side`.

    Always encoded from pixels: no EXIF (which holds the location), no comments, no trailing data.
    `admit` is that of `decode`. Raises ImageError as `decode` does.
    """
    picture = _decode(data, limits, lambda size: _fit(size, max_side), admit)
    # Full colour resolution unless a JPEG halved it already: text and drawings would smear.
    subsampling = 2 if picture.format == "JPEG" else 0
    rgb, size = picture.rgb, _fit(picture.rgb.size, max_side)
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return _jpeg(rgb, quality=88, subsampling=subsampling), "image/jpeg"


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Skip the DPI: it is not needed, and Pillow's EXIF reader allocates what a file claims."""


_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode(
    data: bytes,
    limits: Limits,
    smallest: Callable[[_Size], _Size],
    admit: Callable[[int], None] | None = None,
) -> Picture:
    """Decode; `smallest(stored size)` gives the pixels that a JPEG decoded at reduced size must keep."""
    limits.check_bytes(len(data))
    kind = _identify(data)
    _hush()
    try:
        refuse(data, kind, max_pixels=limits.pixels)
        image = _open(data, kind, limits)
        width, height = image.size
        check_pixels(width, height, limits.pixels)
        if kind == "JPEG":
            image.draft(None, smallest(image.size))
        elif kind == "TIFF":
            _check_strips(image, len(data))
        if admit is not None:
            # a progressive JPEG holds the coefficients of the whole picture at any size
            whole = kind != "JPEG" or "progressive" in image.info
            admit(width * height if whole else image.size[0] * image.size[1])
        image.load()
        # After loading: PNG may carry EXIF behind its pixels. Pillow turns TIFFs upright itself.
        facts = read_facts(data if kind == "TIFF" else _exif_block(image))
        orientation = 1 if kind == "TIFF" else facts.orientation
        rgb = upright_rgb(image, orientation)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes, and promises none
        raise _failure(error, data, kind, limits) from error
    if orientation >= 5:  # the four that swap the sides
        width, height = height, width
    return Picture(rgb, width, height, kind, facts.taken_at, facts.camera)


def _identify(data: bytes) -> str:
    kind = sniff(data)
    if kind is not None:
        return kind
    name = sniff_unsupported(data)
    if name is not None:
        raise ImageError(
            f"{name} files are not read; export it as JPEG or PNG", reason="unsupported-format"
        )
    problem = "file holds text, not a picture" if _is_text(data) else "file is not a picture"
    raise ImageError(
        f"{problem}; JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC are read",
        reason="not-a-picture",
    )


def _is_text(data: bytes) -> bool:
    """Return whether a file begins with printable UTF-8."""
    try:
        # Cut to whole characters: one may straddle the end of the part that is looked at.
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:256])
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\t\n\r\f" for char in text)


def _open(data: bytes, kind: str, limits: Limits) -> ImageFile.ImageFile:
    """Open a picture, which reads its header only. Raises whatever Pillow raises."""
    pillow_limit = Image.MAX_IMAGE_PIXELS  # Pillow refuses above twice this
    if pillow_limit is not None and limits.pixels > 2 * pillow_limit:
        Image.MAX_IMAGE_PIXELS = limits.pixels // 2 + 1
    if kind != "HEIF":
        return _OPENERS[kind](io.BytesIO(data))
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            "HEIC pictures need an extra: pip install 'clipkit[heic]'", reason="unsupported-format"
        ) from error
    image: ImageFile.ImageFile = HeifImageFile(io.BytesIO(data))
    return image


def _check_strips(image: ImageFile.ImageFile, size: int) -> None:
    """Raise EOFError for a compressed TIFF with data beyond its end; libtiff would write to stderr."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(259, 1) == 1:  # not compressed: Pillow reads it, and ignores the byte counts
        return
    for offsets, counts in ((273, 279), (324, 325)):
        for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            if offset + count > size:
                raise EOFError("TIFF strip beyond the end of the file")


def _exif_block(image: Image.Image) -> bytes:
    block = image.info.get("exif")
    if isinstance(block, bytes):
        return block
    text = image.info.get("Raw profile type exif")  # ImageMagick's way: name, length, hex lines
    if not isinstance(text, str):
        return b""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def _failure(error: Exception, data: bytes, kind: str, limits: Limits) -> ImageError:
    """Translate Pillow's exception."""
    message = str(error)
    if isinstance(error, Image.DecompressionBombError):
        match = re.search(r"(\d+) pixels", message)
        size = f"{int(match[1]) / 1e6:.0f} MP" if match else "too large"
        return ImageError(
            f"picture is {size}; the limit is {limits.max_megapixels:g} MP; resize it",
            reason="too-many-pixels",
        )
    if isinstance(error, MemoryError):
        return ImageError(
            f"{kind} picture needs more memory than there is; resize it", reason="broken"
        )
    if re.search(r"unsupported|not yet supported|cannot handle|unknown pixel mode", message, re.I):
        return ImageError(
            f"{kind} picture is of an unsupported kind ({message}); save it as JPEG or PNG",
            reason="unsupported-format",
        )
    if "truncated" in message.lower() or isinstance(error, EOFError) or ends_early(data, kind):
        return ImageError(
            f"{kind} picture ends early, after {len(data):,} bytes; copy it again from its source",
            reason="truncated",
        )
    detail = f"{type(error).__name__}: {message}"[:200] if message else type(error).__name__
    return ImageError(
        f"{kind} picture is broken ({detail}); restore it from a copy", reason="broken"
    )


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }.get(stat.S_IFMT(status.st_mode), "something else")
        raise ImageError(f"it is {what}, not a file; give a picture file", reason="not-a-file")


def _fit(size: _Size, side: int) -> _Size:
    """Shrink a size so that its longest side is at most `side`, and at least one pixel."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _jpeg(rgb: Image.Image, *, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    profile = rgb.info.get("icc_profile")
    rgb.save(buffer, "JPEG", quality=quality, subsampling=subsampling, icc_profile=profile)
    return buffer.getvalue()


def rgb_array(picture_rgb: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an RGB picture, uint8 (H, W, 3), copied once, strip by strip.

    `np.array(picture_rgb)` holds two more copies while it works: 144 MB of a 24 MP picture.
    """
    width, height = picture_rgb.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = picture_rgb.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(strip)
    return pixels


# ---- modes -> RGB


def upright_rgb(image: ImageFile.ImageFile, orientation: int) -> Image.Image:
    """Convert any mode that Pillow decodes to an upright RGB picture on white.

    Handles what `convert("RGB")` gets wrong: transparency (it drops the alpha channel and shows what
    is beneath), 16-bit greyscale and 32-bit numbers (it clips both at 255). The info of the result
    holds a small ICC profile or nothing.
    """
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
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", rgba.size, _WHITE)
    white.paste(rgba, mask=rgba)
    return white


def _from_16_bit(image: ImageFile.ImageFile) -> Image.Image:
    """Scale by the nominal range (16 bits, or a TIFF's 12); Pillow's own conversion clips at 255."""
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
    """Scale 32-bit integers and floats, which have no agreed white: from 0..1 or 0..255 if all values
    are in that range, else from the smallest to the largest value; NaN is black."""
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


# ---- Pillow's warnings

_HUSH_LOCK = threading.Lock()
_PILLOW_MODULES = re.compile(r"PIL\.|pillow_heif")


def _hush() -> None:
    """Keep the filter that ignores Pillow's warnings first in the process's list.

    `catch_warnings` would be narrower, but it replaces the list while other threads use it; and a
    filter that is set at import is lost when someone resets the list, as pytest does.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[:1] != ("ignore",) or first[3] != _PILLOW_MODULES:
        with _HUSH_LOCK:
            warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)
