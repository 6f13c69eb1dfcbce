"""Datasets of pictures without captions, and of pictures with labels."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import picture, save, save_all
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import DatasetError, InputError
from clipkit.sources import Broken, Options, Row, open_source
from data_prep.build import Built, build, build_once
from data_prep.clean import LabelError, Rules, label_text
from data_prep.split import Fractions, assign

KEEP = Rules(uncaptioned="keep")
ALL_TRAIN = Fractions(0, 0)


def run(out: Path, *paths: Path, **options: Any) -> Built:
    return build([open_source(path) for path in paths], out, **({"rules": KEEP} | options))


def read(out: Path, split: str = "train") -> list[Row]:
    """The rows as training reads them."""
    rows = list(open_source(out / split, options=Options(indexed=True, split=split)).rows())
    return [row for row in rows if not isinstance(row, Broken)]


def rejected(out: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(line["what"], line["reason"], line["detail"]) for line in lines]


def jsonl(path: Path, *lines: dict[str, Any]) -> Path:
    """A line a picture; each gets a picture of its own, if it names one that is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed, line in enumerate(lines):
        if not (path.parent / line["image"]).exists():
            picture(seed, 48, 40).save(path.parent / line["image"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_table_needs_no_column_of_captions(tmp_path: Path) -> None:
    """Two pictures with numbers; without the option the error names it."""
    table = jsonl(tmp_path / "in.jsonl", {"image": "a.png", "id": 1}, {"image": "b.png", "id": 2})
    with pytest.raises(DatasetError, match=r"no column is plainly .*--uncaptioned keep"):
        open_source(table)
    source = open_source(table, options=Options(uncaptioned=True))
    built = build([source], tmp_path / "out", rules=KEEP)
    assert sum(built.pictures.values()) == built.uncaptioned == 2
    _, once = build_once(str(table), tmp_path / "made", uncaptioned=True)
    assert once is not None and once.uncaptioned == 2


@pytest.mark.parametrize("shards", [False, True])
def test_pictures_without_a_caption_stay(tmp_path: Path, shards: bool) -> None:
    """b has none, the only caption of c is rejected: both stay, and the rejected caption is listed."""
    save_all(tmp_path / "in" / "deep" / "deeper", "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "in" / "deep" / "deeper" / "a.txt").write_text("A dog\n")
    (tmp_path / "in" / "deep" / "deeper" / "c.txt").write_text("IMG_0001.JPG\n")
    out = tmp_path / "out"
    built = run(out, tmp_path / "in", shards=shards, fractions=ALL_TRAIN)
    assert (built.pictures, built.captions, built.uncaptioned) == ({"train": 3}, 1, 2)
    assert rejected(out) == [("caption", "file-name", "IMG_0001.JPG")]
    assert sorted(row.captions for row in read(out)) == [(), (), ("A dog",)]
    if shards:
        with tarfile.open(out / "train" / "00000.tar") as tar:
            names = tar.getnames()
            texts = [n for n in names if n.endswith(".txt")]
            bodies = [json.loads(tar.extractfile(n).read()) for n in names if n.endswith(".json")]  # type: ignore[union-attr]
        assert len(texts) == 1 and len(names) == 7
        assert sorted((b["captions"], "caption" in b) for b in bodies) == [
            ([], False),
            ([], False),
            (["A dog"], True),
        ]
    manifest = json.loads((out / "dataset.json").read_text())
    assert manifest["counts"]["uncaptioned_pictures"] == 2
    assert manifest["options"]["rules"]["uncaptioned"] == "keep"


def test_by_default_they_are_rejected_and_the_error_names_the_remedy(tmp_path: Path) -> None:
    save_all(tmp_path / "in", "a.jpg", "b.jpg")
    with pytest.raises(
        DatasetError,
        match=r"no picture with a caption is left of 2.*no-caption 2.*--uncaptioned keep",
    ):
        run(tmp_path / "out", tmp_path / "in", rules=Rules())
    (tmp_path / "in" / "a.txt").write_text("A dog\n")
    built = run(tmp_path / "out", tmp_path / "in", rules=Rules())
    assert built.rejected == {"picture": {"no-caption": 1}} and built.uncaptioned == 0
    with pytest.raises(InputError, match="uncaptioned is 'maybe'; it must be reject or keep"):
        Rules(uncaptioned="maybe")  # type: ignore[arg-type]
    with pytest.raises(
        DatasetError, match=r"rows gives a picture; the first: a.jpg: 96 x 64 pixels"
    ):
        run(tmp_path / "none", tmp_path / "in", rules=Rules(uncaptioned="keep", min_side=500))


@pytest.mark.parametrize("captioned", [0, 1, 12])
def test_the_datasets_library_finds_text_in_every_column(tmp_path: Path, captioned: int) -> None:
    """Captions and labels of some pictures only, of those of one split only, of none: the types are
    text and list of text in both splits, not null."""
    datasets = pytest.importorskip("datasets")
    lines: list[dict[str, Any]] = [
        {"image": f"{n:02}.png", "split": "train" if n < 8 else "test"} for n in range(12)
    ]
    for n in range(12 - captioned, 12):  # the last ones: the first lines have empty lists
        lines[n]["caption"] = f"Thing {n}"
    for n in (3, 7):
        lines[n]["label"] = n
    path = jsonl(tmp_path / "in" / "t.jsonl", *lines)
    run(tmp_path / "out", path)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 8, "test": 4}
    for rows in loaded.values():
        assert rows.features["label"].dtype == "string"
        assert rows.features["captions"].feature.dtype == "string"
    texts = [[c for c in row["captions"] if c] for rows in loaded.values() for row in rows]
    assert sum(map(bool, texts)) == captioned
    assert sorted(row["label"] for row in loaded["train"]) == [""] * 6 + ["3", "7"]
    ours = [row for split in ("train", "test") for row in read(tmp_path / "out", split)]
    assert sum(bool(row.captions) for row in ours) == captioned
    assert sorted(row.label or "none" for row in ours) == ["3", "7"] + ["none"] * 10
    again = run(tmp_path / "again", tmp_path / "out")
    assert again.uncaptioned == 12 - captioned and again.labels == {"3": 1, "7": 1}


@pytest.mark.parametrize("shards", [False, True])
def test_labels_come_through_a_build(tmp_path: Path, shards: bool) -> None:
    """A number that the source does not name is text; without any label there is no such column."""
    path = jsonl(
        tmp_path / "in" / "t.jsonl",
        {"image": "a.png", "caption": "One", "label": "red  fox"},
        {"image": "b.png", "caption": "Two", "label": 7},
        {"image": "c.png", "caption": "Three"},
        {"image": "d.png", "caption": "Four", "label": ""},
    )
    built = run(tmp_path / "out", path, shards=shards, fractions=ALL_TRAIN, rules=Rules())
    assert built.labels == {"red fox": 1, "7": 1}
    labels = {row.captions: row.label for row in read(tmp_path / "out")}
    assert labels == {("One",): "red fox", ("Two",): "7", ("Three",): None, ("Four",): None}
    again = run(tmp_path / "again", tmp_path / "out", fractions=ALL_TRAIN)
    assert again.labels == built.labels
    assert (
        shards or again.fingerprint == built.fingerprint
    )  # shards have JPEG files: other identities
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bare = jsonl(path, *({key: line[key] for key in ("image", "caption")} for line in lines))
    unlabelled = run(tmp_path / "bare", bare, shards=shards, fractions=ALL_TRAIN)
    assert unlabelled.labels == {} and unlabelled.fingerprint != built.fingerprint
    if not shards:
        assert '"label"' not in (tmp_path / "bare" / "train" / "metadata.jsonl").read_text()


def test_numbers_get_the_names_that_the_source_knows(tmp_path: Path) -> None:
    """clip-benchmark's shards: .cls beside each picture, the names in classnames.txt."""
    save_all(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "classnames.txt").write_text("cat\ndog\n")
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for n, number in enumerate((1, 0, 5)):
            (tmp_path / f"{n}.cls").write_text(str(number))
            tar.add(tmp_path / f"{n}.jpg", f"s{n}.jpg")
            tar.add(tmp_path / f"{n}.cls", f"s{n}.cls")
    built = run(tmp_path / "out", tmp_path / "in", fractions=ALL_TRAIN)
    assert built.labels == {"dog": 1, "cat": 1, "5": 1}  # the sixth has no name


def test_one_picture_has_one_label(tmp_path: Path) -> None:
    """The first counts; another is listed, and so are several classes of one row, and no class."""
    path = jsonl(
        tmp_path / "in" / "t.jsonl",
        {"image": "a.png", "label": None},
        {"image": "a.png", "label": "cat"},
        {"image": "a.png", "label": "cat"},
        {"image": "a.png", "label": "dog"},
        {"image": "b.png", "label": ["cat", "dog"]},
        {"image": "c.png", "label": ["dog"]},
        {"image": "d.png", "label": 0.5},
    )
    built = run(tmp_path / "out", path, fractions=ALL_TRAIN)
    assert built.labels == {"cat": 1, "dog": 1} and sum(built.pictures.values()) == 4
    assert built.rejected == {"label": {"several-labels": 1, "not-a-class": 1, "other-label": 1}}
    assert [line for line in rejected(tmp_path / "out") if line[0] == "label"] == [
        ("label", "several-labels", "2 classes: cat, dog"),
        ("label", "not-a-class", "a label must be a name or a number, got 0.5"),
        ("label", "other-label", "dog; it has the label cat already"),
    ]


@given(
    st.one_of(
        st.none(),
        st.text(st.characters(), max_size=20),
        st.integers(-3, 5),
        st.booleans(),
        st.floats(),
        st.lists(st.one_of(st.none(), st.text(max_size=5), st.integers(-1, 3)), max_size=4),
    )
)
def test_a_label_is_one_line_of_text_or_none_or_refused(label: object) -> None:
    try:
        text = label_text(label, ("cat", "dog"))
    except LabelError as error:
        assert error.reason in ("several-labels", "not-a-class") and str(error)
        return
    if text is not None:
        assert text and text == " ".join(text.split())
        text.encode("utf-8")  # the file's encoding
        assert label_text(text, None) == text


def test_a_class_is_in_every_split_that_it_has_pictures_for() -> None:
    """Ten pictures a class: by hash alone some of 100 classes are in no validation or no test split."""
    ids = [f"{n:032x}" for n in range(1000)]
    labels = [f"class {n % 100}" for n in range(1000)]
    official: list[str | None] = [None] * 1000
    by_hash = assign(ids, official, np.arange(1000), fractions=Fractions())
    splits = assign(ids, official, np.arange(1000), labels, fractions=Fractions())

    def absent(splits: list[str]) -> int:
        pairs = set(zip(labels, splits, strict=True))
        return 300 - len(pairs)

    assert absent(by_hash) > 30 and absent(splits) == 0
    moved = sum(a != b for a, b in zip(by_hash, splits, strict=True))
    assert moved == absent(by_hash)  # no more than necessary
    # Two pictures a class: too few for three splits, but enough to train on one of them.
    labels = [f"class {n // 2}" for n in range(1000)]
    splits = assign(ids, official, np.arange(1000), labels, fractions=Fractions())
    assert {label for label, s in zip(labels, splits, strict=True) if s == "train"} == set(labels)
    # Classes of one picture stay where their hashes put them.
    assert assign(ids, official, np.arange(1000), ids, fractions=Fractions()) == by_hash


@given(st.data())
def test_classes_do_not_part_groups_and_do_not_move_official_pictures(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.integers(0, count, count), return_inverse=True)[1]
    labels = [None if n == 0 else f"class {n}" for n in rng.integers(0, 5, count)]
    official = [(None, None, None, "train", "test")[n] for n in rng.integers(0, 5, count)]
    ids = [f"{n:x}" for n in rng.integers(0, 2**62, count)]
    splits = assign(ids, official, groups, labels, fractions=Fractions(0.2, 0.2))
    assert all(o in (None, s) for o, s in zip(official, splits, strict=True))
    for group in range(int(groups.max()) + 1):
        free = {s for s, o, g in zip(splits, official, groups, strict=True) if g == group and not o}
        assert len(free) <= 1
    for label in set(labels) - {None}:
        # Every class of alone standing pictures is where its share rounds to one.
        own = [n for n in range(count) if labels[n] == label]
        if len(own) > 1 and all((groups == groups[n]).sum() == 1 and not official[n] for n in own):
            present = {splits[n] for n in own}
            assert "train" in present
            assert len(own) < 3 or present == {"train", "validation", "test"}


def test_splits_of_a_build_are_balanced(tmp_path: Path) -> None:
    """Three classes of six pictures, one of them rare in the source's order."""
    lines = [{"image": f"{n:02}.png", "label": f"class {n // 6}"} for n in range(18)]
    built = run(tmp_path / "out", jsonl(tmp_path / "in" / "t.jsonl", *lines))
    assert built.labels == {"class 0": 6, "class 1": 6, "class 2": 6}
    for split in ("train", "validation", "test"):
        assert {row.label for row in read(tmp_path / "out", split)} == {
            "class 0",
            "class 1",
            "class 2",
        }


@pytest.mark.parametrize("shards", [False, True])
def test_names_that_are_not_utf_8(tmp_path: Path, shards: bool) -> None:
    """Folders by other systems, half a surrogate pair in JSON: files are UTF-8, classes stay apart."""
    for seed, folder in enumerate(("caf\udce9", "caf\udce8")):
        try:
            save(tmp_path / "in" / folder / f"{seed}.png", seed)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    path = tmp_path / "t.jsonl"
    save_all(tmp_path, "0.png", "1.png", "2.png")
    path.write_text('{"image": "2.png", "x\\ud800": "\\ud801", "label": ["\\ud802", "a"]}\n')
    built = run(tmp_path / "out", tmp_path / "in", path, shards=shards, fractions=ALL_TRAIN)
    assert built.labels == {"caf\\udce9": 1, "caf\\udce8": 1}
    assert {row.label for row in read(tmp_path / "out")} == {"caf\\udce9", "caf\\udce8", None}
    for file in (tmp_path / "out").rglob("*.json*"):
        file.read_text(encoding="utf-8")
