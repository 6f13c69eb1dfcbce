"""The viewer, the history of the page, loading more and the selection, in a real Chromium."""

# ruff: noqa: F811
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import (  # noqa: F401
    Open,
    ask,
    browser,
    context,
    pytestmark,
    served,
    settled,
    visit,
)
from colours import ColourModel, paint

from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
Site = tuple[str, Workspace]


class Model(ColourModel):
    """Says what sorting asks of a model beside the vectors."""

    precision = "float32"
    logit_scale = 10.0

    def encode_texts(self, texts: Any) -> Any:
        return super().encode_texts([text.replace(".", "") for text in texts])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """60 red pictures in a/ and 60 blue ones in b/, all modified on 13 September 2020."""
    root = tmp_path_factory.mktemp("viewer")
    for number in range(60):
        for folder, colour in (("a", "red"), ("b", "blue")):
            path = paint(root / folder / f"{colour} {number:02}.png", colour, number=number)
            os.utime(path, (1_600_000_000,) * 2)
    model = Model()
    with Catalog.open(root / "index", write=True) as catalog:
        index_folders(catalog, [root / "a", root / "b"], encoder=model)
    workspace = Workspace(root / "index", model)  # type: ignore[arg-type]
    with served(workspace) as address:
        yield address, workspace


def wait(page: Any, condition: str, arg: Any = None) -> None:
    page.wait_for_function(condition, arg=arg)


def cards(page: Any) -> list[str]:
    return page.eval_on_selector_all("#results .hit", "all => all.map(card => card.dataset.id)")


def view(page: Any, position: int) -> str:
    """Open the card at a position and return the picture's id."""
    name = cards(page)[position]
    page.locator("#results .hit .open").nth(position).click()
    viewing(page, name)
    return name


def viewing(page: Any, name: str) -> None:
    wait(page, "id => document.querySelector('#viewer[open]')?.dataset.id === id", name)


def closed(page: Any) -> None:
    wait(page, "() => !document.querySelector('#viewer').open && !history.state?.view")


def load(page: Any, count: int) -> None:
    """Scroll to the end until so many cards are there."""
    script = """count => {
        const cards = document.querySelectorAll('.hit').length;
        if (cards < count) scrollTo(0, document.documentElement.scrollHeight);
        return cards >= count;
    }"""
    wait(page, script, count)


def steps(page: Any) -> int:
    return int(page.evaluate("history.length"))


# ---- the viewer and the history


def test_opening_is_a_step_of_the_history_and_back_closes(site: Site, visit: Open) -> None:
    page = visit(site[0])
    ask(page, "red")
    before = steps(page)
    page.evaluate("document.querySelector('.hit').marked = true")
    name = view(page, 2)
    assert page.url.endswith(f"#words=red&view={name}") and steps(page) == before + 1
    page.go_back()
    closed(page)
    assert page.url.endswith("#words=red")
    page.go_forward()
    viewing(page, name)
    # Next and previous replace the step; Esc, the button and a click beside it go back.
    page.keyboard.press("ArrowRight")
    viewing(page, cards(page)[3])
    assert steps(page) == before + 1 and page.url.endswith(f"view={cards(page)[3]}")
    page.keyboard.press("Escape")
    closed(page)
    # The focus is on the card seen last, and the results were not asked for again.
    assert page.evaluate("document.activeElement.closest('.hit').dataset.id") == cards(page)[3]
    assert page.evaluate("document.querySelector('.hit').marked")
    view(page, 0)
    page.mouse.click(2, 2)
    closed(page)
    page.go_back()
    page.wait_for_selector(".home .chips")


def test_a_viewed_picture_has_an_address(site: Site, visit: Open) -> None:
    """Opened from it there is no step to go back to: closing stays on the page."""
    page = visit(site[0])
    ask(page, "red")
    name = view(page, 1)
    page.reload()
    viewing(page, name)
    assert page.inner_text("#viewer .position") == "2 of 120"
    page.go_back()
    closed(page)
    assert page.inner_text(".summary h2") == "“red”"
    other = visit(f"{site[0]}/#words=red&view={name}")
    viewing(other, name)
    other.click("#viewer [data-do=close]")
    closed(other)
    assert other.url.endswith("#words=red")
    alone = visit(f"{site[0]}/#view={name}")
    viewing(alone, name)
    alone.wait_for_selector("#viewer dd")
    evil = visit(f'{site[0]}/#words=red&view="],x')
    settled(evil)
    assert not evil.evaluate("document.querySelector('#viewer').open")


