"""Every kind of picture -> RGB, its first frame only, with expected pixels derived by hand."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hostile import encoded, gif_bytes, png_bytes, png_with, tiff_bytes
from PIL import Image
from textured import textured

from clipkit.images import decode, thumbnail
from clipkit.images.reading import upright_rgb


def pixels(data: bytes) -> list[object]:
    """The picture's pixels row by row, each (r, g, b); grey ones as one number."""
    found = np.asarray(decode(data).rgb).reshape(-1, 3).tolist()
    return [p[0] if p[0] == p[1] == p[2] else tuple(p) for p in found]


# ---- modes ----------------------------------------------------------------------------------------


def test_alpha_goes_onto_white() -> None:
    """out = (colour * a + 255 * (255 - a)) / 255: red at a = 128 gives (255, 127, 127), black at 64
    gives 255 * 191 / 255 = 191, and clear gives white whatever lies beneath."""
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
