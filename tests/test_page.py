"""The page in a real Chromium, over a real catalog and a model that knows colours."""

# ruff: noqa: F811
from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import (  # noqa: F401
    Open,
    Watched,
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

EVIL = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 pictures: 30 red in a/, 40 blue in b/, one green with an evil name, one yellow captioned."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(30):
        paint(folder / "a" / f"red {number}.png", "red", number=number)
    for number in range(40):
        paint(folder / "b" / f"blue {number}.png", "blue", number=number)
    paint(folder / EVIL, "green", size=(60, 90))
    paint(folder / "c" / "lemon.png", "yellow")
    (folder / "c" / "lemon.txt").write_text("A <b>lemon</b> & more")
    os.utime(folder / "c" / "lemon.png", (1_600_000_000,) * 2)  # 13 September 2020
    return folder


@pytest.fixture(scope="module")
def site(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = ColourModel()
    index = tmp_path_factory.mktemp("index")
    with Catalog.open(index, write=True) as catalog:
        index_folders(catalog, [photos], encoder=model)
    with served(Workspace(index, model)) as address:  # type: ignore[arg-type]
        yield address


def names(page: Any) -> list[str]:
    return page.eval_on_selector_all("#results .hit img", "all => all.map(img => img.alt)")


def first_row(page: Any) -> list[str]:
    script = """all => {
        const top = all[0].getBoundingClientRect().top;
        return all.filter(hit => Math.abs(hit.getBoundingClientRect().top - top) < 5)
                  .map(hit => hit.querySelector('img').alt);
    }"""
    return page.eval_on_selector_all("#results .hit", script)


# ---- asking


def test_words_find_their_picture(site: str, visit: Open) -> None:
    page = visit(site)
    assert page.inner_text("h1.title") == "Type words, see your pictures"
    assert page.inner_text("#status").split("\n")[0].startswith("colours")
    ask(page, "yellow")
    assert first_row(page)[0] == "A <b>lemon</b> & more"
    best = page.locator(".hit").first
    assert best.locator(".score").inner_text() == "1.00"
    assert "not calibrated" in (best.locator(".score").get_attribute("title") or "")
    assert "24 of 72 pictures" in page.inner_text(".summary p")
    page.wait_for_function("document.querySelector('.hit img').naturalWidth > 0")


def test_a_question_has_an_address(site: str, visit: Open) -> None:
    page = visit(site)
    ask(page, "red")
    ask(page, "blue")
    assert page.url.endswith("#words=blue")
    page.go_back()
    page.wait_for_function("document.querySelector('.summary h2').textContent === '“red”'")
    page.go_back()
    page.wait_for_selector(".home .chips")
    again = visit(f"{site}/#words=blue")
    again.wait_for_selector(".summary h2")
    assert again.input_value("input[name=words]") == "blue"
    assert names(again)[0].startswith("blue")


def test_examples_are_one_click(site: str, visit: Open) -> None:
    page = visit(site)
    page.click(".chip >> text=blue")
    settled(page)
    assert names(page)[0].startswith("blue")
    assert page.input_value("input[name=words]") == "blue"


def test_more_can_be_shown_without_losing_the_place(site: str, visit: Open) -> None:
    """72 pictures, 24 a page: two more pages, then no button."""
    page = visit(site)
    ask(page, "red")
    page.evaluate("document.querySelector('.hit img').marked = true")
    for expected in (48, 72):
        page.click("[data-do=more]")
        page.wait_for_function(f"document.querySelectorAll('.hit').length === {expected}")
    assert page.locator("[data-do=more]").count() == 0
    assert page.evaluate("document.querySelector('.hit img').marked")
    assert len(set(page.eval_on_selector_all(".hit", "all => all.map(h => h.dataset.id)"))) == 72


def test_what_cannot_be_understood_is_a_sentence(site: str, visit: Open) -> None:
    page = visit(site)
    for words, said in (("folde:x", "folder"), ('+"/etc/passwd"', "picture")):
        page.fill("input[name=words]", words)
        page.keyboard.press("Enter")
        page.wait_for_selector(".failure")
        settled(page)
        sentence = page.inner_text(".failure")
        assert said in sentence and "Traceback" not in sentence
        ask(page, "red")


# ---- looking at one picture


def test_a_click_shows_the_picture_and_what_is_known(site: str, visit: Open, photos: Path) -> None:
    page = visit(site)
    ask(page, "yellow")
    page.click(".hit .open >> nth=0")
    page.wait_for_selector("#viewer dd")
    told = page.inner_text("#viewer aside")
    assert str(photos / "c" / "lemon.png") in told
    assert "90 × 60, PNG" in told and "cosine 1.000" in told
    assert page.inner_text("#viewer h2") == "A <b>lemon</b> & more"
    page.wait_for_function("document.querySelector('.stage img').src.includes('/pictures/')")
    # Arrow keys step, Esc closes, and the focus is where it was.
    page.keyboard.press("ArrowRight")
    second = page.locator(".hit").nth(1).get_attribute("data-id")
    page.wait_for_function("id => document.querySelector('#viewer').dataset.id === id", arg=second)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement.className === 'open'")
    assert not page.evaluate("document.querySelector('#viewer').open")


def test_similar_pictures_are_one_click_away(site: str, visit: Open) -> None:
    """29 other reds are nearest to a red picture; itself it is not."""
    page = visit(site)
    ask(page, "red")
    chosen = page.locator(".hit").first.get_attribute("data-id")
    page.click(".hit .open >> nth=0")
    page.click("[data-do=similar-here]")
    page.wait_for_selector(".summary h2 img")
    settled(page)
    assert all(name.startswith("red") for name in names(page))
    shown = page.eval_on_selector_all(".hit", "all => all.map(h => h.dataset.id)")
    assert chosen not in shown
    page.click(".hit [data-do=similar] >> nth=0")
    page.wait_for_function("id => !location.hash.includes(id)", arg=chosen)
    page.go_back()
    page.wait_for_function("id => location.hash.includes(id)", arg=chosen)


def test_a_path_can_be_copied(site: str, visit: Open, photos: Path) -> None:
    page = visit(site, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "yellow")
    page.click(".hit .open >> nth=0")
    page.click("[data-do=copy]")
    page.wait_for_selector("[data-do=copy] >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == str(photos / "c" / "lemon.png")


def test_a_picture_that_is_gone_says_so(tmp_path: Path, visit: Open) -> None:
    model = ColourModel()
    path = paint(tmp_path / "photos" / "gone.png", "red")
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [path.parent], encoder=model)
    path.unlink()
    with served(Workspace(tmp_path / "index", model)) as address:  # type: ignore[arg-type]
        page = visit(address)
        page.click(".hit .open")
        page.wait_for_selector(".stage p:visible")
        assert page.inner_text(".stage p").startswith(
            "the file gone.png was deleted or has changed"
        )


# ---- asking with a picture


def hand_over(page: Any, event: str, kind: str, name: str, data: bytes) -> None:
    """Drop or paste a file as a person does."""
    script = """([event, kind, name, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        transfer.items.add(new File([bytes], name));
        const options = {bubbles: true, cancelable: true};
        const sent = kind === 'ClipboardEvent'
            ? new ClipboardEvent(event, {...options, clipboardData: transfer})
            : new DragEvent(event, {...options, dataTransfer: transfer});
        document.querySelector('#results').dispatchEvent(sent);
    }"""
    page.evaluate(script, [event, kind, name, base64.b64encode(data).decode()])


def test_a_dropped_or_pasted_picture_finds_its_like(site: str, visit: Open, tmp_path: Path) -> None:
    page = visit(site)
    red = paint(tmp_path / "mine.png", "red", size=(50, 50)).read_bytes()
    hand_over(page, "dragenter", "DragEvent", "mine.png", red)
    assert page.inner_text("#drop") == "Drop a picture to find similar ones"
    hand_over(page, "drop", "DragEvent", "mine.png", red)
    page.wait_for_selector(".summary h2 img")
    settled(page)
    assert page.locator("#drop").is_hidden()
    assert page.locator(".sample").is_visible()
    assert all(name.startswith("red") for name in names(page))

    blue = paint(tmp_path / "other.png", "blue", size=(50, 50)).read_bytes()
    hand_over(page, "paste", "ClipboardEvent", "other.png", blue)
    page.wait_for_function("document.querySelector('.hit img')?.alt.startsWith('blue')")
    page.click("[data-do=clear-sample]")
    page.wait_for_selector(".home .chips")


def test_a_picture_can_be_chosen_and_joined_with_words(
    site: str, visit: Open, tmp_path: Path
) -> None:
    """A red picture and yellow^3 sum to (1, -1, -1) + 3 (1, 1, -1) = (4, 2, -4) / sqrt 3, whose
    cosine is 10 / (6 sqrt 3) = 0.96 to yellow (1, 1, -1) and 6 / (6 sqrt 3) = 0.58 to red."""
    page = visit(site)
    with page.expect_file_chooser() as chooser:
        page.click("[data-do=pick]")
    chooser.value.set_files(paint(tmp_path / "mine.png", "red"))
    page.wait_for_selector(".summary h2 img")
    settled(page)
    ask(page, "yellow^3")
    assert names(page)[0] == "A <b>lemon</b> & more"
    assert names(page)[1].startswith("red")
    scores = page.eval_on_selector_all(".hit", "all => all.slice(0, 2).map(h => h.dataset.score)")
    assert scores == ["0.962", "0.577"]


def test_find_similar_counts_together_with_words(site: str, visit: Open) -> None:
    """As with a chosen picture: yellow^3 outweighs the red one, which itself is left out."""
    page = visit(site)
    ask(page, "red")
    red = page.get_attribute(".hit >> nth=0", "data-id")
    page.click(".hit [data-do=similar] >> nth=0")
    page.wait_for_selector(".summary h2 img")
    settled(page)
    assert names(page)[0].startswith("red")
    ask(page, "yellow^3")
    assert page.inner_text(".summary h2").endswith("and “yellow^3”")
    assert names(page)[0] == "A <b>lemon</b> & more"
    shown = page.eval_on_selector_all(".hit", "all => all.map(h => h.dataset.id)")
    assert names(page)[1].startswith("red") and red not in shown


def test_an_empty_result_leads_out(site: str, visit: Open) -> None:
    page = visit(site)
    for words, label, left in (
        ('red "nothing such"', 'Search without "nothing such"', "red"),
        ("red folder:c path:blue", "Search without folder:c", "red path:blue"),
    ):
        page.fill("input[name=words]", words)
        page.keyboard.press("Enter")
        page.wait_for_selector(f".nothing button >> text={label}")
        page.click(f".nothing button >> text={label}")
        page.wait_for_selector(".hit")
        settled(page)
        assert page.input_value("input[name=words]") == left
    ask(page, "red")
    page.click("#ask [data-do=filters]")
    page.fill("#filters input[name=until]", "1990-01-01")
    page.click(".nothing button >> text=Search without the filters")
    page.wait_for_function("document.querySelector('.summary p')?.textContent.includes('of 72 ')")
    assert page.input_value("#filters input[name=until]") == ""


def test_what_is_no_picture_is_refused_where_it_was_dropped(site: str, visit: Open) -> None:
    page = visit(site)
    hand_over(page, "drop", "DragEvent", "notes.txt", b"hello")
    page.wait_for_selector(".notice:visible")
    assert len(page.inner_text(".notice")) > 15
    assert "Traceback" not in page.inner_text(".notice")
    assert not page.evaluate("document.body.dataset.busy")


# ---- narrowing


def choose_folder(page: Any, ending: str) -> None:
    labels = page.eval_on_selector_all("#filters option", "all => all.map(o => o.textContent)")
    page.select_option("#filters select", label=next(x for x in labels if x.endswith(ending)))


def test_folders_and_dates_narrow_what_is_searched(site: str, visit: Open) -> None:
    page = visit(site)
    ask(page, "red")
    page.click("#ask [data-do=filters]")
    choose_folder(page, "b (40)")
    page.wait_for_function("document.querySelector('.summary p').textContent.includes('of 40 ')")
    assert all(name.startswith("blue") for name in names(page))
    page.click("#filters [data-do=clear-filters]")
    page.wait_for_function("document.querySelector('.summary p').textContent.includes('of 72 ')")
    # The lemon's file is from 13 September 2020; "to" includes its day.
    page.fill("#filters input[name=until]", "2020-09-12")
    page.wait_for_selector(".nothing")
    page.fill("#filters input[name=until]", "2020-09-14")
    page.wait_for_function("document.querySelector('.summary p').textContent.includes('1 of 1 ')")
    page.fill("#filters input[name=after]", "2021-01-01")
    page.wait_for_selector(".failure")
    assert "the first must not be later" in page.inner_text(".failure")
    page.click("#filters [data-do=clear-filters]")
    page.wait_for_function("document.querySelector('.summary p')?.textContent.includes('of 72 ')")


def test_filters_alone_list_what_passes(site: str, visit: Open) -> None:
    page = visit(site)
    page.click("#ask [data-do=filters]")
    choose_folder(page, "a (30)")
    settled(page)
    assert "24 of 30 pictures" in page.inner_text(".summary p")
    assert page.locator(".band").count() == 0  # nothing was compared


# ---- harm, looks, reach


def test_a_file_name_cannot_run_anything(site: str, visit: Open) -> None:
    page = visit(site)
    ask(page, "green")
    assert names(page)[0] == EVIL
    page.click(".hit .open >> nth=0")
    page.wait_for_selector("#viewer dd")
    assert page.inner_text("#viewer h2") == EVIL
    assert page.locator("img[src=x]").count() == 0
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement.className === 'open'")
    ask(page, "<img src=x onerror=alert(2)>")
    assert page.locator("img[src=x]").count() == 0


def test_the_pages_policy_runs_nothing_smuggled_in(site: str, browser: Any) -> None:
    """Should escaping fail one day."""
    watched = Watched(browser.new_page())
    watched.page.goto(site)
    watched.page.wait_for_selector("#results [data-view]")
    watched.page.evaluate(
        "document.querySelector('#results').innerHTML = '<img src=\"x\" onerror=\"alert(3)\">'"
    )
    watched.page.wait_for_function("document.querySelector('#results img').complete")
    watched.page.wait_for_timeout(100)
    watched.page.close()
    assert len(watched.faults) == 1
    assert "inline event handler violates" in watched.faults[0]


def test_dark_follows_the_system_and_can_be_chosen(site: str, visit: Open) -> None:
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c > 200)"
    page = visit(site, color_scheme="dark")
    assert not page.evaluate(light)
    page.click("[data-do=theme]")
    assert page.evaluate(light)
    page.reload()
    page.wait_for_selector("#results [data-view]")
    assert page.evaluate(light)
    assert visit(site, color_scheme="light").evaluate(light)


@pytest.mark.parametrize("width", [360, 390, 768, 1920])
def test_every_width_is_used_and_none_is_left(site: str, visit: Open, width: int) -> None:
    page = visit(site, viewport={"width": width, "height": 780})
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    ask(page, "red")
    assert page.evaluate(wide) == 0
    assert len(first_row(page)) >= 2
    page.click(".hit .open >> nth=0")
    page.wait_for_selector("#viewer dd")
    box = page.locator("#viewer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.locator("[data-do=similar-here]").is_visible()
    assert page.locator(".stage").bounding_box()["height"] > 200
    assert page.locator(".stage img").bounding_box()["height"] == 120  # 90 x 60, enlarged twice


def test_the_keyboard_is_enough(site: str, visit: Open) -> None:
    page = visit(site)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "words"
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    settled(page)
    page.keyboard.press("Escape")
    page.locator(".hit .open").first.focus()
    here = "[...document.querySelectorAll('.hit .open')].indexOf(document.activeElement)"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(here) == 1
    page.keyboard.press("ArrowDown")
    assert page.evaluate(here) > 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(here) == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")


def test_everything_has_a_name(site: str, visit: Open) -> None:
    """For who cannot see: every button, field and picture says what it is."""
    page = visit(site)
    ask(page, "red")
    nameless = """() => [...document.querySelectorAll('#top, #ask, #filters, #results')]
        .flatMap(part => [...part.querySelectorAll('button, input, select, img')])
        .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length
                       || (e.tagName === 'IMG' && e.hasAttribute('alt'))))
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.locator("footer:visible").count() == 0
