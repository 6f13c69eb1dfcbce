"""Pictures made smaller: decoded reduced, as thumbnails, and for the web with nothing but pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hostile import encoded, jpeg_with_exif, tiff_bytes
from PIL import Image
from textured import textured

from clipkit.images import decode, encode_for_web, rgb_array, thumbnail

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


@pytest.mark.parametrize(
    ("format", "options", "pixels"),
    [
        ("PNG", {}, 800 * 600),
        # 600 / 4 = 150 is still over 2 x 64 = 128: decoded at 200 x 150
        ("JPEG", {}, 200 * 150),
        ("JPEG", {"progressive": True}, 800 * 600),  # its coefficients are held at any size
    ],
)
def test_the_pixels_are_admitted_before_they_are_decoded(
    format: str, options: dict[str, Any], pixels: int
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (800, 600), "red").save(buffer, format, **options)
    admitted: list[int] = []
    decode(buffer.getvalue(), target=64, admit=admitted.append)
    assert admitted == [pixels]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1500, 1401), (2**20 + 1, 1), (1, 1500)])
def test_the_array_of_a_picture_is_numpys_own(size: tuple[int, int]) -> None:
    """1500 x 1401 pixels are three strips of 2**20 // 1500 = 699 rows, the last of three rows."""
    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    array = rgb_array(picture)
    assert array.dtype == np.uint8 and array.flags.writeable
    assert np.array_equal(array, values)
