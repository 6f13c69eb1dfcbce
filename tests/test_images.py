"""images.py: every kind of picture -> upright RGB, with expected pixels derived by hand."""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hostile import FORMATS, encoded, gif_bytes, jpeg_with_exif, png_bytes, png_with, tiff_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.errors import ImageError, InputError
from clipkit.images import (
    SUFFIXES,
    Limits,
    Picture,
    decode,
    encode_for_web,
    image_id,
    read_bytes,
    thumbnail,
)
from clipkit.images.pixels import upright_rgb


def pixels(data: bytes) -> list[object]:
    """The picture's pixels row by row, each (r, g, b); grey ones as one number."""
    found = np.asarray(decode(data).rgb).reshape(-1, 3).tolist()
    return [p[0] if p[0] == p[1] == p[2] else tuple(p) for p in found]


def reason_of(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)  # type: ignore[arg-type]
    return caught.value.reason


def textured(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Detail at every scale, like a photo's: noise of several sizes, added up."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((6, 90), (24, 50), (96, 30), (384, 15)):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += weight * (np.asarray(Image.fromarray(noise).resize(size)) / 255.0 - 0.5)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


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


# ---- modes ----------------------------------------------------------------------------------------


def test_alpha_goes_onto_white() -> None:
    """out = (colour * a + 255 * (255 - a)) / 255: red at a = 128 gives (255, 127, 127), black at 64
    gives 255 * 191 / 255 = 191, and clear gives white whatever lies beneath (trap 14)."""
    image = Image.new("RGBA", (4, 1))
    image.putdata([(255, 0, 0, 128), (0, 0, 0, 64), (9, 9, 9, 0), (1, 2, 3, 255)])
    expected = [(255, 127, 127), 191, 255, (1, 2, 3)]
    assert pixels(encoded(image, format="PNG")) == expected
    assert pixels(encoded(image, format="TIFF")) == expected
    assert pixels(encoded(image, format="WEBP", lossless=True, exact=True)) == expected


def test_grey_with_alpha_goes_onto_white() -> None:
    """(100 * 128 + 255 * 127) / 255 = 177.2."""
    image = Image.new("LA", (1, 1), (100, 128))
    assert pixels(encoded(image, format="PNG")) == [177]


def test_a_fully_opaque_alpha_channel_changes_nothing() -> None:
    image = textured((30, 20)).convert("RGBA")
    assert np.array_equal(
        np.asarray(decode(encoded(image, format="PNG")).rgb), np.asarray(image.convert("RGB"))
    )


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert pixels(encoded(image, format=kind)) == [red, green, blue]
    # One clear entry (a number), and an alpha for each (bytes): green at 128 is (127, 255, 127).
    assert pixels(encoded(image, format="PNG", transparency=1)) == [red, 255, blue]
    assert pixels(encoded(image, format="GIF", transparency=1)) == [red, 255, blue]
    half = bytes([255, 128, 0])
    assert pixels(encoded(image, format="PNG", transparency=half)) == [red, (127, 255, 127), 255]


def test_palette_with_an_alpha_channel() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([255, 0, 0])
    image.putdata([(0, 255), (0, 0)])
    assert np.asarray(upright_rgb(image, 1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]  # type: ignore[arg-type]


def test_a_transparent_colour_without_an_alpha_channel() -> None:
    rgb = Image.new("RGB", (2, 1), (10, 20, 30))
    rgb.putpixel((1, 0), (40, 50, 60))
    assert pixels(encoded(rgb, format="PNG", transparency=(40, 50, 60))) == [(10, 20, 30), 255]
    grey = Image.new("L", (2, 1), 10)
    grey.putpixel((1, 0), 40)
    assert pixels(encoded(grey, format="PNG", transparency=40)) == [10, 255]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    """The high byte: 0x80 -> 0, 0x8000 -> 128, 0xFFFF -> 255. Pillow's convert clips: 128, 255, 255."""
    values = np.array([[0x0080, 0x8000, 0xFFFF]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), format="PNG")) == [0, 128, 255]
    assert pixels(encoded(Image.fromarray(values), format="TIFF")) == [0, 128, 255]
    packed = encoded(Image.fromarray(values), format="TIFF", compression="tiff_lzw")
    assert pixels(packed) == [0, 128, 255]
    row = b"\0" + values.astype(">u2").tobytes()
    clear = png_with(png_bytes((3, 1), 16, 0, zlib.compress(row)), b"tRNS", b"\x80\x00")
    assert pixels(clear) == [0, 255, 255]


def tiff_of(raw: bytes, width: int, *, big_endian: bool = False, **tags: int) -> bytes:
    """A one-row, uncompressed grey TIFF."""
    numbers = {256: width, 257: 1, 262: tags.get("white", 1), 258: tags["bits"], 273: 0}
    numbers[273] = len(tiff_bytes(dict(numbers)))
    return tiff_bytes(dict(numbers), big_endian=big_endian) + raw


def test_tiffs_of_12_and_16_bits_in_either_byte_order() -> None:
    """12 bits: 0x800 of 0xFFF is 128; two values lie in three bytes: 80 0F FF."""
    assert pixels(tiff_of(b"\x80\x00\xff\xff", 2, bits=16, big_endian=True)) == [128, 255]
    assert pixels(tiff_of(b"\x00\x80\xff\xff", 2, bits=16)) == [128, 255]
    assert pixels(tiff_of(b"\x80\x0f\xff", 2, bits=12)) == [128, 255]
    assert pixels(tiff_of(b"\x00\x80\xff\xff", 2, bits=16, white=0)) == [127, 0]


def test_16_bit_colour() -> None:
    row = b"\0" + struct.pack(">6H", 0x8000, 0xFFFF, 0, 0x1234, 0x5678, 0x9ABC)
    png = png_bytes((2, 1), 16, 2, zlib.compress(row))
    assert pixels(png) == [(0x80, 0xFF, 0), (0x12, 0x56, 0x9A)]
    decode(png_with(png, b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),  # 0..1
        ([0.0, 51.0, 255.0], [0, 51, 255]),  # 0..255
        ([-1000.0, -600.0, 1000.0], [0, 51, 255]),  # stretched: 400 of 2000 is a fifth
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([0.5, 0.5, float("inf")], [128, 128, 255]),  # 127.5 rounds to even
        ([-3e38, 3e38, 3e38], [0, 255, 255]),  # the span overflows float32
        ([float("nan")] * 3, [0, 0, 0]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels(encoded(image, format="TIFF")) == expected


def test_32_bit_integers_are_stretched() -> None:
    image = Image.fromarray(np.array([[0, 200_000, 1_000_000]], dtype=np.int32))
    assert pixels(encoded(image, format="TIFF")) == [0, 51, 255]
    small = Image.fromarray(np.array([[0, 51, 200]], dtype=np.int32))
    assert pixels(encoded(small, format="TIFF")) == [0, 51, 200]


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert pixels(encoded(image, format=kind)) == [0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile(kind: str) -> None:
    """No cyan, full magenta and yellow, no black is red; Adobe's JPEGs store it inverted."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = np.asarray(decode(encoded(image, format=kind)).rgb)[8, 8].tolist()
    assert red >= 250
    assert max(green, blue) <= 5


def test_a_wide_gamut_profile_stays_with_the_pixels_and_a_large_one_does_not() -> None:
    small, large = b"p" * 548, b"p" * 3_144
    image = Image.new("RGB", (8, 8))
    kept = decode(encoded(image, format="JPEG", icc_profile=small)).rgb
    assert kept.info == {"icc_profile": small}
    assert decode(encoded(image, format="PNG", icc_profile=large)).rgb.info == {}
    assert Image.open(io.BytesIO(thumbnail(kept))).info["icc_profile"] == small


# ---- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_only(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue", "lime")]
    data = encoded(frames[0], format=kind, save_all=True, append_images=frames[1:])
    picture = decode(data)
    red, green, blue = np.asarray(picture.rgb)[8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 15
    assert picture.format == kind


def test_a_gif_of_10000_frames_costs_no_more_than_its_first() -> None:
    data = gif_bytes(10_000)
    started = time.perf_counter()
    assert pixels(data) == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]
    assert time.perf_counter() - started < 0.2
    assert pixels(data[: len(data) // 2]) == pixels(data), "later frames are not looked at"


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


# ---- reduced decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((1600, 1200), 64, (200, 150)),  # 1200 / 8 = 150 >= 128
        ((1600, 1200), 80, (400, 300)),  # 150 < 160, so a quarter
        ((1600, 1200), 224, (800, 600)),  # a quarter, 300, is below 448
        ((1600, 1200), 301, (1600, 1200)),  # half, 600, is below 602
        ((1601, 1203), 64, (201, 151)),  # rounded up
        ((1600, 100), 64, (1600, 100)),  # never enlarged
    ],
)
def test_a_jpeg_is_reduced_to_no_less_than_twice_the_target(
    size: tuple[int, int], target: int, expected: tuple[int, int]
) -> None:
    jpeg = encoded(Image.new("RGB", size), format="JPEG")
    picture = decode(jpeg, target=target)
    assert picture.rgb.size == expected
    assert (picture.width, picture.height) == size
    turned = decode(jpeg_with_exif(jpeg, tiff_bytes({274: 6})), target=target)
    assert turned.rgb.size == expected[::-1]
    assert (turned.width, turned.height) == size[::-1]


def test_other_formats_keep_their_size() -> None:
    assert decode(encoded(Image.new("RGB", (900, 900)), format="PNG"), target=8).rgb.width == 900
    with pytest.raises(ValueError, match="target is 0"):
        decode(b"x", target=0)


def test_reduced_decoding_is_close_to_full_decoding() -> None:
    """Resized to 224, half- and quarter-size decoding differ from full decoding by 0.26 to 0.28
    levels of 255 on average; with a margin of 1 x the target instead of 2 x, by 0.61 to 0.77."""
    for size in ((1200, 900), (2000, 1800)):
        jpeg = encoded(textured(size), format="JPEG", quality=90)
        full, reduced = (
            np.asarray(decode(jpeg, target=t).rgb.resize((224, 224), Image.Resampling.BICUBIC))
            for t in (None, 224)
        )
        assert decode(jpeg, target=224).rgb.width < size[0]
        assert np.abs(full.astype(float) - reduced).mean() < 0.4


# ---- limits and damage ----------------------------------------------------------------------------


def test_the_pixel_limit_is_exact_and_its_message_complete() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"):
        data = encoded(Image.new("RGB", (100, 100)), format=kind)
        assert decode(data, limits=Limits(max_megapixels=0.01)).width == 100
        with pytest.raises(ImageError) as caught:
            decode(data, limits=Limits(max_megapixels=0.009999))
        assert caught.value.reason == "too-many-pixels"
    with pytest.raises(ImageError) as caught:
        decode(png_bytes((30_000, 20_000), 8, 2, b""))
    assert str(caught.value) == (
        "picture is 600 MP (30000 x 20000); the limit is 100 MP; "
        "resize it or raise --max-megapixels"
    )


def test_bytes_count_too() -> None:
    data = encoded(Image.new("RGB", (8, 8)), format="BMP")
    assert reason_of(data, limits=Limits(max_megabytes=0.0001)) == "too-large"
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG", "GIF"])
def test_pillows_own_limit_neither_warns_nor_refuses(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.new("RGB", (64, 48)), format=kind)  # 3,072 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)  # Pillow warns above, refuses above twice
    decode(data, limits=Limits(max_megapixels=0.0035))
    assert Image.MAX_IMAGE_PIXELS == 2_000, "left alone where it is wide enough"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    decode(data)
    assert Image.MAX_IMAGE_PIXELS == 50_000_001, "half of our 100 MP, as Pillow refuses above twice"


def test_what_is_no_picture_says_so() -> None:
    assert reason_of(b"hello") == "not-a-picture"
    assert reason_of(b"%PDF-1.7 ...") == "unsupported-format"
    with pytest.raises(ImageError, match="Photoshop files are not read; export it"):
        decode(b"8BPS" + bytes(100))
    jpeg_12_bit = encoded(Image.new("L", (8, 8)), format="JPEG").replace(
        b"\xff\xc0\x00\x0b\x08", b"\xff\xc0\x00\x0b\x0c"
    )
    assert reason_of(jpeg_12_bit) == "unsupported-format"


def test_heic_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"clipkit\[heic\]") as caught:
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert caught.value.reason == "unsupported-format"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FORMATS),
        ("jpg", {"progressive": True}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "tiff_adobe_deflate"}),
        ("tif", {"compression": "packbits"}),
        ("webp", {"lossless": True}),
    ],
)
def test_a_truncated_picture_is_never_half_a_picture(name: str, options: dict[str, object]) -> None:
    """Wherever it is cut: an error, or (when only the end mark is gone) every pixel as it was."""
    image = textured((40, 30))
    data = encoded(image, **{**FORMATS[name], **options})
    whole = np.asarray(decode(data).rgb)
    reasons: dict[str, int] = {}
    for cut in range(1, len(data), max(1, len(data) // 400)):
        try:
            rgb = decode(data[:cut]).rgb
        except ImageError as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
        else:
            assert np.array_equal(np.asarray(rgb), whole)
    assert set(reasons) <= {"truncated", "not-a-picture", "broken"}
    assert reasons["truncated"] >= 0.9 * sum(reasons.values())


def test_warnings_stay_silent_even_where_they_are_errors() -> None:
    """A TIFF whose directory is cut makes Pillow warn, which an "error" filter turns into a raise."""
    data = encoded(Image.new("RGB", (20, 20)), format="TIFF", exif=tiff_bytes({306: b"x" * 30}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cut in range(10, 250, 3):
            try:
                decode(data[:cut])
            except ImageError as error:
                assert "Warning" not in str(error)


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


# ---- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (320, 240)),
        ((480, 640), (240, 320)),
        ((100, 50), (100, 50)),
        ((9000, 1), (320, 1)),
    ],
)
def test_a_thumbnail_fits_and_is_never_enlarged(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = thumbnail(Image.new("RGB", size, (200, 100, 50)))
    small = Image.open(io.BytesIO(data))
    assert small.size == expected
    assert np.abs(np.asarray(small.convert("RGB")).astype(int) - (200, 100, 50)).max() <= 3


def test_a_thumbnail_is_small() -> None:
    assert len(thumbnail(textured((640, 480)))) < 15_000


def test_for_the_web_nothing_but_pixels_and_upright() -> None:
    """The place (GPS), comments, XMP and what lies behind the picture stay here."""
    exif = Image.Exif()
    exif[274] = 6
    exif.get_ifd(34853)[1] = "N"
    jpeg = encoded(
        Image.new("RGB", (3000, 1000), "red"), format="JPEG", exif=exif, comment=b"secret-note"
    )
    xmp = b"http://ns.adobe.com/xap/1.0/\0secret-place"
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + jpeg[2:]
    data, mime = encode_for_web(jpeg + b"secret-tail")
    shown = Image.open(io.BytesIO(data))
    assert (mime, shown.size) == ("image/jpeg", (683, 2048))  # 1000 * 2048 / 3000 = 682.7
    assert b"secret" not in data
    assert b"Exif" not in data
    assert not shown.getexif()
    assert "comment" not in shown.info


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP", "WEBP", "AVIF"])
def test_for_the_web_every_format_becomes_one_that_browsers_show(kind: str) -> None:
    data, mime = encode_for_web(
        encoded(Image.new("RGB", (50, 40), "red"), format=kind), max_side=20
    )
    assert (Image.open(io.BytesIO(data)).size, mime) == ((20, 16), "image/jpeg")
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert Image.open(io.BytesIO(encode_for_web(encoded(cmyk, format="TIFF"))[0])).mode == "RGB"


def test_for_the_web_a_large_jpeg_is_decoded_reduced() -> None:
    """1600 x 1200 to 400: a quarter is exactly 400 x 300 and needs no resizing."""
    picture = textured((1600, 1200))
    jpeg = encoded(picture, format="JPEG")
    shown = Image.open(io.BytesIO(encode_for_web(jpeg, max_side=400)[0])).convert("RGB")
    reference = picture.resize((400, 300), Image.Resampling.BOX)
    assert np.abs(np.asarray(shown).astype(float) - np.asarray(reference)).mean() < 5


# ---- many at once, and anything at all ------------------------------------------------------------


def test_threads_do_not_disturb_each_other() -> None:
    """Broken and whole pictures decoded at once, while another thread swaps the warning filters."""
    image = textured((120, 90))
    whole = [encoded(image, **options) for options in FORMATS.values()]
    jobs = [data for data in whole for _ in range(12)] + [data[:-200] for data in whole] * 6
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                time.sleep(0.001)

    def outcome(data: bytes) -> str:
        try:
            return hashlib.sha256(decode(data).rgb.tobytes()).hexdigest()
        except ImageError as error:
            return error.reason

    alone = [outcome(data) for data in jobs]
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(outcome, jobs)) == alone
    finally:
        done.set()
        swapper.join()


SMALL = {
    name: encoded(textured((24, 18)), **options)
    for name, options in [
        *FORMATS.items(),
        ("progressive", {"format": "JPEG", "progressive": True}),
        ("lzw", {"format": "TIFF", "compression": "tiff_lzw"}),
        ("animated", {"format": "PNG", "save_all": True, "append_images": [textured((24, 18), 1)]}),
    ]
}


@settings(max_examples=600, deadline=None)
@given(
    name=st.sampled_from(sorted(SMALL)),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans()),
        max_size=12,
    ),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_any_bytes_give_a_picture_or_an_image_error(
    name: str, edits: list[tuple[float, int, bool]], cut: float
) -> None:
    data = bytearray(SMALL[name])
    for where, value, early in edits:
        span = min(len(data), 120) if early else len(data)
        data[int(where * span)] = value
    mangled = bytes(data[: int(cut * len(data))])
    try:
        picture = decode(mangled, target=16, limits=Limits(max_megapixels=1))
    except ImageError as error:
        assert error.reason in {
            *("empty", "truncated", "broken", "not-a-picture"),
            *("unsupported-format", "too-many-pixels"),
        }
        assert str(error)
    else:
        assert picture.rgb.mode == "RGB"
        assert picture.width * picture.height <= 1_000_000
