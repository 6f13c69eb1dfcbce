"""Snapshots: whole or not there, every byte of them checked, and the hits of an exact search."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bench.bench_index import clustered, make_queries

from clipkit import durable
from clipkit.catalog import Catalog
from clipkit.catalog.rows import StoredVectors
from clipkit.errors import ClipkitError, IndexDamaged, InputError
from clipkit.index import (
    KINDS,
    Kind,
    Manifest,
    Snapshot,
    VectorIndex,
    building,
    kinds,
    load_snapshot,
    read_manifest,
    refresh_snapshot,
    sampling_hash,
    snapshot,
)
from clipkit.index.building import build_snapshot
from clipkit.index.checked_files import write_facts
from clipkit.picture_set import PictureSet

Rows = npt.NDArray[np.float16]
Ids = npt.NDArray[np.int64]
N, DIM = 12_000, 64  # of which a query's candidates are a small part
SMALL = 2_000  # just large enough that codes are searched
APPROXIMATE = pytest.mark.parametrize("kind", ["rabitq", "ivf"])
LOADED = {"ids.npy", "sample.f16", "sample_ids.npy", "manifest.json", "codes.faiss"}
MAPPED = {"vectors.f16", "rows.crc32"}


def build(folder: Path, ids: Ids, rows: Rows, **options: Any) -> Manifest:
    """Write a snapshot from chunks of 1,000."""
    chunks = (
        StoredVectors(ids[at : at + 1000], rows[at : at + 1000], 42)
        for at in range(0, len(ids), 1000)
    )
    known: dict[str, Any] = {"encoder_id": "enc", "dim": rows.shape[1], "total": len(ids)}
    return build_snapshot(folder, chunks, **{**known, **options})


@pytest.fixture(scope="module")
def rows() -> Rows:
    return clustered(N, DIM, per_cluster=100)


@pytest.fixture(scope="module")
def ids() -> Ids:
    """Not row numbers: 7, 10, 13, ..."""
    return np.arange(N) * 3 + 7


@pytest.fixture(scope="module")
def queries(rows: Rows) -> npt.NDArray[np.float32]:
    return make_queries(rows, 40)


@pytest.fixture(scope="module")
def exact(ids: Ids, rows: Rows) -> VectorIndex:
    return VectorIndex.build(ids, rows, kind="exact")


@pytest.fixture(scope="module")
def opened(ids: Ids, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Snapshot]:
    folder = tmp_path_factory.mktemp("snapshots")
    for kind in ("rabitq", "ivf"):
        build(folder / kind, ids, rows, kind=kind)
    return {kind: Snapshot.open(folder / kind) for kind in ("rabitq", "ivf")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "000007"
    build(folder, np.arange(SMALL) * 3 + 7, clustered(SMALL, 32, per_cluster=10))
    return folder


@pytest.fixture
def saved(small: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small, tmp_path / "snapshots" / "000007"))


def mean_recall(hits: Sequence[Any], truth: Sequence[Any]) -> float:
    """Hits whose score reaches the true last one's: ties are no misses."""
    pairs = zip(hits, truth, strict=True)
    return float(np.mean([np.mean(scores >= true[-1] - 1e-6) for (_, scores), (_, true) in pairs]))


# ---- what a search returns


@APPROXIMATE
@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_hits_are_those_of_an_exact_search(
    kind: str, k: int, opened: dict[str, Snapshot], exact: VectorIndex, queries: Any
) -> None:
    """A score is bit for bit the one that an index in memory computes."""
    hits, truth = opened[kind].search(queries, k), exact.search(queries, k)
    assert mean_recall(hits, truth) >= (0.99 if k <= 100 else 0.95)
    every = [dict(zip(*map(list, hit), strict=True)) for hit in exact.search(queries, N)]
    for (found, scores), scored in zip(hits, every, strict=True):
        assert len(found) == len(set(found.tolist())) == k
        assert np.lexsort((found, -scores)).tolist() == list(range(k))
        assert [scored[i] for i in found] == scores.tolist()


