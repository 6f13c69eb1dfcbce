"""Dataset folders and the captions beside pictures: what is read, and what is said of bad files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit import records
from clipkit.errors import DatasetError
from clipkit.records import FolderCaptions, ImageRecord, Texts, read_dataset

GOOD = {"file_name": "a.jpg", "image_id": "00ff", "captions": ["A dog.", "One dog."]}


def write_split(folder: Path, split: str, *rows: Any) -> Path:
    """A split's metadata.jsonl of objects, or of raw lines where a row is bytes."""
    path = folder / split / "metadata.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


# ---- datasets


def test_records_of_all_splits_in_order(tmp_path: Path) -> None:
    write_split(tmp_path, "test", {"file_name": "t.jpg", "image_id": "3", "captions": []})
    more = {"file_name": "sub/b.png", "image_id": "2", "caption": "A cat.", "label": 7, "tags": [1]}
    write_split(tmp_path, "train", GOOD, b"", more)
    first, second, third = read_dataset(tmp_path)
    assert first == ImageRecord("00ff", "train/a.jpg", ("A dog.", "One dog."), "train", {})
    assert second.path == "train/sub/b.png"
    assert second.captions == ("A cat.",)
    assert second.meta == {"label": 7, "tags": [1]}  # any other column, of any kind
    assert (third.image_id, third.split, third.captions) == ("3", "test", ())
    assert [record.image_id for record in read_dataset(tmp_path, "test")] == ["3"]


def test_an_empty_split_has_no_records(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    assert list(read_dataset(tmp_path, "train")) == []


def test_reading_is_by_the_line(tmp_path: Path) -> None:
    """The first record comes before the bad second line is looked at."""
    write_split(tmp_path, "train", GOOD, b"{")
    reading = read_dataset(tmp_path)
    assert next(reading).image_id == "00ff"
    with pytest.raises(DatasetError):
        next(reading)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"file_name": ', "not JSON: Expecting value"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        ({**GOOD, "image_id": 5}, "image_id must be a string of at least one character, got 5"),
        ({"file_name": "a.jpg", "captions": []}, "image_id must be .* got None"),
        ({"image_id": "1", "captions": []}, "file_name must be .* got None"),
        ({**GOOD, "file_name": ""}, "file_name must be .* got ''"),
        ({**GOOD, "file_name": "a\0.jpg"}, "file_name must be"),
        ({**GOOD, "file_name": "../secret"}, r"file_name '\.\./secret' must stay below the folder"),
        (
            {**GOOD, "file_name": "/etc/passwd"},
            "file_name '/etc/passwd' must stay below the folder",
        ),
        ({**GOOD, "captions": [3]}, "captions must hold strings only, got int"),
        (
            {**GOOD, "captions": {"en": "a"}},
            "captions must be a string or a list of strings, got dict",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    write_split(tmp_path, "train", GOOD, line)
    with pytest.raises(DatasetError, match=rf"train.metadata\.jsonl, line 2: {says}"):
        list(read_dataset(tmp_path))


def test_a_line_without_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 2**20)
    write_split(tmp_path, "train", GOOD, b"x" * (2**20 + 1))
    with pytest.raises(DatasetError, match="line 2: the line is longer than 1 MB"):
        list(read_dataset(tmp_path))


def test_no_dataset_and_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none of train/, validation/, test/ holds a metadata"):
        read_dataset(tmp_path)  # at once, not at the first record
    write_split(tmp_path, "train", GOOD)
    write_split(tmp_path, "test", GOOD)
    with pytest.raises(DatasetError, match="has no split 'dev'; it has train, test"):
        read_dataset(tmp_path, "dev")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["file_name", "image_id", "captions", "text", "tags", "x"]), inner, max_size=4
    ),
    max_leaves=8,
))  # fmt: skip
def test_any_line_is_a_record_or_a_dataset_error(tmp_path_factory: Any, row: Any) -> None:
    folder = tmp_path_factory.mktemp("set")
    write_split(folder, "train", row)
    try:
        for record in read_dataset(folder):
            assert record.image_id
            assert record.path.startswith("train/")
            assert all(isinstance(caption, str) and caption for caption in record.captions)
    except DatasetError as error:
        assert "line " in str(error)


# ---- captions beside pictures


def texts(folder: Path, name: str = "cat.jpg") -> Texts:
    return FolderCaptions().for_picture(folder / name)


def test_no_words_anywhere(tmp_path: Path) -> None:
    assert texts(tmp_path) == Texts((), ())
    assert texts(tmp_path / "no such folder") == Texts((), ())


