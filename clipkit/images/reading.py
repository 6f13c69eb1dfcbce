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
from clipkit.images.pixels import upright_rgb

# What indexing walks; the format itself is always told by the content.
SUFFIXES: frozenset[str] = frozenset(
    ".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif".split()
)

_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may cost: pixels (of the original, 1 MP = 10^6) and bytes (1 MB = 10^6)."""

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
        """Raises ImageError ("empty", "too-large")."""
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
    """A decoded picture and what its file says about it."""

    rgb: Image.Image  # mode RGB, upright, alpha on white; may be smaller than the original
    width: int  # of the original, upright
    height: int
    format: str  # "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"
    taken_at: str | None  # "2023-05-01T12:30:00", the camera's local time
    camera: str | None  # "Canon EOS 80D"


def image_id(data: bytes) -> str:
    """The picture's identity: BLAKE2b-128 of the file's bytes, 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bytes(path: Path, *, limits: Limits = _LIMITS) -> bytes:
    """A regular file's bytes; never blocks on a pipe, never reads what is above the limit.

    Raises ImageError: "not-a-file", "empty", "too-large", "unreadable" (gone, forbidden, a loop of
    links, a disk error). Messages do not name the file: the caller knows it, with its odd characters.
    """
    try:
        # Looked at before opening (opening a device can act) and after (it may have been replaced).
        _check_regular(path.stat())
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            _check_regular(status)
            limits.check_bytes(status.st_size)
            # Of a file that grows meanwhile the beginning is read; decoding will call it truncated.
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


def decode(data: bytes, *, target: int | None = None, limits: Limits = _LIMITS) -> Picture:
    """The first (or only) frame as an upright RGB picture. Safe from any thread.

    `target` is the side in pixels that a tower wants: a JPEG is then decoded at 1/2, 1/4 or 1/8 of
    its size as long as its shorter side stays at least 2 x `target` (the resized picture differs by
    less than a JPEG's own noise). None, and every other format: the full size.

    Raises ImageError for whatever can be wrong with the bytes: "empty", "too-large",
    "too-many-pixels", "not-a-picture", "unsupported-format", "truncated", "broken". Never another
    exception, never a warning, never half a picture.
    """
    if target is None:
        return _decode(data, limits, lambda size: size)
    if target < 1:
        raise ValueError(f"target is {target}; it must be at least 1 pixel")
    return _decode(data, limits, lambda _: (2 * target, 2 * target))


def thumbnail(picture_rgb: Image.Image, *, side: int = 320, quality: int = 75) -> bytes:
    """JPEG bytes, longest side at most `side`; a smaller picture is not enlarged.

    Made for every picture of an index run, so it must be cheap. JPEG and not WebP: at 320 pixels and
    the same error, 0.4 ms and 14 kB against 3.3 ms and 12 kB. Hamming and not bicubic: from 1000 x
    750, 3 ms against 9 ms, 0.7 levels of 255 away from Lanczos.
    """
    size = _fit(picture_rgb.size, side)
    if size != picture_rgb.size:
        picture_rgb = picture_rgb.resize(size, Image.Resampling.HAMMING, reducing_gap=1.5)
    return _jpeg(picture_rgb, quality=quality, subsampling=2)


def encode_for_web(
    data: bytes, *, max_side: int = 2048, limits: Limits = _LIMITS
) -> tuple[bytes, str]:
    """(bytes, mime) of a picture that any browser shows, longest side at most `max_side`.

    Always encoded anew from pixels: no EXIF (which holds the place), no comments, no trailing data.
    Raises ImageError like `decode`.
    """
    picture = _decode(data, limits, lambda size: _fit(size, max_side))
    # Full colour resolution unless a JPEG halved it already: text and drawings would smear.
    subsampling = 2 if picture.format == "JPEG" else 0
    rgb, size = picture.rgb, _fit(picture.rgb.size, max_side)
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return _jpeg(rgb, quality=88, subsampling=subsampling), "image/jpeg"


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Nothing: clipkit needs no DPI, and Pillow's EXIF reader allocates what a file claims."""


_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode(data: bytes, limits: Limits, smallest: Callable[[_Size], _Size]) -> Picture:
    """`smallest(stored size)` -> the size in pixels that a JPEG must keep when decoded reduced."""
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
    raise ImageError(
        f"file is not a picture: it begins with {bytes(data[:8])!r}; "
        "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC are read",
        reason="not-a-picture",
    )


def _open(data: bytes, kind: str, limits: Limits) -> ImageFile.ImageFile:
    """Reads the header only. Raises whatever Pillow raises."""
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
    """Refuses a compressed TIFF whose data lies beyond its end; libtiff would write to stderr."""
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
    """Pillow's exception in clipkit's words."""
    said = str(error)
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"(\d+) pixels", said)
        size = f"{int(found[1]) / 1e6:.0f} MP" if found else "too large"
        return ImageError(
            f"picture is {size}; the limit is {limits.max_megapixels:g} MP; resize it",
            reason="too-many-pixels",
        )
    if isinstance(error, MemoryError):
        return ImageError(
            f"{kind} picture needs more memory than there is; resize it", reason="broken"
        )
    if re.search(r"unsupported|not yet supported|cannot handle|unknown pixel mode", said, re.I):
        return ImageError(
            f"{kind} picture is of a kind that is not read ({said}); save it as JPEG or PNG",
            reason="unsupported-format",
        )
    if "truncated" in said.lower() or isinstance(error, EOFError) or ends_early(data, kind):
        return ImageError(
            f"{kind} picture ends early, after {len(data):,} bytes; copy it again from its source",
            reason="truncated",
        )
    detail = f"{type(error).__name__}: {said}"[:200] if said else type(error).__name__
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
    """The size with its longest side at most `side`, never enlarged, at least one pixel."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _jpeg(rgb: Image.Image, *, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    profile = rgb.info.get("icc_profile")
    rgb.save(buffer, "JPEG", quality=quality, subsampling=subsampling, icc_profile=profile)
    return buffer.getvalue()


_HUSH_LOCK = threading.Lock()
_PILLOW_MODULES = re.compile(r"PIL\.|pillow_heif")


def _hush() -> None:
    """Keeps the filter that ignores Pillow's warnings in front of the process's list.

    `catch_warnings` would be the narrow way, but it swaps the list under other threads' feet; and a
    filter set once at import is lost to whoever resets the list, as pytest does.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[:1] != ("ignore",) or first[3] != _PILLOW_MODULES:
        with _HUSH_LOCK:
            warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)
