"""Look-alikes found exactly; splits that follow content, keep together and never come to leak."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import picture, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from clipkit.errors import DatasetError, InputError
from clipkit.sources import open_source
from data_prep.leaks import find_leaks
from data_prep.split import Fractions, assign, groups_of, near_pairs, perceptual_hash

IDS = [f"{n:032x}" for n in range(2000)]
ALONE = np.arange(2000)
DEFAULT = Fractions()


def bits_apart(one: Image.Image, two: Image.Image) -> int:
    a, b = (int.from_bytes(perceptual_hash(p), "big") for p in (one, two))
    return (a ^ b).bit_count()


def test_copies_look_alike_and_others_do_not() -> None:
    """Saved again, smaller, darker: within the default radius of 15. Different: near 128."""
    original = picture(1, 320, 240)
    buffer = io.BytesIO()
    original.resize((160, 120)).save(buffer, "JPEG", quality=60)
    assert bits_apart(original, Image.open(buffer)) <= 15
    assert bits_apart(original, ImageEnhance.Brightness(original).enhance(0.85)) <= 15
    assert min(bits_apart(original, picture(n, 320, 240)) for n in range(2, 12)) > 60


@settings(max_examples=50)
@given(seed=st.integers(0, 99), radius=st.integers(0, 15))
def test_near_pairs_equal_a_search_of_all_pairs(seed: int, radius: int) -> None:
    """Clusters of hashes a few bits apart; equal rows are chained, so groups are what is compared."""
    rng = np.random.default_rng(seed)
    hashes = np.repeat(rng.integers(0, 256, (4, 32), dtype=np.uint8), 5, axis=0)
    flips = np.zeros((20, 256), np.uint8)
    for row in flips:
        row[rng.choice(256, rng.integers(0, 17), replace=False)] = 1
    hashes ^= np.packbits(flips, axis=1)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(2)
    expected = np.argwhere(np.triu(apart <= radius, 1))
    found = near_pairs(hashes, radius)
    assert {tuple(p) for p in found.tolist()} <= {tuple(p) for p in expected.tolist()}
    np.testing.assert_array_equal(groups_of(20, found), groups_of(20, expected))


def test_many_equal_hashes_make_a_chain_not_all_pairs() -> None:
    assert len(near_pairs(np.zeros((1000, 32), np.uint8), 15)) == 999
    assert near_pairs(np.zeros((0, 32), np.uint8), 15).shape == (0, 2)


def test_fractions_and_seeds() -> None:
    """2,000 ids at 10 % are binomial: 200 with a deviation of 13.4; five of those on either side."""
    splits = assign(IDS, [None] * 2000, ALONE, fractions=DEFAULT)
    for split in ("validation", "test"):
        assert 133 < splits.count(split) < 267
    assert splits != assign(IDS, [None] * 2000, ALONE, fractions=DEFAULT, seed=1)
    all_train = assign(IDS, [None] * 2000, ALONE, fractions=Fractions(0, 0))
    assert set(all_train) == {"train"}


@settings(max_examples=50)
@given(st.permutations(range(40)), st.integers(0, 39))
def test_a_picture_never_moves_when_data_is_added(order: list[int], first: int) -> None:
    """Any part of the data, in any order, puts each picture where the whole does; only a part with
    fewer than two training pictures lends itself as many as it lacks."""
    ids, groups = IDS[:40], ALONE[:40]
    whole = dict(zip(ids, assign(ids, [None] * 40, groups, fractions=DEFAULT), strict=True))
    part = [IDS[n] for n in order[: first + 1]]
    splits = assign(part, [None] * len(part), np.arange(len(part)), fractions=DEFAULT)
    expected = [whole[image_id] for image_id in part]
    moved = [now for now, usual in zip(splits, expected, strict=True) if now != usual]
    trained = expected.count("train")
    assert moved == ["train"] * min(max(0, 2 - trained), len(part) - trained)


def test_a_few_pictures_train_though_their_hashes_say_otherwise() -> None:
    """At 10 % each, hashes below 0.8 train, below 0.9 validate, else test. None of these four would
    train, so the two with the lowest hashes do; among three, of which one trains, the lower of the
    others does; two official ones suffice. Fails for splits by hash alone, which leave no training.
    """
    places = {
        i: int(hashlib.blake2b(f"0:{i}".encode(), digest_size=8).hexdigest(), 16) / 2**64
        for i in IDS
    }
    held_out = [i for i in IDS if places[i] >= 0.8][:4]
    lowest = sorted(held_out, key=places.__getitem__)

    def train(ids: list[str], official: list[str | None], groups: list[int]) -> set[str]:
        splits = assign(ids, official, np.array(groups), fractions=DEFAULT)
        return {i for i, name in zip(ids, splits, strict=True) if name == "train"}

    assert train(held_out, [None] * 4, [0, 1, 2, 3]) == set(lowest[:2])
    # a look-alike goes with the lowest, and then two train
    assert train(lowest, [None] * 4, [0, 1, 2, 0]) == {lowest[0], lowest[3]}
    one = next(i for i in IDS if places[i] < 0.8)
    assert train([one, *lowest[:2]], [None] * 3, [0, 1, 2]) == {one, lowest[0]}
    assert train(held_out[:2], ["test", None], [0, 1]) == {held_out[1]}
    assert train(held_out[:2], ["test", "test"], [0, 1]) == set()
    assert train(held_out, ["train", "train", None, None], [0, 1, 2, 3]) == {*held_out[:2]}


@settings(max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=60, max_size=60), st.integers(1, 60))
def test_what_was_trained_on_is_never_tested_on(numbers: list[int], before: int) -> None:
    """Groups stay together, and a group that grows can only move towards training: whatever is
    tested on after data came was not trained on, nor validated on, before. Two further pictures are
    for training anyway, so that none must be lent to it."""
    ids, official = IDS[:62], ["train", "train", *[None] * 60]
    groups, before = np.array([13, 14, *numbers]), before + 2
    now = assign(ids, official, groups, fractions=Fractions(0.3, 0.3))
    for number in set(numbers):
        assert len({s for s, g in zip(now, groups, strict=True) if g == number}) == 1
    then = assign(ids[:before], official[:before], groups[:before], fractions=Fractions(0.3, 0.3))
    order = ["train", "validation", "test"]
    assert all(order.index(b) >= order.index(a) for b, a in zip(then, now, strict=False))


def test_official_splits_are_kept_and_look_alikes_follow_them() -> None:
    official = ["test", None, None, "validation", None, "train", "test"]
    groups = np.array([0, 0, 1, 2, 2, 3, 3])
    splits = assign(IDS[:7], official, groups, fractions=Fractions(0, 0))
    assert splits == ["test", "test", "train", "validation", "validation", "train", "test"]


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0)])
def test_fractions_that_leave_nothing(validation: float, test: float) -> None:
    with pytest.raises(InputError, match=r"fraction is|leave no training data"):
        Fractions(validation, test)


def leaky(folder: Path) -> Path:
    """train: 0 1 2 3; test: a copy of 0, a look-alike of 1, a caption of 2, a look-alike of itself."""
    rows: dict[str, list[tuple[str, str]]] = {
        "train": [("a.png", "A dog"), ("b.png", "A cat"), ("c.png", "A bird."), ("d.png", "Fog")],
        "test": [("e.png", "One"), ("f.jpg", "Two"), ("g.png", "a bird"), ("h.jpg", "Three")],
    }
    for seed, (name, _) in enumerate(rows["train"]):
        save(folder / "train" / name, seed)
    save(folder / "test" / "e.png", 0)
    save(folder / "test" / "f.jpg", 1, quality=60)
    save(folder / "test" / "g.png", 9)
    save(folder / "test" / "h.jpg", 9, quality=60)
    for split, pairs in rows.items():
        lines = [json.dumps({"file_name": n, "captions": [c]}) + "\n" for n, c in pairs]
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def test_leaks_are_found_and_named(tmp_path: Path) -> None:
    """Pictures in two splits, by the bytes and by the look; look-alikes inside a split are none."""
    leaks = find_leaks(open_source(leaky(tmp_path)))
    assert leaks.pictures == {"train": 4, "test": 4}
    assert [(leak.kind, leak.splits, leak.pictures) for leak in leaks.pairs] == [
        ("same-file", ("train", "test"), ("train/a.png", "test/e.png")),
        ("look-alike", ("train", "test"), ("train/b.png", "test/f.jpg")),
    ]
    (shared,) = leaks.shared_captions
    assert (shared.pictures, shared.detail) == (("train/c.png", "test/g.png"), "a bird")


def test_equal_hashes_leak_though_a_chain_links_them_within_splits(tmp_path: Path) -> None:
    """train, train, test of one look (lossless copies in three formats): one leak, named once."""
    for split, names in (("train", ("a.png", "b.bmp")), ("test", ("c.webp",))):
        (tmp_path / split).mkdir()
        for name in names:
            options = {"lossless": True} if name.endswith("webp") else {}
            picture(0).save(tmp_path / split / name, **options)
        lines = [json.dumps({"file_name": n, "text": "A dog"}) + "\n" for n in names]
        (tmp_path / split / "metadata.jsonl").write_text("".join(lines))
    leaks = find_leaks(open_source(tmp_path), radius=0)
    assert [(x.kind, x.pictures) for x in leaks.pairs] == [
        ("look-alike", ("train/a.png", "test/c.webp"))
    ]


def test_what_cannot_be_read_is_told_and_no_splits_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 0)
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,A dog\n")
    with pytest.raises(DatasetError, match="has no pictures in splits"):
        find_leaks(open_source(tmp_path / "t.csv"))
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xffbroken")
    (tmp_path / "t.csv").write_text(
        "image,caption,split\na.jpg,A,train\nb.jpg,B,test\nc.jpg,C,test\n"
    )
    leaks = find_leaks(open_source(tmp_path / "t.csv"))
    assert [name for name, _ in leaks.unreadable] == ["b.jpg", "line 4"]
