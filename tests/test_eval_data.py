"""Data from wherever it lies: the same pictures, captions and classes, and clear refusals."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written import names, png, write, write_lines

from clipkit.errors import DatasetError, ImageError, InputError
from eval import classification
from eval.data import open_captioned, open_labelled

# ---- JSONL


def test_a_jsonl_file_gives_captions_by_picture(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png", png(1))
    data = open_captioned(
        write_lines(
            tmp_path / "dev.jsonl",
            {"image": "images/a.png", "captions": ["one", " two "], "keywords": "x, y,x"},
            "",
            {"file_name": "b.png", "caption": "three", "tags": ["z"]},
        )
    )
    assert data.captions == ("one", "two", "three")
    assert data.owner.tolist() == [0, 0, 1]
    assert data.tags == (("x", "y"), ("z",))
    assert data.split is None
    assert data.pictures.read(0) == png(1)
    with pytest.raises(ImageError, match="No such file"):
        data.pictures.read(1)


def test_lines_of_one_picture_are_joined(tmp_path: Path) -> None:
    """A caption a line is the commonest form; five rows of one picture must not become five pictures
    that compete with each other, which would make a perfect model score 20 %."""
    path = write_lines(
        tmp_path / "rows.jsonl",
        *[{"image": f"{i}.png", "text": f"caption {j}"} for j in range(5) for i in range(2)],
    )
    data = open_captioned(path)
    assert len(data.pictures) == 2
    assert data.owner.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"captions": ["a"]}', "line 2: no picture is named"),
        ('{"image": "b.png", "captions": 3}', "line 2: captions must be a string or a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"image": "a.png", "text": "a", "label": "cat"}, line)
    with pytest.raises(DatasetError, match=f"x.jsonl, {said}.*clipkit data build"):
        open_captioned(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "b.png", "label": 1.5}', "line 2: a label must be a name or a number, got 1.5"),
        ('{"image": "a.png", "label": "dog"}', "line 2: a.png had another label before"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"image": "a.png", "text": "a", "label": "cat"}, line)
    with pytest.raises(DatasetError, match=said):
        open_labelled(path)
    assert open_captioned(path).captions == ("a",)  # captions do not depend on labels


@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["captions", "caption", "text", "keywords", "tags", "label", "labels", "x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_fields_are_read_or_refused(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever JSON holds: texts that are not blank and can be written as UTF-8, or InputError."""
    row = {"image": "a.png", **fields}
    path = write_lines(tmp_path_factory.mktemp("any") / "x.jsonl", row, "")
    with contextlib.suppress(InputError):
        data = open_captioned(path)
        for text in (*data.captions, *data.tags[0]):
            assert text.strip() == text != ""
            text.encode()
    with contextlib.suppress(InputError):
        labelled = open_labelled(path)
        assert labelled.classes and all(isinstance(name, str) for name in labelled.classes)


# ---- tables


def test_a_table_names_splits_and_labels(tmp_path: Path) -> None:
    """Without --split the test rows; a row without a split is in none."""
    path = str(
        write(
            tmp_path / "t.csv",
            "image,caption,species,label,split\n"
            "a.png,A dog,canis,dog,train\nb.png,A cat,felis,cat,test\n"
            "b.png,A pet,felis,cat,test\nc.png,A fox,vulpes,fox,\n",
        )
    )
    data = open_captioned(path)
    assert (data.split, data.captions, names(data)) == ("test", ("A cat", "A pet"), ["b.png"])
    assert data.warnings == ()
    assert open_captioned(path, split="train").captions == ("A dog",)
    with pytest.raises(InputError, match="no split 'validation'; it has train, test"):
        open_captioned(path, split="validation")
    labelled = open_labelled(path, split="train")
    assert (labelled.classes, labelled.split) == (("dog",), "train")


def test_a_table_of_class_numbers_takes_names(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.csv", "image,label\na.png,1\nb.png,0\n"))
    data = open_labelled(path, classes=["cat", "dog"])
    assert data.labels is not None
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("cat", "dog"))
    with pytest.raises(InputError, match="names no classes"):
        open_labelled(str(write(tmp_path / "u.csv", "image,caption\na.png,A dog\n")))


