"""Searches follow the catalog as it changes, and use snapshots of it that are whole, no others."""

# ruff: noqa: F811
from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from directions import (  # noqa: F401
    FakeEncoder,
    Writer,
    catalog,
    encoder,
    fill,
    key,
    names,
    path,
    searcher,
    writer,
)

from clipkit.catalog import Catalog, EncoderRow
from clipkit.errors import IndexDamaged, InputError
from clipkit.index import VectorIndex, refresh_snapshot
from clipkit.search import Searcher, live_vectors
from clipkit.search.live_vectors import SAMPLE, follow

# ---- following the catalog


def nearer(number: int) -> list[float]:
    """A picture whose cosine to "beach" is number / 64."""
    return [(1 - (number / 64) ** 2) ** 0.5, number / 64, 0, 0]


def test_what_an_indexer_commits_is_found_at_once(writer: Writer, searcher: Searcher) -> None:
    assert searcher.search("dog").hits == ()
    for number in range(50):
        writer.add(f"p{number:02}", nearer(number))
        result = searcher.search("beach", k=1)
        assert (names(result), result.total) == ([f"p{number:02}"], number + 1)


def test_an_unchanged_catalog_is_not_read_again(writer: Writer, catalog: Catalog) -> None:
    fill(writer)
    state = follow(catalog, "fake-1")
    assert follow(catalog, "fake-1", state) is state
    writer.add("more", [1, 0, 0, 0])
    newer = follow(catalog, "fake-1", state)
    assert newer.parts[0].index is state.parts[0].index  # only what is new was loaded


def test_parts_stay_few(writer: Writer, catalog: Catalog) -> None:
    state = None
    for number in range(100):
        writer.add(f"p{number}", [1, number, 0, 0])
        state = follow(catalog, "fake-1", state)
    assert state is not None
    assert len(state.parts) <= 8
    assert len(state.pictures) == 100


