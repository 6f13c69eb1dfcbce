"""The catalog keeps what it was told of pictures, their places, texts, files and vectors."""

# ruff: noqa: F811
from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing

import numpy as np
import pytest
from catalogs import (  # noqa: F401
    DIM,
    ENCODER,
    NOON_2020,
    add,
    folder,
    found,
    image_id,
    number_of,
    reader,
    vector_of,
    writer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters, KnownFile, SkippedRow, SnapshotPointer
from clipkit.errors import InputError

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
    assert row.captions == ("first", "second")
    assert writer.stats(ENCODER).pictures == 1
    assert writer.stats(ENCODER).vectors == 1
    assert writer.stats(ENCODER).places == 2


def test_adding_a_place_tells_whether_it_is_news(writer: Catalog) -> None:
    num = add(writer, 1)
    assert writer.add_place(num, "/p/a.jpg", size=1, mtime_ns=1)
    assert not writer.add_place(num, "/p/a.jpg", size=1, mtime_ns=2)
    assert dict(writer.known_files("/p")) == {"/p/a.jpg": KnownFile(1, 2, "ok", num)}


def test_a_moved_file_is_a_new_place_and_a_lost_one_can_come_back(
    writer: Catalog, reader: Catalog
) -> None:
    num = add(writer, 1, "/p/old.jpg", captions=["a cat"], camera="Canon")
    writer.commit()
    texts = {"captions": ["a cat"]}
    writer.add_place(num, "/p/new.jpg", size=1000, mtime_ns=NOON_2020, **texts)
    assert writer.remove_places(["/p/old.jpg", "/p/never.jpg"]) == [num]
    writer.commit()
    assert reader.rows([num])[num].places == ("/p/new.jpg",)
    assert found(reader, "old") == []
    before = reader.vectors(ENCODER)
    assert before.nums.tolist() == [num]

    writer.remove_places(["/p/new.jpg"])
    writer.commit()  # dead: no search sees it ...
    assert reader.vectors(ENCODER).vectors.shape == (0, DIM)
    assert list(reader.live_nums(ENCODER)) == []
    assert list(reader.matching(Filters())) == []
    assert list(reader.matching(Filters(cameras=("canon",)))) == []
    assert found(reader, "cat") == []
    assert reader.rows([num]) == {}
    assert reader.row(image_id(1)) is None
    assert not reader.is_live(num)
    stats = reader.stats(ENCODER)
    assert (stats.pictures, stats.vectors, stats.places, stats.bytes) == (0, 0, 0, 0)
    # ... but nothing has to be computed again
    assert reader.has_picture(image_id(1)) == num
    assert reader.vector(num, ENCODER) is not None

    writer.add_place(num, "/q/back.jpg", size=1000, mtime_ns=NOON_2020, **texts)
    writer.commit()
    assert reader.is_live(num)
    assert found(reader, "cat") == [num]
    assert list(reader.live_nums(ENCODER)) == [num]
    # a snapshot that was made while it was dead lacks it, so it must count as newer than that
    assert reader.vectors(ENCODER, after_seq=before.last_seq).nums.tolist() == [num]


def test_other_content_at_a_place_takes_it_from_the_old_picture(
    writer: Catalog, reader: Catalog
) -> None:
    old = add(writer, 1, "/p/a.jpg", captions=["old words"])
    writer.commit()
    new = add(writer, 2, "/p/a.jpg", captions=["new words"])
    writer.commit()
    assert list(reader.matching(Filters())) == [new]
    assert found(reader, "words") == [new]
    assert reader.rows([old]) == {}


def test_changed_texts_replace_the_old_ones(writer: Catalog, reader: Catalog) -> None:
    num = add(writer, 1, "/p/a.jpg", captions=["a dog"], tags=["pet"])
    writer.commit()
    counter = reader.change_counter()
    writer.set_place_texts("/p/a.jpg", captions=["a dog"], tags=["pet"])
    writer.set_place_texts("/p/never.jpg", captions=["a dog"], tags=["pet"])
    writer.commit()
    assert reader.change_counter() == counter  # nothing changed
    writer.set_place_texts("/p/a.jpg", captions=["a cat"], tags=[])
    writer.commit()
    assert reader.change_counter() > counter
    assert found(reader, "dog") == []
    assert found(reader, "cat") == [num]
    assert list(reader.matching(Filters(tags=("pet",)))) == []


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
    assert set(dict(writer.known_files("/p"))) == {"/p/a", "/p/sub/b"}
    assert set(dict(writer.known_files("/p/"))) == {"/p/a", "/p/sub/b"}
    assert set(dict(writer.known_files("/p_%*[a]"))) == {"/p_%*[a]/c"}
    assert set(dict(writer.known_files("/"))) == set(paths)
    assert writer.places_below("/p") == 2
    assert writer.places_below("/nowhere") == 0


def test_known_files_tell_what_lacks_a_vector_of_this_encoder(writer: Catalog) -> None:
    add(writer, 1, "/p/done.jpg")
    num = writer.add_picture(image_id=image_id(2), width=1, height=1, format="PNG", bytes=1)
    writer.add_place(num, "/p/new.jpg", size=1, mtime_ns=1)
    writer.add_skipped("/p/bad.jpg", size=1, mtime_ns=1, reason="empty", message="empty")

    def states(encoder_id: str | None) -> dict[str, str]:
        known = dict(writer.known_files("/p", encoder_id=encoder_id))
        return {path: file.state for path, file in known.items()}

    bad = {"/p/bad.jpg": "skipped"}
    assert states(None) == {"/p/done.jpg": "ok", "/p/new.jpg": "ok", **bad}
    assert states(ENCODER) == {"/p/done.jpg": "ok", "/p/new.jpg": "pending", **bad}
    assert states("another") == {"/p/done.jpg": "pending", "/p/new.jpg": "pending", **bad}


def test_a_skipped_file_is_remembered_until_it_is_good_or_gone(writer: Catalog) -> None:
    for name in ("a", "b", "c"):
        writer.add_skipped(f"/p/{name}", size=9, mtime_ns=5, reason="truncated", message="It ends.")
    assert dict(writer.known_files("/p"))["/p/a"] == KnownFile(9, 5, "skipped", None)
    assert writer.skipped()[0] == SkippedRow("/p/a", "truncated", "It ends.")
    writer.add_skipped("/p/a", size=10, mtime_ns=6, reason="empty", message="It is empty.")
    assert dict(writer.known_files("/p"))["/p/a"] == KnownFile(10, 6, "skipped", None)
    add(writer, 1, "/p/b")
    assert writer.remove_places(["/p/c"]) == []
    assert [row.path for row in writer.skipped()] == ["/p/a"]
    assert writer.stats().skipped == 1


def test_a_file_that_breaks_is_no_place_any_more(writer: Catalog) -> None:
    num = add(writer, 1, "/p/a.jpg")
    writer.add_skipped("/p/a.jpg", size=1, mtime_ns=1, reason="truncated", message="It ends.")
    assert writer.rows([num]) == {}
    assert dict(writer.known_files("/p")) == {"/p/a.jpg": KnownFile(1, 1, "skipped", None)}


def test_a_root_is_remembered_and_forgotten_with_its_places(writer: Catalog) -> None:
    writer.add_root("/p")
    writer.add_root("/p/")
    writer.add_root("/q")
    add(writer, 1, "/p/a.jpg")
    keep = add(writer, 2, "/q/b.jpg")
    assert writer.roots() == ("/p", "/q")
    assert writer.remove_root("/p") == 1
    assert writer.roots() == writer.stats().roots == ("/q",)
    assert list(writer.matching(Filters())) == [keep]


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & set(b"/\0"))


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_any_file_name_survives(writer: Catalog, reader: Catalog) -> None:
    """Trap 27: names are bytes, often not UTF-8, and must lead back to their file."""
    num = add(writer, 1)

    @settings(max_examples=60)
    @given(NAMES)
    def check(name: bytes) -> None:
        path = os.fsdecode(b"/p/" + name)
        writer.add_place(num, path, size=1, mtime_ns=1)
        writer.commit()
        assert path in dict(reader.known_files("/p"))
        row = reader.rows([num])[num]
        assert row.places == (path,)
        assert os.fsencode(row.path) == b"/p/" + name
        assert list(reader.matching(Filters(folders=("/p",)))) == [num]
        assert reader.folders() == [("/p", 1)]
        writer.remove_places([path])

    check()