def test_a_mark_goes_to_the_picture_that_is_shown_for_its_own_query(
    site: Site, visit: Open
) -> None:
    """Search, search, open, Back, "Right": the mark went to the picture at this place in the other
    search, for the other words. Now Back closes; and if the results change under an open viewer by
    whatever way, a mark is still for the picture and the words it was opened with."""
    address, workspace = site
    page = visit(address)
    ask(page, "red")
    ask(page, "blue")
    name = view(page, 2)
    page.go_back()
    closed(page)
    assert page.inner_text(".summary h2") == "“blue”"
    view(page, 2)
    page.evaluate("""() => {
        document.querySelector('#ask [name=words]').value = 'red';
        document.querySelector('#ask form').requestSubmit();
    }""")
    wait(page, "document.querySelector('.summary h2').textContent === '“red”'")
    assert name not in cards(page)
    page.click(".judge >> text=Right")
    page.wait_for_selector(".judge [data-right=yes][aria-pressed=true]")
    wait(page, "document.querySelector('.corrections').textContent.includes('1 correction')")
    assert workspace.corrections.of("blue") == {name: True} and not workspace.corrections.of("red")
    assert page.locator(".hit .mark[aria-pressed=true]").count() == 0
    page.click(".judge >> text=Right")  # taken back, for the other tests
    wait(page, "document.querySelector('.corrections').hidden")


def test_next_goes_beyond_the_loaded_cards_to_the_last(site: Site, visit: Open) -> None:
    page = visit(site[0])
    ask(page, "red path:/a/")
    assert len(cards(page)) == 24
    view(page, 23)
    for position in range(25, 61):
        page.keyboard.press("ArrowRight")
        wait(
            page,
            "p => document.querySelector('#viewer .position').textContent === p",
            f"{position} of 60",
        )
    assert page.locator("#viewer [data-do=next]").is_disabled()
    assert len(set(cards(page))) == 60


def test_the_viewer_says_which_date_and_enlarges_no_more_than_twice(
    site: Site, visit: Open
) -> None:
    page = visit(site[0], viewport={"width": 1280, "height": 900}, locale="en-GB")
    ask(page, "red")
    view(page, 0)
    page.wait_for_selector("#viewer dd >> text=File of 13 September 2020")
    image = page.locator("#viewer .frame img")
    assert [image.bounding_box()[side] for side in ("width", "height")] == [180, 120]
    image.click()  # zooms: 90 x 60 is fitted at 180 x 120, so twice that
    page.wait_for_selector("#viewer .zoomed")
    assert [image.bounding_box()[side] for side in ("width", "height")] == [360, 240]
    page.keyboard.press("z")
    assert page.locator("#viewer .zoomed").count() == 0
    href = page.get_attribute("#viewer [data-full]", "href")
    assert href is not None and href.endswith(f"/pictures/{cards(page)[0]}")


def test_a_late_close_event_leaves_the_open_viewer(site: Site, visit: Open) -> None:
    """Back and Forward in quick succession: the event of the first comes when it is open again."""
    page = visit(site[0])
    ask(page, "red")
    name = view(page, 1)
    page.evaluate("document.querySelector('#viewer').dispatchEvent(new Event('close'))")
    viewing(page, name)
    wait(page, "() => document.querySelector('#viewer dd')")
    assert page.evaluate("history.state.view") == name


def test_a_swipe_goes_to_the_next_picture(site: Site, visit: Open) -> None:
    page = visit(site[0], **PHONE)
    ask(page, "red")
    page.locator("#results .hit .open").first.tap()
    viewing(page, cards(page)[0])
    touch = page.context.new_cdp_session(page)

    def swipe(*x: int) -> None:
        for kind, at in [("touchStart", x[0]), *(("touchMove", at) for at in x[1:])]:
            points = [{"x": at, "y": 200}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    swipe(300, 200, 100)
    viewing(page, cards(page)[1])
    swipe(100, 200, 300)
    viewing(page, cards(page)[0])
    swipe(200, 210)  # too short
    assert page.get_attribute("#viewer", "data-id") == cards(page)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="a stand-in for xdg-open, which is Linux's")
