"""Pages by cursor: together they are one large search, whatever their sizes and whatever happens."""

# ruff: noqa: F811
from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from directions import (  # noqa: F401
    AXES,
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
from hypothesis import assume, given
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters
from clipkit.errors import InputError
from clipkit.search import Searcher, SearchResult, ranking
from clipkit.search.cursor import MOST_CHARACTERS

PICTURES = 150


def ids(*results: SearchResult) -> list[str]:
    return [hit.picture.image_id for result in results for hit in result.hits]


def pages(
    searcher: Searcher, query: str, sizes: list[int], *, like: str | None = None, **given: Any
) -> Iterator[SearchResult]:
    """Yield the pages of a search to its end; the sizes repeat. Ranks go on and totals stay."""
    cursor, shown, total = None, 0, None
    while shown == 0 or cursor is not None:
        k = sizes[0]
        sizes = [*sizes[1:], k]
        if like is None:
            result = searcher.search(query, k=k, cursor=cursor, **given)
        else:
            result = searcher.similar(like, query, k=k, cursor=cursor, **given)
        assert [hit.rank for hit in result.hits] == list(
            range(shown + 1, shown + 1 + len(result.hits))
        )
        assert total in (None, result.total)
        yield result
        total, cursor, shown = result.total, result.cursor, shown + len(result.hits)
        if not result.hits:
            assert cursor is None
            return


def populate(writer: Writer) -> None:
    """Add pictures of which some have equal vectors, equal captions, no caption or no vector."""
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(PICTURES, 4))
    for number in range(PICTURES):
        has = draw.random(4) < (0.3, 0.3, 0.6, 0.1)
        caption = " ".join(axis for axis, some in zip(AXES, has, strict=True) if some)
        writer.add(
            f"p{number:03}",
            None if number % 17 == 16 else list(vectors[draw.integers(number + 1)]),
            captions=[caption or "nothing"],
            taken_at=f"20{number % 7:02}-01-01T00:00:00",
            width=100 + number % 3,
            commit=False,
        )
    writer.catalog.commit()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    writer = Writer(tmp_path_factory.mktemp("paging"))
    populate(writer)
    with Catalog.open(writer.catalog.folder) as catalog:
        yield Searcher(catalog, FakeEncoder())
    writer.catalog.close()


@pytest.fixture
def populated(writer: Writer, searcher: Searcher) -> Searcher:
    """A searcher of the same pictures in a catalog that the test may change by `writer`."""
    populate(writer)
    return searcher


QUERIES = [
    "dog", "dog beach", "-dog", "dog car leash beach", "", "sort:name", "sort:date", "after:2003",
    '"leash"', 'dog "leash"', 'dog "leash" "dog"', '"dog" sort:name', "beach before:2002 width:102",
    f"+{key('p003')}", f"car +{key('p003')}^2", "dog after:2030",
]  # fmt: skip


@given(
    query=st.sampled_from(QUERIES),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    like=st.sampled_from([None, None, key("p007"), key("p020")]),
    filters=st.sampled_from([None, Filters(min_width=101)]),
)
def test_pages_are_one_large_search(
    library: Searcher, query: str, sizes: list[int], like: str | None, filters: Filters | None
) -> None:
    assume(like is None or "sort:" not in query)  # these go page by page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TIERS", (4, 13, 40))
        found = list(pages(Searcher(library.catalog, FakeEncoder()), query, sizes, like=like,
                           filters=filters))  # fmt: skip
        (whole,) = pages(library, query, [10**9], like=like, filters=filters)
    assert ids(*found) == ids(whole)
    assert [hit for page in found for hit in page.hits] == [*whole.hits]
    assert whole.total == len(whole.hits) and whole.cursor is None
    assert not any(page.notes or page.empty for page in found[1:])


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    sort=st.sampled_from(["date", "name"]),
)
def test_with_words_each_page_holds_the_next_best_in_order(
    library: Searcher, sizes: list[int], sort: str
) -> None:
    best = ids(library.search("dog beach", k=PICTURES))
    start = 0
    for page in pages(library, f"dog beach sort:{sort}", sizes):
        assert sorted(ids(page)) == sorted(best[start : start + len(page.hits)])
        start += len(page.hits)
        rows = [hit.picture for hit in page.hits]
        order = [row.path if sort == "name" else row.dated or "" for row in rows]
        assert order == sorted(order, reverse=sort == "date")
    assert start == len(best)


