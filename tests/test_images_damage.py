"""Too large, cut, broken, unknown, many at once: a picture, or an error that says why."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hostile import FORMATS, encoded, png_bytes, tiff_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from textured import textured

from clipkit.errors import ImageError
from clipkit.images import Limits, decode


def reason_of(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)  # type: ignore[arg-type]
    return caught.value.reason


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


@settings(max_examples=600)
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