def test_a_file_is_opened_on_the_servers_own_screen(
    tmp_path: Path, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paint(tmp_path / "my photos" / "-a b.png", "red")
    opener = tmp_path / "bin" / "xdg-open"
    opener.parent.mkdir()
    opener.write_text(f'#!/bin/sh\nprintf "%s|" "$#" "$1" >> "{tmp_path}/opened"\n')
    opener.chmod(0o755)
    model = ColourModel()
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [path.parent], encoder=model)
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", f"{opener.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":9")
    with served(workspace) as address:
        page = visit(address)
        page.click(".hit .open")
        for button, expected in (("Open file", path), ("Show in folder", path.parent)):
            (tmp_path / "opened").write_text("")
            page.click(f"#viewer >> text={button}")
            while (
                not (said := (tmp_path / "opened").read_text()).endswith("|") or said.count("|") < 2
            ):
                time.sleep(0.02)
            assert said == f"1|{expected}|"


# ---- more results, and back to where one was


def test_scrolling_loads_more_and_back_restores_the_place(site: Site, visit: Open) -> None:
    page = visit(site[0])
    ask(page, "red")
    page.evaluate("document.querySelector('.hit').marked = true")
    load(page, 96)
    assert page.evaluate("document.querySelector('.hit').marked")  # only added to
    before = cards(page)
    assert len(set(before)) == len(before) and set(before[:60]) == set(cards(page)[:60])
    chosen = page.locator("#results .hit .open").nth(70)
    chosen.scroll_into_view_if_needed()
    page.wait_for_timeout(300)  # longer than the pause after which a place is noted
    place = page.evaluate("scrollY")
    assert place > 1000
    chosen.click()
    page.click("[data-do=similar-here]")
    page.wait_for_selector(".summary h2 img")
    settled(page)
    assert page.evaluate("scrollY") == 0 and len(cards(page)) < 96
    page.go_back()  # to the picture, and once more to the results
    viewing(page, before[70])
    page.go_back()
    closed(page)
    settled(page)
    assert cards(page)[: len(before)] == before
    assert abs(page.evaluate("scrollY") - place) < 3
    page.reload()
    settled(page)
    wait(page, "place => Math.abs(scrollY - place) < 3", place)
    assert cards(page)[: len(before)] == before


def test_more_results_that_come_too_late_are_dropped(site: Site, visit: Open) -> None:
    """The next reds are asked for, and before they come, blue is searched."""
    page = visit(site[0])
    ask(page, "red")
    held: list[Any] = []

    def hold(route: Any) -> None:
        later = "cursor" in route.request.post_data_json
        held.append(route) if later else route.continue_()

    page.route("**/api/v1/search", hold)
    load_began = "scrollTo(0, document.documentElement.scrollHeight)"
    page.evaluate(load_began)
    while not held:
        page.wait_for_timeout(20)
    page.evaluate("scrollTo(0, 0)")
    ask(page, "blue")
    blue = cards(page)
    with page.expect_response("**/api/v1/search"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert cards(page)[:24] == blue[:24] and len(cards(page)) == len(blue)


def test_by_date_more_results_are_asked_for_as_a_whole(site: Site, visit: Open) -> None:
    """The 24 best by date, then the 48 best by date: the new ones lie between the others."""
    page = visit(site[0])
    ask(page, "red sort:name")
    load(page, 48)
    names = page.eval_on_selector_all(".hit img", "all => all.slice(0, 48).map(img => img.alt)")
    assert names == sorted(names)


# ---- several pictures


def test_several_are_selected_copied_and_marked(site: Site, visit: Open) -> None:
    address, workspace = site
    page = visit(address, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "red sort:name")
    page.locator(".hit .select").nth(1).click()
    page.locator(".hit .open").nth(3).click(modifiers=["Shift"])
    assert page.inner_text("#selection .total") == "3 selected"
    assert page.locator(".select[aria-checked=true]").count() == 3
    page.click("#selection >> text=Copy paths")
    page.wait_for_selector("#selection >> text=Copied")
    paths = page.eval_on_selector_all(".hit", "all => all.slice(1, 4).map(c => c.dataset.path)")
    assert page.evaluate("navigator.clipboard.readText()").split("\n") == paths
    assert all(Path(path).is_file() for path in paths)
    page.click("#selection >> text=Wrong")
    wait(page, "document.querySelector('.corrections').textContent.includes('3 corrections')")
    assert workspace.corrections.of("red") == dict.fromkeys(cards(page)[1:4], False)
    page.keyboard.press("Escape")
    assert page.locator("#selection").is_hidden()
    assert page.locator(".select[aria-checked=true]").count() == 0
    page.locator(".hit .select").nth(0).click()
    ask(page, "blue")
    assert page.locator("#selection").is_hidden()
    ask(page, "red sort:name")
    for position in (1, 2, 3):  # taken back, for the other tests
        page.locator(".hit").nth(position).hover()
        page.locator(".hit").nth(position).locator(".mark[data-right=no]").click()
    wait(page, "document.querySelector('.corrections').hidden")


# ---- a server that does not answer


def test_a_server_that_is_gone_is_one_clear_state(tmp_path: Path, browser: Any) -> None:
    """Stopped and started again at the same port, as clipkit is in a terminal."""
    paint(tmp_path / "photos" / "red.png", "red")
    model = ColourModel()
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [tmp_path / "photos"], encoder=model)
    shared = browser.new_context()
    page = shared.new_page()
    with served(Workspace(tmp_path / "index", model)) as address:  # type: ignore[arg-type]
        page.goto(address)
        page.wait_for_selector("#results [data-view]")
        ask(page, "red")
        port = int(address.rpartition(":")[2])
    page.fill("input[name=words]", "blue")
    page.press("input[name=words]", "Enter")
    page.wait_for_selector("#lost:visible")
    assert page.inner_text("#lost").startswith("clipkit does not answer. Is it still running?")
    assert page.inner_text(".summary h2") == "“red”"
    assert float(page.evaluate("getComputedStyle(document.querySelector('.grid')).opacity")) < 0.9
    page.wait_for_timeout(3500)  # Gradio's own note would show by now
    assert page.locator(".toast-wrap:visible").count() == 0
    with served(Workspace(tmp_path / "index", model), port=port):  # type: ignore[arg-type]
        wait(page, "document.querySelector('.summary h2')?.textContent === '“blue”'")
        assert page.locator("#lost:visible").count() == 0
        shared.close()