def test_an_unchanged_library_is_known_in_a_blink(writer: Catalog) -> None:
    """7,000 known files: some milliseconds; the bound is 20 times that, for a busy machine."""
    for number in range(7000):
        num = writer.add_picture(
            image_id=image_id(number), width=1, height=1, format="PNG", bytes=1
        )
        writer.add_place(num, f"/p/{number // 500}/{number}.png", size=1, mtime_ns=1)
    writer.commit()
    start = time.perf_counter()
    known = dict(writer.known_files("/p", encoder_id=ENCODER))
    assert time.perf_counter() - start < 0.4
    assert len(known) == 7000


# ---- vectors


def test_vectors_are_joined_by_num_whatever_the_order(writer: Catalog, reader: Catalog) -> None:
    """Trap 25: rows are told apart by id, never by the order of files."""
    nums = [add(writer, number, f"/p/{9 - number}") for number in range(1, 6)]
    more = np.array([nums[3], nums[0]])
    writer.register_encoder("enc-2", spec="other", config_json="{}", dim=2)
    writer.add_vectors("enc-2", more, np.array([[0, 1], [1, 0]], np.float32))
    writer.commit()
    stored = reader.vectors(ENCODER)
    assert stored.nums.dtype == np.int64
    assert stored.vectors.dtype == np.float16
    for num, vector in zip(stored.nums, stored.vectors, strict=True):
        assert reader.rows([num])[num].image_id == image_id(number_of(vector))
    assert reader.vectors("enc-2").nums.tolist() == more.tolist()
    assert reader.vectors("enc-2").vectors.tolist() == [[0, 1], [1, 0]]
    assert list(reader.live_nums("enc-2")) == sorted(more.tolist())
    assert [(row.encoder_id, row.dim) for row in reader.encoders()] == [(ENCODER, 4), ("enc-2", 2)]
    assert reader.stats("enc-2").vectors == 2


