"""What names add to a search: words in folders, file names, captions and tags beside the cosine."""

# ruff: noqa: F811
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from directions import (  # noqa: F401
    AXES,
    FakeEncoder,
    Writer,
    catalog,
    encoder,
    key,
    names,
    searcher,
    writer,
)
from hypothesis import given
from hypothesis import strategies as st

from clipkit.catalog import Catalog, Filters
from clipkit.picture_set import PictureSet
from clipkit.query import Query, Term
from clipkit.search import Searcher, comparison
from clipkit.search.name_matches import (
    COVERAGE_POWER,
    NAME_WEIGHT,
    NAMED_COVERAGE,
    NameMatches,
    match_names,
    spellings,
)


def library(writer: Writer, *, folders: dict[str, int]) -> None:
    """Add pictures 0, 1, ... below /home/photos/FOLDER; the later, the less they show a dog. Pictures
    of the last folder show next to none."""
    total = sum(folders.values())
    number = 0
    for folder, count in folders.items():
        for _ in range(count):
            dog = 0.05 if folder == list(folders)[-1] else 1.0
            writer.add(f"/home/photos/{folder}/{number}", [dog, 1 + number / total, 0, 0])
            number += 1


def covered(matches: NameMatches) -> dict[int, float]:
    """The coverage of each picture that has any, by num."""
    pictures = [block.pictures.nums for block in matches.blocks(1, 1)]
    nums = np.concatenate([np.empty(0, np.int64), *pictures])
    return dict(zip(nums.tolist(), matches.coverage(nums).tolist(), strict=True))


def folders_of(searcher: Searcher, query: str, k: int = 6) -> list[str]:
    return [Path(hit.picture.path).parent.name for hit in searcher.search(query, k=k).hits]


def test_the_name_of_a_folder_lifts_its_pictures_and_the_cosine_orders_them(
    writer: Writer, searcher: Searcher
) -> None:
    """36 pictures have cosines 0, 1/35, ..., 1 to "dog"; four in a folder called dog have some 0.5. The
    spread of all is 0.28, so these four rank by 0.28 * 3 * (1 - 2 * 4/40) ** 1.5 = 0.60 more: 1.1,
    before all others."""
    for number in range(36):
        cosine = number / 35
        writer.add(f"/home/misc/{number}", [cosine, (1 - cosine**2) ** 0.5, 0, 0], commit=False)
    for name, cosine in (("a", 0.49), ("b", 0.52), ("c", 0.5), ("d", 0.51)):
        writer.add(f"/home/dog/{name}", [cosine, (1 - cosine**2) ** 0.5, 0, 0], commit=False)
    writer.catalog.commit()
    result = searcher.search("dog", k=5)
    assert names(result) == ["b", "d", "c", "a", "35"]
    assert [hit.named for hit in result.hits] == [("dog",)] * 4 + [()]
    assert [hit.score for hit in result.hits[:2]] == pytest.approx([0.52, 0.51], abs=1e-3)


def test_the_bonus_by_hand(writer: Writer, catalog: Catalog) -> None:
    """Of ten pictures two lie in red_cars, one of them has the caption "a road". Query "a red car on a
    road": words red, car, road, of which 2, 2 and 1 pictures of 10 have: each counts 1/3 times
    1 - 2 * 0.2 = 0.6, 0.6 and 1 - 2 * 0.1 = 0.8. Coverage (0.6 + 0.6) / 3 = 0.4 and 2.0 / 3 = 0.6667.
    With an example of weight 1 beside the text each is half as much."""
    first = writer.add("/red_cars/1", [1, 0, 0, 0])
    second = writer.add("/red_cars/2", [1, 0, 0, 0], captions=["a road"])
    for number in range(8):
        writer.add(f"p{number}", [1, 0, 0, 0])
    query = Query(terms=(Term("a red car on a road"),))
    found = match_names(catalog, query, pictures=10, others=0)
    assert covered(found) == pytest.approx({first: 0.4, second: 2 / 3})
    assert found.words_of(first) == ()  # 0.4 is not the half of what is asked for
    assert found.words_of(second) == ("red", "car", "road")
    assert found.words_of(second) == ("red", "car", "road")
    assert found.words_of(second + 1) == ()
    bonus = found.bonus(np.array([second, 5, first]), 0.1)
    by_hand = [0.1 * NAME_WEIGHT * share**COVERAGE_POWER for share in (2 / 3, 0, 0.4)]
    assert bonus == pytest.approx(by_hand)
    half = match_names(catalog, query, pictures=10, others=1.0)
    assert covered(half) == pytest.approx({first: 0.2, second: 1 / 3})


