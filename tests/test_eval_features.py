"""Features: made once, found by content, never another model's; damage and interruption survived."""

from __future__ import annotations

import base64
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import Numbered, Told
from PIL import Image

from clipkit import towers
from clipkit.errors import ImageError, InputError, ModelError
from clipkit.lazy_encoder import LazyEncoder
from eval.features import (
    STORE,
    Encoder,
    FeatureCache,
    Stopped,
    Transform,
    fingerprint,
    logit_scale,
    picture_features,
    text_features,
    thumbnail_uri,
)

ROOT = Path(__file__).parent.parent


def angle(at: float) -> np.ndarray:
    return np.array([np.cos(at), np.sin(at)], np.float32)


def told(name: str = "told", **options: Any) -> Told:
    """Sees picture (c, i) at the angle i / 100; reads a text as its length / 100."""
    return Told(
        lambda _, i: angle(i / 100), lambda text: angle(len(text) / 100), name=name, **options
    )


class Unloadable:
    """The model of `told`, whose towers nobody may load."""

    spec = encoder_id = space_id = known_id = "told"
    precision = "float32"

    def towers(self) -> Any:
        raise AssertionError("the towers were loaded")

    def encode_texts(self, texts: Sequence[str]) -> Any:
        return self.towers().encode_texts(texts)


def pictures(*numbers: int, suffix: str = "") -> Numbered:
    return Numbered([(1, number) for number in numbers], suffix=suffix)


class Counting(Told):
    """`told`, counting what it encodes."""

    def __init__(self, name: str = "told") -> None:
        other = told()
        super().__init__(other.see, other.read, name=name)
        self.seen: list[int] = []
        self.texts: list[list[str]] = []

    def encode_images(self, pixels: Sequence[Any]) -> Any:
        self.seen += [round(g) for _, g, _ in pixels]
        return super().encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> Any:
        self.texts.append(list(texts))
        return super().encode_texts(texts)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


# ---- what is a hit


def test_the_second_run_loads_no_towers_and_gives_the_same(cache: FeatureCache) -> None:
    first = picture_features(told(), pictures(1, 2, 3), cache=cache)
    texts = text_features(told(), ["a", "bb", "a"], cache=cache)
    assert np.allclose(first.vectors, [angle(0.01), angle(0.02), angle(0.03)])
    assert np.allclose(texts, [angle(0.01), angle(0.02), angle(0.01)])
    again = picture_features(Unloadable(), pictures(1, 2, 3), cache=cache)
    assert np.array_equal(again.vectors, first.vectors)
    assert again.vectors.dtype == np.float32
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(text_features(Unloadable(), ["a", "bb", "a"], cache=cache), texts)
    assert logit_scale(Unloadable(), cache) == 100.0
    assert text_features(Unloadable(), [], cache=cache).shape == (0, 2)


def test_content_counts_not_names(cache: FeatureCache) -> None:
    """The same pictures elsewhere and in another order are hits; a changed one is a miss."""
    picture_features(told(), pictures(1, 2, 3), cache=cache)
    moved = picture_features(Unloadable(), pictures(3, 1, suffix="-moved"), cache=cache)
    assert np.allclose(moved.vectors, [angle(0.03), angle(0.01)])
    model = Counting()
    picture_features(model, pictures(1, 9, 3), cache=cache)
    assert model.seen == [9]


def test_copies_are_encoded_once_and_counted() -> None:
    model = Counting()
    found = picture_features(model, pictures(5, 6, 5, 5), cache=FeatureCache(None))
    assert model.seen == [5, 6]
    assert found.repeated == 2
    assert np.array_equal(found.vectors[0], found.vectors[3])
    assert found.warnings == ("2 pictures are copies of others, byte by byte",)


