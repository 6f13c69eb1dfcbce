"""What the catalog holds in memory follows the file: filters, words and lists after any changes equal
those of a catalog that was just opened, and of plain Python over the rows."""

# ruff: noqa: F811
from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from catalogs import (  # noqa: F401
    ENCODER,
    NOON_2020,
    SECOND,
    add,
    folder,
    found,
    image_id,
    reader,
    vector_of,
    writer,
)
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters, PictureRow, columns, queries
from clipkit.catalog.rows import fold
from clipkit.errors import InputError
from clipkit.picture_set import PictureSet

NAMES = ("a", "Ab", "IMG_1", "ｃafé", "cafe\u0301", "東京", "x%y")
PATHS = [f"/{sub}/{name}.jpg" for sub in ("p/Café", "p/ab", "q/ab", "q/c") for name in NAMES]
DATES = (None, "2019-12-31T23:59:59", "2020-01-01T00:00:00", "2023-05-01T12:30:00")
CAMERAS = (None, "Canon EOS", "CANON", "Leica ß")
PARTS = ("a", "ab", "/ab/", "b/i", "CAFÉ", "é/im", "東", "京.", "x%", "", "/p/", "1.jpg", "q/c/a")


def passes(row: PictureRow, filters: Filters) -> bool:
    """The documented meaning of Filters, in plain Python over one row."""
    dated = row.dated or ""
    places = []
    for place in row.places:
        folded, folder = fold(place), fold(os.path.dirname(place) + "/")
        in_folder = not filters.folders or any(
            place.startswith(f.rstrip("/") + "/") if os.path.isabs(f) else f"/{fold(f)}/" in folder
            for f in filters.folders
        )
        places.append(in_folder and all(fold(part) in folded for part in filters.paths))
    camera = fold(row.camera or "")
    orientation = {"landscape": row.width > row.height, "portrait": row.width < row.height,
                   "square": row.width == row.height, None: True}[filters.orientation]  # fmt: skip
    return all((
        filters.after is None or dated >= filters.after,
        filters.before is None or dated < filters.before,
        not filters.cameras or (row.camera and any(fold(c) in camera for c in filters.cameras)),
        filters.camera is None or row.camera == filters.camera,
        not filters.formats or row.format.upper() in {name.upper() for name in filters.formats},
        {fold(tag) for tag in filters.tags} <= {fold(tag) for tag in row.tags},
        row.width >= filters.min_width and row.height >= filters.min_height,
        max(row.width, row.height) >= filters.min_side,
        orientation, any(places),
    ))  # fmt: skip


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


FILTERS = st.builds(
    Filters,
    after=some(None, None, "2020", "2020-01-01", "2023-05"),
    before=some(None, None, "2020", "2023-05-02", "2030"),
    paths=st.lists(some(*PARTS), max_size=2).map(tuple),
    folders=st.lists(some("/p", "/q/ab", "ab", "café", "CAFÉ", "/p/Café/", "no"), max_size=2).map(tuple),
    cameras=st.lists(some("canon", "SS", "eos"), max_size=2).map(tuple),
    camera=some(None, None, "CANON"),
    formats=st.lists(some("jpeg", "PNG"), max_size=2).map(tuple),
    tags=st.lists(some("sea", "STRASSE", "none"), max_size=2).map(tuple),
    min_width=some(0, 0, 500), min_height=some(0, 0, 500), min_side=some(0, 0, 500),
    orientation=some(None, None, "landscape", "portrait", "square"),
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 12), st.sampled_from(PATHS), some(*DATES), some(*CAMERAS),
            some("JPEG", "PNG"), some((400, 300), (300, 600), (500, 500)),
            some((), ("Sea",), ("straße", "sea")),
        ),
        st.tuples(st.just("remove"), st.sampled_from(PATHS)),
        st.tuples(st.just("purge")),
        st.tuples(st.just("texts"), st.sampled_from(PATHS), some((), ("sea",))),
        st.tuples(st.just("commit")),
    ),
    max_size=25,
)  # fmt: skip


