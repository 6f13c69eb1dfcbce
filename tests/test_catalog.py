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
from clipkit.picture_set import PictureSet

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
    with pytest.raises(InputError, match="/p is not in the index; its folders are: /q"):
        writer.remove_root("/p")


def test_with_a_folder_the_roots_below_it_are_forgotten(writer: Catalog) -> None:
    for number, root in enumerate(("/p/a", "/p/b", "/pq")):
        writer.add_root(root)
        add(writer, number, f"{root}/one.jpg")
    assert writer.remove_root("/p") == 2
    assert writer.roots() == ("/pq",)


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


def test_vectors_are_counted_by_encoder_seq_and_what_is_live(
    writer: Catalog, reader: Catalog
) -> None:
    """By the whole table, by seq and by the index, before and after two pictures die."""
    nums = [add(writer, number, f"/p/{number}.jpg") for number in range(1, 5)]
    third = writer.vectors(ENCODER).last_seq - 1
    for _ in range(2):  # with one encoder, and with another one's vectors beside
        writer.commit()
        assert reader.count_vectors(ENCODER, after_seq=0) == reader.stats(ENCODER).vectors == 4
        assert reader.count_vectors(ENCODER, after_seq=third) == 1
        assert reader.count_vectors("unknown", after_seq=0) == 0
        writer.register_encoder("enc-2", spec="other", config_json="{}", dim=2)
        writer.add_vectors("enc-2", np.array(nums[:2]), np.array([[0, 1], [1, 0]], np.float32))
    assert reader.count_vectors("enc-2", after_seq=third) == reader.stats("enc-2").vectors == 2
    writer.remove_places(["/p/1.jpg", "/p/4.jpg"])
    writer.commit()
    assert reader.count_vectors(ENCODER, after_seq=0) == reader.stats(ENCODER).vectors == 2
    assert reader.count_vectors(ENCODER, after_seq=third) == 0
    assert reader.count_vectors("enc-2", after_seq=0) == reader.stats("enc-2").vectors == 1


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


def test_rows_that_are_not_unit_vectors_are_refused(writer: Catalog) -> None:
    """A zero vector has no direction: one made every search fail. 0.99 and 1.01 are within bounds."""
    nums = np.array([add(writer, 1, "/p/1"), add(writer, 2, "/p/2")])
    good = np.array([0.995, 0, 0, 0], np.float32)
    for bad, length in (([0, 0, 0, 0], "0"), ([1, 1, 0, 0], "1.41"), ([0.5, 0, 0, 0], "0.5")):
        with pytest.raises(
            InputError,
            match=f"the vector of picture {nums[1]} has length {length}; vectors must have",
        ):
            writer.add_vectors(ENCODER, nums, np.array([good, bad], np.float32))
    writer.add_vectors(ENCODER, nums[:1], good[None])


def test_chunks_of_vectors_are_all_of_them_in_the_order_of_num(
    writer: Catalog, reader: Catalog
) -> None:
    nums = [add(writer, number, f"/p/{number}") for number in range(1, 8)]
    writer.remove_places(["/p/3"])
    writer.add_vectors(ENCODER, np.array(nums[:1]), vector_of(9))  # a later seq than the others'
    writer.commit()
    chunks = list(reader.vector_chunks(ENCODER, rows=4))
    assert [chunk.nums.tolist() for chunk in chunks] == [[1, 2, 4, 5], [6, 7]]
    assert [number_of(row) for chunk in chunks for row in chunk.vectors] == [9, 2, 4, 5, 6, 7]
    assert {chunk.last_seq for chunk in chunks} == {reader.vectors(ENCODER).last_seq} == {8}
    assert list(reader.vector_chunks("nobody")) == []
    assert list(reader.dead()) == [3]


# ---- texts of places


def test_a_picture_has_the_texts_of_all_its_places_in_their_order(
    writer: Catalog, reader: Catalog
) -> None:
    """Whichever was added first; what two places share is there once; a lost place takes its own."""
    num = add(writer, 1, "/q/copy.jpg", captions=["a dog", "on grass"], tags=["pet"])
    add(writer, 1, "/p/a.jpg", captions=["my dog", "on grass"], tags=["Rex", "pet"])
    writer.commit()
    row = reader.rows([num])[num]
    assert row.captions == ("my dog", "on grass", "a dog")
    assert row.tags == ("Rex", "pet")
    assert found(reader, "my dog") == found(reader, "a dog") == [num]
    writer.set_place_texts("/p/a.jpg", captions=["the dog"], tags=[])
    assert writer.rows([num])[num].captions == ("the dog", "a dog", "on grass")
    writer.remove_places(["/p/a.jpg"])
    assert writer.rows([num])[num].captions == ("a dog", "on grass")
    assert writer.rows([num])[num].tags == ("pet",)
    assert found(writer, "my dog") == found(writer, "the dog") == []