def test_one_encoder_is_active(writer: Catalog, reader: Catalog) -> None:
    """The first one, until another is made it; registering one, as an interrupted run does, is not
    enough."""

    def active() -> str:
        writer.commit()
        row = reader.active_encoder()
        return row.encoder_id if row else ""

    writer.register_encoder("enc-2", spec="other", config_json="{}", dim=2)
    assert active() == ENCODER
    writer.activate_encoder("enc-2")
    assert active() == "enc-2"
    writer.activate_encoder("never registered")
    writer.register_encoder("enc-3", spec="third", config_json="{}", dim=2)
    assert active() == "enc-2"
    writer.move_encoder("enc-2", "/new/place")
    assert {row.encoder_id: row.spec for row in reader.encoders()}["enc-2"] == "other"
    assert active() == "enc-2"
    assert {row.encoder_id: row.spec for row in reader.encoders()}["enc-2"] == "/new/place"


def test_an_older_index_keeps_its_newest_encoder(writer: Catalog, reader: Catalog) -> None:
    """Indexes of before were searched with the encoder registered last."""
    writer.register_encoder("enc-2", spec="other", config_json="{}", dim=2)
    writer.commit()
    with closing(sqlite3.connect(writer.folder / "catalog.sqlite")) as db, db:
        db.execute("DELETE FROM meta WHERE key = 'active'")
    row = reader.active_encoder()
    assert row is not None and row.encoder_id == "enc-2"
    writer.register_encoder("enc-3", spec="third", config_json="{}", dim=2)
    writer.commit()
    row = reader.active_encoder()
    assert row is not None and row.encoder_id == "enc-2"


def test_vectors_after_a_seq_are_the_newer_ones(writer: Catalog, reader: Catalog) -> None:
    first = add(writer, 1, "/p/1")
    writer.commit()
    before = reader.vectors(ENCODER)
    assert before.nums.tolist() == [first]
    second = add(writer, 2, "/p/2")
    writer.commit()
    after = reader.vectors(ENCODER, after_seq=before.last_seq)
    assert after.nums.tolist() == [second]
    assert [number_of(vector) for vector in after.vectors] == [2]
    nothing = reader.vectors(ENCODER, after_seq=after.last_seq)
    assert nothing.vectors.shape == (0, DIM)
    assert nothing.last_seq == after.last_seq
    writer.add_vectors(ENCODER, np.array([first]), vector_of(7))  # embedded again
    writer.commit()
    again = reader.vectors(ENCODER, after_seq=after.last_seq).vectors
    assert [number_of(vector) for vector in again] == [7]
    assert reader.vectors(ENCODER).nums.tolist() == [second, first]


def test_vectors_of_an_unknown_encoder_are_none(writer: Catalog) -> None:
    num = add(writer, 1, "/p/1")
    stored = writer.vectors("nobody")
    assert (stored.nums.shape, stored.vectors.shape, stored.last_seq) == ((0,), (0, 0), 0)
    assert list(writer.live_nums("nobody")) == []
    assert writer.vector(num, "nobody") is None
    assert number_of(writer.vector(num, ENCODER)) == 1  # type: ignore[arg-type]


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
