"""Pictures that are broken, truncated, mislabelled or made to harm, written from a seed.

    for item in make_hostile(tmp_path): ...        # item.path, item.kind, item.readable

Everything is built here, mostly byte by byte: no file is taken from anywhere, and two runs with the
same seed write the same bytes. Used wherever pictures enter clipkit: decoding, indexing, the API.
"""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# 600 megapixels, six times the default limit.
WIDE, HIGH = 30_000, 20_000

FORMATS: dict[str, dict[str, object]] = {
    "jpg": {"format": "JPEG", "quality": 85},
    "png": {"format": "PNG"},
    "gif": {"format": "GIF"},
    "webp": {"format": "WEBP", "quality": 85},
    "bmp": {"format": "BMP"},
    "tif": {"format": "TIFF"},
    "avif": {"format": "AVIF", "speed": 10},
}


@dataclass(frozen=True, slots=True)
class Hostile:
    """One entry of the folder."""

    path: Path
    kind: str
    readable: bool | None  # None: either is right, as for flipped bits


def sample(rng: random.Random, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A small picture with smooth colours and no two alike."""
    return Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3)).resize(
        size, Image.Resampling.BICUBIC
    )


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def make_hostile(folder: Path, n: int = 300, seed: int = 0) -> list[Hostile]:
    """Writes about `n` entries below `folder`: each special case once, the rest truncated or flipped.

    What a file system or a platform refuses (a name that is not UTF-8, a pipe) is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    found = list(_specials(folder, rng))
    found += list(_odd_names(folder, rng))
    found += list(_not_files(folder, rng))
    found += list(_mangled(folder, rng, max(0, n - len(found))))
    return found


def _mangled(folder: Path, rng: random.Random, count: int) -> Iterator[Hostile]:
    suffixes = list(FORMATS)
    for number in range(count):
        suffix = suffixes[number % len(suffixes)]
        data = bytearray(encoded(sample(rng), **FORMATS[suffix]))
        what = ("truncated", "header-flip", "body-flip", "many-flips")[number // len(suffixes) % 4]
        if what == "truncated":  # deep enough that pixels are missing in every format
            del data[rng.randrange(len(data) // 10, len(data) * 9 // 10) :]
        else:
            span = (0, 64) if what == "header-flip" else (64, len(data))
            for _ in range(40 if what == "many-flips" else 1):
                data[rng.randrange(*span)] ^= 1 << rng.randrange(8)
        path = folder / f"{what}-{number:03}.{suffix}"
        path.write_bytes(data)
        yield Hostile(path, what, False if what == "truncated" else None)


def _specials(folder: Path, rng: random.Random) -> Iterator[Hostile]:
    def put(name: str, data: bytes, readable: bool | None) -> Hostile:
        path = folder / name
        path.write_bytes(data)
        return Hostile(path, path.stem, readable)

    picture = sample(rng)
    jpeg, png = encoded(picture, format="JPEG"), encoded(picture, format="PNG")

    yield put("zero-bytes.jpg", b"", False)
    yield put("one-byte.png", b"\x89", False)
    yield put("text.jpg", b"Dear diary, today I took no photograph.\n", False)
    yield put("text-begins-like-bmp.bmp", b"BMX is a kind of bicycle.\n" * 9, False)
    yield put("page.png", b"<!DOCTYPE html><title>404</title>", False)
    yield put("archive.webp", _zip(jpeg), False)
    yield put("zeros.jpg", bytes(5_000), False)
    yield put("png-named.jpg", png, True)
    yield put("jpeg-named.png", jpeg, True)
    yield put("photoshop.tif", b"8BPS\0\x01" + bytes(300), False)

    yield put("header-600mp.png", png_bytes((WIDE, HIGH), 8, 2, b""), False)
    yield put("header-600mp.tif", tiff_bytes({256: WIDE, 257: HIGH, 258: 8, 262: 1, 273: 8}), False)
    yield put("header-600mp.bmp", _bmp_header(WIDE, HIGH), False)
    yield put("header-600mp.gif", b"GIF89a" + struct.pack("<HH", WIDE, HIGH) + bytes(40), False)
    yield put("header-600mp.webp", _webp_header(WIDE, HIGH), False)
    yield put("header-600mp.jpg", _jpeg_resized(jpeg, WIDE, HIGH), False)
    yield put("frame-4300mp.gif", gif_bytes(1, frame=(0, 0, 65_535, 65_535)), False)
    yield put("png-bomb-1-bit.png", png_bytes((WIDE, HIGH), 1, 0, _zeros(HIGH, WIDE // 8)), False)
    yield put("apng-bomb.png", _apng_bomb(), False)
    yield put("no-pixels.png", png_bytes((0, 7), 8, 2, b""), False)
    yield put("no-height.jpg", _jpeg_resized(jpeg, 96, 0), False)
    yield put("thin.png", encoded(Image.new("RGB", (10_000, 1), "red"), format="PNG"), True)
    yield put("tall.jpg", encoded(Image.new("RGB", (1, 10_000), "red"), format="JPEG"), True)

    yield put("frames-10000.gif", gif_bytes(10_000), True)
    yield put("comment-20mb.gif", gif_bytes(1, comment=20_000_000), False)
    yield put("scans-2000.jpg", _many_scans(2_000), False)
    for name, chunk in (("ztxt", b"zTXt"), ("itxt", b"iTXt"), ("iccp", b"iCCP")):
        yield put(f"png-{name}-bomb.png", png_with(png, chunk, _text_bomb(chunk)), False)
    yield put("png-bad-crc.png", png[:29] + bytes([png[29] ^ 1]) + png[30:], False)
    yield put("tag-bomb.tif", tag_bomb({256: 4, 257: 4, 258: 8, 262: 1, 273: 8}), False)
    yield put("exif-tag-bomb.avif", _avif_exif_bomb(picture), False)
    yield put("tile-bomb.tif", _tile_bomb(), False)
    yield put("samples-60000.tif", tiff_bytes({256: 4, 257: 4, 277: 60_000, 273: 8}), False)

    exifs = {
        "exif-garbage": rng.randbytes(400),
        "exif-header-only": b"II*\0\x08\0\0\0",
        "exif-orientation-9": tiff_bytes({274: 9}),
        "exif-loop": tiff_bytes({34665: 8, 34853: 8, 40965: 8}, following=8),
        "exif-far-away": tiff_bytes({34665: 0xFFFFFF00, 306: b"x" * 40}, first=0xFFFFFFF0),
    }
    for name, exif in exifs.items():
        yield put(f"{name}.jpg", jpeg_with_exif(jpeg, exif), True)
    yield put("exif-tag-bomb.jpg", jpeg_with_exif(jpeg, tag_bomb({274: 1})), True)

    cmyk = Image.frombytes("CMYK", (8, 6), rng.randbytes(192)).resize((48, 36))
    yield put("cmyk-no-profile.jpg", encoded(cmyk, format="JPEG"), True)
    rows = b"".join(b"\0" + rng.randbytes(2 * 16) for _ in range(12))
    yield put("grey-16-bit.png", png_bytes((16, 12), 16, 0, zlib.compress(rows)), True)
    yield put("junk-behind.jpg", jpeg + rng.randbytes(3_000), True)


def _odd_names(folder: Path, rng: random.Random) -> Iterator[Hostile]:
    data = encoded(sample(rng), format="JPEG")
    names: dict[str, bytes] = {
        "name-not-utf8": b"caf\xe9-\xff\xfe.jpg",
        "name-newline": b"two\nlines\r.jpg",
        "name-quotes": b'it\'s "quoted" `$(id)` %s {0}.jpg',
        "name-emoji": "\N{CAT FACE}\N{ZERO WIDTH JOINER}\N{SNOWMAN}.jpg".encode(),
        "name-right-to-left": "\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe.jpg".encode(),
        "name-option": b"--help.jpg",
        "name-long": b"n" * 240 + b".jpg",
        "name-capitals": b"PHOTO.JPG",
    }
    for kind, name in names.items():
        path = folder / os.fsdecode(name)
        try:
            path.write_bytes(data)
        except (OSError, ValueError):  # this file system wants UTF-8, or shorter names
            continue
        yield Hostile(path, kind, True)


def _not_files(folder: Path, rng: random.Random) -> Iterator[Hostile]:
    def attempt(path: Path, kind: str, make: Callable[[Path], object]) -> Iterator[Hostile]:
        try:
            make(path)
        except (OSError, NotImplementedError):
            return
        yield Hostile(path, kind, False)

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(10**9)

    yield from attempt(folder / "folder.jpg", "folder", Path.mkdir)
    yield from attempt(folder / "dangling.jpg", "dangling-link", lambda p: p.symlink_to("gone.jpg"))
    yield from attempt(folder / "loop-a.jpg", "link-loop", lambda p: p.symlink_to("loop-b.jpg"))
    yield from attempt(folder / "loop-b.jpg", "link-loop", lambda p: p.symlink_to("loop-a.jpg"))
    inner = folder / "inner"
    inner.mkdir()
    yield from attempt(inner / "up.jpg", "folder-loop", lambda p: p.symlink_to(folder))
    if hasattr(os, "mkfifo"):
        yield from attempt(folder / "pipe.jpg", "pipe", os.mkfifo)
    yield from attempt(folder / "sparse-1gb.jpg", "sparse", sparse)

    # Root reads these all the same, hence None.
    forbidden = folder / "forbidden.jpg"
    forbidden.write_bytes(encoded(sample(rng), format="JPEG"))
    forbidden.chmod(0)
    yield Hostile(forbidden, "forbidden", None)
    locked = folder / "locked"
    locked.mkdir()
    (locked / "inside.jpg").write_bytes(encoded(sample(rng), format="JPEG"))
    locked.chmod(0)
    yield Hostile(locked / "inside.jpg", "forbidden-folder", None)


def png_bytes(size: tuple[int, int], bits: int, colour: int, idat: bytes) -> bytes:
    """A PNG of one IDAT chunk; `colour` is PNG's colour type (0 grey, 2 RGB, 3 palette)."""
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", idat), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def png_with(png: bytes, name: bytes, body: bytes) -> bytes:
    """The PNG with one chunk more, right behind its header chunk."""
    return png[:33] + _chunk(name, body) + png[33:]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _zeros(rows: int, width: int) -> bytes:
    squeeze = zlib.compressobj(1)
    row = bytes(1 + width) * 100
    return b"".join(squeeze.compress(row) for _ in range(rows // 100)) + squeeze.flush()


def _text_bomb(chunk: bytes) -> bytes:
    """100 MB of text in 100 kB."""
    lead = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\x01\0\0\0", b"iCCP": b"k\0\0"}[chunk]
    return lead + _zeros(100, 999_999)


def _apng_bomb() -> bytes:
    """Its first frame is to be cleared afterwards: Pillow fills that rectangle while it opens."""
    png = png_bytes((WIDE, HIGH), 8, 6, zlib.compress(b""))
    frame = struct.pack(">IIIIIHHBB", 0, WIDE, HIGH, 0, 0, 1, 10, 1, 0)
    return png_with(png_with(png, b"fcTL", frame), b"acTL", struct.pack(">II", 2, 0))


def gif_bytes(
    frames: int, *, frame: tuple[int, int, int, int] = (0, 0, 2, 2), comment: int = 0
) -> bytes:
    """A GIF of 2x2 pixels: red, blue, blue, red; every frame the same.

    LZW with codes of 3 bits: clear 4, 1, 0, 0; then the table has 8 entries and codes 4 bits: 1, end 5.
    """
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + b"\0\0\xff\xff\0\0"
    blocks = (b"\xff" + b"c" * 255) * (comment // 256)
    note = b"!\xfe" + blocks + b"\0" if comment else b""
    codes = 4 | 1 << 3 | 0 << 6 | 0 << 9 | 1 << 12 | 5 << 16
    image = b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x03" + codes.to_bytes(3, "little")
    return head + note + (image + b"\0") * frames + b";"


def tiff_bytes(
    tags: dict[int, int | bytes], *, first: int = 8, following: int = 0, big_endian: bool = False
) -> bytes:
    """A TIFF or EXIF block of one directory: numbers become LONG, bytes become ASCII."""
    order = ">" if big_endian else "<"
    entries, values = b"", b""
    base = 8 + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        if isinstance(value, int):
            entries += struct.pack(order + "HHII", tag, 4, 1, value)
        elif len(value) <= 4:
            entries += struct.pack(order + "HHI4s", tag, 2, len(value), value)
        else:
            entries += struct.pack(order + "HHII", tag, 2, len(value), base + len(values))
            values += value
    mark = b"MM\0*" if big_endian else b"II*\0"
    body = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following)
    return mark + struct.pack(order + "I", first) + body + values


def tag_bomb(tags: dict[int, int], *, count: int = 40_000, shared: int = 50_000) -> bytes:
    """0.5 MB whose tags all claim the same 50 kB: 2 GB for a reader that copies values."""
    used = dict(sorted(tags.items()))
    others = (tag for tag in range(1_000, 60_000) if tag not in used)
    numbers = sorted([*used, *(next(others) for _ in range(count - len(used)))])
    start = 8 + 2 + 12 * count + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, used[tag])
        if tag in used
        else struct.pack("<HHII", tag, 7, shared, start)
        for tag in numbers
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4 + shared)


def _tile_bomb() -> bytes:
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 322: 1 << 16, 323: 1 << 15, 324: 8, 325: 8}
    return tiff_bytes(dict(tags))


def _bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 3 * width * height, 0, 0, 54) + info


def _webp_header(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_with_exif(jpeg: bytes, exif: bytes) -> bytes:
    """The JPEG with an EXIF block, cut into segments of 64 kB if need be."""
    pieces = [exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces
    )
    return jpeg[:2] + segments + jpeg[2:]


def _jpeg_resized(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _many_scans(count: int) -> bytes:
    """A progressive JPEG of 16 MP whose last scan, some 40 bytes, is repeated."""
    jpeg = encoded(Image.new("L", (4_000, 4_000)), format="JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * count + b"\xff\xd9"


def _avif_exif_bomb(picture: Image.Image) -> bytes:
    """Written with a harmless EXIF block of the same length, which is then replaced."""
    bomb = tag_bomb({})
    harmless = tiff_bytes({306: b"2023:05:01 12:30:00\0"}).ljust(len(bomb), b"z")
    return encoded(picture, format="AVIF", speed=10, exif=harmless).replace(harmless, bomb)


def _zip(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.jpg", (1980, 1, 1, 0, 0, 0)), jpeg)
    return buffer.getvalue()