@pytest.mark.parametrize("query", ["beach", "-car", "after:2001 sort:name", "", "beach after:2001"])
@pytest.mark.parametrize("seed", range(3))
def test_pages_go_on_when_pictures_come_and_go(
    writer: Writer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, query: str, seed: int
) -> None:
    """Each page is of the library as it is then: what was there all the time is on one page; nothing is
    on two; what has gone before its page is on none. Names say nothing here."""
    monkeypatch.setattr(ranking, "TIERS", (4, 13, 40))
    draw = np.random.default_rng(seed)
    for number in range(80):
        vector = draw.normal(size=4) if number % 4 else [1, 1, 0, 0]  # every fourth is alike
        date = f"200{number % 9}-01-01T00:00:00"
        writer.add(f"p{number:02}", list(vector), taken_at=date, commit=False)
    writer.catalog.commit()
    searcher = Searcher(catalog, FakeEncoder())
    before = ids(searcher.search(query, k=1000))
    cursor, shown, alive, gone = None, [], {f"p{number:02}" for number in range(80)}, set()
    while not shown or cursor is not None:
        page = searcher.search(query, k=7, cursor=cursor)
        assert not gone & set(ids(page))
        shown += ids(page)
        cursor = page.cursor
        removed = {str(name) for name in draw.choice(sorted(alive), 3, replace=False)}
        if len(shown) == 14:  # the last that was shown goes, too
            removed |= {name for name in alive if key(name) == shown[-1]}
        alive -= removed
        for name in removed:
            gone.add(key(name))
            writer.remove(name)
        late = f"late{len(shown):02}"
        writer.add(late, list(draw.normal(size=4)), taken_at="2004-06-01T00:00:00")
        if len(shown) % 2:  # another process, or one that was started again
            searcher = Searcher(catalog, FakeEncoder())
    assert len(shown) == len(set(shown))
    stayed = {key(name) for name in alive}
    assert [name for name in shown if name in stayed] == [n for n in before if n in stayed]
    assert [name for name in shown if name in before] == [n for n in before if n in shown]