def test_class_names_are_no_captions(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.csv", "image,label\na.png,dog\nb.png,cat\n"))
    with pytest.raises(InputError, match=r"no picture of .* has a caption"):
        open_captioned(path)
    assert open_labelled(path).classes == ("cat", "dog")


def test_a_table_beside_class_folders_need_not_be_about_them(tmp_path: Path) -> None:
    write(Path(classed(tmp_path, cat=1, dog=1)) / "prices.csv", "item,price\nfood,3\ntoys,7\n")
    assert open_labelled(str(tmp_path)).classes == ("cat", "dog")
    with pytest.raises(DatasetError, match=r"prices\.csv: no column names picture files"):
        open_captioned(str(tmp_path))


def test_a_broken_row_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.csv", "image,caption\na.png,A dog\nb.png,A,cat\n"))
    with pytest.raises(
        DatasetError, match=r"t\.csv, line 3: 3 fields instead of 2: b\.png,A,cat; c"
    ):
        open_captioned(path)


# ---- folders with captions


def test_a_dataset_folder_is_read_by_its_metadata(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_lines(
            tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "captions": [split]}
        )
    assert open_captioned(str(tmp_path)).captions == ("test",)
    assert open_captioned(str(tmp_path), split="train").captions == ("train",)
    validation = open_captioned(str(tmp_path), split="val")
    assert (validation.captions, validation.split) == (("validation",), "validation")
    with pytest.raises(InputError, match="no split 'tset'; it has test, train, validation"):
        open_captioned(str(tmp_path), split="tset")


def test_a_lone_training_split_is_warned_of(tmp_path: Path) -> None:
    write_lines(tmp_path / "train" / "metadata.jsonl", {"file_name": "a.png", "text": "a"})
    (warning,) = open_captioned(str(tmp_path)).warnings
    assert "only a split train" in warning
    assert open_captioned(str(tmp_path), split="train").warnings == ()


def test_captions_beside_pictures(tmp_path: Path) -> None:
    write(tmp_path / "b.png", png(1))
    write(tmp_path / "b.txt", "first\nsecond\n")
    write(tmp_path / "a" / "c.png", png(2))
    write(tmp_path / "a" / "c.json", '{"caption": "third", "tags": ["t"]}')
    data = open_captioned(str(tmp_path))
    found = {data.pictures.name(o): c for o, c in zip(data.owner, data.captions, strict=True)}
    assert found == {"b.png": "second", "a/c.png": "third"}
    assert sorted(data.tags) == [(), ("t",)]
    with pytest.raises(InputError, match=r"has no splits.*leave out --split"):
        open_captioned(str(tmp_path / "a"), split="test")


def test_a_folder_called_train_beside_others_is_no_split(tmp_path: Path) -> None:
    for name in ("train/a", "cars/b"):
        write(tmp_path / f"{name}.png", png(len(name)))
        write(tmp_path / f"{name}.txt", name)
    data = open_captioned(str(tmp_path))
    assert (data.split, data.captions) == (None, ("cars/b", "train/a"))


def test_no_captions_and_no_pictures_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pictures"):
        open_captioned(str(tmp_path))
    write(tmp_path / "a.png", png())
    with pytest.raises(InputError, match=r"no picture of .* has a caption"):
        open_captioned(str(tmp_path))


# ---- a folder per class


def classed(root: Path, **folders: int) -> str:
    """A folder per class with so many pictures."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            write(root / name / f"{i}.png", png(i))
    return str(root)


def test_a_folder_per_class(tmp_path: Path) -> None:
    data = open_labelled(classed(tmp_path, dog=1, Great_Dane=2))
    assert data.classes == ("Great Dane", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    assert data.targets is None and data.domains is None and data.warnings == ()
    assert names(data) == ["Great_Dane/0.png", "Great_Dane/1.png", "dog/0.png"]


def test_train_is_a_class_where_not_all_folders_are_splits(tmp_path: Path) -> None:
    """CIFAR-100 has a class "train"."""
    assert open_labelled(classed(tmp_path, train=1, rocket=1)).classes == ("rocket", "train")


def test_splits_hold_class_folders(tmp_path: Path) -> None:
    classed(tmp_path / "train", cat=1, dog=1)
    classed(tmp_path / "val", cat=2, dog=1)
    data = open_labelled(str(tmp_path))
    assert (data.split, len(data.pictures)) == ("val", 3)
    assert len(open_labelled(str(tmp_path), split="train").pictures) == 2


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    data = open_labelled(
        classed(tmp_path, great_dane=1, cat=2), classes=["Great Dane", "owl", "CAT"]
    )
    assert data.classes == ("Great Dane", "owl", "CAT")
    assert data.labels is not None
    assert data.labels.tolist() == [2, 2, 0]
    assert data.warnings == ("1 of 3 classes have no picture: owl",)


def test_folders_that_bear_no_names_take_them_in_order(tmp_path: Path) -> None:
    data = open_labelled(classed(tmp_path, n01=1, n02=1), classes=["tench", "goldfish"])
    assert data.classes == ("tench", "goldfish")
    assert "n01 is 'tench', n02 is 'goldfish'" in data.warnings[0]


def test_wrong_classes_are_errors(tmp_path: Path) -> None:
    root = classed(tmp_path, cat=1, dog=1)
    with pytest.raises(InputError, match=r"3 classes were given, but .* has 2"):
        open_labelled(root, classes=["a", "b", "c"])
    # As many as there are and one of them known: taking them in order would swap cat and dog.
    with pytest.raises(InputError, match=r"1 of .* 2 classes are none of those given \(cat\)"):
        open_labelled(root, classes=["dog", "cta"])
    with pytest.raises(InputError, match="a class has no name"):
        open_labelled(root, classes=["dog", " "])
    with pytest.raises(InputError, match="holds no class folders"):
        open_labelled(root + "/cat")


def test_class_names_given_twice_and_empty_classes_are_warned_of(tmp_path: Path) -> None:
    root = classed(tmp_path, bird=2, machine=0)
    data = open_labelled(root, classes=["crane", "Crane"])
    assert data.warnings[1:] == (
        "class names given more than once: crane; no model can distinguish those",
        "1 of 2 classes have no picture: Crane",
    )


def test_domain_folders(tmp_path: Path) -> None:
    classed(tmp_path / "photo", cat=1, dog=1)
    classed(tmp_path / "sketch", dog=1)
    data = open_labelled(str(tmp_path), by_domain=True)
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert data.domains == ("photo", "photo", "sketch")


def test_labels_in_a_jsonl_file(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl",
        {"image": "a.png", "labels": ["sea", "dog"]},
        {"image": "b.png", "labels": []},
        {"image": "c.png", "labels": ["sea"]},
    )
    data = open_labelled(path)
    assert data.classes == ("dog", "sea")
    assert data.labels is None and data.targets is not None
    assert data.targets.tolist() == [[True, True], [False, False], [False, True]]
    assert data.pictures_per_class().tolist() == [1, 2]
    numbered = write_lines(tmp_path / "y.jsonl", {"image": "a.png", "label": 2})
    with pytest.raises(InputError, match=r"numbers its classes .* add --classes FILE"):
        open_labelled(numbered)
    with pytest.raises(InputError, match="class numbers 2 to 2, but 2 class names"):
        open_labelled(numbered, classes=["a", "b"])
    half = write_lines(tmp_path / "z.jsonl", {"image": "a", "label": "x"}, {"image": "b"})
    with pytest.raises(DatasetError, match=r"b of .* has no label"):
        open_labelled(half)


# ---- limits


def test_a_limit_takes_the_same_pictures_everywhere(tmp_path: Path) -> None:
    rows = [{"image": f"{i:03}.png", "captions": [f"{i} a", f"{i} b"]} for i in range(200)]
    here = open_captioned(write_lines(tmp_path / "here.jsonl", *rows), limit=20)
    there = open_captioned(write_lines(tmp_path / "far" / "there.jsonl", *rows[::-1]), limit=20)
    assert set(names(here)) == set(names(there))
    assert names(here) == sorted(names(here)) != [f"{i:03}.png" for i in range(20)]
    for owner, caption in zip(here.owner, here.captions, strict=True):
        assert here.pictures.name(owner).startswith(f"{int(caption[:-2]):03}")
    assert len(here.captions) == 40
    assert here.subset == "20 of 200 pictures, by the hash of their names"
    assert open_captioned(str(tmp_path / "here.jsonl"), limit=200).subset is None
    with pytest.raises(InputError, match="limit is 0 pictures"):
        open_captioned(str(tmp_path / "here.jsonl"), limit=0)


def test_a_limited_labelled_set_keeps_its_classes(tmp_path: Path) -> None:
    data = open_labelled(classed(tmp_path, a=20, b=20, c=20), limit=2)
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None
    for row in range(2):
        assert data.pictures.name(row).startswith(data.classes[data.labels[row]])
    assert "classes have no picture" in data.warnings[-1]


# ---- one folder too high, one file too many


def test_a_folder_too_high_names_the_one_with_classes(tmp_path: Path) -> None:
    """PACS unpacked as pacs/PACS/photo/dog/1.png: its one "class" PACS is none."""
    for domain in ("photo", "sketch"):
        classed(tmp_path / "PACS" / domain, dog=1, cat=1, horse=1)
    data = open_labelled(str(tmp_path))
    assert data.classes == ("PACS",) and data.warnings == ()
    sentence = (
        f"has 1 class; choosing between classes needs 2; {tmp_path}/PACS/photo has 3: give that"
    )
    with pytest.raises(InputError, match=re.escape(sentence)):
        classification.check_labels(data)
    (warning,) = open_labelled(str(tmp_path / "PACS")).warnings
    assert warning.startswith(
        "every class has the same 3 folders, such as photo, so the classes may"
    )
    assert warning.endswith(f"give --data {tmp_path}/PACS/photo")
    assert open_labelled(str(tmp_path / "PACS"), by_domain=True).warnings == ()
    assert open_labelled(str(tmp_path / "PACS" / "photo")).warnings == ()


def test_the_tables_of_a_folder_are_named(tmp_path: Path) -> None:
    """One is read; of several, which have no captions beside the pictures, the person chooses."""
    write(tmp_path / "images" / "a.png", png(1))
    write_lines(tmp_path / "captions.jsonl", {"image": "images/a.png", "caption": "one"})
    assert open_captioned(str(tmp_path)).captions == ("one",)
    write_lines(tmp_path / "titles.jsonl", {"image": "images/a.png", "caption": "two"})
    sentence = (
        "it holds captions.jsonl, titles.jsonl: name the one with the captions, as in --data "
    )
    with pytest.raises(InputError, match=re.escape(sentence + str(tmp_path / "captions.jsonl"))):
        open_captioned(str(tmp_path))