@pytest.mark.parametrize("k", [101, 400, 1000])
def test_a_large_k_is_searched_until_its_candidates_are_certain(
    k: int,
    opened: dict[str, Snapshot],
    exact: VectorIndex,
    queries: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a larger library, the candidates are more than are looked at where k is larger still."""
    monkeypatch.setattr(snapshot, "_MOST_DEEP", 512)
    monkeypatch.setattr(snapshot, "_DEPTH_PER_HIT", 0)
    hits, truth = opened["rabitq"].search(queries, k), exact.search(queries, k)
    assert mean_recall(hits, truth) >= 0.999


@pytest.mark.parametrize("share", [None, 2, 50])
def test_a_floor_leaves_out_nothing_above_it_and_reads_less(
    share: int | None,
    opened: dict[str, Snapshot],
    exact: VectorIndex,
    queries: Any,
    ids: Ids,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some, read = opened["rabitq"], list[int]()
    allowed = None if share is None else PictureSet(ids[::share])
    scores = some._rows.scores
    monkeypatch.setattr(
        some._rows, "scores", lambda q, rows: (read.append(len(rows)), scores(q, rows))[1]
    )
    for query in queries:
        ((true, cosines),) = exact.search(query[None], 40, allowed=allowed)
        floor = float(cosines[4])
        ((found, _),) = some.search(query[None], 40, allowed=allowed, floor=floor)
        assert found[:5].tolist() == true[:5].tolist()
    with_floor = sum(read)
    read.clear()
    some.search(queries, 40, allowed=allowed)
    assert share == 50 or with_floor < 0.9 * sum(read)  # 240 allowed rows are all read in any case


def test_one_search_at_a_time_is_spread_over_the_cores(
    opened: dict[str, Snapshot], queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hits are the same; beside another search, one thread does all."""
    monkeypatch.setattr(kinds.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(kinds, "searches", kinds.Searches())
    by: set[str] = set()
    alone, beside = [], []
    meet = threading.Barrier(3)

    def work(number: int) -> None:
        by.add(threading.current_thread().name)
        if number < 3:
            meet.wait(20)

    kinds.searches.spread(work, 4)  # each of the first three waits until all three have begun
    assert len(by) == 3
    for query in queries:
        alone += opened["rabitq"].search(query[None], 20)
    with kinds.searches.one(), kinds.searches.one():
        by.clear()
        kinds.searches.spread(lambda _: by.add(threading.current_thread().name), 4)
        assert by == {threading.current_thread().name}
        for query in queries:
            beside += opened["rabitq"].search(query[None], 20)
    for (a, s), (b, t) in zip(alone, beside, strict=True):
        assert np.array_equal(a, b) and np.array_equal(s, t)


def test_an_error_of_any_part_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds.os, "cpu_count", lambda: 2)

    def work(number: int) -> None:
        if number == 3:
            raise ValueError("part 3")

    for _ in range(50):
        with pytest.raises(ValueError, match="part 3"):
            kinds.Searches().spread(work, 4)


def test_codes_in_one_structure_are_read_too(
    ids: Ids,
    rows: Rows,
    opened: dict[str, Snapshot],
    queries: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As format version 2 has them."""
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "PARTS", 1)
        patch.setattr(snapshot, "FORMAT_VERSION", 2)
        build(tmp_path / "1", ids, rows)
    assert json.loads((tmp_path / "1" / "manifest.json").read_text())["format_version"] == 2
    older = Snapshot.open(tmp_path / "1")
    for (a, s), (b, t) in zip(
        older.search(queries, 10), opened["rabitq"].search(queries, 10), strict=True
    ):
        assert np.array_equal(a, b) and np.array_equal(s, t)


@APPROXIMATE
def test_recall_is_measured_and_candidates_are_few(
    kind: str, opened: dict[str, Snapshot], monkeypatch: pytest.MonkeyPatch, queries: Any
) -> None:
    manifest = opened[kind].manifest
    assert manifest.kind == kind and manifest.recall_at_10 >= 0.999 and manifest.queries == 200
    assert manifest.settings["margin"] > 0 and ("nprobe" in manifest.settings) == (kind == "ivf")
    read: list[int] = []
    scores = opened[kind]._rows.scores
    monkeypatch.setattr(
        opened[kind]._rows, "scores", lambda q, rows: (read.append(len(rows)), scores(q, rows))[1]
    )
    opened[kind].search(queries, 10)
    assert sum(read) / len(queries) < N / 6, "rows scored per query"


@APPROXIMATE
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_a_filter_keeps_the_recall(
    kind: str, share: float, ids: Ids, opened: Any, exact: VectorIndex, queries: Any
) -> None:
    only = PictureSet(np.random.default_rng(3).choice(ids, int(share * N), replace=False))
    hits = opened[kind].search(queries, 10, allowed=only)
    assert all(len(found) == 10 and only.has(found).all() for found, _ in hits)
    assert mean_recall(hits, exact.search(queries, 10, allowed=only)) >= 0.99


@APPROXIMATE
@pytest.mark.parametrize("hidden", [5, 60, 300, N // 3])
def test_a_filter_that_hides_the_nearest(
    kind: str, hidden: int, ids: Ids, rows: Rows, opened: Any, exact: VectorIndex, queries: Any
) -> None:
    """What is left lies close together and far from the query: a fixed number of candidates by code
    holds few of the ten best of it (400 of a million: 0.5 with 300 hidden)."""
    recalls = []
    for query in queries[:20]:
        order = np.argsort(-(rows.astype(np.float32) @ query), kind="stable")
        only = PictureSet(ids[order[hidden:]])
        hits = opened[kind].search(query[None], 10, allowed=only)
        recalls.append(mean_recall(hits, exact.search(query[None], 10, allowed=only)))
    assert np.mean(recalls) >= 0.98


@APPROXIMATE
def test_a_search_is_the_same_on_any_number_of_threads(
    kind: str, opened: dict[str, Snapshot], queries: Any
) -> None:
    hits = []
    for count in (1, 2, 5):
        with kinds.threads(count):
            hits.append(opened[kind].search(queries, 20))
    alone = [opened[kind].search(query[None], 20)[0] for query in queries]
    for other in (*hits[1:], alone):
        for (a, s), (b, t) in zip(hits[0], other, strict=True):
            assert np.array_equal(a, b) and np.array_equal(s, t)


def test_the_same_input_gives_the_same_files(ids: Ids, rows: Rows, tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 2)):
        with kinds.threads(count):
            build(tmp_path / name, ids[:3000], rows[:3000])
    for path in (tmp_path / "a").iterdir():
        if path.name != "manifest.json":  # holds the seconds
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_refusals_and_empty_results(opened: dict[str, Snapshot], queries: Any) -> None:
    some = opened["rabitq"]
    with pytest.raises(InputError, match=r"shape \(1, 3\).* 64 dimensions"):
        some.search(np.ones((1, 3), np.float32), 1)
    with pytest.raises(InputError, match="k is 0; ask for at least 1"):
        some.search(queries, 0)
    with pytest.raises(InputError, match="id 8 is not in this index of 12000"):
        some.vectors_of(np.array([7, 8]))
    ((found, scores),) = some.search(queries[:1], 5, allowed=PictureSet([8, 9]))
    assert found.shape == scores.shape == (0,)
    assert some.vectors_of(np.array([], np.int64)).shape == (0, DIM)


def test_vectors_of_ids_come_in_their_order(
    opened: dict[str, Snapshot], rows: Rows, ids: Ids
) -> None:
    pick = [17, 3, 17]
    assert np.array_equal(opened["ivf"].vectors_of(ids[pick]), rows[pick].astype(np.float32))
    assert np.array_equal(opened["ivf"].vectors_of(ids), rows.astype(np.float32))


@pytest.mark.parametrize("size", [0, 1, 255])
def test_a_small_snapshot_is_exact(size: int, rows: Rows, tmp_path: Path) -> None:
    manifest = build(tmp_path / "1", np.arange(size), rows[:size])
    assert (manifest.kind, manifest.size, manifest.recall_at_10) == ("exact", size, 1.0)
    some = Snapshot.open(tmp_path / "1")
    assert some.sample.shape == (size, DIM)
    ((found, _),) = some.search(rows[:1].astype(np.float32), 5)
    assert len(found) == min(size, 5)
    assert found[:1].tolist() == [0][:size]


def test_codes_that_miss_the_goal_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rows: Rows, tmp_path: Path
) -> None:
    """A kind that finds nothing but the first row: every query would lose nine of ten."""

    def scan(*_: Any) -> kinds.Scan:
        return kinds.Scan(np.zeros(1, np.int64), np.zeros(1, np.float32), -np.inf)

    def search(_structure: Any, queries: Any, count: int, *_: Any) -> Any:
        return np.where(np.arange(count) == 0, 0, -1) + np.zeros((len(queries), 1), np.int64)

    fake = Kind(lambda *_: [], search, ({"refine": 1},), scan)
    monkeypatch.setitem(KINDS, "fake", fake)
    with caplog.at_level(logging.WARNING):
        manifest = build(tmp_path / "1", np.arange(600), rows[:600], kind="fake")
    assert manifest.kind == "exact" and manifest.settings["given_up"] == "fake"
    assert "fake reaches recall@10 0.0000 on these vectors; the goal is 0.9990" in caplog.text
    some = Snapshot.open(tmp_path / "1")
    truth = VectorIndex.build(np.arange(600), rows[:600]).search(rows[:9].astype(np.float32), 10)
    assert mean_recall(some.search(rows[:9].astype(np.float32), 10), truth) == 1
    with pytest.raises(InputError, match="'hnsw' lives in memory"):
        build(tmp_path / "2", np.arange(600), rows[:600], kind="hnsw")


def test_a_margin_that_is_too_small_is_raised(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, tmp_path: Path
) -> None:
    """Started at nothing, it never grows: the kind is given up; at a third, it is raised."""
    whole = build(tmp_path / "whole", np.arange(N), rows).settings["margin"]
    monkeypatch.setattr(building, "_HEADROOM", building._HEADROOM * 0.7)
    assert build(tmp_path / "part", np.arange(N), rows).settings["margin"] == pytest.approx(
        0.7 * whole * 1.25, rel=0.26
    )
    monkeypatch.setattr(building, "_HEADROOM", 0.0)
    assert build(tmp_path / "none", np.arange(N), rows).kind == "exact"


def test_vectors_that_are_no_directions_are_left_out(
    rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = rows[:300].copy()
    some[7], some[9] = 0, np.nan
    manifest = build(tmp_path / "1", np.arange(300), some)
    assert manifest.size == 298 and "left 2 vectors out of the snapshot" in caplog.text
    assert not {7, 9} & set(Snapshot.open(tmp_path / "1").ids.tolist())


def test_the_sample_is_the_ids_of_least_hash(small: Path, opened: dict[str, Snapshot]) -> None:
    """Of 12,000 the 2,560 of least hash; of 2,000 all. One id more changes one of them at most."""
    some = opened["rabitq"]
    least = some.ids[np.argsort(sampling_hash(some.ids))[:2560]]
    assert some.sample_ids.tolist() == sorted(least.tolist())
    assert np.array_equal(some.sample, some.vectors_of(some.sample_ids))
    assert len(Snapshot.open(small).sample) == SMALL


# ---- the files


def test_the_formats_are_open_and_nothing_else_is_left(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == LOADED | MAPPED
    ids = np.load(saved / "ids.npy")
    vectors = np.fromfile(saved / "vectors.f16", "<f2").reshape(-1, 32)
    assert np.array_equal(vectors, clustered(SMALL, 32, per_cluster=10))
    crc = np.fromfile(saved / "rows.crc32", "<u4")
    assert crc[5] == zlib.crc32(vectors[5].tobytes(), 22) and ids[5] == 22
    manifest = read_manifest(saved)
    assert (manifest.encoder_id, manifest.last_seq, manifest.dim, manifest.size) == (
        "enc",
        42,
        32,
        SMALL,
    )
    sizes = sum(path.stat().st_size for path in saved.iterdir() if path.name != "manifest.json")
    assert manifest.bytes == sizes
    assert json.loads((saved / "manifest.json").read_text())["format_version"] == 3


def flips(saved: Path, count: int, seed: int) -> Iterator[Path]:
    """Flip a bit of `count` bytes over all files, one at a time; yield the file's path meanwhile."""
    random = np.random.default_rng(seed)
    paths = sorted(saved.iterdir())
    for number in range(count):
        path = paths[number % len(paths)]
        size = path.stat().st_size
        position = (0, size - 1)[number // len(paths)] if number < 2 * len(paths) else None
        with path.open("r+b") as file:
            file.seek(random.integers(size) if position is None else position)
            at, byte = file.tell(), file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << int(random.integers(8))]))
            file.flush()
            yield path
            file.seek(at)
            file.write(bytes([byte]))
        (saved / "damaged").unlink(missing_ok=True)


