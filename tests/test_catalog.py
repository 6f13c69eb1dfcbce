"""The catalog keeps what it was told, shows whole commits only, and survives kills and damage."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters, KnownFile, SkippedRow, SnapshotPointer, store
from clipkit.errors import CatalogBusy, ClipkitError, IndexDamaged, InputError

ENCODER = "enc-1"
DIM = 4
SECOND = 10**9  # in nanoseconds
NOON_2020 = (
    int(time.mktime((2020, 6, 15, 12, 0, 0, 0, 0, -1))) * SECOND
)  # local time, as Filters say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def writer(folder: Path) -> Iterator[Catalog]:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="builtin", config_json="{}", dim=DIM)
        yield catalog


@pytest.fixture
def reader(writer: Catalog) -> Iterator[Catalog]:
    """Sees what `writer` has committed."""
    writer.commit()
    with Catalog.open(writer.folder) as catalog:
        yield catalog


def image_id(number: int) -> str:
    return f"{number:032x}"


def vector_of(number: int) -> np.ndarray:
    """Distinct, and exact in half precision up to 2,048."""
    return np.full((1, DIM), number, np.float32)


def add(catalog: Catalog, number: int, *paths: str, mtime_ns: int = NOON_2020, **facts: Any) -> int:
    """Picture `number` at `paths`, with a vector that says its number; not committed."""
    known: dict[str, Any] = {"width": 640, "height": 480, "format": "JPEG", "bytes": 1000}
    num = catalog.add_picture(image_id=image_id(number), **{**known, **facts})
    for path in paths:
        catalog.add_place(num, path, size=1000, mtime_ns=mtime_ns)
    if not catalog.has_vector(num, ENCODER):
        catalog.add_vectors(ENCODER, np.array([num]), vector_of(number))
    return num


def everything(catalog: Catalog) -> None:
    """Call every way of reading."""
    nums = catalog.matching(Filters())
    catalog.rows(nums.tolist())
    catalog.matching(Filters(after="1999", paths=("a",), cameras=("a",), tags=("a",)))
    catalog.vectors(ENCODER)
    catalog.live_nums(ENCODER)
    catalog.known_files("/", encoder_id=ENCODER)
    catalog.phrase("cat")
    catalog.stats(ENCODER)
    catalog.folders()
    catalog.skipped()
    catalog.date_range()


# ---- pictures, places, texts


def test_a_picture_comes_back_as_it_was_told(writer: Catalog, reader: Catalog) -> None:
    facts = {"taken_at": "2023-05-01T12:30:00", "camera": "Canon EOS 80D", "format": "PNG"}
    texts = {"captions": ["A dog\n on grass", "  "], "tags": ["Dog", "New York"]}
    num = add(writer, 1, "/p/sub/b.png", "/p/a.png", width=30, height=20, **facts, **texts)
    writer.commit()
    row = reader.rows([num])[num]
    assert (row.num, row.image_id, row.width, row.height) == (num, image_id(1), 30, 20)
    assert row.path == "/p/a.png"  # the shortest
    assert row.places == ("/p/a.png", "/p/sub/b.png")
    assert (row.taken_at, row.dated) == ("2023-05-01T12:30:00", "2023-05-01T12:30:00")
    assert (row.camera, row.format, row.bytes) == ("Canon EOS 80D", "PNG", 1000)
    assert row.captions == ("A dog on grass",)  # white space evened out, empty ones left out
    assert row.tags == ("Dog", "New York")
    assert reader.row(image_id(1)) == row
    assert reader.row(image_id(2)) is None
    assert reader.rows([]) == {}
    assert reader.rows([num, 999]) == {num: row}


def test_the_same_content_again_is_the_same_picture(writer: Catalog) -> None:
    num = add(writer, 1, "/p/a.jpg", captions=["first"])
    assert add(writer, 1, "/p/b.jpg", captions=["second"]) == num
    row = writer.rows([num])[num]
    assert row.places == ("/p/a.jpg", "/p/b.jpg")
    assert row.captions == ("first",)
    assert writer.stats(ENCODER).pictures == 1
    assert writer.stats(ENCODER).vectors == 1
    assert writer.stats(ENCODER).places == 2


def test_adding_a_place_tells_whether_it_is_news(writer: Catalog) -> None:
    num = add(writer, 1)
    assert writer.add_place(num, "/p/a.jpg", size=1, mtime_ns=1)
    assert not writer.add_place(num, "/p/a.jpg", size=1, mtime_ns=2)
    assert writer.known_files("/p") == {"/p/a.jpg": KnownFile(1, 2, "ok", num)}


def test_a_moved_file_is_a_new_place_and_a_lost_one_can_come_back(
    writer: Catalog, reader: Catalog
) -> None:
    num = add(writer, 1, "/p/old.jpg", captions=["a cat"], camera="Canon")
    writer.commit()
    writer.add_place(num, "/p/new.jpg", size=1000, mtime_ns=NOON_2020)
    assert writer.remove_places(["/p/old.jpg", "/p/never.jpg"]) == [num]
    writer.commit()
    assert reader.rows([num])[num].places == ("/p/new.jpg",)
    assert reader.phrase("old") == []
    before = reader.vectors(ENCODER)
    assert before.nums.tolist() == [num]

    writer.remove_places(["/p/new.jpg"])
    writer.commit()  # dead: no search sees it ...
    assert reader.vectors(ENCODER).vectors.shape == (0, DIM)
    assert reader.live_nums(ENCODER).tolist() == []
    assert reader.matching(Filters()).tolist() == []
    assert reader.matching(Filters(cameras=("canon",))).tolist() == []
    assert reader.phrase("cat") == []
    assert reader.rows([num]) == {}
    assert reader.row(image_id(1)) is None
    assert not reader.is_live(num)
    assert reader.date_range() is None
    stats = reader.stats(ENCODER)
    assert (stats.pictures, stats.vectors, stats.places, stats.bytes) == (0, 0, 0, 0)
    # ... but nothing has to be computed again
    assert reader.has_picture(image_id(1)) == num
    assert reader.has_vector(num, ENCODER)

    writer.add_place(num, "/q/back.jpg", size=1000, mtime_ns=NOON_2020)
    writer.commit()
    assert reader.is_live(num)
    assert reader.phrase("cat") == [num]
    assert reader.live_nums(ENCODER).tolist() == [num]
    # a snapshot that was made while it was dead lacks it, so it must count as newer than that
    assert reader.vectors(ENCODER, after_seq=before.last_seq).nums.tolist() == [num]


def test_other_content_at_a_place_takes_it_from_the_old_picture(
    writer: Catalog, reader: Catalog
) -> None:
    old = add(writer, 1, "/p/a.jpg", captions=["old words"])
    writer.commit()
    new = add(writer, 2, "/p/a.jpg", captions=["new words"])
    writer.commit()
    assert reader.matching(Filters()).tolist() == [new]
    assert reader.phrase("words") == [new]
    assert reader.rows([old]) == {}


def test_changed_texts_replace_the_old_ones(writer: Catalog, reader: Catalog) -> None:
    num = add(writer, 1, "/p/a.jpg", captions=["a dog"], tags=["pet"])
    writer.commit()
    counter = reader.change_counter()
    writer.set_texts(num, captions=["a dog"], tags=["pet"])
    writer.commit()
    assert reader.change_counter() == counter  # nothing changed
    writer.set_texts(num, captions=["a cat"], tags=[])
    writer.commit()
    assert reader.change_counter() > counter
    assert reader.phrase("dog") == []
    assert reader.phrase("cat") == [num]
    assert reader.matching(Filters(tags=("pet",))).tolist() == []


def test_texts_that_no_database_holds_are_made_fit(writer: Catalog) -> None:
    """A lone surrogate (from a JSON escape) or a NUL must not stop a run."""
    num = add(writer, 1, "/p/a.jpg", captions=["half \ud800 pair", "nul \0 here"], camera="x\udcff")
    row = writer.rows([num])[num]
    assert row.captions == ("half ? pair", "nul here")
    assert row.camera == "x?"


# ---- known and skipped files


def test_known_files_are_those_below_the_folder_only(writer: Catalog) -> None:
    """ "/p" holds neither "/pq/x" nor "/p.jpg"; signs of LIKE and GLOB mean themselves."""
    paths = ["/p/a", "/p/sub/b", "/pq/x", "/p.jpg", "/p_%*[a]/c", "/pXYZ/d", "/P/a"]
    for number, path in enumerate(paths):
        add(writer, number, path)
    assert set(writer.known_files("/p")) == {"/p/a", "/p/sub/b"}
    assert set(writer.known_files("/p/")) == {"/p/a", "/p/sub/b"}
    assert set(writer.known_files("/p_%*[a]")) == {"/p_%*[a]/c"}
    assert set(writer.known_files("/")) == set(paths)
    assert writer.places_below("/p") == 2
    assert writer.places_below("/nowhere") == 0


def test_known_files_tell_what_lacks_a_vector_of_this_encoder(writer: Catalog) -> None:
    add(writer, 1, "/p/done.jpg")
    num = writer.add_picture(image_id=image_id(2), width=1, height=1, format="PNG", bytes=1)
    writer.add_place(num, "/p/new.jpg", size=1, mtime_ns=1)
    writer.add_skipped("/p/bad.jpg", size=1, mtime_ns=1, reason="empty", message="empty")

    def states(encoder_id: str | None) -> dict[str, str]:
        known = writer.known_files("/p", encoder_id=encoder_id)
        return {path: file.state for path, file in known.items()}

    bad = {"/p/bad.jpg": "skipped"}
    assert states(None) == {"/p/done.jpg": "ok", "/p/new.jpg": "ok", **bad}
    assert states(ENCODER) == {"/p/done.jpg": "ok", "/p/new.jpg": "pending", **bad}
    assert states("another") == {"/p/done.jpg": "pending", "/p/new.jpg": "pending", **bad}


def test_a_skipped_file_is_remembered_until_it_is_good_or_gone(writer: Catalog) -> None:
    for name in ("a", "b", "c"):
        writer.add_skipped(f"/p/{name}", size=9, mtime_ns=5, reason="truncated", message="It ends.")
    assert writer.known_files("/p")["/p/a"] == KnownFile(9, 5, "skipped", None)
    assert writer.skipped()[0] == SkippedRow("/p/a", "truncated", "It ends.")
    writer.add_skipped("/p/a", size=10, mtime_ns=6, reason="empty", message="It is empty.")
    assert writer.known_files("/p")["/p/a"] == KnownFile(10, 6, "skipped", None)
    add(writer, 1, "/p/b")
    assert writer.remove_places(["/p/c"]) == []
    assert [row.path for row in writer.skipped()] == ["/p/a"]
    assert writer.stats().skipped == 1


def test_a_file_that_breaks_is_no_place_any_more(writer: Catalog) -> None:
    num = add(writer, 1, "/p/a.jpg")
    writer.add_skipped("/p/a.jpg", size=1, mtime_ns=1, reason="truncated", message="It ends.")
    assert writer.rows([num]) == {}
    assert writer.known_files("/p") == {"/p/a.jpg": KnownFile(1, 1, "skipped", None)}


def test_a_root_is_remembered_and_forgotten_with_its_places(writer: Catalog) -> None:
    writer.add_root("/p")
    writer.add_root("/p/")
    writer.add_root("/q")
    add(writer, 1, "/p/a.jpg")
    keep = add(writer, 2, "/q/b.jpg")
    assert writer.roots() == ("/p", "/q")
    assert writer.remove_root("/p") == 1
    assert writer.roots() == writer.stats().roots == ("/q",)
    assert writer.matching(Filters()).tolist() == [keep]


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & set(b"/\0"))


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_any_file_name_survives(writer: Catalog, reader: Catalog) -> None:
    """Trap 27: names are bytes, often not UTF-8, and must lead back to their file."""
    num = add(writer, 1)

    @settings(max_examples=60, deadline=None)
    @given(NAMES)
    def check(name: bytes) -> None:
        path = os.fsdecode(b"/p/" + name)
        writer.add_place(num, path, size=1, mtime_ns=1)
        writer.commit()
        assert path in reader.known_files("/p")
        row = reader.rows([num])[num]
        assert row.places == (path,)
        assert os.fsencode(row.path) == b"/p/" + name
        assert reader.matching(Filters(folders=("/p",))).tolist() == [num]
        assert reader.folders() == [("/p", 1)]
        writer.remove_places([path])

    check()


# ---- phrases


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        ("redcar", True),  # a word of the name ...
        ("marcelo", True),
        ("redcar marcelo", True),
        ("redcar_marcelo", True),
        ("marcelo redcar", False),  # ... in this order
        ("redc", False),  # whole words
        ("Birthday", True),  # camel case
        ("birthday party", True),
        ("BirthdayParty2023", True),  # the name as it stands
        ("party 2023", True),
        ("jpg", False),  # the suffix says nothing
        ("cafe au lait", True),  # diacritics and case
        ("CAFÉ", True),
        ("lait the", False),  # not across two captions
        ("new york", True),
        ("york red", False),  # nor two tags
        ("", False),
        ('"', False),
        ("!!!", False),
    ],
)
def test_a_phrase_finds_names_captions_and_tags(writer: Catalog, phrase: str, found: bool) -> None:
    captions = ["Café au lait", "the end"]
    num = add(
        writer, 1, "/p/redcar_marcelo.jpg", "/q/BirthdayParty2023.jpg", captions=captions,
        tags=["New York", "red"],
    )  # fmt: skip
    assert writer.phrase(phrase) == ([num] if found else [])


def test_phrases_come_best_first(writer: Catalog) -> None:
    """bm25: the same single hit weighs more in a shorter text."""
    long = add(writer, 1, "/p/x.jpg", captions=["a cat " + "and much more " * 20])
    short = add(writer, 2, "/p/y.jpg", captions=["a cat"])
    for number in range(3, 9):  # else "cat" is in half of all texts and weighs nothing
        add(writer, number, f"/p/z{number}.jpg")
    assert writer.phrase("cat") == [short, long]
    assert writer.phrase("cat", limit=1) == [short]


def test_no_text_is_an_operator(writer: Catalog) -> None:
    num = add(writer, 1, "/p/cat.jpg", captions=["salt AND pepper"])
    add(writer, 2, "/p/dog.jpg", captions=["salt, pepper"])
    assert writer.phrase("salt AND pepper") == [num]
    assert (
        writer.phrase("names:cat")
        == writer.phrase("cat*dog")
        == writer.phrase('cat" OR "dog')
        == []
    )


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)


def test_any_text_can_be_asked_for(writer: Catalog, reader: Catalog) -> None:
    add(writer, 1, "/p/cat.jpg", captions=["a cat"])
    writer.commit()

    @settings(max_examples=300, deadline=None)
    @given(ANY_TEXT | st.text('"*^(){}:+-ANDORNEARnames \0', max_size=30))
    def check(text: str) -> None:
        assert set(reader.phrase(text)) <= {1}
        assert set(reader.matching(Filters(paths=(text,), tags=(text,))).tolist()) <= {1}
        assert set(reader.matching(Filters(cameras=(text,), formats=(text,))).tolist()) <= {1}

    check()
    assert reader.phrase("cat " * 50_000) == []


def test_any_text_can_be_kept(writer: Catalog) -> None:
    num = add(writer, 1, "/p/cat.jpg")

    @settings(max_examples=100, deadline=None)
    @given(st.lists(ANY_TEXT, max_size=4))
    def check(texts: list[str]) -> None:
        writer.set_texts(num, captions=texts, tags=texts)
        row = writer.rows([num])[num]
        assert row.captions == row.tags
        for tag in row.tags:
            assert writer.matching(Filters(tags=(tag,))).tolist() == [num]

    check()


# ---- filters


def test_the_newest_come_first_and_the_dead_not_at_all(writer: Catalog) -> None:
    """Dates of EXIF before dates of files (2020 here); equal dates by image_id; `among` restricts."""
    old = add(writer, 1, "/p/old.jpg", taken_at="1999-05-01T00:00:00")
    file_dated = add(writer, 2, "/p/file.jpg")
    new = add(writer, 3, "/p/new.jpg", taken_at="2024-05-01T00:00:00")
    twin = add(writer, 4, "/p/twin.jpg", taken_at="2024-05-01T00:00:00")
    add(writer, 5, taken_at="2025-05-01T00:00:00")  # has no place
    twins = sorted((new, twin), key=lambda num: writer.rows([num])[num].image_id)
    assert writer.newest(10) == [*twins, file_dated, old]
    assert writer.newest(1) == twins[:1]
    assert writer.newest(10, among=np.array([old, new])) == [new, old]
    assert writer.newest(10, among=np.array([], np.int64)) == []


def test_dates_after_is_inclusive_and_before_exclusive(writer: Catalog) -> None:
    dates = {1: "2022-12-31T23:59:59", 2: "2023-01-01T00:00:00", 3: "2023-05-01T00:00:00"}
    for number, date in dates.items():
        add(writer, number, f"/p/{number}", taken_at=date)
    add(writer, 4, "/p/4", mtime_ns=NOON_2020)  # no EXIF date: its file's

    def between(after: str | None, before: str | None) -> list[int]:
        return writer.matching(Filters(after=after, before=before)).tolist()

    assert between("2023", None) == [2, 3]
    assert between("2022-12-31", None) == [1, 2, 3]
    assert between("2023-05", None) == between("2023-05-01", None) == [3]
    assert between(None, "2023") == [1, 4]
    assert between(None, "2023-05-01") == [1, 2, 4]
    assert between("2023", "2023-05") == [2]
    assert between("2020-06-15", "2020-06-16") == [4]
    assert writer.date_range() == ("2020-06-15T12:00:00", "2023-05-01T00:00:00")
    for bad in ("yesterday", "2023-5", "23", "2023-05-01 ", "２０２３"):
        with pytest.raises(InputError, match="is not of the form 2023, 2023-05 or 2023-05-01"):
            writer.matching(Filters(after=bad))


def test_a_picture_without_exif_date_has_its_oldest_files_date(writer: Catalog) -> None:
    num = add(writer, 1, "/p/a", mtime_ns=NOON_2020 + SECOND)
    writer.add_place(num, "/p/b", size=1, mtime_ns=NOON_2020)
    assert writer.rows([num])[num].dated == "2020-06-15T12:00:00"
    writer.remove_places(["/p/b"])
    assert writer.rows([num])[num].dated == "2020-06-15T12:00:01"
    writer.add_place(num, "/p/a", size=1, mtime_ns=2**62)  # year 2116: a wrong clock, but a date
    writer.add_place(num, "/p/a", size=1, mtime_ns=10**30 % 2**63)
    assert writer.rows([num])[num].dated is not None


def test_filters_by_place(writer: Catalog) -> None:
    paths = ["/p/Trips/a.jpg", "/p/trips_old/b.jpg", "/q/TRIPS/Ürlaub.jpg", "/p/100%/c.jpg"]
    for number, path in enumerate(paths, 1):
        add(writer, number, path)
    add(writer, 5, "/p/100_/d.jpg", "/r/trips/e.jpg")

    def match(**fields: tuple[str, ...]) -> list[int]:
        return writer.matching(Filters(**fields)).tolist()  # type: ignore[arg-type]

    assert match(paths=("trips",)) == [1, 2, 3, 5]
    assert match(paths=("trips", "old")) == [2]  # all of them
    assert match(paths=("üRLAUB",)) == [3]
    assert match(paths=("u\u0308rlaub",)) == [3]  # decomposed, as macOS has it
    assert match(paths=("100%",)) == [4]
    assert match(folders=("/p/100_",)) == [5]
    assert match(folders=("/p",)) == match(folders=("/p/",)) == [1, 2, 4, 5]
    assert match(folders=("/p/Trips", "/q")) == [1, 3]  # any of them
    assert match(folders=("/p/trips",)) == []  # an absolute folder is meant exactly
    assert match(folders=("trips",)) == match(folders=("./trips/",)) == [1, 3, 5]
    assert match(folders=("/p",), paths=("trips",)) == [1, 2]  # 5: not at one place


def test_filters_by_facts(writer: Catalog) -> None:
    add(
        writer, 1, "/p/1", camera="Canon EOS 80D", tags=["New York", "Night"], width=640, height=480
    )
    add(writer, 2, "/p/2", camera="NIKON D750", format="PNG", tags=["york"], width=480, height=640)
    add(writer, 3, "/p/3", width=640, height=640, tags=["STRASSE", "night"])

    def match(**fields: Any) -> list[int]:
        return writer.matching(Filters(**fields)).tolist()

    assert match() == [1, 2, 3]
    assert match(cameras=("canon",)) == match(cameras=("80d",)) == [1]
    assert match(cameras=("canon", "nikon")) == [1, 2]
    assert match(cameras=("leica",)) == []
    assert match(formats=("png",)) == [2]
    assert match(formats=("PN",)) == []
    assert match(formats=("png", "jpeg")) == [1, 2, 3]
    assert match(tags=("york",)) == [2]  # a whole tag
    assert match(tags=("new  york",)) == [1]
    assert match(tags=("night",)) == [1, 3]
    assert match(tags=("night", "new york")) == [1]  # all of them
    assert match(tags=("straße",)) == [3]
    assert match(min_width=640) == [1, 3]
    assert match(min_height=481) == [2, 3]
    assert match(orientation="landscape") == [1]
    assert match(orientation="portrait") == [2]
    assert match(orientation="square") == [3]
    assert match(orientation="square", formats=("PNG",)) == []
    with pytest.raises(InputError, match="'round' is not one of landscape, portrait, square"):
        match(orientation="round")


def test_folders_count_what_lies_below_them_up_to_the_root(writer: Catalog) -> None:
    writer.add_root("/p/photos")
    for number, path in enumerate(["2022/a", "2023/b", "2023/may/c", "d"]):
        add(writer, number, f"/p/photos/{path}")
    add(writer, 9, "/elsewhere/e")  # below no root: its own folder only
    assert writer.folders() == [
        ("/p/photos", 4), ("/p/photos/2023", 2), ("/elsewhere", 1), ("/p/photos/2022", 1),
        ("/p/photos/2023/may", 1),
    ]  # fmt: skip
    assert writer.folders(limit=1) == [("/p/photos", 4)]


# ---- vectors


def test_vectors_are_joined_by_num_whatever_the_order(writer: Catalog, reader: Catalog) -> None:
    """Trap 25: rows are told apart by id, never by the order of files."""
    nums = [add(writer, number, f"/p/{9 - number}") for number in range(1, 6)]
    more = np.array([nums[3], nums[0]])
    writer.register_encoder("enc-2", spec="other", config_json="{}", dim=2)
    writer.add_vectors("enc-2", more, np.array([[3, 3], [0, 0]], np.float32))
    writer.commit()
    stored = reader.vectors(ENCODER)
    assert stored.nums.dtype == np.int64
    assert stored.vectors.dtype == np.float16
    for num, vector in zip(stored.nums, stored.vectors, strict=True):
        assert reader.rows([num])[num].image_id == image_id(int(vector[0]))
    assert reader.vectors("enc-2").nums.tolist() == more.tolist()
    assert reader.vectors("enc-2").vectors.tolist() == [[3, 3], [0, 0]]
    assert reader.live_nums("enc-2").tolist() == sorted(more.tolist())
    assert [(row.encoder_id, row.dim) for row in reader.encoders()] == [(ENCODER, 4), ("enc-2", 2)]
    assert reader.stats("enc-2").vectors == 2


def test_vectors_after_a_seq_are_the_newer_ones(writer: Catalog, reader: Catalog) -> None:
    first = add(writer, 1, "/p/1")
    writer.commit()
    before = reader.vectors(ENCODER)
    assert before.nums.tolist() == [first]
    second = add(writer, 2, "/p/2")
    writer.commit()
    after = reader.vectors(ENCODER, after_seq=before.last_seq)
    assert after.nums.tolist() == [second]
    assert after.vectors.tolist() == [[2.0] * DIM]
    nothing = reader.vectors(ENCODER, after_seq=after.last_seq)
    assert nothing.vectors.shape == (0, DIM)
    assert nothing.last_seq == after.last_seq
    writer.add_vectors(ENCODER, np.array([first]), vector_of(7))  # embedded again
    writer.commit()
    assert reader.vectors(ENCODER, after_seq=after.last_seq).vectors.tolist() == [[7.0] * DIM]
    assert reader.vectors(ENCODER).nums.tolist() == [second, first]


def test_vectors_of_an_unknown_encoder_are_none(writer: Catalog) -> None:
    num = add(writer, 1, "/p/1")
    stored = writer.vectors("nobody")
    assert (stored.nums.shape, stored.vectors.shape, stored.last_seq) == ((0,), (0, 0), 0)
    assert writer.live_nums("nobody").shape == (0,)
    assert writer.vector(num, "nobody") is None
    assert writer.vector(num, ENCODER).tolist() == [1.0] * DIM  # type: ignore[union-attr]


def test_vectors_that_do_not_fit_are_refused(writer: Catalog) -> None:
    num = add(writer, 1, "/p/1")
    nums = np.array([num])
    with pytest.raises(InputError, match=r"shape \(1, 3\); expected \(1, 4\)"):
        writer.add_vectors(ENCODER, nums, np.zeros((1, 3), np.float32))
    with pytest.raises(InputError, match=r"shape \(2, 4\); expected \(1, 4\)"):
        writer.add_vectors(ENCODER, nums, np.zeros((2, 4), np.float32))
    for bad in (np.nan, np.inf, 1e6):  # 1e6 is beyond half precision
        with pytest.raises(InputError, match="not finite"):
            writer.add_vectors(ENCODER, nums, np.full((1, 4), bad, np.float32))
    with pytest.raises(InputError, match="nobody is not registered"):
        writer.add_vectors("nobody", nums, np.zeros((1, 4), np.float32))
    writer.add_vectors(ENCODER, np.empty(0, np.int64), np.empty((0, DIM), np.float32))


def test_the_snapshot_pointer_is_committed_with_the_work(writer: Catalog, reader: Catalog) -> None:
    add(writer, 1, "/p/1")
    assert reader.snapshot(ENCODER) is None
    counter = reader.change_counter()
    writer.point_to_snapshot(ENCODER, name="000001", last_seq=1)
    assert reader.snapshot(ENCODER) == SnapshotPointer("000001", 1)
    assert reader.change_counter() > counter
    writer.point_to_snapshot(ENCODER, name="000002", last_seq=5)
    assert reader.snapshot(ENCODER) == SnapshotPointer("000002", 5)


# ---- thumbnails


def test_thumbnails_are_derived(writer: Catalog, reader: Catalog) -> None:
    add(writer, 1, "/p/1", thumbnail=b"small")
    assert writer.thumbnail(image_id(1)) == b"small"
    writer.commit()
    assert reader.thumbnail(image_id(1)) == b"small"
    assert reader.thumbnail(image_id(2)) is None
    reader.put_thumbnail(image_id(2), b"made later")
    assert writer.thumbnail(image_id(2)) == b"made later"


@pytest.mark.parametrize("damage", ["deleted", "random", "truncated", "empty", "foreign"])
def test_a_lost_or_damaged_thumbnail_file_is_made_anew(folder: Path, damage: str) -> None:
    with Catalog.open(folder, write=True) as catalog:
        catalog.put_thumbnail(image_id(1), b"x" * 50_000)
    path = folder / "thumbnails.sqlite"
    if damage == "deleted":
        path.unlink()
    elif damage == "random":
        path.write_bytes(random.Random(0).randbytes(20_000))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE thumbnails (other TEXT)")
        db.close()
    with Catalog.open(folder) as catalog:
        assert catalog.thumbnail(image_id(1)) is None
        catalog.put_thumbnail(image_id(1), b"again")
        assert catalog.thumbnail(image_id(1)) == b"again"


# ---- transactions, readers beside a writer, two writers


def test_readers_see_whole_commits_and_the_writer_its_own_work(
    writer: Catalog, reader: Catalog
) -> None:
    counter = reader.change_counter()
    num = add(writer, 1, "/p/cat.jpg")
    assert writer.phrase("cat") == [num]
    assert reader.phrase("cat") == []
    assert reader.change_counter() == counter
    writer.commit()
    assert reader.phrase("cat") == [num]
    assert reader.change_counter() == counter + 1
    writer.add_skipped("/p/bad", size=1, mtime_ns=1, reason="r", message="m")
    writer.commit()
    assert reader.change_counter() == counter + 1  # no search answers otherwise


def test_what_is_rolled_back_or_not_committed_never_was(folder: Path) -> None:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="s", config_json="{}", dim=DIM)
        catalog.commit()
        add(catalog, 1, "/p/1", thumbnail=b"t")
        catalog.rollback()
        assert catalog.stats(ENCODER).pictures == 0
        assert catalog.thumbnail(image_id(1)) is None
        add(catalog, 2, "/p/2")
    with pytest.raises(ZeroDivisionError), Catalog.open(folder, write=True) as catalog:
        add(catalog, 3, "/p/3")
        raise ZeroDivisionError
    catalog = Catalog.open(folder, write=True)
    add(catalog, 4, "/p/4")
    catalog.close()
    with Catalog.open(folder) as reader:
        assert list(reader.known_files("/p")) == ["/p/2"]


def test_a_reader_cannot_write(reader: Catalog) -> None:
    with pytest.raises(InputError, match="open it with write=True"):
        add(reader, 1, "/p/1")


def test_a_closed_catalog_says_so(folder: Path) -> None:
    catalog = Catalog.open(folder, write=True)
    catalog.close()
    catalog.close()
    with pytest.raises(InputError, match="was closed"):
        catalog.stats()


def test_reading_while_writing_in_threads(writer: Catalog, reader: Catalog) -> None:
    """Trap 30: adding during a search. Every read shows a whole number of 10-picture commits."""
    commits, size = 25, 10
    done = threading.Event()
    problems: list[str] = []

    def read() -> None:
        seen = 0
        while not done.is_set():
            stats = reader.stats(ENCODER)
            if not stats.pictures == stats.vectors == stats.places or stats.pictures % size:
                problems.append(f"half a commit: {stats}")
            stored = reader.vectors(ENCODER)
            if len(stored.nums) % size or len(set(stored.nums.tolist())) != len(stored.nums):
                problems.append(f"{len(stored.nums)} vectors")
            if any(len(reader.rows([num])) != 1 for num in stored.nums[-3:]):
                problems.append("a vector without its picture")
            if len(stored.nums) < seen:
                problems.append("went backwards")
            seen = len(stored.nums)
            reader.phrase("common")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for commit in range(commits):
        for number in range(commit * size, (commit + 1) * size):
            add(writer, number, f"/p/common_{number}.jpg")
        writer.commit()
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(reader.phrase("common")) == commits * size


def test_two_writers_in_one_process(folder: Path) -> None:
    first = Catalog.open(folder, write=True)
    with pytest.raises(CatalogBusy, match="this process is writing to the index"):
        Catalog.open(folder, write=True)
    first.close()
    Catalog.open(folder, write=True).close()


def python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE, text=True
    )


def test_another_process_is_named_and_its_death_frees_the_lock(folder: Path) -> None:
    code = """
        import sys, time
        from clipkit.catalog import Catalog
        catalog = Catalog.open(sys.argv[1], write=True)
        print("open", flush=True)
        time.sleep(60)
    """
    with python(code, str(folder)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CatalogBusy, match=f"process {other.pid} is writing .* wait for it"):
            Catalog.open(folder, write=True)
        with Catalog.open(folder) as reader:
            assert reader.stats().pictures == 0
        other.kill()
        other.wait()
        Catalog.open(folder, write=True).close()


def test_kill_9_at_any_time_leaves_whole_commits(folder: Path) -> None:
    """Each commit holds 5 pictures with place and vector. After a kill, at least what was reported
    as committed is there, at most one commit more, and the next run goes on from there."""
    code = """
        import sys
        import numpy as np
        from clipkit.catalog import Catalog
        catalog = Catalog.open(sys.argv[1], write=True)
        catalog.register_encoder("enc-1", spec="s", config_json="{}", dim=64)
        start = catalog.stats("enc-1").pictures
        for first in range(start, start + 100_000, 5):
            nums = []
            for n in range(first, first + 5):
                num = catalog.add_picture(image_id=f"{n:032x}", width=1, height=1, format="PNG",
                    bytes=1, captions=[f"caption {n} " * 20], thumbnail=b"t" * 5000)
                catalog.add_place(num, f"/p/name_{n}.jpg", size=1, mtime_ns=n)
                nums.append(num)
            catalog.add_vectors("enc-1", np.array(nums), np.ones((5, 64), np.float32))
            catalog.commit()
            print(first + 5, flush=True)
    """
    rng = random.Random(5)
    for _ in range(6):
        with python(code, str(folder)) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            told = int((process.stdout.read().split("\n")[-2:-1] or [told])[0])
        with Catalog.open(folder) as reader:
            stats = reader.stats(ENCODER)
            assert stats.pictures in (told, told + 5)
            assert stats.vectors == stats.places == stats.pictures
            assert len(reader.phrase("caption")) == stats.pictures
            assert len(reader.vectors(ENCODER).nums) == stats.pictures
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        db.execute("INSERT INTO texts (texts) VALUES ('integrity-check')")  # raises if not
    db.close()


# ---- what is not an index, or not a whole one


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no index at .*; create one with: clipkit index FOLDER"):
        Catalog.open(tmp_path / "nowhere")
    (tmp_path / "catalog.sqlite").write_bytes(b"")  # a first writer that died at once
    with pytest.raises(InputError, match="no index at"):
        Catalog.open(tmp_path)
    Catalog.open(tmp_path, write=True).close()
    Catalog.open(tmp_path).close()


@pytest.mark.parametrize("write", [False, True])
def test_a_dataset_is_no_index(tmp_path: Path, write: bool) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="is a dataset, not an index"):
        Catalog.open(tmp_path, write=write)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("write", [False, True])
def test_another_programs_file_is_left_alone(tmp_path: Path, write: bool) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    before = (tmp_path / "catalog.sqlite").read_bytes()
    with pytest.raises(InputError, match="is another program's SQLite file"):
        Catalog.open(tmp_path, write=write)
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write an index at"):
        Catalog.open(tmp_path / "file" / "index", write=True)


def filled(folder: Path) -> Path:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="s", config_json="{}", dim=DIM)
        for number in range(300):
            add(catalog, number, f"/p/cat_{number}.jpg", captions=["words " * 20], tags=["a"])
    return folder / "catalog.sqlite"


@pytest.mark.parametrize("write", [False, True])
def test_a_file_of_random_bytes_is_damaged(folder: Path, write: bool) -> None:
    path = filled(folder)
    path.write_bytes(random.Random(1).randbytes(50_000))
    with pytest.raises(IndexDamaged, match=r"catalog\.sqlite is damaged .* clipkit index FOLDER"):
        Catalog.open(folder, write=write)


def test_a_truncated_file_is_damaged(folder: Path) -> None:
    path = filled(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IndexDamaged, match=r"catalog\.sqlite is damaged"):
        Catalog.open(folder)


def test_damage_within_is_told_or_harmless(folder: Path) -> None:
    """Overwriting 4,000 bytes anywhere gives clipkit's own error or none at all."""
    path = filled(folder)
    good = path.read_bytes()
    rng = random.Random(2)
    told = 0
    for _ in range(40):
        at = rng.randrange(len(good) - 4000)
        path.write_bytes(good[:at] + rng.randbytes(4000) + good[at + 4000 :])
        try:
            with Catalog.open(folder) as catalog:
                everything(catalog)
        except ClipkitError:
            told += 1
    assert told > 20