def test_a_folders_fingerprint_is_kept_and_forgotten(writer: Catalog, reader: Catalog) -> None:
    assert writer.text_fingerprint("/p") is None
    writer.set_text_fingerprint("/p", "one")
    writer.set_text_fingerprint("/p/sub/", "two")
    writer.set_text_fingerprint("/pq", "three")
    writer.commit()
    assert reader.text_fingerprint("/p/") == "one" and reader.text_fingerprint("/p/sub") == "two"
    writer.set_text_fingerprint("/p/sub", None)
    assert writer.text_fingerprint("/p/sub") is None
    add(writer, 1, "/pq/1.jpg")
    writer.remove_root("/p")
    assert writer.text_fingerprint("/p") is None and writer.text_fingerprint("/pq") == "three"


def test_a_file_that_cannot_be_read_now_keeps_its_place(writer: Catalog) -> None:
    """It is found as before and is read again by the next run; adding it ends the note."""
    num = add(writer, 1, "/p/a.jpg", captions=["a dog"])
    note = {"size": -1, "mtime_ns": -1, "reason": "unreadable", "message": "no"}
    for _ in range(2):
        writer.add_skipped("/p/a.jpg", **note, keep_place=True)  # type: ignore[arg-type]
    writer.add_skipped("/p/b.jpg", **note, keep_place=True)  # type: ignore[arg-type]
    assert found(writer, "dog") == [num] and writer.stats().skipped == 2
    assert list(writer.known_files("/p", encoder_id=ENCODER)) == [
        ("/p/a.jpg", KnownFile(-1, -1, "skipped", num)),
        ("/p/b.jpg", KnownFile(-1, -1, "skipped", None)),
    ]
    writer.add_place(num, "/p/a.jpg", size=1, mtime_ns=1)
    assert dict(writer.known_files("/p"))["/p/a.jpg"] == KnownFile(1, 1, "ok", num)