def test_an_overwritten_checkpoint_never_reuses_features(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], cache: FeatureCache
) -> None:
    """Another model at the same path: features found by path would be the old model's."""
    place = tmp_path / "checkpoint"
    for seed in (0, 1):
        shutil.copytree(tiny_checkpoint(seed=seed), place, dirs_exist_ok=True)
        encoder = LazyEncoder(str(place), device="cpu", precision="float32")
        seen = picture_features(encoder, pictures(1, 2), cache=cache).vectors
        read = text_features(encoder, ["a cat"], cache=cache)
        fresh = towers.load(str(place), device="cpu", precision="float32")
        data = [Image.open(io.BytesIO(pictures(1, 2).read(row))).convert("RGB") for row in range(2)]
        assert np.allclose(seen, fresh.encode_images(data), atol=1e-6), f"checkpoint {seed}"
        assert np.allclose(read, fresh.encode_texts(["a cat"]), atol=1e-6), f"checkpoint {seed}"


def test_a_checkpoint_overwritten_meanwhile_is_an_error(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], cache: FeatureCache
) -> None:
    """Known by its files before, loaded after they changed: nothing may be kept under the old name."""
    place = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint(seed=0), place)
    encoder = LazyEncoder(str(place), device="cpu", precision="float32")
    shutil.copytree(tiny_checkpoint(seed=1), place, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="changed while it was evaluated"):
        picture_features(encoder, pictures(1), cache=cache)


def test_models_and_precisions_do_not_share(cache: FeatureCache) -> None:
    picture_features(told(), pictures(1), cache=cache)
    other, rough = Counting("other"), Counting()
    rough.precision = "bfloat16"
    for model in (other, rough):
        picture_features(model, pictures(1), cache=cache)
        assert model.seen == [1]