# ---- titles, steps, keyboard, phones


def test_titles_and_steps_name_the_search(site: Site, visit: Open) -> None:
    page = visit(site[0])
    assert page.title() == "clipkit"
    ask(page, "red")
    assert page.title() == "red – clipkit"
    before = steps(page)
    page.press("input[name=words]", "Enter")
    settled(page)
    assert steps(page) == before
    page.click("#tools >> text=Classify")
    page.fill(".evaluate textarea", "red, blue\nwhite")
    page.press(".evaluate textarea", "Control+Enter")
    page.wait_for_selector(".shares")
    assert "#classify=red%2C+blue%0Awhite&choice=" in page.url
    address = page.url
    page.go_back()
    page.go_back()
    wait(page, "document.title === 'red – clipkit' && document.body.dataset.view === 'results'")
    again = visit(address)
    again.wait_for_selector(".shares")
    assert again.input_value(".evaluate textarea") == "red, blue\nwhite"


def test_a_box_is_as_high_as_its_lines(site: Site, visit: Open) -> None:
    page = visit(f"{site[0]}/#classify")
    page.wait_for_selector(".evaluate textarea")
    page.fill(".evaluate textarea", "\n".join("abcdefgh"))
    box = "document.querySelector('.evaluate textarea')"
    hidden = f"{box}.scrollHeight - {box}.clientHeight"
    assert page.evaluate(hidden) == 0


