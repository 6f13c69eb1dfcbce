"""HTML from hits, runs and names that mean harm."""

from __future__ import annotations

import re
from datetime import date
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.web import render
from app.web.render import Card
from app.web.requests import Ask
from clipkit.errors import InputError
from clipkit.wording import printable

EVIL = [
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    "${alert(1)} {{alert(1)}} `alert(1)`",
    "</li></ol></found-0><script>alert(1)</script>",
]
SHOWN = {"question": "q", "key": "0", "ticket": "1", "total": 100, "seconds": 0.0123, "page": 24}


class Tags(HTMLParser):
    """What a browser would make of some HTML: elements with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data

    def attributes(self, name: str) -> list[str | None]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def card(rank: int = 1, **changes: Any) -> Card:
    values: dict[str, Any] = {
        "rank": rank,
        "image_id": f"{rank:032x}",
        "name": f"{rank}.png",
        "caption": "",
        "width": 300,
        "height": 200,
        "score": 0.3,
        "strength": "strong",
    }
    return Card(**(values | changes))


def every_part(evil: str) -> str:
    """All that can hold a text from outside, with `evil` for each."""
    row = card(name=evil, caption=evil)
    return "".join(
        [
            render.results([row, card(2, name=evil)], **SHOWN),
            render.results([], **{**SHOWN, "ticket": evil}),
            render.home(pictures=1, chips=[evil], newest=[row]),
            render.failure(evil, ticket=evil),
            render.status(spec=evil, encoder_id=evil, model=evil, pictures=1, newest=evil),
            render.filters([(evil, evil, 1), ("/a/b", "k", 2)]),
            render.run(
                folders=[evil],
                state="done",
                line=evil,
                skipped=[(evil, evil, evil)],
                skipped_total=1,
            ),
        ]
    )


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_becomes_an_element_or_an_attribute(evil: str) -> None:
    harmless = Tags(every_part("harmless"))
    tags = Tags(every_part(evil))
    assert [tag for tag, _ in tags.elements] == [tag for tag, _ in harmless.elements]
    assert [list(a) for _, a in tags.elements] == [list(a) for _, a in harmless.elements]
    assert evil in tags.said
    assert evil in tags.attributes("alt")


@given(st.text(st.characters(min_codepoint=0, max_codepoint=0x10FFFF), max_size=40))
def test_any_text_can_be_sent_and_read_back(value: str) -> None:
    """Lone surrogates included: JSON to a browser must be UTF-8."""
    shown = render.text(value)
    shown.encode("utf-8")
    assert not re.search("[<>\"'\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert Tags(f"<p>{shown}</p>").said == printable(value)


def test_a_picture_is_described_by_its_caption_else_by_its_name() -> None:
    tags = Tags(render.results([card(caption="A cake"), card(2)], **SHOWN))
    assert tags.attributes("alt") == ["A cake", "2.png"]
    assert tags.attributes("src") == [f"thumbnails/{1:032x}", f"thumbnails/{2:032x}"]


def test_the_weak_tail_is_shown_and_marked() -> None:
    """strong, weak, fair, weak, weak: the tail begins after the last that is not weak, at the 4th."""
    bands = ["strong", "weak", "fair", "weak", "weak"]
    html = render.results([card(n, strength=b) for n, b in enumerate(bands, 1)], **SHOWN)
    items = re.findall(r'<li class="([^"]*)"', html)
    assert items == ["hit strong", "hit weak", "hit fair", "divider", "hit weak", "hit weak"]
    assert "Weak from here on" in html


def test_all_weak_is_said_at_once() -> None:
    html = render.results([card(strength="weak")], **SHOWN)
    assert html.index("Nothing stands out") < html.index('<li class="hit')


def test_nothing_is_claimed_where_nothing_was_compared() -> None:
    html = render.results([card(score=None, strength=None)], **SHOWN)
    assert 'class="band"' not in html and 'class="score"' not in html and "divider" not in html


def test_more_is_offered_while_there_is_more() -> None:
    """2 shown of 100: 24 more are 26. 2 shown of 5: the 3 that are left. 2 of 2: none."""
    cards = [card(1), card(2)]
    assert 'data-k="26">Show 24 more' in render.results(cards, **SHOWN)
    assert 'data-k="5">Show 3 more' in render.results(cards, **{**SHOWN, "total": 5})
    assert "Show" not in render.results(cards, **{**SHOWN, "total": 2})


def test_an_empty_answer_offers_the_way_out() -> None:
    html = render.results([], **{**SHOWN, "total": 0})
    assert "No picture passes this." in html and 'data-do="clear-filters"' in html


def test_numbers_are_written_for_people() -> None:
    assert (
        render.facts([(3, "added"), (0, "moved"), (1_200, "skipped")]) == "3 added, 1,200 skipped"
    )
    assert render.facts([(0, "added")]) == "nothing to do"


def test_folders_are_named_without_what_they_share() -> None:
    """/home/me is shared by all; /home/me/a is one of them, so its own name is kept."""
    rows = [("/home/me/a", "k1", 9), ("/home/me/a/b", "k2", 4), ("/home/me/c", "k3", 1)]
    html = render.filters(rows)
    assert re.findall(r">([^<>]+) \(\d\)</option>", html) == ["a", "a/b", "c"]
    assert "/home/me/a/b" in Tags(html).attributes("title")


def test_a_run_shows_what_can_be_done_with_it() -> None:
    running = render.run(folders=["/p"], state="running", line="x", done=3, total=9)
    assert '<progress value="3" max="9">' in running and 'data-do="stop"' in running
    walking = render.run(folders=["/p"], state="running", line="x")
    assert "<progress></progress>" in walking
    assert 'data-do="stop"' not in render.run(folders=["/p"], state="stopping", line="x")
    failed = render.run(folders=["/p"], state="failed", line="x")
    assert 'role="alert"' in failed and "<progress" not in failed


def test_a_long_list_of_skipped_files_says_what_is_left_out() -> None:
    rows = [("/p/a", "truncated", "m"), ("/p/b", "truncated", "m"), ("/p/c", "empty", "m")]
    html = render.run(folders=["/p"], state="done", line="x", skipped=rows, skipped_total=10)
    assert "10 files skipped: 2 truncated, 1 empty" in html and "and 7 more" in html


def test_a_page_open_to_the_network_says_how_to_index_instead() -> None:
    assert "<form" not in render.empty(may_index=False, indexing=False)
    assert "<form" in render.empty(may_index=True, indexing=False)
    assert "<form" not in render.empty(may_index=True, indexing=True)


# ---- what a page may ask


def test_an_ask_is_read_from_what_the_page_sends() -> None:
    """`until` is inclusive for people and exclusive for the catalog: one day later."""
    ask = Ask.from_page({"words": " cake ", "until": "2023-12-31", "k": 5, "ticket": "9"})
    assert ask == Ask(words="cake", until=date(2023, 12, 31), k=5)
    assert ask.before == date(2024, 1, 1)
    assert Ask(until=date.max).before is None
    assert Ask.from_page({}).is_empty and Ask.from_page({"words": "  ", "k": 99}).is_empty
    assert not Ask.from_page({"folder": "x"}).is_empty


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"words": 3}, "words is 3; it must be text"),
        ({"k": 0}, "k is 0; it must be a whole number from 1"),
        ({"k": True}, "k is True"),
        ({"k": "many"}, "k is 'many'"),
        ({"after": "May"}, "the date 'May' is none; write it like 2023-05-31"),
        ({"after": "2023-02-30"}, "the date '2023-02-30' is none"),
        ({"after": "2024-01-02", "until": "2024-01-01"}, "the first must not be later"),
    ],
)
def test_what_makes_no_sense_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Ask.from_page(data)
