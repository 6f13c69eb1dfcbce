"""The query language. Expected values are read off the grammar in clipkit/query.py's docstring."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipkit.errors import QueryError
from clipkit.query import KEYS, Example, Filter, Query, Term, format, parse


def test_the_design_documents_example() -> None:
    text = (
        'dog on a beach -leash +./ref.jpg^0.5 "invoice 42" '
        "after:2023 path:trips camera:canon sort:date"
    )
    assert parse(text) == Query(
        terms=(Term("dog on a beach"),),
        exclude=(Term("leash"),),
        examples=(Example("./ref.jpg", 0.5),),
        phrases=(Term("invoice 42"),),
        filters=(Filter("after", "2023"), Filter("path", "trips"), Filter("camera", "canon")),
        sort="date",
    )


def test_empty_asks_for_everything() -> None:
    assert parse("") == parse("  \t\n ") == Query()
    assert str(Query()) == ""


@pytest.mark.parametrize(
    "word",
    ["t-shirt", "-", "+", "--", "--help", "++", "12:30", "3:2", "http://x.org/a?b=c", "note:",
     "C++", '5"', "O'Neill", ":-)", "^_", "日本:語", "D:", "\\d", "a\\b", "naïve", "😀"],
)  # fmt: skip
def test_what_is_not_syntax_is_a_word(word: str) -> None:
    assert parse(f"a {word} b") == Query(terms=(Term(f"a {word} b"),))


def test_free_words_are_one_text_and_a_weighed_word_is_another() -> None:
    query = parse("red^2 car  on\ta road^.5")
    assert query.terms == (Term("car on a"), Term("red", 2.0), Term("road", 0.5))


def test_signs_take_quotes_and_weights() -> None:
    assert parse('-"red car"^2 -blue^0.25 +"my file.jpg"^3 "a phrase"^4') == Query(
        exclude=(Term("red car", 2.0), Term("blue", 0.25)),
        examples=(Example("my file.jpg", 3.0),),
        phrases=(Term("a phrase", 4.0),),
    )


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (r"\-leash", Query(terms=(Term("-leash"),))),
        (r"\+1", Query(terms=(Term("+1"),))),
        (r"x\^2", Query(terms=(Term("x^2"),))),
        (r"path\:trips", Query(terms=(Term("path:trips"),))),
        (r"\"quoted\"", Query(terms=(Term('"quoted"'),))),
        (r'"say \"hi\""', Query(phrases=(Term('say "hi"'),))),
        (r"two\ words^2", Query(terms=(Term("two words", 2.0),))),
        (r"+my\ file.jpg", Query(examples=(Example("my file.jpg"),))),
        (r"+C:\pics\x.jpg", Query(examples=(Example(r"C:\pics\x.jpg"),))),
        (r"a\\b", Query(terms=(Term(r"a\b"),))),
        ('+"a^b.jpg"', Query(examples=(Example("a^b.jpg"),))),
    ],
)
def test_a_backslash_takes_the_meaning_away(text: str, query: Query) -> None:
    assert parse(text) == query


def test_curly_quotes_are_quotes() -> None:
    """A phone's keyboard types them by itself."""
    assert parse("“invoice 42” -“red car” „Rechnung“") == Query(
        phrases=(Term("invoice 42"), Term("Rechnung")), exclude=(Term("red car"),)
    )


def test_text_right_behind_a_quote_is_an_item_of_its_own() -> None:
    assert parse('"a b"c') == Query(terms=(Term("c"),), phrases=(Term("a b"),))


def test_control_characters_separate_like_blanks() -> None:
    assert parse('a\0b "c\nd" +"e\0f"') == Query(
        terms=(Term("a b"),), phrases=(Term("c d"),), examples=(Example("e f"),)
    )


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("After:2023-05", "after", "2023-05"),
        ("before:2024-02-29", "before", "2024-02-29"),
        ('path:"my trips"', "path", "my trips"),
        (r"folder:my\ trips", "folder", "my trips"),
        ("path:a:b^2", "path", "a:b^2"),
        ("path://server/x", "path", "//server/x"),
        ('camera:"Canon  EOS"', "camera", "Canon EOS"),
        ("format:.jpg", "format", "JPEG"),
        ("format:png", "format", "PNG"),
        ("tag:café", "tag", "café"),
        ("width:1000", "width", "1000"),
        ("width:>=0100", "width", "100"),
        ("height:>1000", "height", "1001"),
        ("orientation:Portrait", "orientation", "portrait"),
    ],
)
def test_filters(text: str, key: str, value: str) -> None:
    query = parse(text)
    assert query == Query(filters=(Filter(key, value),))
    assert parse(format(query)) == query