def test_words_of_most_paths_and_words_that_say_nothing_do_not_matter(
    writer: Writer, catalog: Catalog, searcher: Searcher
) -> None:
    library(writer, folders={"the pictures": 3, "b": 3})
    for text in ("home", "photos", "a photo of the picture", "the", "a of", "!", "b"):
        found = match_names(catalog, Query(terms=(Term(text),)), pictures=6, others=0)
        assert not covered(found), text
    assert folders_of(searcher, "dog home photos") == folders_of(searcher, "dog")


def test_filters_still_decide_which_pictures_are_found(writer: Writer, searcher: Searcher) -> None:
    library(writer, folders={"misc": 9, "watch": 2})
    result = searcher.search("dog watch path:misc")
    assert result.total == 9 and not any(hit.named for hit in result.hits)
    assert searcher.search("dog watch", k=1).total == 11


def test_as_many_hits_as_asked_for_and_each_once(writer: Writer, searcher: Searcher) -> None:
    library(writer, folders={"misc": 9, "watch": 4})
    for k in (1, 3, 5, 12, 100):
        found = names(searcher.search("dog watch", k=k))
        assert len(found) == len(set(found)) == min(k, 13)


@pytest.mark.parametrize("first_named", [1, 3, 1000])
@pytest.mark.parametrize("query", ["dog beach", "dog", "dog leash car", "beach car"])
def test_pictures_that_no_name_can_lift_are_left_out_and_none_else(
    writer: Writer,
    searcher: Searcher,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    first_named: int,
) -> None:
    """The k best of 400 are those of a ranking of all 400, whatever is compared first.
    Captions have some of four words; one of five pictures has the vector of the one before."""
    monkeypatch.setattr(comparison, "FIRST_NAMED", first_named)
    draw = np.random.default_rng(0)
    vector = draw.normal(size=4)
    for number in range(400):
        vector = vector if number % 5 == 1 else draw.normal(size=4)
        words = [axis for axis, has in zip(AXES, draw.random(4) < 0.2, strict=True) if has]
        writer.add(f"p{number}", list(vector), captions=[" ".join(words) or "x"], commit=False)
    writer.catalog.commit()
    every = names(searcher.search(query, k=400))
    for k in (1, 2, 10, 50):
        assert names(searcher.search(query, k=k)) == every[:k]
    like = key("p7")
    every = names(searcher.similar(like, query, k=400))
    assert len(every) == 399 and names(searcher.similar(like, query, k=10)) == every[:10]


# ---- against the definition


def reference(
    postings: list[tuple[list[int], float]],
) -> dict[int, float]:
    """The coverage by num as it was computed before: an array over all nums."""
    coverage = np.zeros(3000)
    for nums, share in postings:
        coverage[nums] += share
    return {int(num): float(coverage[num]) for num in np.flatnonzero(coverage)}


@given(
    postings=st.lists(
        st.tuples(
            st.one_of(
                st.lists(st.integers(1, 2999), min_size=1, max_size=20, unique=True),
                st.integers(1, 40).map(lambda step: list(range(step, 2900, step))),
            ),
            st.sampled_from([0.05, 0.1, 0.25]),
        ),
        max_size=20,
    ),
    first=st.integers(1, 50),
    growth=st.integers(1, 4),
)
def test_coverage_and_blocks_are_what_an_array_over_all_pictures_says(
    postings: list[tuple[list[int], float]], first: int, growth: int
) -> None:
    words = [(f"w{at}", PictureSet(nums), share) for at, (nums, share) in enumerate(postings)]
    matches = NameMatches(tuple(words))
    expected = reference(postings)
    some = np.random.default_rng(0).permutation(3000)
    assert matches.coverage(some).tolist() == [expected.get(int(num), 0.0) for num in some]
    blocks = list(matches.blocks(first, growth))
    held = [num for block in blocks for num in block.pictures]
    assert sorted(held) == sorted(expected)
    last = 99.0
    for at, block in enumerate(blocks):
        values = [expected[num] for num in block.pictures]
        assert max(values) == block.coverage <= last
        assert block.even == (min(values) == max(values))
        assert len(values) <= first * growth**at or block.even
        last = min(values)
    for num in some[:50].tolist():
        named = [name for name, nums, _ in words if num in nums]
        enough = expected.get(num, 0) > NAMED_COVERAGE
        assert matches.words_of(num) == (tuple(named) if enough else ())


