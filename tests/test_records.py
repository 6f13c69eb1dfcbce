"""Captions beside pictures: what is read, and what is said of bad files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from clipkit.records import FolderCaptions, Texts

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
