"""What a search is asked beside words: example pictures, filters, phrases, an order."""

# ruff: noqa: F811
from __future__ import annotations

import io
from pathlib import Path

import pytest
from directions import (  # noqa: F401
    FakeEncoder,
    NotNeeded,
    Writer,
    catalog,
    encoder,
    fill,
    key,
    names,
    searcher,
    writer,
)
from PIL import Image

from clipkit.catalog import Catalog, Filters
from clipkit.errors import ImageError, InputError, QueryError
from clipkit.images import image_id as content_id
from clipkit.query import Filter, Query
from clipkit.search import Searcher

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
    searcher = Searcher(catalog, NotNeeded())
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
    searcher = Searcher(catalog, NotNeeded())
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
    for folder in ("/pictures", "pictures", "/pictures/", "Pictures"):
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
    scores = {Path(hit.picture.path).stem: hit.score for hit in result.hits}
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
    searcher = Searcher(catalog, NotNeeded())
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
