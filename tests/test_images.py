"""images.py: a picture's identity, its bytes, which way up it is, its date and camera."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import encoded, jpeg_with_exif, tiff_bytes
from PIL import Image

from clipkit.errors import ImageError, InputError
from clipkit.images import SUFFIXES, Limits, Picture, decode, image_id, read_bytes

# ---- identity and reading -------------------------------------------------------------------------


def test_the_identity_is_a_hash_of_the_bytes_alone() -> None:
    assert image_id(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert len(image_id(b"")) == 32
    assert image_id(b"abc") != image_id(b"abd")


def test_the_suffixes_are_lower_case_with_a_dot() -> None:
    assert {".jpg", ".tiff", ".heic", ".avif"} <= SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SUFFIXES)


def test_a_file_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 2_000)
    assert read_bytes(path, limits=Limits(max_megabytes=0.002)) == b"x" * 2_000
    with pytest.raises(ImageError, match=r"is 0 MB; the limit is 0\.001999 MB") as caught:
        read_bytes(path, limits=Limits(max_megabytes=0.001999))
    assert caught.value.reason == "too-large"


def test_reading_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    cases = {
        "empty.jpg": ("empty", "0 bytes"),
        "gone.jpg": ("unreadable", "No such file"),
        "": ("not-a-file", "a folder"),
        "nul\0.jpg": ("unreadable", "null"),
    }
    for name, (reason, words) in cases.items():
        with pytest.raises(ImageError, match=words) as caught:
            read_bytes(tmp_path / name)
        assert caught.value.reason == reason


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(bad: float) -> None:
    with pytest.raises(InputError, match="max_megapixels"):
        Limits(max_megapixels=bad)


# ---- orientation ----------------------------------------------------------------------------------

CELL = 16
COLOURS = {
    "A": (230, 20, 20),
    "B": (20, 230, 20),
    "C": (20, 20, 230),
    "D": (230, 230, 20),
    "E": (20, 230, 230),
    "F": (230, 20, 230),
}
UPRIGHT = {  # stored AB / CD / EF; Exif 2.32, tag 274
    1: "AB CD EF",
    2: "BA DC FE",  # mirrored
    3: "FE DC BA",  # turned by 180 degrees
    4: "EF CD AB",  # upside down
    5: "ACE BDF",  # transposed
    6: "ECA FDB",  # turned clockwise: the first column, from below, is the first row
    7: "FDB ECA",
    8: "BDF ACE",  # turned counter-clockwise
}


def cells(picture: Picture) -> str:
    """The picture's cells named by the nearest colour."""
    rows = []
    rgb = np.asarray(picture.rgb).astype(int)
    for y in range(CELL // 2, picture.rgb.height, CELL):
        row = [rgb[y, x] for x in range(CELL // 2, picture.rgb.width, CELL)]
        rows.append("".join(min(COLOURS, key=lambda n: abs(p - COLOURS[n]).sum()) for p in row))
    return " ".join(rows)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF-LZW", "AVIF", "HEIF"])
def test_all_eight_orientations(kind: str, orientation: int) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    stored = Image.new("RGB", (2 * CELL, 3 * CELL))
    for index, colour in enumerate(COLOURS.values()):
        x, y = index % 2 * CELL, index // 2 * CELL
        stored.paste(colour, (x, y, x + CELL, y + CELL))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"compression": "tiff_lzw"} if kind == "TIFF-LZW" else {}
    data = encoded(stored, format=kind.removesuffix("-LZW"), exif=exif.tobytes(), **options)
    picture = decode(data)
    assert cells(picture) == UPRIGHT[orientation]
    assert (picture.width, picture.height) == picture.rgb.size
    assert type(picture.rgb) is Image.Image
    assert picture.rgb.mode == "RGB"


def test_orientation_behind_the_pixels_of_a_png() -> None:
    data = encoded(Image.new("RGB", (4, 2)), format="PNG")
    exif = tiff_bytes({274: 6})
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    assert decode(data[:-12] + chunk + data[-12:]).rgb.size == (2, 4)


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_is_none_is_upright(value: int) -> None:
    jpeg = encoded(Image.new("RGB", (4, 2)), format="JPEG")
    assert decode(jpeg_with_exif(jpeg, tiff_bytes({274: value}))).rgb.size == (4, 2)


# ---- facts ----------------------------------------------------------------------------------------


def photo(
    date: bytes = b"", *, changed: bytes = b"", make: bytes = b"", model: bytes = b""
) -> bytes:
    """A JPEG whose EXIF has the given texts; `date` is DateTimeOriginal, in a directory of its own."""
    main: dict[int, int | bytes] = {271: make, 272: model, 306: changed}
    main = {tag: text + b"\0" for tag, text in main.items() if isinstance(text, bytes) and text}
    main[34665] = 0
    main[34665] = len(tiff_bytes(main))
    block = tiff_bytes(main)
    start = len(block)
    value = date + b"\0" * (5 - len(date) if len(date) < 5 else 1)
    block += struct.pack("<HHHIII", 1, 36867, 2, len(value), start + 18, 0) + value
    return jpeg_with_exif(encoded(Image.new("RGB", (8, 8)), format="JPEG"), block)


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        (b"2023:05:01 12:30:00", "2023-05-01T12:30:00"),
        (b"2023-05-01T12:30:00+02:00", "2023-05-01T12:30:00"),
        (b"0000:00:00 00:00:00", None),
        (b"0001:01:01 00:00:00", None),
        (b"2023:13:01 12:30:00", None),
        (b"2023:02:29 12:30:00", None),
        (b"9999:12:31 23:59:59", None),
        (b"    :  :     :  :  ", None),
        (b"\xff\xfe\x00\x01garbage\x1b[2J", None),
        (b"", None),
    ],
)
def test_the_capture_date(date: bytes, expected: str | None) -> None:
    assert decode(photo(date)).taken_at == expected
    with_fallback = decode(photo(date, changed=b"2020:01:02 03:04:05")).taken_at
    assert with_fallback == (expected or "2020-01-02T03:04:05")


@pytest.mark.parametrize(
    ("make", "model", "expected"),
    [
        (b"Canon", b"Canon EOS 80D", "Canon EOS 80D"),
        (b"NIKON CORPORATION", b"NIKON D850", "NIKON D850"),
        (b"Apple", b"iPhone 15 Pro", "Apple iPhone 15 Pro"),
        (b"  SONY\0junk", b"", "SONY"),
        (b"", b"DMC-G9", "DMC-G9"),
        (b"Evil\x1b[31m\x07", b"C\xc3\xa4m\n1", "Evil [31m Cäm 1"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}abc".encode(), b"caf\xe9", "abc café"),
        (b"", b"", None),
    ],
)
def test_the_camera(make: bytes, model: bytes, expected: str | None) -> None:
    assert decode(photo(make=make, model=model)).camera == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_facts_are_found_in_every_format_that_has_them(kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[271], exif[272] = "Canon", "Canon EOS 80D"
    exif.get_ifd(34665)[36867] = "2023:05:01 12:30:00"
    picture = decode(encoded(Image.new("RGB", (64, 64)), format=kind, exif=exif.tobytes()))
    assert (picture.taken_at, picture.camera) == ("2023-05-01T12:30:00", "Canon EOS 80D")
    assert picture.format == kind