def test_a_transform_is_part_of_the_key_and_seeded_by_content(cache: FeatureCache) -> None:
    drawn: list[float] = []

    def darker(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        drawn.append(float(rng.random()))
        return image.point(lambda value: value // 2)

    plain = picture_features(told(), pictures(40, 60), cache=cache)
    half = Transform("darker 2", darker)
    dark = picture_features(told(), pictures(40, 60), cache=cache, transform=half, workers=1)
    assert np.allclose(plain.vectors, [angle(0.4), angle(0.6)])
    assert np.allclose(dark.vectors, [angle(0.2), angle(0.3)])
    again = picture_features(Unloadable(), pictures(40, 60), cache=cache, transform=half)
    assert np.array_equal(again.vectors, dark.vectors)
    turned = FeatureCache(None)
    picture_features(told(), pictures(60, 40), cache=turned, transform=half, workers=1)
    assert drawn[:2] == drawn[3:1:-1]
    assert len(set(drawn)) == 2


# ---- what cannot be read


def test_unreadable_pictures_are_left_out_and_named(cache: FeatureCache) -> None:
    mixed = Numbered([(1, 1), None, (1, 3), None])
    found = picture_features(told(), mixed, cache=cache)
    assert found.rows.tolist() == [0, 2]
    assert found.skipped[0] == (1, "1.png", "empty", "file is empty (0 bytes)")
    assert found.warnings == ("left out 2 of 4 pictures, the first 1.png: file is empty (0 bytes)",)
    with pytest.raises(InputError, match=r"none of the 2 pictures can be read; the first, 0\.png"):
        picture_features(told(), Numbered([None, None]), cache=cache)
    with pytest.raises(InputError, match="no picture to encode"):
        picture_features(told(), Numbered([]), cache=cache)


class Files:
    """Pictures given as bytes."""

    def __init__(self, *files: bytes) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        return f"file {row}"

    def read(self, row: int) -> bytes:
        return self.files[row]


def test_a_broken_picture_alone_does_not_load_the_towers(cache: FeatureCache) -> None:
    """Nothing is cached for what cannot be decoded: it is looked at again, without the model."""
    files = Files(pictures(1).read(0), b"no picture", b"no picture")
    first = picture_features(told(), files, cache=cache)
    again = picture_features(Unloadable(), files, cache=cache)
    for found in (first, again):
        assert found.rows.tolist() == [0]
        assert [(row, reason) for row, _, reason, _ in found.skipped] == [
            (1, "not-a-picture"),
            (2, "not-a-picture"),
        ]


def test_a_cold_evaluation_reads_each_file_once(cache: FeatureCache) -> None:
    """What is hashed is what is decoded: a file that changes while it is evaluated is encoded as one of
    its contents and cached under that one. Fails for a pass that hashes all pictures and then reads
    those again that are not cached: two reads, and a hash of other bytes than are decoded."""

    class Changing(Numbered):
        def __init__(self) -> None:
            super().__init__([(1, 0), (1, 1), None, (1, 0)])
            self.reads: list[int] = []

        def read(self, row: int) -> bytes:
            self.reads.append(row)
            super().read(row)
            return pictures(10 * self.reads.count(row) + row).read(0)  # other bytes each time

    changing = Changing()
    first = picture_features(told(), changing, cache=cache)
    assert sorted(changing.reads) == [0, 1, 2, 3]
    assert first.rows.tolist() == [0, 1, 3]
    assert np.allclose(first.vectors, [angle(0.1), angle(0.11), angle(0.13)])
    model = Counting()
    second = picture_features(model, pictures(10, 0, 11, 1), cache=cache)
    assert sorted(model.seen) == [0, 1]
    assert np.allclose(second.vectors, [angle(0.1), angle(0), angle(0.11), angle(0.01)])
    picture_features(Unloadable(), warm := Changing(), cache=cache)
    assert sorted(warm.reads) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_an_error_and_not_kept(
    cache: FeatureCache, bad: float
) -> None:
    class Broken(Counting):
        def encode_images(self, pixels: Sequence[Any]) -> Any:
            return np.where(np.arange(len(pixels))[:, None] == 1, bad, np.ones(2, np.float32))

        def encode_texts(self, texts: Sequence[str]) -> Any:
            return self.encode_images(texts)

    with pytest.raises(InputError, match=r"told gives no finite vector for 1\.png"):
        picture_features(Broken(), pictures(1, 2), cache=cache)
    with pytest.raises(InputError, match="told gives no finite vector for 'bb'"):
        text_features(Broken(), ["a", "bb"], cache=cache)
    model = Counting()
    picture_features(model, pictures(1, 2), cache=cache)
    assert model.seen == [1, 2]


# ---- texts


def test_texts_are_encoded_once_each_and_by_length() -> None:
    """Long and short texts in one batch would all be padded to the longest."""
    model = Counting()
    texts = [letter * length for length in (3, 50, 7) for letter in "abcdefgh" * 8 + "z"]
    rows = text_features(model, texts, cache=FeatureCache(None))
    encoded = [len(text) for batch in model.texts for text in batch]
    assert encoded == [3] * 9 + [7] * 9 + [50] * 9
    assert np.allclose(rows, [angle(len(text) / 100) for text in texts])


# ---- interruption


def test_a_stopped_run_goes_on_where_it_was(cache: FeatureCache) -> None:
    stop = threading.Event()

    def on_progress(what: str, done: int, total: int) -> None:
        assert total == 100
        if (what, done) == ("encoding pictures", 40):
            stop.set()

    many = pictures(*range(100))
    with pytest.raises(Stopped, match="stopped while encoding pictures; what was done is kept"):
        picture_features(
            told(), many, cache=cache, batch_size=10, on_progress=on_progress, stop=stop
        )
    model = Counting()
    found = picture_features(model, many, cache=cache)
    assert model.seen == list(range(40, 100))
    assert np.allclose(found.vectors, [angle(i / 100) for i in range(100)])


def test_a_crashed_run_goes_on_where_it_was(cache: FeatureCache) -> None:
    class Crashing(Counting):
        def encode_images(self, pixels: Sequence[Any]) -> Any:
            if len(self.seen) >= 30:
                raise KeyboardInterrupt
            return super().encode_images(pixels)

        def encode_texts(self, texts: Sequence[str]) -> Any:
            if self.texts:
                raise RuntimeError("out of memory")
            return super().encode_texts(texts)

    with pytest.raises(KeyboardInterrupt):
        picture_features(Crashing(), pictures(*range(50)), cache=cache, batch_size=10)
    texts = [f"text {i:03}" for i in range(200)]
    with pytest.raises(RuntimeError, match="out of memory"):
        text_features(Crashing(), texts, cache=cache)
    model = Counting()
    picture_features(model, pictures(*range(50)), cache=cache)
    text_features(model, texts, cache=cache)
    assert model.seen == list(range(30, 50))
    assert sum(map(len, model.texts)) == 200 - 128


def test_stopping_texts(cache: FeatureCache) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        text_features(told(), ["a"], cache=cache, stop=stop)


def test_decoding_stays_a_bounded_number_ahead() -> None:
    """5,000 decoded pictures would not fit; a slow tower must hold the decoders back."""
    ahead: list[int] = []

    class Slow(Counting):
        begun = 0

        def preprocess(self, image: Image.Image) -> Any:
            self.begun += 1
            return super().preprocess(image)

        def encode_images(self, pixels: Sequence[Any]) -> Any:
            time.sleep(0.01)
            ahead.append(self.begun - len(self.seen))
            return super().encode_images(pixels)

    model = Slow()
    picture_features(
        model, pictures(*range(200)), cache=FeatureCache(None), workers=2, batch_size=4
    )
    assert max(ahead) <= 4 * 2 + 4 + 4 + 1  # what waits, and the batch in hand


# ---- damage, and other processes


def test_a_damaged_vector_is_computed_again(
    cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit of one vector flips on the disk: what was stored is dropped, the answer is right."""
    picture_features(told(), pictures(1, 2, 3), cache=cache)
    assert cache.folder is not None
    file = cache.folder / STORE
    content = bytearray(file.read_bytes())
    content[content.index(angle(0.02).tobytes()) + 2] ^= 1
    file.write_bytes(content)
    model = Counting()
    with caplog.at_level(logging.WARNING):
        features = picture_features(model, pictures(1, 2, 3), cache=cache)
    assert np.allclose(features.vectors, [angle(0.01), angle(0.02), angle(0.03)])
    assert 2 in model.seen
    assert "set aside the damaged vectors" in caplog.text
    # what was looked up before the damage was met is not in the new file
    picture_features(told(), pictures(1, 2, 3), cache=cache)
    picture_features(Unloadable(), pictures(1, 2, 3), cache=cache)


def test_processes_may_write_at_once(cache: FeatureCache) -> None:
    """Three processes encode overlapping sets into one folder; all of it is there and whole."""
    code = (
        "import sys; from pathlib import Path; from numbered import Numbered, Told;"
        "from eval.features import FeatureCache, picture_features; from math import cos, sin;"
        "model = Told(lambda _, i: [cos(i / 100), sin(i / 100)], lambda _: [1, 0]);"
        "many = Numbered([(1, int(sys.argv[2]) + i) for i in range(150)]);"
        "picture_features(model, many, cache=FeatureCache(Path(sys.argv[1])), batch_size=8)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(cache.folder), str(start)],
            env={**os.environ, "PYTHONPATH": path},
            cwd=ROOT,
        )
        for start in (0, 50, 100)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    found = picture_features(Unloadable(), pictures(*range(250)), cache=cache)
    assert np.allclose(found.vectors, [angle(i / 100) for i in range(250)])
    assert cache.folder is not None
    assert [path.name for path in cache.folder.iterdir()] == [STORE]


# ---- small things


def test_a_fingerprint_tells_order_and_bounds() -> None:
    assert fingerprint("", ["ab", "c"]) != fingerprint("", ["a", "bc"])
    assert fingerprint("", ["a", "b"]) != fingerprint("", ["b", "a"])
    assert fingerprint("x", ["a"]) != fingerprint("", ["a"])
    assert fingerprint("", ["a"]) == fingerprint("", [b"a"])
    assert len(fingerprint("", [])) == 16


def test_a_thumbnail_is_a_small_jpeg(noise_picture: Callable[..., Image.Image]) -> None:
    buffer = io.BytesIO()
    noise_picture(640, 320).save(buffer, "PNG")
    uri = thumbnail_uri(Files(buffer.getvalue()), 0)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (160, 80)
    with pytest.raises(ImageError):
        thumbnail_uri(Files(b"no picture"), 0)


def test_the_lazy_encoder_is_an_encoder(tiny_checkpoint: Callable[..., Path]) -> None:
    """The protocol is what the command line hands in; real towers, real pictures, no cache."""
    encoder: Encoder = LazyEncoder(str(tiny_checkpoint()), device="cpu", precision="float32")
    found = picture_features(encoder, pictures(1, 2), cache=FeatureCache(None))
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    assert logit_scale(encoder, FeatureCache(None)) == encoder.towers().logit_scale