@pytest.mark.parametrize(
    ("fields", "captions", "tags"),
    [
        ({"captions": ["a", " b ", "", "a"]}, ("a", "b"), ()),  # trimmed, none empty, none twice
        ({"captions": "a"}, ("a",), ()),
        ({"caption": "a"}, ("a",), ()),
        ({"caption": ["a", "b"]}, ("a", "b"), ()),
        ({"text": "a, b"}, ("a, b",), ()),
        ({"caption": "a", "text": "b"}, ("a", "b"), ()),
        ({"keywords": "red, new york ,"}, (), ("red", "new york")),
        ({"tags": ["red, deep", "x"]}, (), ("red, deep", "x")),  # a list is as it is
        ({"tags": ["x"], "keywords": ["y"]}, (), ("y", "x")),
        ({"caption": None, "other": 5}, (), ()),
        ({"caption": "half \ud800 pair"}, ("half ? pair",), ()),
    ],
)
def test_fields_in_metadata_and_json_sidecars(
    tmp_path: Path, fields: dict[str, Any], captions: tuple[str, ...], tags: tuple[str, ...]
) -> None:
    line = json.dumps({"file_name": "cat.jpg", **fields})
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "dog.json").write_text(json.dumps(fields))
    (tmp_path / "cow.jpg.json").write_text("\ufeff" + json.dumps(fields, indent=1))
    for name in ("cat.jpg", "dog.jpg", "cow.jpg"):
        assert texts(tmp_path, name) == Texts(captions, tags)
    assert texts(tmp_path, "cow.png") == Texts()


def test_text_sidecars_hold_a_caption_a_line(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_bytes("\ufeffA cat.\r\n\r\n  Zwei Kätzchen  \n".encode())
    assert texts(tmp_path).captions == ("A cat.", "Zwei Kätzchen")
    (tmp_path / "cat.jpg.txt").write_bytes(b"A cat.\nbroken \xff byte")
    assert texts(tmp_path).captions == ("A cat.", "Zwei Kätzchen", "broken \ufffd byte")


def test_all_sources_are_joined_the_folders_first(tmp_path: Path) -> None:
    write = {
        "cat.txt": "two",
        "cat.json": '{"caption": "three", "tags": "t"}',
        "cat.jpg.txt": "four",
    }
    for name, content in write.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat.jpg", "caption": "one"}\n')
    assert texts(tmp_path) == Texts(("one", "two", "three", "four"), ("t",))


def test_a_large_text_sidecar_counts_up_to_its_last_whole_line(tmp_path: Path) -> None:
    """Lines of 100 bytes: 655 whole ones fit into 64 kB = 65,536 bytes."""
    (tmp_path / "cat.txt").write_text("".join(f"{n:099}\n" for n in range(2000)))
    captions = texts(tmp_path).captions
    assert len(captions) == 655
    assert captions[-1] == f"{654:099}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff", "not UTF-8"),
        (b'{"captions": 5}', "captions must be a string or a list of strings, got int"),
        (b'{"tags": [5]}', "tags must hold strings only, got int"),
        (b"[" * 50_000, "nested too deeply"),
        (b" " * 70_000, "larger than 64 kB"),
    ],
)
def test_a_broken_sidecar_is_logged_and_left_out(
    tmp_path: Path, content: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cat.json").write_bytes(content)
    (tmp_path / "cat.txt").write_text("A cat.")
    with caplog.at_level(logging.WARNING, logger="clipkit.records"):
        assert texts(tmp_path) == Texts(("A cat.",), ())
    assert says in caplog.text
    assert "cat.json" in caplog.text


def test_bad_lines_of_a_folders_metadata_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["{", '{"file_name": "cat.jpg", "caption": "A cat."}', '{"caption": "nameless"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING, logger="clipkit.records"):
        assert texts(tmp_path).captions == ("A cat.",)
    assert "2 lines left out, the first: line 1: not JSON" in caplog.text


def test_a_folders_metadata_is_parsed_once_and_few_are_kept(tmp_path: Path) -> None:
    beside = FolderCaptions()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "metadata.jsonl"
        path.write_text('{"file_name": "cat.jpg", "caption": "old"}')
        assert beside.for_picture(folder / "cat.jpg").captions == ("old",)
        path.write_text('{"file_name": "cat.jpg", "caption": "new"}')
        assert beside.for_picture(folder / "cat.jpg").captions == ("old",)
    assert beside.for_picture(tmp_path / "0" / "cat.jpg").captions == ("new",)  # was let go


def test_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    """macOS writes u and a combining diaeresis where others write one sign."""
    line = json.dumps({"file_name": "Ku\u0308he.jpg", "caption": "Cows."})
    (tmp_path / "metadata.jsonl").write_text(line)
    assert texts(tmp_path, "K\u00fche.jpg").captions == ("Cows.",)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat.txt")
    os.mkfifo(tmp_path / "metadata.jsonl")
    (tmp_path / "cat.json").mkdir()
    assert texts(tmp_path) == Texts()


def test_long_and_odd_names_are_no_trouble(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".jpg", ".jpg", "a.b.jpg", os.fsdecode(b"\xff.jpg"), "noend"):
        assert texts(tmp_path, name) == Texts()