def test_a_filter_may_be_repeated_where_that_means_something() -> None:
    assert len(parse("path:a path:b tag:c tag:d").filters) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dog "beach', r"quote at position 5 is not closed; add a closing quote"),
        (r'"abc\" def', r"quote at position 1 is not closed"),
        ('-"x', r"quote at position 2 is not closed"),
        ('dog ""', r"text at position 5 is empty"),
        ('path:" "', r"'path:' at position 1 needs a value; the path contains this: path:trips"),
        ("dog path: trips", r"'path:' at position 5 needs a value"),
        ("dog^big", r"weight 'big' at position 4 is not a number; write \^ and a number from 0.01"),
        ("dog^", r"weight '' at position 4 is not a number"),
        ("dog^1e3", r"weight '1e3' at position 4 is not a number"),
        ("dog^-1", r"weight '-1' at position 4 is not a number"),
        ("dog^nan", r"weight 'nan' at position 4"),
        ('-"a b"^11', r"weight 11 at position 7 is out of range; weights are 0.01 to 10"),
        ("dog^0", r"weight 0 at position 4 is out of range"),
        ("ab camra:canon", r"unknown key 'camra' at position 4; did you mean 'camera'\?"),
        ("http:x", r"to search for the words themselves write http\\:\.\.\."),
        ("-path:trips", r"filter 'path:' at position 1 cannot be excluded"),
        ("after:yesterday", r"'yesterday' at position 7 is not a date; use the form after:2023"),
        ("after:2023-13", r"'2023-13' at position 7 is not a date"),
        ("before:2023-02-30", r"not a date"),
        ("after:0000", r"not a date"),
        ("after:٢٠٢٣", r"not a date"),
        ("after:2023 dog after:2024", r"'after:' is given twice, again at position 16; keep one"),
        ("sort:name sort:date", r"'sort:' is given twice, again at position 11"),
        ("width:big", r"'big' at position 7 is not a number of pixels; use the form width:1000"),
        ("width:<1000", r"not a number of pixels"),
        ("height:٢", r"not a number of pixels"),
        ("width:1 width:2", r"'width:' is given twice, again at position 9"),
        ("orientation:portait", r"unknown orientation 'portait' at position 13.*'portrait'\?"),
        ("sort:newest", r"unknown sort 'newest'.*one of score, date, name"),
        ("dog \ud800", r"text at position 5 is not valid Unicode; type it again"),
        ("+\ud800", r"text at position 1 is not valid Unicode"),
        ("x" * 10_001, r"query has 10,001 characters; the limit is 10,000; shorten it"),
        ("-a " * 65, r"more than 64 terms, examples, phrases and filters at position 194"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place_and_remedy(text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse(text)


def test_file_names_that_are_not_utf8_pass() -> None:
    """os.fsdecode makes lone surrogates of such bytes; the words of a text may not hold them."""
    assert parse("+\udcff.jpg path:\udcff") == Query(
        examples=(Example("\udcff.jpg"),), filters=(Filter("path", "\udcff"),)
    )


def test_weights_are_checked_when_made_by_hand() -> None:
    with pytest.raises(QueryError, match="weight nan is out of range"):
        Term("dog", float("nan"))
    with pytest.raises(QueryError, match="weight 0 is out of range"):
        Example("x.jpg", 0.0)


def test_every_key_shows_how_it_is_written() -> None:
    for key, help_text in KEYS.items():
        assert f"{key}:" in help_text


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
SYNTAX = st.text(alphabet='ab1-+^:."\\“ \n\0\ud800é', max_size=25)
WORDS = (TEXTS | SYNTAX).map(
    lambda text: " ".join(
        "".join(" " if char < " " or "\ud800" <= char < "\ue000" else char for char in text).split()
    )
).filter(bool)  # fmt: skip
WEIGHTS = st.floats(0.01, 10.0)
TERMS = st.builds(Term, WORDS, WEIGHTS | st.just(1.0))
PATHS = st.text(alphabet='a.^"\\ -+:/\udcff', min_size=1, max_size=9).filter(str.strip)
FILTERS = st.one_of(
    st.builds(Filter, st.sampled_from(["camera", "tag"]), WORDS),
    st.builds(Filter, st.sampled_from(["path", "folder"]), PATHS),
)
QUERIES = st.builds(
    lambda terms, exclude, examples, phrases, filters, dates, sort: Query(
        terms, exclude, examples, phrases, (*filters, *dates), sort
    ),
    terms=st.lists(TERMS, max_size=4).map(tuple),
    exclude=st.lists(TERMS, max_size=3).map(tuple),
    examples=st.lists(st.builds(Example, PATHS, WEIGHTS), max_size=3).map(tuple),
    phrases=st.lists(TERMS, max_size=3).map(tuple),
    filters=st.lists(FILTERS, max_size=4).map(tuple),
    dates=st.sampled_from([(), (Filter("after", "2020-02"), Filter("width", "640"))]),
    sort=st.sampled_from([None, "score", "date", "name"]),
)


@given(QUERIES)
@example(Query(terms=(Term("path:x"), Term("two words", 1.0), Term("-a", 0.010000000000000002))))
def test_what_is_written_is_read_back_the_same(query: Query) -> None:
    assert parse(format(query)) == query
    assert str(query) == format(query)


@given(
    st.text()
    | SYNTAX
    | st.lists(SYNTAX | st.sampled_from([f"{key}:" for key in KEYS])).map("".join)
)
@example("“")
@example("\\")
@example("+\\ ")
@example('format:". ."')
@example("format:ŉ")
def test_any_text_is_read_or_refused_and_reads_back_the_same(text: str) -> None:
    try:
        query = parse(text)
    except QueryError as error:
        assert str(error)
    else:
        assert parse(format(query)) == query