def test_the_keyboard_starts_in_the_field_and_walks_the_cards(site: Site, visit: Open) -> None:
    page = visit(site[0])
    assert page.evaluate("document.activeElement.name") == "words"
    page.keyboard.type("/red")  # "/" goes to the field; it is there already
    page.keyboard.press("Enter")
    settled(page)
    assert page.input_value("input[name=words]") == "red"
    page.keyboard.press("ArrowDown")
    here = "[...document.querySelectorAll('.hit')].indexOf(document.activeElement.closest('.hit'))"
    assert page.evaluate(here) == 0
    page.keyboard.press("ArrowRight")
    assert page.evaluate(here) == 1
    # A grid is one stop: open, select, right, wrong, similar of one card, then what comes after.
    assert page.locator(".grid [tabindex='0']").count() == 5
    for _ in range(5):
        page.keyboard.press("Tab")
    # That is the button at the end; as it comes into view, it loads, and the first new card is next.
    wait(page, f"{here} === 24")
    page.locator(".hit .open").nth(1).focus()
    chosen = cards(page)[1]
    for key, mark in (("x", {chosen: False}), ("r", {chosen: True}), ("r", {})):
        page.keyboard.press(key)
        total = f"{len(mark)} c"
        wait(
            page,
            "total => document.querySelector('.corrections .total').textContent.startsWith(total)",
            total,
        )
        wait(
            page,
            "([id, right]) => [...document.querySelectorAll(`.hit[data-id='${id}'] .mark`)]"
            ".every(b => (b.ariaPressed === 'true') === (b.dataset.right === right))",
            [chosen, {True: "yes", False: "no", None: ""}[mark.get(chosen)]],
        )
    page.keyboard.press("c")
    assert page.inner_text("#selection .total") == "1 selected"
    page.keyboard.press("Escape")
    page.locator(".hit .open").first.focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.name") == "words"
    page.locator(".hit .open").first.focus()
    page.keyboard.press("s")
    page.wait_for_selector(".summary h2 img")


def test_a_drop_is_taken_anywhere_in_the_window(site: Site, visit: Open) -> None:
    """On the results page too, where the search row had become the overlay's frame."""
    page = visit(site[0], viewport={"width": 1280, "height": 900})
    ask(page, "red")
    page.evaluate("document.body.dataset.drag = 'yes'")
    box = page.locator("#drop").bounding_box()
    assert box["x"] == 14 and box["y"] == 14  # its `inset`
    assert box["width"] > 1200 and box["height"] == 900 - 28


def small_targets(page: Any) -> list[str]:
    script = """() => [...document.querySelectorAll('button, a, input, select, summary')]
        .filter(e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
        .map(e => [e, e.getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.width < 43.9 || box.height < 43.9))
        .map(([e, box]) => `${e.outerHTML.slice(0, 90)} ${box.width} x ${box.height}`)"""
    return page.evaluate(script)


def test_on_a_phone_everything_can_be_touched_and_nothing_is_wider(site: Site, visit: Open) -> None:
    page = visit(site[0], **PHONE)
    overflow = "document.documentElement.scrollWidth"

    def good(where: str) -> None:
        assert small_targets(page) == [], where
        assert page.evaluate(overflow) == 390, where

    good("start")
    assert page.evaluate("document.activeElement.name") != "words"  # no keyboard comes up by itself
    ask(page, "red")
    good("results")
    page.locator("#ask [data-do=filters]").tap()
    good("filters")
    page.locator("[data-do=choose]").tap()
    page.locator("#results .hit .open").first.tap()
    good("selection")
    page.locator("[data-do=clear-selection]").tap()
    page.locator("#results .hit .open").first.tap()
    page.wait_for_selector("#viewer dd")
    good("viewer")
    page.go_back()
    closed(page)
    page.locator("#tools [data-do=folders]").tap()
    good("folders")
    page.locator("#folders [data-do=close-dialog]").tap()
    page.goto(f"{site[0]}/#classify=red,blue")
    page.wait_for_selector(".shares")
    good("classify")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(site: Site, visit: Open, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    page = visit(site[0], viewport={"width": 1280, "height": 900}, color_scheme=scheme)

    def check(where: str) -> None:
        page.wait_for_timeout(400)  # fades have ended
        found = axe.Axe().run(page).response["violations"]
        serious = [
            (where, one["id"], node["html"][:200], node["failureSummary"][:300])
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]
        assert not serious, serious

    check("start")
    ask(page, "red")
    check("results")
    page.locator(".hit .select").first.click()
    check("selection")
    page.keyboard.press("Escape")
    view(page, 0)
    page.wait_for_selector("#viewer dd")
    check("viewer")
    page.keyboard.press("Escape")
    closed(page)
    page.click("#ask [data-do=filters]")
    check("filters")
    page.click("#ask [data-do=help]")
    check("help")
    page.keyboard.press("Escape")
    page.click("#tools [data-do=folders]")
    page.wait_for_selector("#folders .indexed li, #folders .indexed *")
    check("folders")
    page.keyboard.press("Escape")
    page = visit(
        f"{site[0]}/#classify=red, blue",
        viewport={"width": 1280, "height": 900},
        color_scheme=scheme,
    )
    page.wait_for_selector(".shares")
    check("classify")
    page.set_viewport_size({"width": 390, "height": 844})
    check("classify on a phone")
