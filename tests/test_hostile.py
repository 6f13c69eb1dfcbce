"""300 hostile pictures: each is a picture or an error that says why, fast and in little memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hostile import Hostile, make_hostile

from clipkit.errors import ImageError
from clipkit.images import decode, encode_for_web, read_bytes

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hostiles(tmp_path_factory: pytest.TempPathFactory) -> list[Hostile]:
    return make_hostile(tmp_path_factory.mktemp("hostile"))


def test_every_one_is_read_or_named_with_its_reason(hostiles: list[Hostile]) -> None:
    """No other exception, no warning (they are errors here), nothing that blocks or takes long."""
    reasons: Counter[str] = Counter()
    started = time.perf_counter()
    for item in hostiles:
        begun = time.perf_counter()
        try:
            decode(read_bytes(item.path), target=224)
        except ImageError as error:
            assert not item.readable, f"{item.path!r}: {error}"
            assert error.reason
            assert str(error).isprintable(), repr(str(error))
            assert "; " in str(error) or ": " in str(error), "says what to do"
            reasons[error.reason] += 1
        else:
            assert item.readable is not False, f"{item.path!r} was decoded"
        assert time.perf_counter() - begun < 5, item.path
    assert len(hostiles) == pytest.approx(300, abs=10)
    assert time.perf_counter() - started < 20
    assert set(reasons) >= {
        *("empty", "too-large", "too-many-pixels", "truncated", "not-a-picture"),
        *("unsupported-format", "broken", "not-a-file", "unreadable"),
    }


def test_the_expected_reasons(hostiles: list[Hostile]) -> None:
    expected = {
        "zero-bytes": "empty",
        "one-byte": "not-a-picture",
        "text": "not-a-picture",
        "text-begins-like-bmp": "not-a-picture",
        "archive": "not-a-picture",
        "photoshop": "unsupported-format",
        "header-600mp": "too-many-pixels",
        "frame-4300mp": "too-many-pixels",
        "png-bomb-1-bit": "too-many-pixels",
        "apng-bomb": "too-many-pixels",
        "comment-20mb": "broken",
        "scans-2000": "broken",
        "tag-bomb": "broken",
        "truncated": "truncated",
        "sparse": "too-large",
        "pipe": "not-a-file",
        "folder": "not-a-file",
        "link-loop": "unreadable",
        "dangling-link": "unreadable",
    }
    seen = set()
    for item in hostiles:
        if item.kind in expected:
            with pytest.raises(ImageError) as caught:
                decode(read_bytes(item.path))
            assert caught.value.reason == expected[item.kind], item.path
            seen.add(item.kind)
    assert seen == set(expected)


def test_the_web_encoder_survives_them_too(hostiles: list[Hostile]) -> None:
    for item in hostiles:
        try:
            assert encode_for_web(read_bytes(item.path), max_side=64)[1] == "image/jpeg"
        except ImageError as error:
            assert not item.readable, f"{item.path!r}: {error}"


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, hostiles: list[Hostile]) -> None:
    again = make_hostile(tmp_path / "again", n=75)
    assert [item.kind for item in again] == [item.kind for item in hostiles][: len(again)]
    for one, other in zip(again, hostiles, strict=False):
        if one.path.is_file() and one.path.stat().st_size < 10**8 and one.readable is not None:
            assert one.path.read_bytes() == other.path.read_bytes()


MEASURE = """
import resource, sys
from pathlib import Path
from clipkit.errors import ImageError
from clipkit.images import decode, read_bytes
from PIL import Image
import os
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
for name in sys.stdin.buffer.read().split(b"\\0"):
    try:
        decode(read_bytes(Path(os.fsdecode(name))), target=224)
    except ImageError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def test_bombs_do_not_allocate(hostiles: list[Hostile]) -> None:
    """Decoding all 300 in a fresh process raises its peak memory by less than 120 MB: the largest
    honest need is the 20 MB GIF read whole. A 600 MP bomb in RGB would take 2,400 MB."""
    pytest.importorskip("resource", reason="peak memory is asked of the POSIX kernel")
    names = b"\0".join(bytes(item.path) for item in hostiles)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE], input=names, capture_output=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 120e6
    assert done.stderr == b"", "nothing is printed"