def do(writer: Catalog, step: tuple[Any, ...]) -> None:
    match step:
        case ("add", number, path, taken_at, camera, kind, (width, height), tags):
            facts = {"taken_at": taken_at, "camera": camera, "format": kind}
            add(writer, number, path, width=width, height=height, tags=tags, **facts)
        case ("remove", path):
            writer.remove_places([path])
        case ("purge",):
            writer.purge()
        case ("texts", path, tags):
            writer.set_place_texts(path, captions=[], tags=tags)
        case _:
            writer.commit()


def _added(number: int, camera: str | None) -> tuple[Any, ...]:
    return ("add", number, PATHS[number], None, camera, "JPEG", (300, 600), ())


@example(  # the last picture is gone, and purged, before anything is committed
    [_added(0, "Leica"), _added(1, None), ("remove", PATHS[1]), ("purge",)],
    [Filters(cameras=("Leica",), orientation="portrait")],
)
@settings(
    max_examples=30, suppress_health_check=list(HealthCheck), deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
)  # fmt: skip
@given(STEPS, st.lists(FILTERS, min_size=1, max_size=4))
def test_filters_mean_what_they_say_after_any_changes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]], filters: list[Filters]
) -> None:
    """A writer (uncommitted changes included), a reader that has followed each commit, and one opened
    at the end give what plain Python finds in all rows; the same for words, lists and counts."""
    folder = tmp_path_factory.mktemp("index")
    words = [["ab", "img"], ["sea"], ["東"], ["q"]]
    with Catalog.open(folder, write=True) as writer:
        writer.register_encoder(ENCODER, spec="builtin", config_json="{}", dim=4)
        writer.commit()
        with Catalog.open(folder) as reader:
            for step in steps:
                do(writer, step)
                for one in filters:
                    reader.matching(one)
                reader.having(words)
                reader.live_nums(ENCODER)
                rows = writer.rows(range(99))
                for one in filters:
                    wanted = [num for num, row in rows.items() if passes(row, one)]
                    assert list(writer.matching(one)) == wanted
            writer.commit()
            with Catalog.open(folder) as fresh:
                rows = fresh.rows(range(99))
                for catalog in (reader, fresh, writer):
                    for one in filters:
                        wanted = [num for num, row in rows.items() if passes(row, one)]
                        assert list(catalog.matching(one)) == wanted
                    assert list(catalog.live_nums(ENCODER)) == list(rows)
                    stats = catalog.stats(ENCODER)
                    places = sum(len(row.places) for row in rows.values())
                    assert (stats.pictures, stats.vectors) == (len(rows), len(rows))
                    assert (stats.places, stats.bytes) == (places, 1000 * len(rows))
                assert reader.having(words) == fresh.having(words) == writer.having(words)
                assert reader.facets() == fresh.facets()
                assert dict(reader.folders()) == dict(fresh.folders())


def test_many_changes_at_once_are_read_anew(
    writer: Catalog, reader: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "MOST_CHANGED", 3)
    assert list(reader.matching(Filters(min_width=600))) == [] == list(reader.having([["p"]])[0])
    nums = [add(writer, number, f"/p/{number}.jpg") for number in range(1, 9)]
    writer.commit()
    assert list(reader.matching(Filters(min_width=600, folders=("p",)))) == nums
    assert list(reader.having([["p"]])[0]) == nums


def test_sets_that_are_kept_stay_within_their_memory(
    writer: Catalog, reader: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "SET_BYTES", 100)
    for number in range(1, 50):
        add(writer, number, f"/p/{number}.jpg", tags=[f"t{number % 5}"])
    writer.commit()
    for number in range(5):
        assert len(reader.matching(Filters(tags=(f"t{number}",)))) == 10 - (number == 0)
    kept = reader._columns._sets
    assert len(kept) <= 2


# ---- lists