def test_words_of_half_of_all_pictures_are_not_read(writer: Writer, catalog: Catalog) -> None:
    """Of ten pictures, five are called "half": it counts 1 - 2 * 5 / 10 = 0, whoever has it."""
    for number in range(10):
        writer.add(f"/{'half' if number < 5 else 'x'}/{number}", [1, 0, 0, 0])
    query = Query(terms=(Term("half"),))
    assert not covered(match_names(catalog, query, pictures=10, others=0))
    assert len(covered(match_names(catalog, query, pictures=11, others=0))) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [("car", "cars"), ("box", "boxes"), ("cherry", "cherries"), ("knife", "knives"), ("leaf", "leaves"),
     ("skate", "skating"), ("run", "running"), ("skate", "skated"), ("man", "men"),
     ("child", "children"), ("glass", "glasses"), ("bus", "buses")],
)  # fmt: skip
def test_a_word_meets_its_forms_in_either_direction(one: str, other: str) -> None:
    assert other in spellings(one) and one in spellings(other)


@pytest.mark.parametrize(
    ("one", "other"), [("car", "card"), ("bed", "b"), ("gas", "ga"), ("king", "k")]
)
def test_other_words_are_other_words(one: str, other: str) -> None:
    assert other not in spellings(one)


@given(st.text(max_size=60))
def test_any_text_can_be_looked_up(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    if not folder.exists():
        with Catalog.open(folder, write=True):
            pass
    with Catalog.open(folder) as catalog:
        query = Query(terms=(Term(text),))
        assert not covered(match_names(catalog, query, pictures=1, others=0))


# ---- phrases


def test_a_phrase_looks_at_folder_names(writer: Writer, searcher: Searcher) -> None:
    writer.add("/p/By the Sea/x", [1, 0, 0, 0])
    writer.add("/p/seaside/y", [1, 0, 0, 0])
    writer.add("/p/2023/pizza/z", [1, 0, 0, 0])
    assert names(searcher.search('"by the sea"')) == ["x"]
    assert names(searcher.search('"sea*" sort:name')) == ["x", "y"]
    assert searcher.search('"2023 pizza"').total == 0  # not across two folders
    assert searcher.search('"pizza z"').total == 0


def test_where_phrases_tie_the_words_decide(writer: Writer, searcher: Searcher) -> None:
    """Four files of one name in folders at different depths: equal bm25, so the cosines decide."""
    for place, dog in (("a", 0.1), ("b/c/d", 0.9), ("e/f", 0.5), ("g", 0.7)):
        writer.add(f"/{place}/image_0001", [dog, 1, 0, 0], image_id=key(place))
    writer.add("image_0002", [1, 0, 0, 0])
    result = searcher.search('dog "image_0001"')
    assert [hit.picture.image_id for hit in result.hits] == [
        key(p) for p in ("b/c/d", "g", "e/f", "a")
    ]
    assert searcher.search('dog "image_00"').total == 0
    assert searcher.search('dog "image_00*"').total == 5


# ---- similar, with words


def test_similar_to_a_picture_and_a_text(writer: Writer, searcher: Searcher) -> None:
    """The example is a dog, (1, 0, 0, 0). With "beach" the query is (1, 1, 0, 0) / 1.4142: both
    0.9899 (0.8 + 0.6), dog 0.7071, sea 0.7071; without words dog-like pictures lead."""
    writer.add("example", [1, 0, 0, 0])
    writer.add("rex", [0.99, 0, 0.141, 0])
    writer.add("both", [0.8, 0.6, 0, 0])
    writer.add("sea", [0, 1, 0, 0])
    assert names(searcher.similar(key("example"))) == ["rex", "both", "sea"]
    result = searcher.similar(key("example"), "beach")
    assert names(result)[0] == "both" and "example" not in names(result)
    assert result.hits[0].score == pytest.approx(0.9899, abs=1e-3)
    assert result.total == 3
    assert names(searcher.similar(key("example"), "beach^9"))[0] == "sea"
    assert names(searcher.similar(key("example"), "path:sea")) == ["sea"]
    assert names(searcher.similar(key("example"), '"rex"')) == ["rex"]
    assert searcher.similar(key("example"), '"example"').total == 0


# ---- folders


def test_a_folder_by_its_name_or_the_end_of_its_path(writer: Writer, searcher: Searcher) -> None:
    writer.catalog.add_root("/p")
    for place in ("2023/Pizza/a", "2024/pizza/old/b", "2024/pizzas/c", "pizza.d"):
        writer.add(f"/p/{place}", [1, 0, 0, 0])
    for folder, found in {
        "pizza": ["a", "b"], "2023/pizza": ["a"], "pizza/": ["a", "b"], "/p/2024/pizza": ["b"],
        "p": ["a", "b", "c", "pizza.d"], "izza": [], "/pizza": [],
    }.items():  # fmt: skip
        result = searcher.search(f"folder:{folder} sort:name")
        assert (names(result), result.total) == (found, len(found)), folder


def test_a_folder_that_begins_with_a_dot_is_seen_from_the_working_folder(
    writer: Writer, searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer.add(f"{tmp_path}/here/a", [1, 0, 0, 0])
    writer.add("elsewhere", [1, 0, 0, 0])
    for folder in (".", "./here"):
        assert names(searcher.search(f"folder:{folder}")) == ["a"]


# ---- nothing found


@pytest.fixture
def trips(writer: Writer, searcher: Searcher) -> Searcher:
    """Three pictures of 2020 and two of 2023, which are named IMG_1, IMG_2, ... in two folders."""
    for number in range(5):
        folder, year = ("trips/rome", 2020) if number < 3 else ("home", 2023)
        writer.add(
            f"/{folder}/IMG_{number}", [1, 0, 0, 0], taken_at=f"{year}-05-01T12:00:00",
            camera="Canon",
        )  # fmt: skip
    return searcher


@pytest.mark.parametrize(
    ("query", "sentence", "offers"),
    [
        ('dog "IM"', "No file name, folder, caption or tag has “IM” as whole words; 5 have words that"
         " begin so", [('Search for "IM*"', 'dog "IM*"', 5), ('Search without "IM"', "dog", 5)]),
        ('"zebra"', "No file name, folder, caption or tag has “zebra”",
         [('Search without "zebra"', "", 5)]),
        ("dog folder:roma after:2019", "No folder is called “roma”; did you mean “rome”?",
         [("Search for folder:rome", "dog after:2019 folder:rome", 3),
          ("Search without folder:roma", "dog after:2019", 5)]),
        ("folder:quite/different", "No folder is called “quite/different”",
         [("Search without folder:quite/different", "", 5)]),
        ("dog after:2030 camera:nikon", "No picture is dated 2030 or later; no camera's name contains"
         " “nikon”", [("Search without after:2030 and camera:nikon", "dog", 5)]),
        ("dog after:2021 folder:rome camera:canon",
         "No picture passes after:2021, camera:canon and folder:rome together",
         [("Search without after:2021", "dog camera:canon folder:rome", 3),
          ("Search without folder:rome", "dog after:2021 camera:canon", 2)]),
        ("tag:x format:png width:9999 height:9999 orientation:square path:y before:1990",
         "No picture has the tag “x”; no picture is 9999 pixels wide; no picture is 9999 pixels high;"
         " no picture is square; no path contains “y”; no picture is dated before 1990; no picture has"
         " the format PNG",
         [("Search without tag:x and width:9999 and height:9999 and orientation:square and path:y and"
           " before:1990 and format:PNG", "", 5)]),
    ],
)  # fmt: skip
def test_an_empty_result_says_why_and_what_else_finds_something(
    trips: Searcher, query: str, sentence: str, offers: list[tuple[str, str, int]]
) -> None:
    empty = trips.search(query).empty
    assert empty is not None and empty.sentence == sentence
    assert [(offer.label, offer.query, offer.total) for offer in empty.offers] == offers
    for offer in empty.offers:
        assert trips.search(offer.query).total == offer.total


def test_filters_beside_the_query_are_named_as_such(trips: Searcher) -> None:
    """Those of the page's panel: they are kept, or all dropped."""
    old, none = Filters(before="2021"), Filters(tags=("x",))
    empty = trips.search("dog after:2022", filters=old).empty
    assert empty is not None
    assert empty.sentence == "No picture passes after:2022 and the filters together"
    assert [(o.label, o.query, o.keeps_filters, o.total) for o in empty.offers] == [
        ("Search without after:2022", "dog", True, 3),
        ("Search without the filters", "dog after:2022", False, 2),
    ]
    empty = trips.similar(key("/home/IMG_4"), filters=none).empty
    assert empty is not None and empty.sentence == "No picture passes the filters"
    assert [(o.query, o.keeps_filters) for o in empty.offers] == [("", False)]


def test_what_finds_something_is_not_explained(trips: Searcher) -> None:
    assert trips.search("dog").empty is None
    assert trips.search("folder:rome").empty is None
