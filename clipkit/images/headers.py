"""Check a picture's bytes before any decoder sees them.

`sniff` names the format from the content (a file's suffix is ignored). `refuse` rejects bytes that
are too expensive even to open: Pillow's plugins for PNG, GIF and WebP allocate while they open,
before the size can be checked; others take minutes or gigabytes over a small crafted file.
Everything here reads a few bytes, allocates nothing and raises only ImageError.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from clipkit.errors import ImageError
from clipkit.images.exif import Tiff

_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_CONTAINER_BRANDS = {b"mif1", b"msf1", b"miaf"}
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")

# Formats that people have beside their photos, so that the message can name them.
_UNSUPPORTED = (
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\0\0\x01\0", "icon"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"gimp xcf", "GIMP"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"v/1\x01", "OpenEXR"),
    (b"SIMPLE  =", "FITS"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"<svg", "SVG"),
)

_MOST_SCANS = 100  # honest progressive JPEGs have about 10; each costs a pass over all pixels
_MOST_MARKERS = 10_000
# Bytes of comments before the first frame: Pillow's time is quadratic.
_MOST_GIF_PREAMBLE = 1_000_000
_MOST_SAMPLES = 6  # per pixel in a TIFF: what Pillow decodes
_MOST_HIDDEN_EXIF = 16  # EXIF blocks in one AVIF or HEIF file

# A marker: 0xFF and a code. In coded data 0xFF is followed by 0 or by a restart code (0xD0..0xD7).
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def sniff(data: bytes) -> str | None:
    """Return the format ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF") or None."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if data[:4] in _TIFF_MARKS:
        return "TIFF"
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}
        if data[8:12] in _HEIF_BRANDS:
            return "HEIF"
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & (_HEIF_BRANDS | _CONTAINER_BRANDS):
            return "HEIF"
    return None


def sniff_unsupported(data: bytes) -> str | None:
    """Return the name of a known picture format that clipkit does not read, or None."""
    return next((name for magic, name in _UNSUPPORTED if data.startswith(magic)), None)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError ("too-many-pixels") if width x height is above the limit."""
    if width * height > max_pixels:
        raise ImageError(
            f"picture is {width * height / 1e6:.0f} MP ({width} x {height}); "
            f"the limit is {max_pixels / 1e6:g} MP; resize it or raise --max-megapixels",
            reason="too-many-pixels",
        )


def refuse(data: bytes, kind: str, *, max_pixels: int) -> None:
    """Raise ImageError if `data`, a picture of the format `kind`, is not safe to open."""
    check = _CHECKS.get(kind)
    if check is not None:
        check(data, max_pixels)


def ends_early(data: bytes, kind: str) -> bool:
    """Tell whether the file's end is missing, to explain a failure; a good picture may lack it, too."""
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-4096:]
    if kind == "PNG":
        return b"IEND" not in data[-4096:]
    if kind == "GIF":
        return data[-1:] != b";"
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    if kind == "TIFF":
        tiff = Tiff.parse(data)
        if tiff is None or tiff.first + 2 > len(data):
            return True
        entries = tiff.directory(tiff.first).values()
        return any(entry.start + entry.size > len(data) for entry in entries)
    at = 0
    while at + 8 <= len(data):  # AVIF and HEIF: boxes of a size and a type
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:  # 0: to the end of the file; 1: a 64-bit size follows
            return False
        at += size
    return at != len(data)


def _check_png(data: bytes, max_pixels: int) -> None:
    if len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        check_pixels(width, height, max_pixels)


def _check_gif(data: bytes, max_pixels: int) -> None:
    if len(data) < 13:
        return
    width, height = struct.unpack_from("<HH", data, 6)
    check_pixels(width, height, max_pixels)
    at = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    while data[at : at + 1] == b"!" and at < _MOST_GIF_PREAMBLE:
        at += 2
        while at < min(len(data), _MOST_GIF_PREAMBLE) and data[at]:
            at += 1 + data[at]
        at += 1
    if at >= _MOST_GIF_PREAMBLE:
        raise _broken(f"GIF has over {_MOST_GIF_PREAMBLE:,} bytes of comments before its picture")


def _check_webp(data: bytes, max_pixels: int) -> None:
    if len(data) < 30:
        return
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    check_pixels(width, height, max_pixels)


def _check_jpeg(data: bytes, _max_pixels: int) -> None:
    """Count the scans: 140 bytes more of a 99 MP progressive JPEG cost 0.16 s more."""
    at, scans, components, progressive = 2, 0, 0, False
    for _ in range(_MOST_MARKERS):
        match = _JPEG_MARKER.search(data, at)
        if match is None:
            return
        code, at = data[match.end() - 1], match.end()
        if code == 0xD9 or at + 8 > len(data):
            return
        if code in (0x01, 0xD8):  # markers that stand alone
            continue
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            components, progressive = data[at + 7], code & 3 == 2
        elif code == 0xDA:
            scans += 1
            if not progressive and data[at + 2] == components:
                return  # one scan holds the picture; the decoder stops after it
            if scans > _MOST_SCANS:
                raise _broken(f"JPEG has over {_MOST_SCANS} scans, where 10 are usual")
        at += int.from_bytes(data[at : at + 2], "big")
    raise _broken(f"JPEG has over {_MOST_MARKERS:,} segments")


def _check_tiff(data: bytes, max_pixels: int) -> None:
    tiff = Tiff.parse(data)
    if tiff is None:
        return
    if tiff.amplifies():
        raise _broken("TIFF's tags claim more data than the file has")
    tags = tiff.directory(tiff.first)
    width, height, samples = (tiff.number(tags.get(tag)) or 0 for tag in (322, 323, 277))
    check_pixels(width, height, max_pixels)  # of one tile: libtiff allocates it whole
    if samples > _MOST_SAMPLES:
        raise ImageError(
            f"TIFF has {samples} samples per pixel; the limit is {_MOST_SAMPLES}; "
            "save it as RGB or greyscale",
            reason="unsupported-format",
        )


def _check_boxes(data: bytes, _max_pixels: int) -> None:
    """Check every EXIF block in an AVIF or HEIF file: their readers parse it while they open."""
    view, count = memoryview(data), 0
    for mark in _TIFF_MARKS[:2]:
        at = data.find(mark)
        while at >= 0:
            count += 1
            tiff = Tiff.parse(view[at:])
            if count > _MOST_HIDDEN_EXIF or (tiff is not None and tiff.amplifies()):
                raise _broken("picture's EXIF claims more data than the file has")
            at = data.find(mark, at + 1)


def _broken(what: str) -> ImageError:
    return ImageError(f"{what}: it is broken or made to exhaust memory or time", reason="broken")


_CHECKS: dict[str, Callable[[bytes, int], None]] = {
    "PNG": _check_png,
    "GIF": _check_gif,
    "WEBP": _check_webp,
    "JPEG": _check_jpeg,
    "TIFF": _check_tiff,
    "AVIF": _check_boxes,
    "HEIF": _check_boxes,
}