@pytest.mark.parametrize("sort", ["date", "name"])
@pytest.mark.parametrize("walked", [0, 10**6])
def test_pages_join_to_the_whole_list(
    writer: Catalog, reader: Catalog, monkeypatch: pytest.MonkeyPatch, sort: str, walked: int
) -> None:
    """By the index alone and by the order in memory, for all pictures, many and few, whatever the
    length of a page; ties (three dates, four names) go by image_id."""
    monkeypatch.setattr(queries, "_MOST_WALKED", walked)
    for number in range(1, 60):
        date = (None, "2020-01-01T00:00:00", "2023-05-01T12:30:00")[number % 3]
        mtime_ns = 2**62 if number % 2 else NOON_2020 + number % 5 * SECOND
        add(
            writer,
            number,
            f"/p/{number}/{'bBaé'[number % 4]}.jpg",
            taken_at=date,
            mtime_ns=mtime_ns,
        )
    writer.commit()
    rows = sorted(reader.rows(range(99)).values(), key=lambda row: row.image_id)
    if sort == "date":
        rows.sort(key=lambda row: row.dated or "", reverse=True)
    else:
        rows.sort(key=lambda row: fold(os.path.basename(row.path)))
    order = [row.num for row in rows]
    some = [PictureSet(nums) for nums in (order, order[10:50:7], order[-2:], [])]
    for among in (None, *some):
        wanted = [num for num in order if among is None or num in among]
        for limit in (1, 7, 100):
            pages: list[int] = []
            after = None
            for _ in range(99):
                page, after = reader.listed(sort, among=among, after=after, limit=limit)
                pages += page
                assert len(page) <= limit
                if after is None:
                    break
            assert pages == wanted, (limit, among)


def test_a_list_goes_on_where_it_was_after_changes(writer: Catalog, reader: Catalog) -> None:
    for number in range(1, 9):
        add(writer, number, f"/p/{number}.jpg")
    writer.commit()
    page, after = reader.listed("name", limit=3)
    assert page == [1, 2, 3]
    writer.remove_places(["/p/3.jpg", "/p/5.jpg"])
    add(writer, 9, "/p/44.jpg")
    writer.commit()
    assert reader.listed("name", after=after, limit=3)[0] == [4, 9, 6]


@pytest.mark.parametrize(
    ("sort", "after"),
    [("date", ["2023", "x"]), ("date", [2**70, "x"]), ("date", [True, "x"]), ("name", [1, "x"]),
     ("name", "x"), ("name", ["x"]), ("name", {"x": 1}), ("date", [1, 2])],
)  # fmt: skip
def test_a_wrong_position_is_refused(writer: Catalog, sort: str, after: object) -> None:
    with pytest.raises(InputError, match=f"is no position in a list by {sort}"):
        writer.listed(sort, after=after, limit=1)


def test_an_unknown_order_is_refused(writer: Catalog) -> None:
    with pytest.raises(InputError, match="sort 'size' is not one of date, name"):
        writer.listed("size", limit=1)


# ---- another file in its place


def test_an_index_that_is_replaced_is_opened_anew(tmp_path: Path, folder: Path) -> None:
    """All answers are the new file's, although both files have had as many changes."""
    other = tmp_path / "other"
    for place, name in ((folder, "old"), (other, "new")):
        with Catalog.open(place, write=True) as catalog:
            catalog.register_encoder(ENCODER, spec="builtin", config_json="{}", dim=4)
            add(catalog, 1, f"/p/{name}.jpg", camera=name, tags=[name])
    with Catalog.open(folder) as reader:
        before = reader.change_counter()
        assert found(reader, "old") == [1] and len(reader.matching(Filters(tags=("old",)))) == 1
        assert reader.having([["old"]])[0] == reader.matching(Filters(cameras=("old",)))
        assert reader.folders() and reader.facets().cameras == (("old", 1),)
        os.rename(folder, tmp_path / "away")
        assert found(reader, "old") == [1]  # nothing there yet: still the old one
        os.rename(other, folder)
        assert reader.change_counter() > before
        assert found(reader, "old") == [] and found(reader, "new") == [1]
        assert len(reader.matching(Filters(cameras=("old",)))) == 0
        assert len(reader.matching(Filters(tags=("new",)))) == 1
        assert reader.facets().cameras == (("new", 1),)
        assert reader.change_counter() == reader.change_counter()
    shutil.rmtree(tmp_path / "away")
