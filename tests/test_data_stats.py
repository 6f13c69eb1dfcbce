"""Numbers of a dataset, counted by hand, and a picture of any of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_samples import save_all
from PIL import Image

from clipkit.errors import DatasetError
from clipkit.sources import Broken, Source, open_source
from data_prep.stats import Stats, collect, draw, lines


def test_counts(tmp_path: Path) -> None:
    """Lengths 3, 2, 3, 4 words; "dog" 3 times; stop words, numbers and lone letters do not count."""
    save_all(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "t.csv").write_text(
        "image,caption,split\n"
        "a.png,A dog runs,train\nb.png,A dog,test\nc.png,a Dog runs,train\nb.png,x 7 dogs' bones,test\n"
    )
    found = collect(open_source(tmp_path / "t.csv"))
    assert found.pictures == {"train": 2, "test": 1}  # the two rows of b.png are one picture
    assert found.caption_words.tolist() == [3, 2, 3, 4]
    assert found.captions_per_picture.tolist() == [1, 2, 1]
    assert (found.captions, found.distinct_captions, found.unreadable) == (4, 3, 1)
    assert found.words == Counter(dog=3, runs=2, dogs=1, bones=1)
    assert found.sizes.tolist() == [[96, 64]] * 2
    assert lines(found)[0] == "pictures   3 (train 2, test 1)"


def test_labels_and_pictures_without_captions(tmp_path: Path) -> None:
    """Two of four pictures have no caption; b has two classes, d none."""
    save_all(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.png", "caption": "A dog", "label": "dog"}\n'
        '{"image": "b.png", "caption": "Pets", "label": ["dog", "cat"]}\n'
        '{"image": "c.png", "label": 3}\n{"image": "d.png", "label": 0.5}\n'
    )
    found = collect(open_source(tmp_path / "t.jsonl"))
    assert found.labels == Counter({"dog": 2, "cat": 1, "3": 1})
    assert (found.labelled, found.uncaptioned) == (3, 2)
    text = lines(found)
    assert "captions   2, 2 distinct; 0 to 1 a picture, mean 0.50; 2 pictures without" in text
    assert "labels     3 classes of 1 to 2 pictures; 1 picture without" in text
    assert "classes    dog 2, cat 1, 3 1" in text
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "label": 3}\n')
    text = lines(collect(open_source(tmp_path / "t.jsonl")))
    assert text[1:4] == ["captions   none", "labels     1 class of 1 picture", "classes    3 1"]


def test_the_sample_follows_content_not_order(tmp_path: Path) -> None:
    save_all(tmp_path, *(f"{n:03}.png" for n in range(80)))
    rows = [f"{n:03}.png,Thing {n}" for n in range(80)]
    tiles = []
    for order in (rows, rows[::-1]):
        (tmp_path / "t.csv").write_text("\n".join(["image,caption", *order]) + "\n")
        tiles.append([t.tobytes() for t in collect(open_source(tmp_path / "t.csv")).tiles])
    assert tiles[0] == tiles[1] and len(tiles[0]) == 70


def test_nothing_to_count() -> None:
    broken = Source("made", "made", "", None, lambda: iter([Broken("line 1", "x", "y")]))
    with pytest.raises(
        DatasetError,
        match=r"nothing could be read from made: none of its 1 rows gives .* line 1: y",
    ):
        collect(broken)


@pytest.mark.parametrize("case", ["one", "no captions", "labels", "unreadable", "odd words"])
def test_any_data_set_can_be_drawn(tmp_path: Path, case: str) -> None:
    """A single picture, none readable, no captions, words that the font has no letters for."""
    none = np.zeros(0, np.int64)
    words = (
        Counter({"狗": 3, "$x^$": 2, "a" * 60: 1}) if case == "odd words" else Counter({"dog": 1})
    )
    stats = Stats(
        {"": 1},
        np.array([0 if case in ("no captions", "labels") else 1]),
        none if case in ("no captions", "labels") else np.array([2]),
        none.reshape(0, 2) if case == "unreadable" else np.array([[640, 480]]),
        Counter() if case in ("no captions", "labels") else words,
        Counter(cat=3, dog=1) if case == "labels" else Counter(),
        labelled=4 * (case == "labels"),
        captions=1,
        distinct_captions=1,
        unreadable=case == "unreadable",
        tiles=() if case == "unreadable" else (Image.new("RGB", (144, 108), "red"),),
    )
    draw(stats, tmp_path / "x.png", title="$100 & <b>")
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size == (1650, 1430)