# ---- migrations


def version_of(folder: Path) -> int:
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return version


def test_an_older_catalog_is_migrated_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 3 needs what version 2 made; a reader that comes first has it done as well."""
    filled(folder)
    assert version_of(folder) == len(store.MIGRATIONS)
    later = (
        "CREATE TABLE moods (num INTEGER, mood TEXT)",
        "INSERT INTO moods SELECT num, 'calm' FROM pictures; ALTER TABLE moods RENAME TO feelings",
    )
    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, *later))
    with Catalog.open(folder) as reader:
        assert reader.stats(ENCODER).pictures == 300
    assert version_of(folder) == len(store.MIGRATIONS)
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("SELECT count(*) FROM feelings").fetchone() == (300,)
    db.close()


def test_a_migration_that_fails_leaves_the_old_catalog(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(folder)
    version = version_of(folder)
    broken = "CREATE TABLE half (a); INSERT INTO missing VALUES (1)"
    with monkeypatch.context() as patch:
        patch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, broken))
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            Catalog.open(folder, write=True)
    assert version_of(folder) == version
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []
    db.close()
    with Catalog.open(folder, write=True) as catalog:  # the lock is free again
        assert catalog.stats(ENCODER).pictures == 300


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_catalog_is_refused_naming_both_versions(folder: Path, write: bool) -> None:
    filled(folder)
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    known = len(store.MIGRATIONS)
    with pytest.raises(InputError, match=rf"version 99; this clipkit knows versions up to {known}"):
        Catalog.open(folder, write=write)


def test_an_unchanged_library_is_known_in_a_blink(writer: Catalog) -> None:
    """7,000 known files: some milliseconds; the bound is 20 times that, for a busy machine."""
    for number in range(7000):
        num = writer.add_picture(
            image_id=image_id(number), width=1, height=1, format="PNG", bytes=1
        )
        writer.add_place(num, f"/p/{number // 500}/{number}.png", size=1, mtime_ns=1)
    writer.commit()
    start = time.perf_counter()
    known = writer.known_files("/p", encoder_id=ENCODER)
    assert time.perf_counter() - start < 0.4
    assert len(known) == 7000
