"""What the catalog finds: phrases in names, captions and tags, and filters, exactly as told."""

# ruff: noqa: F811
from __future__ import annotations

from typing import Any

import pytest
from catalogs import NOON_2020, SECOND, add, folder, found, reader, writer  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters
from clipkit.errors import InputError
from clipkit.picture_set import PictureSet

# ---- phrases


@pytest.mark.parametrize(
    ("phrase", "has"),
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
def test_a_phrase_finds_names_captions_and_tags(writer: Catalog, phrase: str, has: bool) -> None:
    captions = ["Café au lait", "the end"]
    num = add(
        writer, 1, "/p/redcar_marcelo.jpg", "/q/BirthdayParty2023.jpg", captions=captions,
        tags=["New York", "red"],
    )  # fmt: skip
    assert found(writer, phrase) == ([num] if has else [])


def test_phrases_come_best_first(writer: Catalog) -> None:
    """bm25: the same single hit weighs more in a shorter text."""
    long = add(writer, 1, "/p/x.jpg", captions=["a cat " + "and much more " * 20])
    short = add(writer, 2, "/p/y.jpg", captions=["a cat"])
    for number in range(3, 9):  # else "cat" is in half of all texts and weighs nothing
        add(writer, number, f"/p/z{number}.jpg")
    assert found(writer, "cat") == [short, long]


def test_no_text_is_an_operator(writer: Catalog) -> None:
    num = add(writer, 1, "/p/cat.jpg", captions=["salt AND pepper"])
    add(writer, 2, "/p/dog.jpg", captions=["salt, pepper"])
    assert found(writer, "salt AND pepper") == [num]
    assert (
        found(writer, "names:cat")
        == found(writer, "cat*dog")
        == found(writer, 'cat" OR "dog')
        == []
    )


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)


def test_any_text_can_be_asked_for(writer: Catalog, reader: Catalog) -> None:
    add(writer, 1, "/p/cat.jpg", captions=["a cat"])
    writer.commit()

    @settings(max_examples=300)
    @given(ANY_TEXT | st.text('"*^(){}:+-ANDORNEARnames \0', max_size=30))
    def check(text: str) -> None:
        assert set(found(reader, text)) <= {1}
        assert set(reader.matching(Filters(paths=(text,), tags=(text,)))) <= {1}
        assert set(reader.matching(Filters(cameras=(text,), formats=(text,)))) <= {1}

    check()
    assert found(reader, "cat " * 50_000) == []


def test_any_text_can_be_kept(writer: Catalog) -> None:
    num = add(writer, 1, "/p/cat.jpg")

    @settings(max_examples=100)
    @given(st.lists(ANY_TEXT, max_size=4))
    def check(texts: list[str]) -> None:
        writer.set_place_texts("/p/cat.jpg", captions=texts, tags=texts)
        row = writer.rows([num])[num]
        assert row.captions == row.tags
        for tag in row.tags:
            assert list(writer.matching(Filters(tags=(tag,)))) == [num]

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
    assert writer.listed("date", limit=10) == ([*twins, file_dated, old], None)
    assert writer.listed("date", limit=1)[0] == twins[:1]
    assert writer.listed("date", among=PictureSet([old, new]), limit=10) == ([new, old], None)
    assert writer.listed("date", among=PictureSet(), limit=10) == ([], None)


def test_dates_after_is_inclusive_and_before_exclusive(writer: Catalog) -> None:
    dates = {1: "2022-12-31T23:59:59", 2: "2023-01-01T00:00:00", 3: "2023-05-01T00:00:00"}
    for number, date in dates.items():
        add(writer, number, f"/p/{number}", taken_at=date)
    add(writer, 4, "/p/4", mtime_ns=NOON_2020)  # no EXIF date: its file's

    def between(after: str | None, before: str | None) -> list[int]:
        return list(writer.matching(Filters(after=after, before=before)))

    assert between("2023", None) == [2, 3]
    assert between("2022-12-31", None) == [1, 2, 3]
    assert between("2023-05", None) == between("2023-05-01", None) == [3]
    assert between(None, "2023") == [1, 4]
    assert between(None, "2023-05-01") == [1, 2, 4]
    assert between("2023", "2023-05") == [2]
    assert between("2020-06-15", "2020-06-16") == [4]
    for bad in ("yesterday", "2023-5", "23", "2023-05-01 ", "２０２３"):
        with pytest.raises(
            InputError, match="is not a date; use the form 2023, 2023-05 or 2023-05-01"
        ):
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
        return list(writer.matching(Filters(**fields)))  # type: ignore[arg-type]

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
        return list(writer.matching(Filters(**fields)))

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


def test_facets_are_the_values_of_live_pictures_with_their_numbers(writer: Catalog) -> None:
    """Two JPEGs of one camera, a PNG without; the dead picture counts nowhere. Most frequent first."""
    add(writer, 1, "/p/1.jpg", camera="Acme One", tags=["Holiday", "sea"])
    add(writer, 2, "/p/2.jpg", camera="Acme One", tags=["sea"])
    add(writer, 3, "/p/3.png", format="PNG")
    add(writer, 4, camera="gone", tags=["gone"])
    facets = writer.facets()
    assert facets.formats == (("JPEG", 2), ("PNG", 1))
    assert facets.cameras == (("Acme One", 2),)
    assert facets.tags == (("sea", 2), ("holiday", 1))
    assert writer.facets(limit=1).formats == (("JPEG", 2),)


def test_a_whole_camera_and_the_longer_side(writer: Catalog) -> None:
    """ "iPhone 12" is a part of "iPhone 12 Pro", and not it; 900 is the height of the second."""
    first = add(writer, 1, "/p/1.jpg", camera="iPhone 12")
    second = add(writer, 2, "/p/2.jpg", camera="iPhone 12 Pro", width=600, height=900)
    assert list(writer.matching(Filters(cameras=("iphone 12",)))) == [first, second]
    assert list(writer.matching(Filters(camera="iPhone 12"))) == [first]
    assert list(writer.matching(Filters(min_side=900))) == [second]
    assert list(writer.matching(Filters(min_side=901))) == []
