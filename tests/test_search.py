"""Searching a real catalog with a fake encoder of four hand-placed directions.

"dog", "beach", "leash" and "car" are the axes of a four-dimensional space; a picture's vector says
how much of each it shows. Vectors are kept in half precision, so cosines are right to 1e-3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipkit.catalog import Catalog, Filters
from clipkit.errors import EncoderMismatch, ImageError, InputError, ModelError, QueryError
from clipkit.images import image_id as content_id
from clipkit.query import Filter, Query, Term
from clipkit.search import Searcher, SearchHit, SearchResult, refresh_snapshot
from clipkit.search.live_vectors import SAMPLE, follow

AXES = ("dog", "beach", "leash", "car")


class FakeEncoder:
    """A text's vector is the sum of its words' axes; a picture's is its mean red, green and blue."""

    preferred_side = 8

    def __init__(self, encoder_id: str = "fake-1", spec: str = "fake") -> None:
        self.encoder_id, self.spec = encoder_id, spec
        self.texts: list[str] = []  # all that was ever encoded
        self.pictures = 0

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.texts += texts
        rows = [[float(axis in text.split()) for axis in AXES] for text in texts]
        return unit(rows)

    def encode_images(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        self.pictures += len(images)
        return unit([[*np.asarray(image).mean(axis=(0, 1)), 0.0] for image in images])


def unit(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float32]:
    array = np.array(rows, dtype=np.float32).reshape(-1, 4)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


class Writer:
    """Fills a catalog; pictures are named by one word, their image_id is that word's hash."""

    def __init__(self, folder: Path) -> None:
        self.catalog = Catalog.open(folder, write=True)
        self.register("fake-1", "fake")

    def register(self, encoder_id: str, spec: str) -> None:
        self.catalog.register_encoder(encoder_id, spec=spec, config_json="{}", dim=4)
        self.catalog.commit()

    def add(
        self,
        name: str,
        vector: Sequence[float] | None,
        *,
        encoder_id: str = "fake-1",
        image_id: str | None = None,
        commit: bool = True,
        captions: Sequence[str] = (),
        tags: Sequence[str] = (),
        width: int = 640,
        height: int = 480,
        taken_at: str | None = None,
        camera: str | None = None,
    ) -> int:
        num = self.catalog.add_picture(
            image_id=image_id or key(name),
            width=width,
            height=height,
            format="JPEG",
            bytes=1000,
            taken_at=taken_at,
            camera=camera,
            captions=captions,
            tags=tags,
        )
        self.catalog.add_place(num, path(name), size=1000, mtime_ns=num * 10**9)
        if vector is not None:
            self.catalog.add_vectors(encoder_id, np.array([num]), unit([vector]))
        if commit:
            self.catalog.commit()
        return num

    def remove(self, name: str) -> None:
        self.catalog.remove_places([path(name)])
        self.catalog.commit()


def key(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def path(name: str) -> str:
    return f"/pictures/{name}.jpg"


def names(result: SearchResult) -> list[str]:
    assert [hit.rank for hit in result.hits] == list(range(1, len(result.hits) + 1))
    return [Path(hit.path).stem for hit in result.hits]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path / "index")
    yield writer
    writer.catalog.close()


@pytest.fixture
def catalog(writer: Writer) -> Iterator[Catalog]:
    with Catalog.open(writer.catalog.folder) as catalog:
        yield catalog


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def searcher(catalog: Catalog, encoder: FakeEncoder) -> Searcher:
    return Searcher(catalog, encoder)


def not_needed() -> FakeEncoder:
    raise AssertionError("the encoder is not needed for this")


def fill(writer: Writer) -> None:
    """Cosines to "dog": swim 0.6, walk 0.6, run 0.8, drive 0."""
    writer.add("swim", [0.6, 0.8, 0, 0])
    writer.add("walk", [0.6, 0, 0.8, 0])
    writer.add("run", [0.8, 0.6, 0, 0])
    writer.add("drive", [0, 0, 0, 1])


# ---- what comes first


def test_the_nearest_come_first_and_ties_go_by_image_id(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    tied = sorted(["swim", "walk"], key=key)
    result = searcher.search("dog")
    assert names(result) == ["run", *tied, "drive"]
    assert [hit.score for hit in result.hits] == pytest.approx([0.8, 0.6, 0.6, 0], abs=1e-3)
    assert result.total == 4
    assert set(result.seconds) == {"load", "encode", "search", "rows"}
    # also where the tie straddles the last rank, and k has no cap
    assert names(searcher.search("dog", k=2)) == ["run", tied[0]]
    assert names(searcher.search("dog", k=10**9)) == names(result)


def test_many_ties_at_the_last_rank(writer: Writer, searcher: Searcher) -> None:
    """40 pictures with one vector: the first by image_id, whatever order they were added in."""
    all_names = [f"p{number}" for number in range(40)]
    for name in all_names:
        writer.add(name, [1, 1, 0, 0])
    assert names(searcher.search("dog", k=3)) == sorted(all_names, key=key)[:3]


def test_an_exclusion_pushes_down(writer: Writer, searcher: Searcher) -> None:
    """dog - 0.5 leash = (1, 0, -0.5, 0) / 1.1180: swim 0.6 / 1.1180 = 0.5367, walk
    (0.6 - 0.5 * 0.8) / 1.1180 = 0.1789, run 0.7155."""
    fill(writer)
    result = searcher.search("dog -leash")
    assert names(result) == ["run", "swim", "walk", "drive"]
    scores = [hit.score for hit in result.hits]
    assert scores == pytest.approx([0.7155, 0.5367, 0.1789, 0], abs=1e-3)
    # with weight 2: (1, 0, -1, 0) / 1.4142, walk (0.6 - 0.8) / 1.4142 = -0.1414, behind drive
    result = searcher.search("dog -leash^2")
    assert names(result) == ["run", "swim", "drive", "walk"]
    assert result.hits[3].score == pytest.approx(-0.1414, abs=1e-3)


def test_only_exclusions_list_what_is_least_alike_first(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    assert names(searcher.search("-dog"))[0] == "drive"


def test_weights(writer: Writer, searcher: Searcher) -> None:
    """dog + 3 beach = (1, 3, 0, 0) / 3.1623: swim (0.6 + 2.4) / 3.1623 = 0.9487,
    run (0.8 + 1.8) / 3.1623 = 0.8222. With 3 dog + beach they swap."""
    fill(writer)
    result = searcher.search("dog beach^3", k=2)
    assert names(result) == ["swim", "run"]
    assert [hit.score for hit in result.hits] == pytest.approx([0.9487, 0.8222], abs=1e-3)
    assert names(searcher.search("dog^3 beach", k=2)) == ["run", "swim"]


def test_terms_that_cancel_out_are_an_error(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    with pytest.raises(QueryError, match=r"terms cancel out; change a weight or leave one out"):
        searcher.search("dog -dog^2")


# ---- examples


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def test_a_picture_as_query(writer: Writer, searcher: Searcher, tmp_path: Path) -> None:
    """Pure green is the second axis, beach: swim 0.8, run 0.6."""
    fill(writer)
    file = tmp_path / "my green.png"
    file.write_bytes(png((0, 255, 0)))
    for result in (
        searcher.search(image=png((0, 255, 0)), k=2),
        searcher.search(image=Image.new("RGB", (16, 16), (0, 255, 0)), k=2),
        searcher.search(f'+"{file}"', k=2),
    ):
        assert names(result) == ["swim", "run"]
        assert [hit.score for hit in result.hits] == pytest.approx([0.8, 0.6], abs=1e-3)
    # with a word: dog + 0.5 green = (1, 0.5, 0, 0) / 1.1180, run (0.8 + 0.3) / 1.1180 = 0.9839
    result = searcher.search(f'dog +"{file}"^0.5', k=1)
    assert names(result) == ["run"]
    assert result.hits[0].score == pytest.approx(0.9839, abs=1e-3)


def test_examples_of_the_library_need_no_encoder(
    writer: Writer, catalog: Catalog, tmp_path: Path
) -> None:
    data = png((1, 2, 3))
    fill(writer)
    writer.add("known", [0, 0.6, 0.8, 0], image_id=content_id(data))
    file = tmp_path / "copy.png"
    file.write_bytes(data)
    searcher = Searcher(catalog, not_needed)
    for result in (
        searcher.search(f"+{content_id(data)}"),
        searcher.search(f"+{file}"),
        searcher.search(image=data),
    ):
        assert names(result)[:2] == ["known", "walk"]
        assert result.hits[0].score == pytest.approx(1, abs=1e-3)


def test_bad_examples(writer: Writer, catalog: Catalog, searcher: Searcher, tmp_path: Path) -> None:
    fill(writer)
    with pytest.raises(ImageError, match=r"nowhere\.jpg"):
        searcher.search(f"+{tmp_path}/nowhere.jpg")
    with pytest.raises(ImageError):
        searcher.search(image=b"not a picture")
    shut = Searcher(catalog, FakeEncoder(), files=False)
    with pytest.raises(QueryError, match=r"example '\+/etc/hosts' names a file, which cannot be"):
        shut.search("+/etc/hosts")
    assert names(shut.search(f"+{key('walk')}", k=1)) == ["walk"]


def test_similar_pictures(writer: Writer, catalog: Catalog) -> None:
    """To run = (0.8, 0.6, 0, 0): swim 0.96, walk 0.48, drive 0."""
    fill(writer)
    searcher = Searcher(catalog, not_needed)
    result = searcher.similar(key("run"))
    assert names(result) == ["swim", "walk", "drive"]
    assert [hit.score for hit in result.hits] == pytest.approx([0.96, 0.48, 0], abs=1e-3)
    assert result.total == 3
    assert names(searcher.similar(key("run"), k=1)) == ["swim"]
    result = searcher.similar(key("run"), filters=Filters(paths=("w",)))  # swim, walk
    assert (names(result), result.total) == (["swim", "walk"], 2)
    with pytest.raises(InputError, match=r"no picture 'nothing' in this library"):
        searcher.similar("nothing")
    writer.remove("run")
    with pytest.raises(InputError, match=r"no picture"):
        searcher.similar(key("run"))


# ---- filters and phrases


def test_filters_come_before_the_ranking_so_counts_are_exact(
    writer: Writer, searcher: Searcher
) -> None:
    """300 pictures of which every tenth is from 2023, all of these far down the ranking."""
    for number in range(300):
        late = number % 10 == 0
        writer.add(
            f"p{number:03}",
            [0.1 if late else 1, 0, 0, 1 + number / 1000],
            taken_at="2023-06-01T00:00:00" if late else "2022-06-01T00:00:00",
            commit=False,
        )
    writer.catalog.commit()
    result = searcher.search("dog after:2023", k=5)
    assert result.total == 30
    assert names(result) == ["p000", "p010", "p020", "p030", "p040"]  # the least of "car"
    assert searcher.search("dog before:2023").total == 270
    assert searcher.search("dog", filters=Filters(after="2023"), k=1).total == 30
    # both given: both must hold
    both = searcher.search("dog after:2023", filters=Filters(before="2023"))
    assert (both.hits, both.total) == ((), 0)
    assert searcher.search("dog path:p00 after:2022-07").total == 1
    # what has no vector yet is listed, but not ranked
    writer.add("p301", None, taken_at="2023-06-01T00:00:00")
    assert searcher.search("after:2023").total == 31
    assert searcher.search("dog after:2023").total == 30


def test_each_filter_reaches_the_catalog(writer: Writer, searcher: Searcher) -> None:
    writer.catalog.add_root("/pictures")
    writer.add(
        "trip", [1, 0, 0, 0], taken_at="2023-05-01T12:00:00", camera="Canon EOS 80D",
        tags=["holiday"], width=2000, height=1000,
    )  # fmt: skip
    writer.add(
        "other", [1, 0, 0, 0], taken_at="2020-01-01T12:00:00", camera="X", width=10, height=20
    )
    for words in (
        "after:2023-05", "path:TRIP", "camera:canon", "tag:holiday", "width:2000", "width:>1999",
        "height:21", "orientation:landscape", "format:jpg path:trip",
    ):  # fmt: skip
        for query in (words, f"dog {words}"):
            result = searcher.search(query)
            assert (names(result), result.total) == (["trip"], 1), query
    for words in ("before:2023", "orientation:portrait"):
        assert names(searcher.search(words)) == ["other"]
    assert searcher.search("format:png").total == 0
    for folder in ("/pictures", "pictures", "/pictures/", "."):
        assert searcher.search(f"folder:{folder}").total == 2, folder
    assert searcher.search("folder:/elsewhere").total == 0
    assert searcher.search("folder:trip").total == 0


def test_a_phrase_must_match_and_is_fused_by_reciprocal_rank(
    writer: Writer, searcher: Searcher
) -> None:
    """bm25 ranks a short text first: short, middle, long. By cosine: long, middle, short.
    short: 1/63 + 1/61 = 0.032266; middle: 1/62 + 1/62 = 0.032258; long: 1/61 + 1/63 as short.
    With weight 3 for the phrase: short 1/63 + 3/61 > middle 1/62 + 3/62 > long 1/61 + 3/63."""
    writer.add("short", [0.5, 1, 0, 0], captions=["red harbour"])
    writer.add("middle", [1, 1, 0, 0], captions=["red harbour with some more words in it"])
    writer.add("long", [1, 0, 0, 0], captions=["red harbour " + "and many more words " * 9])
    writer.add("other", [1, 0, 0, 0], captions=["a red and a blue harbour"])
    tied = sorted(["short", "long"], key=key)
    result = searcher.search('dog "red harbour"')
    assert (names(result), result.total) == ([*tied, "middle"], 3)
    scores = {Path(hit.path).stem: hit.score for hit in result.hits}
    assert scores == pytest.approx({"long": 1, "middle": 0.7071, "short": 0.4472}, abs=1e-3)
    assert names(searcher.search('dog "red harbour"^3')) == ["short", "middle", "long"]
    assert names(searcher.search('dog "red harbour"^3', k=1)) == ["short"]  # the last by cosine
    assert names(searcher.search('dog "red harbour"', k=1)) == tied[:1]
    # ranks count among the pictures that pass: without short, long is 1st and 2nd, middle 2nd and 1st
    tied = sorted(["middle", "long"], key=key)
    assert names(searcher.search('dog "red harbour" path:l')) == tied
    assert searcher.search('dog "red harbour" "no such words"').total == 0


def test_phrases_and_filters_alone_need_no_encoder(writer: Writer, catalog: Catalog) -> None:
    writer.add("b", [1, 0, 0, 0], captions=["red harbour"], taken_at="2021-01-01T00:00:00")
    writer.add(
        "a", None, captions=["a red harbour at night, quiet"], taken_at="2023-01-01T00:00:00"
    )
    writer.add("C", [1, 0, 0, 0], taken_at="2022-01-01T00:00:00")
    searcher = Searcher(catalog, not_needed)
    assert names(searcher.search("")) == ["a", "C", "b"]  # the newest first
    assert names(searcher.search("sort:name")) == ["a", "b", "C"]
    assert names(searcher.search("sort:date", k=2)) == ["a", "C"]
    assert names(searcher.search('"red harbour"')) == ["b", "a"]  # the shorter text
    assert names(searcher.search('"red harbour" sort:date')) == ["a", "b"]
    result = searcher.search("before:2023", k=1)
    assert (names(result), result.total) == (["C"], 2)
    assert (result.hits[0].score, result.hits[0].strength) == (None, None)
    query = Query(filters=(Filter("after", "2022"),), sort="name")
    assert names(searcher.search(query)) == ["a", "C"]


def test_sort_orders_the_k_best(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    assert names(searcher.search("beach sort:name", k=2)) == ["run", "swim"]
    assert names(searcher.search("dog beach sort:name", k=3)) == ["run", "swim", "walk"]
    assert names(searcher.search("beach sort:score", k=2)) == ["swim", "run"]


# ---- strength


def test_strength_marks_what_stands_out(writer: Writer, searcher: Searcher) -> None:
    """99 pictures with no dog and one of a dog. Cosines: one 1, the rest 0, mean 0.01, standard
    deviation sqrt(0.01 * 0.99) = 0.0995: the dog's z is 9.9, the others' -0.1."""
    for number in range(99):
        writer.add(f"p{number}", [0, 1, 0, 1], commit=False)
    writer.add("rex", [1, 0, 0, 0])
    result = searcher.search("dog", k=3)
    assert [hit.strength for hit in result.hits] == ["strong", "weak", "weak"]
    assert names(result)[0] == "rex"


def test_the_sample_is_fixed_and_of_the_live_library(writer: Writer, catalog: Catalog) -> None:
    vectors = np.random.default_rng(0).standard_normal((SAMPLE + 500, 4))
    for number, vector in enumerate(vectors):
        writer.add(f"p{number}", list(vector), commit=False)
    writer.catalog.commit()
    before = follow(catalog, "fake-1")
    assert before.sample.shape == (SAMPLE, 4)
    assert np.array_equal(before.sample, follow(catalog, "fake-1").sample)
    # from all over: 400 of the first 500 are expected, with a standard deviation of 8
    early = {row.tobytes() for row in before.vectors_of(np.arange(1, 501))}
    assert 350 < sum(row.tobytes() in early for row in before.sample) < 450
    writer.add("one more", [1, 0, 0, 0])
    after = follow(catalog, "fake-1", before)
    rows = {row.tobytes() for row in before.sample}
    assert len(rows - {row.tobytes() for row in after.sample}) <= 1


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
    assert len(state.nums) == 100


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
    assert searcher.search("dog", k=1).hits[0].path == "/pictures/new/jog.jpg"


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
    assert follow(catalog, "fake-1").from_snapshot
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
    monkeypatch.setattr("clipkit.search.live_vectors.SNAPSHOT_FROM", 4)
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
    vectors = folder / "vectors.npy"
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
    assert follow(catalog, "fake-1").from_snapshot


# ---- encoders


def test_another_encoder_is_an_error_that_names_both(writer: Writer, catalog: Catalog) -> None:
    fill(writer)
    message = (
        r"this index holds vectors of fake \(encoder fake-1\), but the search is with other "
        r"\(encoder fake-2\); search with --model fake, or index the pictures with the other "
        r"model: clipkit index FOLDER --model other"
    )
    other = FakeEncoder("fake-2", "other")
    for searcher in (
        Searcher(catalog, other),
        Searcher(catalog, lambda: other),
        Searcher(catalog, lambda: other, encoder_id="fake-1"),
    ):
        with pytest.raises(EncoderMismatch, match=message):
            searcher.search("dog")
        with pytest.raises(EncoderMismatch, match=message):
            searcher.search(f"dog +{key('run')}")
    with pytest.raises(EncoderMismatch, match=r"fake \(encoder fake-1\).*encoder fake-3"):
        Searcher(catalog, not_needed, encoder_id="fake-3").search("dog")
    with pytest.raises(EncoderMismatch, match=message):
        Searcher(catalog, other).similar(key("run"))


def test_a_model_that_changed_under_its_name_asks_to_index_again(
    writer: Writer, catalog: Catalog
) -> None:
    """Naming the same spec as the remedy would help nobody."""
    fill(writer)
    retrained = FakeEncoder("fake-2", "fake")
    message = (
        r"fake has changed .*fake-1 then, fake-2 now\); index the pictures again: clipkit index"
    )
    with pytest.raises(EncoderMismatch, match=message):
        Searcher(catalog, retrained).search("dog")


def test_two_encoders_in_one_catalog_do_not_mix(writer: Writer, catalog: Catalog) -> None:
    fill(writer)
    writer.register("fake-2", "other")
    writer.add("run", [0, 0, 0, 1], encoder_id="fake-2")
    assert Searcher(catalog, FakeEncoder()).search("dog").total == 4
    result = Searcher(catalog, FakeEncoder("fake-2", "other")).search("car")
    assert (names(result), result.total) == (["run"], 1)
    assert Searcher(catalog, not_needed, encoder_id="fake-2").similar(key("run")).total == 0


def test_an_empty_catalog_has_no_hits(catalog: Catalog) -> None:
    searcher = Searcher(catalog, not_needed)
    for query in ("dog", "", '"phrase"', "sort:name", "after:2023", f"+{'0' * 32}"):
        result = searcher.search(query)
        assert (result.hits, result.total) == ((), 0)


def test_the_encoder_is_loaded_once_and_texts_are_encoded_once(
    writer: Writer, catalog: Catalog, encoder: FakeEncoder
) -> None:
    fill(writer)
    loads = []

    def load() -> FakeEncoder:
        loads.append(1)
        return encoder

    searcher = Searcher(catalog, load)
    searcher.similar(key("run"))
    searcher.search("path:run")
    assert not loads
    threads = [threading.Thread(target=searcher.search, args=("dog -car",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encoder.texts.clear()
    searcher.search("dog")
    searcher.search("car -dog")
    searcher.search("dog -leash")
    assert (len(loads), encoder.texts) == (1, ["leash"])


def test_vectors_that_are_not_finite_are_an_error(writer: Writer, catalog: Catalog) -> None:
    class Broken(FakeEncoder):
        def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return np.full((len(texts), 4), np.nan, dtype=np.float32)

    fill(writer)
    with pytest.raises(ModelError, match=r"vector of text 'dog' has values that are not finite"):
        Searcher(catalog, Broken()).search("dog")


def test_bad_arguments(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    with pytest.raises(InputError, match=r"k is 0; it is how many pictures to show, at least 1"):
        searcher.search("dog", k=0)
    with pytest.raises(InputError, match=r"k is -1"):
        searcher.similar(key("run"), k=-1)
    with pytest.raises(QueryError, match=r"unknown key 'kamera'"):
        searcher.search("kamera:x")


def test_hits_are_plain_data(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    hit = searcher.search(Query(terms=(Term("dog"),)), k=1).hits[0]
    assert isinstance(hit, SearchHit)
    read = json.loads(json.dumps(dataclasses.asdict(hit)))
    assert read == {
        "rank": 1,
        "image_id": key("run"),
        "score": pytest.approx(0.8, abs=1e-3),
        "strength": "fair",
        "path": "/pictures/run.jpg",
    }