def test_a_removed_place_vanishes_and_comes_back(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    assert names(searcher.search("dog", k=1)) == ["run"]
    writer.remove("run")
    result = searcher.search("dog")
    assert "run" not in names(result)
    assert result.total == 3
    writer.add("run", None)  # the file is back; its vector was kept
    assert names(searcher.search("dog", k=1)) == ["run"]
    # gone before the first look, back after it: it is older than all that was loaded
    writer.remove("run")
    late = Searcher(searcher.catalog, FakeEncoder())
    assert "run" not in names(late.search("dog"))
    writer.add("run", None)
    assert names(late.search("dog", k=1)) == ["run"]


def test_more_dead_rows_than_hits(writer: Writer, searcher: Searcher) -> None:
    for number in range(60):
        writer.add(f"p{number}", [1, number / 1000, 0, 0], commit=False)
    fill(writer)
    searcher.search("dog")
    writer.catalog.remove_places([path(f"p{number}") for number in range(60)])
    writer.catalog.commit()
    assert (names(searcher.search("dog", k=1)), searcher.search("dog").total) == (["run"], 4)


def test_a_moved_picture_shows_its_new_path(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    searcher.search("dog")
    num = writer.catalog.has_picture(key("run"))
    assert num is not None
    writer.catalog.remove_places([path("run")])
    writer.catalog.add_place(num, "/pictures/new/jog.jpg", size=1000, mtime_ns=0)
    writer.catalog.commit()
    assert searcher.search("dog", k=1).hits[0].picture.path == "/pictures/new/jog.jpg"


def test_a_new_vector_replaces_the_old_one(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    searcher.search("dog")
    writer.add("run", [0, 0, 1, 0])
    result = searcher.search("dog")
    assert names(result).index("run") > 1
    assert result.total == 4
    assert names(searcher.search("leash", k=1)) == ["run"]
    for name in ("swim", "walk", "drive"):  # as many as to be joined with the part that has them
        writer.add(name, [0, 0, 0, 1], commit=False)
    writer.catalog.commit()
    result = searcher.search("car", k=3)
    assert (sorted(names(result)), result.total) == (["drive", "swim", "walk"], 4)
    assert [hit.score for hit in result.hits] == pytest.approx([1, 1, 1], abs=1e-3)


def test_threads_search_while_a_writer_commits(writer: Writer, searcher: Searcher) -> None:
    """Every answer is that of one moment: n pictures p0 ... p(n-1), the nearest of them first."""
    stop = threading.Event()
    faults: list[str] = []

    def ask() -> None:
        seen = 0
        while not stop.is_set():
            result = searcher.search("beach")
            if result.total < seen or (result.total and names(result)[0] != f"p{result.total - 1}"):
                faults.append(f"{result.total} after {seen}: {names(result)[:1]}")
            seen = result.total

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(60):
        writer.add(f"p{number}", nearer(number))
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert searcher.search("beach").total == 60


# ---- snapshots


def snapshot_folder(catalog: Catalog) -> Path:
    pointer = catalog.snapshot("fake-1")
    assert pointer is not None
    return catalog.folder / "snapshots" / pointer.name


def changed_over(searcher: Searcher) -> threading.Thread:
    """Wait until the new snapshot is opened: meanwhile, answers may be of a moment ago."""
    opening = searcher._follower.opening
    assert opening is not None
    opening.join()
    return opening


def test_a_snapshot_and_what_is_newer_are_searched_together(
    writer: Writer, catalog: Catalog, searcher: Searcher
) -> None:
    fill(writer)
    before = names(searcher.search("dog"))
    manifest = refresh_snapshot(writer.catalog, "fake-1", force=True)
    assert manifest is not None
    assert (manifest.encoder_id, manifest.size) == ("fake-1", 4)
    assert names(searcher.search("dog")) == names(Searcher(catalog, FakeEncoder()).search("dog"))
    assert names(searcher.search("dog")) == before
    assert follow(catalog, "fake-1").snapshot is not None
    changed_over(searcher)
    writer.add("rex", [1, 0, 0, 0])
    writer.remove("run")
    writer.add("walk", [0, 0, 1, 0])  # a new vector for a picture of the snapshot
    for some in (searcher, Searcher(catalog, FakeEncoder())):
        result = some.search("dog")
        assert names(result)[:2] == ["rex", "swim"]
        assert result.total == 4
        assert result.hits[2].score == pytest.approx(0, abs=1e-3)


def test_a_small_library_gets_no_snapshot(writer: Writer) -> None:
    assert refresh_snapshot(writer.catalog, "fake-1") is None
    assert refresh_snapshot(writer.catalog, "fake-1", force=True) is None  # empty
    fill(writer)
    assert refresh_snapshot(writer.catalog, "fake-1") is None


def test_old_snapshots_are_deleted_but_for_the_last(writer: Writer) -> None:
    fill(writer)
    for _ in range(4):
        refresh_snapshot(writer.catalog, "fake-1", force=True)
    folder = writer.catalog.folder / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == ["000003", "000004"]


def test_a_snapshot_is_built_when_enough_is_new(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit.index.building.SNAPSHOT_FROM", 4)
    fill(writer)
    assert refresh_snapshot(writer.catalog, "fake-1") is not None
    for number in range(3):
        writer.add(f"p{number}", [1, 0, 0, 0])
    assert refresh_snapshot(writer.catalog, "fake-1") is None  # 3 are new
    writer.add("p3", [1, 0, 0, 0])
    manifest = refresh_snapshot(writer.catalog, "fake-1")
    assert manifest is not None
    assert manifest.size == 8


@pytest.mark.parametrize("damage", ["byte", "gone", "manifest", "encoder", "pointer"])
def test_a_damaged_snapshot_is_never_searched(
    writer: Writer, catalog: Catalog, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The answers come from the catalog then, and the log says why."""
    fill(writer)
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    folder = snapshot_folder(catalog)
    vectors = folder / "ids.npy"
    if damage == "byte":
        data = bytearray(vectors.read_bytes())
        data[-3] ^= 0x40
        vectors.write_bytes(data)
    elif damage == "gone":
        vectors.unlink()
    elif damage == "manifest":
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"size": 4', '"size": 3'))
    elif damage == "encoder":  # another encoder's snapshot under the name that is pointed to
        writer.register("fake-2", "other")
        pointer = catalog.snapshot("fake-1")
        assert pointer is not None
        writer.catalog.point_to_snapshot("fake-2", name=pointer.name, last_seq=pointer.last_seq)
        for name in ("swim", "walk"):
            writer.add(name, [0, 0, 0, 1], encoder_id="fake-2")
        searcher = Searcher(catalog, FakeEncoder("fake-2"))
        assert searcher.search("car").total == 2
        assert "fake-1" in caplog.text
        return
    else:
        pointer = catalog.snapshot("fake-1")
        assert pointer is not None
        writer.catalog.point_to_snapshot("fake-1", name=pointer.name, last_seq=99)
    searcher = Searcher(catalog, FakeEncoder())
    result = searcher.search("dog")
    assert (names(result)[0], result.total) == ("run", 4)
    assert "snapshot not used" in caplog.text
    manifest_after = refresh_snapshot(writer.catalog, "fake-1", force=True)
    assert manifest_after is not None
    assert names(searcher.search("dog"))[0] == "run"
    assert follow(catalog, "fake-1").snapshot is not None


# ---- one thread makes the next state, the others search


class Gate:
    """Holds up a method of a catalog: `entered` is set when it is called, `open` lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def held(*arguments: object, **options: object) -> object:
            self.entered.set()
            assert self.open.wait(60)
            return method(*arguments, **options)

        monkeypatch.setattr(owner, name, held)


def test_searches_go_on_while_new_vectors_are_loaded(
    writer: Writer, catalog: Catalog, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer)
    searcher.search("dog")
    writer.add("rex", [1, 0, 0, 0])
    gate = Gate(monkeypatch, catalog, "vectors")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(names(searcher.search("dog", k=1))))
    thread.start()
    assert gate.entered.wait(60)
    assert names(searcher.search("dog", k=1)) == ["run"]  # does not wait: as of a moment ago
    gate.open.set()
    thread.join()
    assert found == ["rex"] == names(searcher.search("dog", k=1))


def test_a_new_snapshot_is_opened_beside_the_searches(
    writer: Writer, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer)
    searcher.search("dog")
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    gate = Gate(monkeypatch, live_vectors, "load_snapshot")
    assert names(searcher.search("dog", k=1)) == ["run"]
    assert gate.entered.wait(60)
    writer.add("rex", [1, 0, 0, 0])
    assert names(searcher.search("dog", k=1)) == ["rex"]  # found meanwhile, too
    assert searcher.live().snapshot is None
    opening = searcher._follower.opening
    gate.open.set()
    assert opening is not None
    opening.join()
    assert searcher.live().snapshot == "000001"
    result = searcher.search("dog")
    assert (names(result)[0], result.total) == ("rex", 5)
    assert searcher._follower.opening is opening  # once


def test_a_snapshot_that_cannot_be_opened_is_not_tried_again(
    writer: Writer, searcher: Searcher, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    fill(writer)
    searcher.search("dog")
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    (snapshot_folder(catalog) / "manifest.json").unlink()
    for number in range(3):
        searcher.search("dog")
        changed_over(searcher)
        writer.add(f"p{number}", [1, 0, 0, 0])
    assert searcher.search("dog").total == 7
    assert caplog.text.count("snapshot not used") == 1


def test_what_is_new_costs_its_own_size(
    writer: Writer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of two pictures beside a snapshot of 300 reads and copies these two, not the 300."""
    for number in range(300):
        writer.add(f"p{number}", [1, number, 0, 0], commit=False)
    writer.catalog.commit()
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    state = follow(catalog, "fake-1")
    built: list[int] = []

    def counted(make: Callable[..., VectorIndex]) -> Callable[..., VectorIndex]:
        def made(*args: object, **options: object) -> VectorIndex:
            index = make(*args, **options)
            built.append(index.size)
            return index

        return made

    monkeypatch.setattr(VectorIndex, "build", counted(VectorIndex.build))
    monkeypatch.setattr(VectorIndex, "joined", counted(VectorIndex.joined))
    monkeypatch.setattr(catalog, "live_nums", None)
    for number in range(8):
        writer.add(f"new{number}", [1, 0, 0, 0], commit=False)
        writer.add(f"p{number}", [0, 0, 0, 1])  # in place of the snapshot's
        state = follow(catalog, "fake-1", state)
        assert len(state.pictures) == 301 + number
    # each 2, then joined with a part of at most twice its size: [2], [4], [6], [6, 2], [10], [10, 2] ...
    assert built == [2, 2, 4, 2, 6, 2, 2, 4, 10, 2, 2, 4, 2, 6, 16]
    nums, scores = state.search(np.array([0, 0, 0, 1], np.float32), 8)
    assert nums.tolist() == list(range(1, 9)) and scores.min() > 0.99


def test_large_parts_are_not_joined(
    writer: Writer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_vectors, "MERGED", 6)
    state = None
    for number in range(24):
        writer.add(f"p{number}", [1, number, 0, 0])
        state = follow(catalog, "fake-1", state)
    assert state is not None
    assert max(len(part.ids) for part in state.parts) <= 6
    assert len(state.parts) <= 8 and len(state.pictures) == 24


def test_damage_that_a_search_finds_costs_the_snapshot_not_the_answer(
    writer: Writer, searcher: Searcher, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Rows are checked when they are read: what is damaged then is read from the catalog instead."""
    fill(writer)
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    writer.add("rex", [1, 0, 0, 0])
    assert names(searcher.search("dog"))[:2] == ["rex", "run"]

    def damaged(*_: object, **__: object) -> object:
        raise IndexDamaged("rows 0 to 3 of vectors.f16 are not what was written")

    for name, ask, best in (
        ("search", lambda: searcher.search("dog"), "rex"),
        ("vectors_of", lambda: searcher.similar(key("run")), "swim"),
    ):
        searcher._follower = live_vectors.Follower(searcher.catalog)
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(live_vectors.Snapshot, name, damaged)
            for _ in range(2):
                result = ask()
                assert result.total == 5 - (name == "vectors_of") and names(result)[0] == best
            writer.add(f"more for {name}", None)
            assert names(ask())[0] == best
        assert searcher.live().snapshot is None
        assert caplog.text.count("snapshot not used") == 1 and "vectors.f16" in caplog.text


def test_the_sample_is_the_same_with_a_snapshot_and_without(
    writer: Writer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot knows its least hashes; no row of it is read for the sample."""
    vectors = np.random.default_rng(0).standard_normal((5000, 4))
    for number in range(4000):
        writer.add(f"p{number}", list(vectors[number]), commit=False)
    writer.catalog.commit()
    refresh_snapshot(writer.catalog, "fake-1", force=True)
    for number in range(4000, 5000):
        writer.add(f"p{number}", list(vectors[number]), commit=False)
    for number in range(0, 1000, 10):
        writer.remove(f"p{number}")
    writer.add("p7", [0, 0, 0, 1])  # in place of the snapshot's
    whole = follow(catalog, "fake-1", unusable={"000001"})
    state = follow(catalog, "fake-1")
    assert whole.snapshot is None and state.snapshot == "000001"
    assert isinstance(state.parts[0].index, live_vectors.Snapshot)
    monkeypatch.setattr(live_vectors.Snapshot, "vectors_of", None)
    assert state.sample.shape == (SAMPLE, 4)
    assert {row.tobytes() for row in state.sample} == {row.tobytes() for row in whole.sample}


# ---- another model becomes active


def test_a_search_follows_the_active_model(writer: Writer, catalog: Catalog) -> None:
    """As after `clipkit use` in another process; a model that was named stays."""
    fill(writer)
    writer.register("fake-2", "other")
    writer.add("drive", [1, 0, 0, 0], encoder_id="fake-2")
    writer.add("swim", [0.8, 0, 0.6, 0], encoder_id="fake-2")
    opened: list[str] = []

    def open_active(row: EncoderRow) -> FakeEncoder:
        opened.append(row.encoder_id)
        return FakeEncoder(row.encoder_id, row.spec)

    searcher = Searcher(catalog, FakeEncoder(), open_active=open_active)
    named = Searcher(catalog, FakeEncoder())
    assert names(searcher.search("dog", k=1)) == ["run"] and not opened
    page = searcher.search("dog", k=1)
    writer.catalog.activate_encoder("fake-2")
    writer.catalog.commit()
    result = searcher.search("dog")
    assert (names(result), result.total, opened) == (["drive", "swim"], 2, ["fake-2"])
    assert names(searcher.similar(key("drive"))) == ["swim"]
    with pytest.raises(InputError, match=r"the cursor belongs to another search or to another mod"):
        searcher.search("dog", k=1, cursor=page.cursor)
    assert names(named.search("dog", k=1)) == ["run"]
    writer.catalog.activate_encoder("fake-1")
    writer.catalog.commit()
    assert names(searcher.search("dog", k=1)) == ["run"] and opened == ["fake-2", "fake-1"]