def test_a_kept_ranking_is_not_searched_again(
    writer: Writer,
    catalog: Catalog,
    encoder: FakeEncoder,
    populated: Searcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second page reads rows only; a change of the library makes a new ranking."""
    first = populated.search("-dog -car after:2001", k=5)
    looked: list[str] = []
    for name in ("matching", "vectors"):
        method = getattr(catalog, name)
        monkeypatch.setattr(
            catalog, name, lambda *a, _m=method, _n=name, **o: looked.append(_n) or _m(*a, **o)
        )
    second = populated.search("-dog -car after:2001", k=5, cursor=first.cursor)
    assert not looked and encoder.texts == ["dog", "car"]
    writer.add("more", [0, 0, 0, 1])
    third = populated.search("-dog -car after:2001", k=5, cursor=second.cursor)
    assert {"matching", "vectors"} <= set(looked)
    assert len(set(ids(first, second, third))) == 15


def test_the_memory_of_rankings_is_bounded(
    populated: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rankings of 150 - 8 pictures at 16 bytes are more than 4,000 bytes: one is kept."""
    monkeypatch.setattr(ranking, "MOST_BYTES", 4_000)
    for query in ("dog", "car", "beach"):
        populated.search(query, k=1000)
    kept = populated.live().rankings
    assert len(kept._rankings) == 1
    monkeypatch.setattr(ranking, "MOST_BYTES", 1)
    monkeypatch.setattr(ranking, "MOST_KEPT", 2)
    assert len(list(pages(populated, "leash", [10]))) == 15  # 142 pictures


def altered(cursor: str, **values: Any) -> str:
    """Return a cursor with other values: search, shown, place, key, image_id, position."""
    fields = ["search", "shown", "place", "key", "image_id", "position"]
    content = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    content = [values.get(name, value) for name, value in zip(fields, content, strict=True)]
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


@pytest.mark.parametrize("query", ["dog", "sort:name", "sort:date"])
def test_a_cursor_is_refused_where_it_does_not_belong(
    writer: Writer, catalog: Catalog, searcher: Searcher, query: str
) -> None:
    fill(writer)
    cursor = searcher.search(query, k=2).cursor
    assert cursor is not None and json.loads(json.dumps(cursor)) == cursor
    assert altered(cursor) and len(searcher.search(query, cursor=altered(cursor)).hits) == 2
    malformed = [
        "", "x", cursor[:-3], cursor + "AAAA", "é", "[]", "A" * (MOST_CHARACTERS + 1), "=" * 9,
        base64.urlsafe_b64encode(b"[" * 3000).decode(), base64.urlsafe_b64encode(b"{}").decode(),
        altered(cursor, place=-1), altered(cursor, place="1"), altered(cursor, shown=2**60),
        altered(cursor, shown=True), altered(cursor, key="x"), altered(cursor, key=float("nan")),
        altered(cursor, image_id=None), altered(cursor, search=3),
        altered(cursor, place=0, position=None),
    ]  # fmt: skip
    for text in malformed:
        with pytest.raises(InputError, match=r"the cursor is malformed; send back the cursor of"):
            searcher.search(query, cursor=text)
    other = r"the cursor belongs to another search or to another model; repeat the search"
    for again in (
        lambda: searcher.search(f"{query} car", cursor=cursor),
        lambda: searcher.search(query, cursor=cursor, filters=Filters(min_width=3)),
        lambda: searcher.similar(key("run"), query, cursor=cursor),
        lambda: searcher.search(query, cursor=cursor, image=np.eye(4, dtype=np.float32)[0]),
    ):
        with pytest.raises(InputError, match=other):
            again()
    if query == "dog":
        writer.register("fake-2", "other")
        writer.add("run", [1, 0, 0, 0], encoder_id="fake-2")
        with pytest.raises(InputError, match=other):
            Searcher(catalog, FakeEncoder("fake-2", "other")).search(query, cursor=cursor)


def test_a_place_beyond_the_end_ends(writer: Writer, searcher: Searcher) -> None:
    """Whoever writes a cursor moves within the same result."""
    fill(writer)
    cursor = searcher.search("dog", k=2).cursor
    assert cursor is not None
    far = altered(cursor, place=10**9, key=-5.0, image_id="none")
    result = searcher.search("dog", cursor=far)
    assert (result.hits, result.total, result.cursor) == ((), 4, None)
    first = altered(cursor, place=1, key=9.0, image_id="none")
    assert ids(searcher.search("dog", cursor=first)) == ids(searcher.search("dog"))


def test_an_example_picture_has_pages(library: Searcher) -> None:
    vector = np.array([0.6, 0.8, 0, 0], np.float32)
    (whole,) = pages(library, "", [1000], image=vector)
    assert ids(*pages(library, "", [50], image=vector)) == ids(whole)
    assert whole.hits[0].score == max(hit.score or 0 for hit in whole.hits)


def test_names_on_later_pages(writer: Writer, catalog: Catalog) -> None:
    """What lifted a picture is said on every page, also when the ranking is made again."""
    for number in range(20):
        caption = "dog" if number < 4 else "x"  # coverage 1 - 2 * 4 / 20 = 0.6
        writer.add(f"p{number:02}", [1, number, 0, 0], captions=[caption], commit=False)
    writer.catalog.commit()
    shown = {}
    cursor = None
    for _ in range(10):
        page = Searcher(catalog, FakeEncoder()).search("dog", k=2, cursor=cursor)
        shown |= {Path(hit.picture.path).stem: hit.named for hit in page.hits}
        cursor = page.cursor
    assert cursor is None and len(shown) == 20
    assert {name for name, named in shown.items() if named} == {f"p{n:02}" for n in range(4)}


def test_listing_needs_no_encoder_on_any_page(library: Searcher) -> None:
    searcher = Searcher(library.catalog, NotNeeded())
    assert sum(len(page.hits) for page in pages(searcher, "sort:name", [40])) == PICTURES