@pytest.mark.parametrize("count", [210, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_flipped_byte_is_an_error_or_changes_nothing(
    count: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faiss never reads a damaged file, and reading all rows always finds a damaged one."""
    queries = clustered(3, 32, seed=2).astype(np.float32)
    whole = Snapshot.open(saved)
    expected = whole.search(queries, 10)
    given: list[Path] = []
    read = kinds.read_structure
    monkeypatch.setattr(
        snapshot, "read_structure", lambda path, size: given.append(path) or read(path, size)
    )
    for path in flips(saved, count, seed=count):
        given.clear()
        if path.name in LOADED:
            with pytest.raises(IndexDamaged, match=path.name):
                Snapshot.open(saved)
            assert not (given and path.name == "codes.faiss")
            continue
        some = Snapshot.open(saved)
        try:
            hits = some.search(queries, 10)
            for (a, s), (b, t) in zip(hits, expected, strict=True):
                assert np.array_equal(a, b) and np.array_equal(s, t)
        except IndexDamaged as error:
            assert "vectors.f16 is not what was written: the CRC-32" in str(error)
        with pytest.raises(IndexDamaged, match="CRC-32 of the vector of picture"):
            some.vectors_of(some.ids)
        with pytest.raises(IndexDamaged):
            some.search(queries, SMALL)  # scores all rows
    assert np.array_equal(Snapshot.open(saved).search(queries, 10)[2][0], expected[2][0])


def test_rows_that_changed_places_are_noticed(saved: Path) -> None:
    """Each with its own checksum: a checksum of the bytes alone would be right."""
    for name, width in (("vectors.f16", 64), ("rows.crc32", 4)):
        data = bytearray((saved / name).read_bytes())
        data[:width], data[width : 2 * width] = data[width : 2 * width], data[:width]
        (saved / name).write_bytes(data)
    some = Snapshot.open(saved)
    with pytest.raises(IndexDamaged, match="vector of picture 7 differs"):
        some.vectors_of(np.array([7]))


def test_missing_truncated_and_longer_files_are_named(saved: Path) -> None:
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        for other in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(other)
            with pytest.raises(IndexDamaged, match=f"{path.name}.* is not what was written"):
                Snapshot.open(saved)
        path.unlink()
        with pytest.raises(IndexDamaged, match=f"{path.name} cannot be read"):
            Snapshot.open(saved)
        path.write_bytes(whole)
        (saved / "damaged").unlink()
    shutil.rmtree(saved)
    with pytest.raises(IndexDamaged, match=r"manifest.json cannot be read .*clipkit index"):
        read_manifest(saved)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"checksum": 1}', "[" * 5000, "\xff"])
def test_a_manifest_of_anything_else_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IndexDamaged, match="is not what was written"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("version", "words"), [(1, "an older format"), (4, "a format")])
def test_another_format_version_is_refused(version: int, words: str, tmp_path: Path) -> None:
    write_facts(tmp_path, {"format_version": version, "files": {}})
    with pytest.raises(IndexDamaged, match=rf"is of {words} \({version}; this clipkit reads 3\)"):
        read_manifest(tmp_path)


def test_an_existing_snapshot_is_never_written_over(saved: Path, rows: Rows) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(InputError, match=r"000007 exists; snapshots are never overwritten"):
        build(saved, np.arange(5), rows[:5])
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# ---- a catalog's snapshots


def fill(catalog: Catalog, numbers: range, rows: Rows) -> None:
    """Add pictures with these numbers' rows and commit."""
    for number in numbers:
        num = catalog.add_picture(
            image_id=f"{number:032x}", width=1, height=1, format="JPEG", bytes=1
        )
        catalog.add_place(num, f"/p/{number}.jpg", size=1, mtime_ns=number)
        catalog.add_vectors("enc", np.array([num]), rows[number : number + 1])
    catalog.commit()


@pytest.fixture
def catalog(tmp_path: Path, rows: Rows) -> Iterator[Catalog]:
    """300 pictures, of which there is a snapshot."""
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        catalog.register_encoder("enc", spec="fake", config_json="{}", dim=DIM)
        fill(catalog, range(300), rows)
        refresh_snapshot(catalog, "enc", force=True)
        yield catalog


def current(catalog: Catalog) -> Snapshot | None:
    return load_snapshot(catalog, "enc", catalog.snapshot("enc"))


def listed(catalog: Catalog) -> list[str]:
    return sorted(path.name for path in (catalog.folder / "snapshots").iterdir())


OPERATIONS = ("write", "fsync", "rename", "sync_folder")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> list[str]:
    """Let the `number`-th durable operation fail, counted from 1; return the list of their names."""
    done: list[str] = []

    def counted(name: str, operation: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            done.append(name)
            if len(done) == number:
                raise OSError(code, os.strerror(code))
            operation(*arguments)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(durable, name, counted(name, getattr(durable, name)))
    return done


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_disk_fails_at_every_write_in_turn(
    code: int, catalog: Catalog, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old snapshot serves, nothing temporary is left, and the next build succeeds."""
    fill(catalog, range(300, 330), rows)
    query = rows[:1].astype(np.float32)
    number, failed = 0, set()
    while True:
        number += 1
        with monkeypatch.context() as patch:
            done = interrupt_at(patch, number, code)
            try:
                refresh_snapshot(catalog, "enc", force=True)
            except ClipkitError as error:
                assert f"cannot write a snapshot to {catalog.folder}" in str(error)
                assert os.strerror(code) in str(error)
            else:
                break
        failed.add(done[-1])
        some = current(catalog)
        assert some is not None and some.folder.name == "000001"
        assert some.search(query, 3)[0][0].tolist()[:1] == [1]
        assert not list((catalog.folder / "snapshots").glob(".*"))
    assert failed == set(OPERATIONS) and number > 20
    some = current(catalog)
    assert some is not None and some.size == 330
    assert listed(catalog) == ["000001", some.folder.name]


def test_a_killed_builds_folder_is_removed_by_the_next(catalog: Catalog) -> None:
    folder = catalog.folder / "snapshots"
    for pid in (os.getpid(), 999_999):  # in a container the next process may have the same id
        shutil.copytree(folder / "000001", folder / f".000002.{pid}-1.tmp")
    refresh_snapshot(catalog, "enc", force=True)
    assert listed(catalog) == ["000001", "000002"]


def test_a_build_can_be_stopped_anywhere(catalog: Catalog) -> None:
    reports: list[tuple[str, int, int]] = []
    refresh_snapshot(catalog, "enc", force=True, on_progress=lambda *r: reports.append(r))
    stages = list(dict.fromkeys(what for what, _, _ in reports))
    assert stages == ["writing vectors", "making codes", "searching exactly", "measuring recall"]
    assert all(0 <= done <= total == 300 for _, done, total in reports)
    before = catalog.snapshot("enc"), listed(catalog)
    for stage in stages:
        stop = threading.Event()

        def report(what: str, *_: int, stage: str = stage, stop: threading.Event = stop) -> None:
            if what == stage:
                stop.set()

        assert refresh_snapshot(
            catalog, "enc", force=True, stop=stop, on_progress=report
        ) is None or (
            stage == "searching exactly"  # one chunk: too late to stop, but for the next stage
        )
        if stage != "searching exactly":
            assert (catalog.snapshot("enc"), listed(catalog)) == before
        else:
            before = catalog.snapshot("enc"), listed(catalog)


def test_a_snapshot_is_built_beside_a_writer(catalog: Catalog, rows: Rows) -> None:
    """The build waits in its first stage until the writer has committed more, and has more pending:
    its snapshot is of the state that it began with, and pointing to it disturbs nothing."""
    begun, go_on = threading.Event(), threading.Event()
    built: list[Manifest | None] = []

    def report(*_: object) -> None:
        begun.set()
        assert go_on.wait(60)

    thread = threading.Thread(
        target=lambda: built.append(
            refresh_snapshot(catalog, "enc", force=True, on_progress=report)
        )
    )
    thread.start()
    assert begun.wait(60)
    fill(catalog, range(300, 320), rows)
    go_on.set()
    for number in range(320, 340):
        fill(catalog, range(number, number + 1), rows)
    thread.join()
    assert built[0] is not None and built[0].size == 300
    pointer = catalog.snapshot("enc")
    assert pointer is not None and catalog.count_vectors("enc", after_seq=pointer.last_seq) == 40
    with Catalog.open(catalog.folder) as reader:
        assert len(reader.live_nums("enc")) == 340


def test_damage_that_a_search_finds_is_remembered(
    catalog: Catalog, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A refresh reads no vectors, so it would not find it: sizes and manifest are right."""
    monkeypatch.setattr(building, "SNAPSHOT_FROM", 4)
    assert refresh_snapshot(catalog, "enc") is None
    some = current(catalog)
    assert some is not None
    with (some.folder / "vectors.f16").open("r+b") as file:
        file.write(b"\x55")
    assert refresh_snapshot(catalog, "enc") is None
    with pytest.raises(IndexDamaged, match="vector of picture 1 differs"):
        some.search(rows[:1].astype(np.float32), 3)
    assert current(catalog) is None and "found damaged by a search" in caplog.text
    assert refresh_snapshot(catalog, "enc") is not None
    assert current(catalog) is not None


def test_an_older_format_is_rebuilt(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "SNAPSHOT_FROM", 4)
    manifest = catalog.folder / "snapshots" / "000001" / "manifest.json"
    manifest.unlink()
    write_facts(manifest.parent, {"format_version": 1, "files": {}})
    assert current(catalog) is None and "is of an older format" in caplog.text
    assert refresh_snapshot(catalog, "enc") is not None


def test_removed_pictures_leave_the_snapshot(catalog: Catalog) -> None:
    """29 of 300 rows are not a tenth, 30 are; of no picture at all the snapshot is empty."""
    catalog.remove_places(f"/p/{number}.jpg" for number in range(29))
    catalog.commit()
    assert refresh_snapshot(catalog, "enc") is None
    catalog.remove_places(["/p/29.jpg"])
    catalog.commit()
    manifest = refresh_snapshot(catalog, "enc")
    assert manifest is not None and manifest.size == 270
    catalog.remove_places(f"/p/{number}.jpg" for number in range(300))
    catalog.commit()
    manifest = refresh_snapshot(catalog, "enc")
    assert manifest is not None and manifest.size == 0
    assert refresh_snapshot(catalog, "enc") is None
    some = current(catalog)
    assert some is not None and some.search(np.ones((1, DIM), np.float32), 3)[0][0].shape == (0,)


def test_pictures_that_come_back_count_as_newer(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the snapshot, and again among what is searched beside it."""
    monkeypatch.setattr(building, "SNAPSHOT_FROM", 10)
    for number in range(40):
        catalog.remove_places([f"/p/{number}.jpg"])
    catalog.commit()
    for number in range(40):
        num = catalog.has_picture(f"{number:032x}")
        assert num is not None
        catalog.add_place(num, f"/p/{number}.jpg", size=1, mtime_ns=1)
    catalog.commit()
    pointer = catalog.snapshot("enc")
    assert pointer is not None
    assert catalog.count_vectors("enc", after_seq=pointer.last_seq) == 40
    manifest = refresh_snapshot(catalog, "enc")
    assert manifest is not None and manifest.size == 300


def test_a_kind_registered_from_outside_serves_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Rows, tmp_path: Path
) -> None:
    rabitq = KINDS["rabitq"]
    assert rabitq is not None
    monkeypatch.setitem(KINDS, "mine", replace(rabitq))
    assert build(tmp_path / "1", ids[:3000], rows[:3000], kind="mine").kind == "mine"
    assert len(Snapshot.open(tmp_path / "1").search(rows[:1].astype(np.float32), 10)[0][0]) == 10