def test_known_files_come_in_the_order_of_bytes_page_by_page(
    writer: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "é" is two bytes from 0xC3 on, behind all of ASCII; a path may be another's beginning."""
    monkeypatch.setattr("clipkit.catalog.catalog._PAGE", 2)
    paths = ["/p/a", "/p/a/b", "/p/a0", "/p/Z", "/p/é", "/p/zz", "/p/a b"]
    for number, path in enumerate(paths):
        if number % 3:
            add(writer, number, path)
        else:
            writer.add_skipped(path, size=1, mtime_ns=1, reason="r", message="m")
    known = [path for path, _ in writer.known_files("/p")]
    assert known == sorted(paths, key=lambda path: path.encode())


# ---- what is left of dead pictures


def test_purging_leaves_only_a_num_that_is_never_used_again(
    writer: Catalog, reader: Catalog
) -> None:
    """No row has its name, caption, tag, camera or folder any more."""
    words = ("geheimnis", "secretword", "privatetag", "uniquecam", "hidden")
    gone = add(
        writer, 1, "/hidden/Geheimnis.jpg", captions=["my Secretword"], tags=["Privatetag"],
        camera="Uniquecam", thumbnail=b"thumbnailbytes" * 100,
    )  # fmt: skip
    writer.set_text_fingerprint("/hidden", "print")
    kept = add(writer, 2, "/p/b.jpg", camera="Canon", thumbnail=b"kept")
    writer.commit()
    assert reader.matching(Filters(tags=("privatetag",))) == reader.having([["secretword"]])[0]
    assert reader.matching(Filters(cameras=("uniquecam",), folders=("hidden",))) == PictureSet(
        [gone]
    )
    writer.add_root("/hidden")
    assert writer.remove_root("/hidden") == 1
    writer.commit()
    assert writer.purge() == 0  # it has been done
    assert reader.vector(gone, ENCODER) is None and reader.vector(kept, ENCODER) is not None
    assert reader.thumbnail(image_id(1)) is None and reader.thumbnail(image_id(2)) == b"kept"
    assert reader.has_picture(image_id(1)) is None and list(reader.dead()) == [gone]
    assert list(reader.matching(Filters())) == list(reader.live_nums(ENCODER)) == [kept]
    assert reader.facets().cameras == (("Canon", 1),) and reader.text_fingerprint("/hidden") is None
    with closing(sqlite3.connect(writer.folder / "catalog.sqlite")) as db:
        sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB '*texts_[di]*'"
        for (table,) in db.execute(sql).fetchall():
            for row in db.execute(f"SELECT * FROM {table}").fetchall():
                text = repr(row).lower()
                assert not any(word in text for word in words), (table, row)

    assert add(writer, 3, "/p/c.jpg") == kept + 1
    again = add(writer, 1, "/p/again.jpg", camera="New", width=10)
    writer.commit()
    assert again == gone
    row = reader.rows([gone])[gone]
    assert (row.width, row.camera, row.captions) == (10, "New", ())
    assert list(reader.matching(Filters(cameras=("new",)))) == [gone]
    assert reader.stats(ENCODER).vectors == reader.stats().pictures == 3


def test_purging_shrinks_the_file(writer: Catalog) -> None:
    """2,709 of 3,010 pictures go, with vectors of 512 numbers."""
    writer.register_encoder("wide", spec="s", config_json="{}", dim=512)
    nums = [add(writer, number, f"/p/{number % 10 and 1}/{number}.jpg") for number in range(3010)]
    rows = np.zeros((len(nums), 512), np.float32)
    rows[:, 0] = 1
    writer.add_vectors("wide", np.array(nums), rows)
    writer.commit()
    with closing(sqlite3.connect(writer.folder / "catalog.sqlite")) as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    writer.remove_places(path for path, _ in list(writer.known_files("/p/1")))
    assert writer.purge() == 2709
    writer.commit()
    with closing(sqlite3.connect(writer.folder / "catalog.sqlite")) as db:
        assert db.execute("PRAGMA page_count").fetchone()[0] < 0.4 * pages
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert writer.stats("wide").vectors == 301


# ---- several models


def test_encoders_of_one_space_share_their_vectors(writer: Catalog, reader: Catalog) -> None:
    for name, space in (("a", "s"), ("b", "s"), ("c", "t"), ("old", None)):
        writer.register_encoder(
            name, spec=f"spec {name}", config_json="{}", dim=DIM, space_id=space
        )
    num = add(writer, 1, "/p/1")
    writer.add_vectors("a", np.array([num]), vector_of(5))
    writer.point_to_snapshot("b", name="000001", last_seq=2)
    writer.commit()
    assert [row.space_id for row in reader.encoders()] == [None, "s", "s", "t", None]
    assert number_of(reader.vector(num, "b")) == 5  # type: ignore[arg-type]
    assert reader.vectors("b").nums.tolist() == list(reader.live_nums("b")) == [num]
    assert reader.snapshot("a") == reader.snapshot("b") == SnapshotPointer("000001", 2)
    assert [reader.vector_space(name) for name in ("a", "b", "old")] == ["s", "s", "old"]
    assert reader.stats("b").vectors == 1 and reader.stats("c").vectors == 0
    writer.add_vectors("b", np.array([num]), vector_of(6))
    assert number_of(writer.vector(num, "a")) == 6  # type: ignore[arg-type]

    # the space of an older encoder is told later: what both have stays the first one's
    other = add(writer, 2, "/p/2")
    writer.add_vectors("old", np.array([num, other]), np.concatenate([vector_of(7), vector_of(8)]))
    writer.commit()
    assert reader.stats("a").vectors == 1 and reader.stats("old").vectors == 2
    seq = reader.vectors("a").last_seq
    writer.register_encoder("old", spec="x", config_json="{}", dim=DIM, space_id="s")
    writer.commit()
    assert [reader.stats(name).vectors for name in ("a", "b", "old")] == [2, 2, 2]
    assert number_of(reader.vector(num, "old")) == 6  # type: ignore[arg-type]
    assert reader.vectors("a", after_seq=seq).nums.tolist() == [other]  # newer than any snapshot


def test_an_encoder_is_dropped_with_its_vectors_unless_others_use_them(
    writer: Catalog, reader: Catalog
) -> None:
    for name, space in (("a", "s"), ("b", "s"), ("c", "t")):
        writer.register_encoder(
            name, spec=f"spec {name}", config_json="{}", dim=DIM, space_id=space
        )
    num = add(writer, 1, "/p/1")
    for name in ("a", "c"):
        writer.add_vectors(name, np.array([num]), vector_of(5))
        writer.point_to_snapshot(name, name="000001", last_seq=2)
    with pytest.raises(
        InputError, match=r"encoder enc-1 \(builtin\) is the one that the index answers"
    ):
        writer.drop_encoder(ENCODER)
    with pytest.raises(
        InputError, match="encoder nobody is not in this index; it has enc-1, a, b, c"
    ):
        writer.drop_encoder("nobody")
    writer.activate_encoder("b")
    writer.commit()
    counter = reader.change_counter()
    assert reader.stats("c").vectors == 1
    assert writer.drop_encoder("a") == 0  # the owner: b goes on with all it had
    assert writer.drop_encoder("c") == 1
    writer.commit()
    assert reader.change_counter() > counter
    assert sorted(row.encoder_id for row in reader.encoders()) == ["b", ENCODER]
    active = reader.active_encoder()
    assert active is not None and (active.encoder_id, active.spec) == ("b", "spec b")
    assert number_of(reader.vector(num, "b")) == 5  # type: ignore[arg-type]
    assert reader.snapshot("b") == SnapshotPointer("000001", 2) and reader.snapshot("c") is None
    assert reader.stats("b").vectors == 1 and reader.stats("c").vectors == 0
    writer.register_encoder("c", spec="again", config_json="{}", dim=DIM, space_id="t")
    writer.commit()
    assert list(reader.live_nums("c")) == []
    writer.activate_encoder(ENCODER)
    assert writer.drop_encoder("b") == 1


def test_activating_is_one_change_that_readers_see(writer: Catalog, reader: Catalog) -> None:
    writer.register_encoder("b", spec="s", config_json="{}", dim=DIM)
    writer.commit()
    counter = reader.change_counter()
    writer.activate_encoder(ENCODER)  # it is already
    writer.commit()
    assert reader.change_counter() == counter
    writer.activate_encoder("b")
    active = reader.active_encoder()
    assert active is not None and active.encoder_id == ENCODER
    writer.commit()
    assert reader.change_counter() == counter + 1
