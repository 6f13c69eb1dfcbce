"""The page's HTML from hits, runs and names that mean harm."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from app.web import render
from app.web.folders import Listing, Root
from app.web.indexing import Run
from app.web.requests import SearchRequest
from app.web.saved_reports import ReportRow
from app.web.sorting import Group, Guess, Sorting, SortRequest
from app.web.workspace import FolderRow, SearchAnswer, Status
from clipkit.catalog import Facets, PictureRow, SkippedRow
from clipkit.embed import Progress, Summary
from clipkit.query import KEYS, SYNTAX, parse
from clipkit.search import Empty, Offer, SearchHit
from clipkit.wording import printable

EVIL = [
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    "${alert(1)} {{alert(1)}} `alert(1)` {% raw %}",
    "</li></ol></found-0><script>alert(1)</script>",
]
STATUS = Status("spec", "0" * 16, "ready", 1, None, indexing=False, corrections=0)


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


def hit(
    rank: int = 1,
    *,
    name: str = "",
    captions: tuple[str, ...] = (),
    score: float | None = 0.3,
    strength: str | None = "strong",
    format: str = "JPEG",
) -> SearchHit:
    path = f"/photos/{name or f'{rank}.png'}"
    row = PictureRow(
        num=rank,
        image_id=f"{rank:032x}",
        path=path,
        places=(path,),
        width=300,
        height=200,
        format=format,
        bytes=1,
        taken_at=None,
        dated=None,
        camera=None,
        added_at="",
        captions=captions,
        tags=(),
    )
    return SearchHit(rank, score, strength, row, None if strength is None else 0.4)


def results(
    *hits: SearchHit,
    total: int = 100,
    words: str | None = None,
    empty: Empty | None = None,
    **request: Any,
) -> str:
    more = "next" if hits and hits[-1].rank < total else None
    answer = SearchAnswer(hits, total, 0.0123, empty, words, {f"{1:032x}": True}, cursor=more)
    return render.results(SearchRequest(**request), answer, STATUS)


def every_part(evil: str) -> str:
    """Everything that can hold a text from outside, with `evil` for each."""
    one = hit(name=evil.replace("/", "|"), captions=(evil,))
    below = "/a/" + evil.replace("/", "|")
    empty = Empty(evil, (Offer(evil, evil, True, 1),))
    run = Run(
        (evil,), error=evil, over=True, skipped=(SkippedRow(evil, evil, evil),), skipped_total=1
    )
    guess = Guess(one.picture, evil, 0.5, evil, 0.5)
    none = np.empty(0)
    sorting = Sorting(
        "0", SortRequest((evil,)), (Group(evil, 1, 1.0, 1.0, (guess,)),), (guess,), 1, 0.0,
        none, none, none, none, none,
    )  # fmt: skip
    fields = {"words": evil, "choice": evil, "floor": evil, "ticket": evil}
    report = ReportRow(evil, evil, (evil,), evil)
    status = replace(STATUS, spec=evil, encoder_id=evil, newest=evil)
    return "".join(
        [
            results(one, hit(2, name=evil.replace("/", "|")), words=evil),
            results(words=evil, similar=evil, empty=empty),
            results(words=evil, images=(evil,)),
            render.part("home", status=status, examples=[evil], newest=[one.picture]),
            render.part("status", status=status),
            render.filters(
                [
                    FolderRow("/a", "k", 2),
                    FolderRow(below, evil, 1),
                    FolderRow(f"{below}/b", "k", 1),
                ],
                Facets(((evil, 1),), ((evil, 1),), ((evil, 1),)),
                ["/a"],
            ),
            render.part("folders", roots=[Root(evil, 1, 1, missing=True)], may_index=True),
            render.part("listing", listing=Listing(evil, "", 1, ((evil, evil),), 1)),
            render.run(run),
            render.sort_page(fields, reports=[report], sorting=sorting, error=evil),
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
    shown = render.part("empty", stage=value, may_index=False)
    shown.encode("utf-8")
    (sentence,) = re.findall('data-stage="([^"]*)"', shown)
    assert not re.search("[<>\"'\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", sentence)
    assert Tags(shown).attributes("data-stage") == [printable(value)]


def test_a_template_cannot_leave_out_what_it_needs() -> None:
    with pytest.raises(UndefinedError, match="'listing' is undefined"):
        render.part("listing")


def test_layout_of_a_template_is_no_white_space_of_the_page() -> None:
    assert "\n" not in every_part("x") and "> <" not in render.run(Run(("/a",), over=True))


def test_a_picture_is_described_by_its_caption_else_by_its_name() -> None:
    tags = Tags(results(hit(captions=("A cake",)), hit(2)))
    assert tags.attributes("alt") == ["A cake", "2.png"]
    assert tags.attributes("src") == [f"thumbnails/{1:032x}", f"thumbnails/{2:032x}"]


def test_the_weak_tail_is_shown_and_marked() -> None:
    """strong, weak, fair, weak, weak: the tail begins after the last that is not weak, at the 4th."""
    bands = ["strong", "weak", "fair", "weak", "weak"]
    html = results(*(hit(n, strength=b) for n, b in enumerate(bands, 1)))
    items = re.findall(r'<li class="([^"]*)"', html)
    assert items == ["hit strong", "hit weak", "hit fair", "divider", "hit weak", "hit weak"]
    assert "Weak from here on" in html


def test_notes_stand_above_the_results() -> None:
    """And no divider: where all are weak, the note says it."""
    answer = SearchAnswer(
        (hit(strength="weak"),), 1, 0.01, notes=("Nothing <clearly> shows.", "Two.")
    )
    html = render.results(SearchRequest(), answer, STATUS)
    assert html.index("Nothing &lt;clearly&gt; shows. Two.") < html.index('<li class="hit')
    assert "divider" not in html and "notes" not in results(hit())


def test_nothing_is_claimed_where_nothing_was_compared() -> None:
    html = results(hit(score=None, strength=None))
    assert 'class="band"' not in html and 'class="score"' not in html and "divider" not in html


def test_drawings_stand_on_white() -> None:
    html = results(hit(format="PNG"), hit(2, format="JPEG"))
    assert re.findall(r'<li class="([^"]*)"', html) == ["hit strong drawn", "hit strong"]


def test_a_hit_can_be_marked_where_there_are_words() -> None:
    """The first of two hits is marked right: its check is pressed, and no other button."""
    assert "mark" not in results(hit(), hit(2)).replace("marked", "")
    html = results(hit(), hit(2), words="red car")
    pressed = re.findall(r'data-right="(\w+)" aria-pressed="(\w+)" aria-label="([^"]*)"', html)
    assert pressed == [
        ("yes", "true", "Result 1 is right for “red car”"),
        ("no", "false", "Result 1 is wrong for “red car”"),
        ("yes", "false", "Result 2 is right for “red car”"),
        ("no", "false", "Result 2 is wrong for “red car”"),
    ]
    assert 'data-query="red car"' in html


def test_more_is_offered_while_there_is_more() -> None:
    """2 shown of 100: 24 more. 2 shown of 5: the 3 that are left. 2 of 2: none. Of 10,000 the page has
    400: half of that; 4,000: at most 600."""
    hits = hit(1), hit(2)
    assert 'data-cursor="next" data-limit="24">Show 24 more' in results(*hits)
    assert 'data-limit="3">Show 3 more' in results(*hits, total=5)
    assert "Show" not in results(*hits, total=2)
    assert 'data-limit="200">Show 200 more' in results(hit(400), total=10_000)
    assert 'data-limit="600">Show 600 more' in results(hit(4_000), total=10_000)


def test_where_more_results_change_the_order_the_page_asks_for_all() -> None:
    """As long as one answer can hold them."""
    answer = SearchAnswer((hit(),), 100, 0.1, stable=False, cursor="next")
    html = render.results(SearchRequest(), answer, STATUS)
    assert 'data-whole="25"' in html and "data-whole" not in results(hit())
    answer = replace(answer, hits=(hit(2_400),), total=9_999)
    assert "data-whole" not in render.results(SearchRequest(), answer, STATUS)


def test_a_later_page_counts_from_the_first_result() -> None:
    html = results(hit(25), hit(26), cursor="x")
    assert '<span class="shown">26</span> of 100' in html and "Result 25: " in html


def test_a_tile_says_where_its_file_is() -> None:
    html = results(hit(name="boat/1.png"), hit(score=None, strength=None))
    assert "<span>boat/</span><b>1.png</b>" in html and 'data-path="/photos/boat/1.png"' in html
    assert html.count('class="under"') == 1  # no empty line where nothing was compared


def test_an_empty_answer_says_why_and_offers_what_finds_something() -> None:
    offers = (
        Offer("Search without x", "a boat", True, 102),
        Offer("Search without the filters", "", False, 1),
    )
    html = results(total=0, empty=Empty("No folder is called “x”", offers))
    assert "<p>No folder is called “x”.</p>" in html
    assert 'data-words="a boat" data-filters="yes">Search without x (102 pictures)</button>' in html
    assert 'data-words="" data-filters="">Search without the filters (1 picture)</button>' in html
    assert "No picture passes this search." in results(total=0)


def test_a_hit_that_its_name_finds_is_not_weak() -> None:
    """Its cosine is: it is shown as "named", and nothing says that weak ones begin there."""
    named = replace(hit(1, strength="weak"), named=("watch",))
    html = results(named, hit(2, strength="weak"))
    assert 'class="hit named"' in html and ">named</span>" in html
    assert html.index(">named</span>") < html.index("Weak from here on")
    assert "Weak from here on" not in results(hit(1, strength="weak"), named)


def test_words_beside_a_chosen_picture_stand_in_the_heading() -> None:
    for picture in ({"similar": "0" * 32}, {"images": ("0" * 32,)}):
        for words, said in (("stop sign", True), ("", False)):
            request = SearchRequest(words=words, **picture)
            answer = SearchAnswer((hit(),), 1, 0.1)
            html = render.results(request, answer, STATUS)
            assert ("and “stop sign”</h2>" in html) is said


def test_folders_stand_below_their_parent_without_what_all_share() -> None:
    """/home/me is shared by all; /home/me/a is one of them, so its own name is kept. What is typed
    after `folder:` begins with the name of the indexed folder around it."""
    rows = [("/home/me/a", 9), ("/home/me/a/b", 4), ("/home/me/c", 1), ("/home/me/a/b/a b", 1)]
    folders = [FolderRow(path, f"k{count}", count) for path, count in rows]
    html = render.filters(folders, Facets(), ["/home/me/a", "/home/me/c", "/home/me/a/b"])
    assert re.findall(r'<optgroup label="(.+?)">|>([^<>]+ \(\d\))</option>', html) == [
        ("", "a (9)"), ("", "c (1)"), ("a", ""), ("", "b (4)"), ("a/b", ""), ("", "a b (1)"),
    ]  # fmt: skip
    tags = Tags(html)
    assert "/home/me/a/b" in tags.attributes("title")
    assert tags.attributes("data-typed") == ["a", "c", "b", "b/a b"]


def test_a_folder_whose_name_cannot_be_typed_is_not_completed() -> None:
    html = render.filters([FolderRow("/p/caf\udce9", "k", 1)], Facets(), ["/p"])
    assert Tags(html).attributes("data-typed") == [""]


def test_the_help_shows_all_that_can_be_typed() -> None:
    """Every key and its description, with examples that are queries of that key. A key that is added
    to the query language appears by itself."""
    tags = Tags(render.help_panel())
    assert tags.attributes("data-key") == list(KEYS)
    for key, meaning in KEYS.items():
        assert f"{key}:{meaning}" in tags.said
    tried = [str(words) for words in tags.attributes("data-words")]
    assert tried[: len(SYNTAX)] == [example for example, _ in SYNTAX]
    queries = [parse(words) for words in tried]
    for key in KEYS:
        uses = [
            q.sort is not None if key == "sort" else any(f.key == key for f in q.filters)
            for q in queries
        ]
        assert any(uses), key


def test_a_run_shows_what_can_be_done_with_it() -> None:
    assert render.run(None) == ""
    progress = Progress(
        phase="embedding", done=3, total=9, skipped=1, seen=9, rate=2.0, eta_seconds=3.0
    )
    running = render.run(Run(("/p",), progress=progress))
    assert '<progress value="3" max="9">' in running and 'data-do="stop"' in running
    assert "<p>3 of 9 pictures · 2 a second · 3.0 s left · 1 skipped</p>" in running
    walking = render.run(Run(("/p",)))
    assert "<progress></progress>" in walking and "<p>Getting ready</p>" in walking
    assert 'data-do="stop"' not in render.run(Run(("/p",), stopping=True))
    failed = render.run(Run(("/p",), error="x", over=True))
    assert 'role="alert"' in failed and "<progress" not in failed


def test_a_finished_run_says_what_it_did() -> None:
    """What did not happen is left out; skipped now and before are one number."""
    summary = Summary(
        added=3, moved=0, duplicates=0, removed=0, unchanged=1_200, skipped=1, skipped_before=1,
        reasons={}, unavailable=(), seconds=12.3, embedded=3, stopped=False,
    )  # fmt: skip
    done = render.run(Run(("/p",), summary=summary, over=True))
    assert "<p>3 added, 1,200 unchanged, 2 skipped, in 12 s</p>" in done
    nothing = replace(summary, added=0, unchanged=0, skipped=0, skipped_before=0)
    assert "nothing to do, in" in render.run(Run(("/p",), summary=nothing, over=True))
    gone = render.run(Run(("/p",), summary=replace(summary, unavailable=("/p",)), over=True))
    assert "not mounted, so nothing was removed</p>" in gone


def test_a_long_list_of_skipped_files_says_what_is_left_out() -> None:
    reasons = [("/p/a", "truncated"), ("/p/b", "truncated"), ("/p/c", "empty")]
    rows = tuple(SkippedRow(path, reason, "m") for path, reason in reasons)
    html = render.run(Run(("/p",), error="x", over=True, skipped=rows, skipped_total=10))
    assert "10 files skipped: 2 cut off, 1 empty" in html and "and 7 more" in html


def test_a_page_open_to_the_network_says_how_to_index_instead() -> None:
    assert "<form" not in render.part("empty", stage="empty", may_index=False)
    assert "<form" in render.part("empty", stage="empty", may_index=True)
    assert "<form" not in render.part("empty", stage="indexing", may_index=True)


# ---- what a page may ask


def test_the_last_day_is_inclusive_for_people_and_exclusive_for_the_catalog() -> None:
    assert SearchRequest(until=date(2023, 12, 31)).before == date(2024, 1, 1)
    assert SearchRequest(until=date.max).before is None


def test_the_model_is_named_for_people() -> None:
    """The id stands in the tooltip only; a run's folder is named without its path."""
    tags = Tags(render.part("status", status=replace(STATUS, spec="/home/me/runs/pets")))
    assert tags.said.startswith("pets") and "0000" not in tags.said
    assert "encoder 0000000000000000" in str(tags.attributes("title")[0])
    tags = Tags(render.part("status", status=replace(STATUS, spec="ViT-B-32/openai")))
    assert tags.said.startswith("ViT-B-32/openai")
