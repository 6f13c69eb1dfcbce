"""Marking results right and wrong in a real Chromium, by pointer, by keyboard and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Open, ask, browser, context, pytestmark, served, settled, visit  # noqa: F401
from colours import ColourModel, paint

from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders

PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
Site = tuple[str, Workspace]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """30 red pictures and a blue one, and what serves them."""
    for number in range(30):
        paint(tmp_path / "photos" / f"red {number}.png", "red", number=number)
    paint(tmp_path / "photos" / "blue.png", "blue")
    model = ColourModel()
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(
            catalog,
            [tmp_path / "photos"],
            encoder=model,
        )
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    with served(workspace) as address:
        yield address, workspace


def kept(page: Any, total: int) -> None:
    """Wait until the server has kept what was clicked."""
    said = f"{total} correction{'' if total == 1 else 's'}"
    page.wait_for_function(
        "said => { const box = document.querySelector('.corrections');"
        " return said.startsWith('0 ') ? box.hidden : !box.hidden && box.textContent.includes(said) }",
        arg=said,
    )


def marked(page: Any) -> list[tuple[int, str]]:
    """(position of the hit from 0, "yes" or "no") of every mark that the page shows."""
    script = """hits => hits.flatMap((hit, at) =>
        [...hit.querySelectorAll('.mark[aria-pressed=true]')].map(b => [at, b.dataset.right]))"""
    return [(at, right) for at, right in page.eval_on_selector_all("#results .hit", script)]


def mark(page: Any, position: int, right: str) -> Any:
    return page.locator("#results .hit").nth(position).locator(f".mark[data-right={right}]")


def test_marks_are_made_changed_taken_back_and_exported(site: Site, visit: Open) -> None:  # noqa: F811
    address, workspace = site
    page = visit(address)
    assert page.locator(".corrections").count() == 0
    ask(page, "red sort:score")
    assert page.locator(".corrections").is_hidden()
    hit = page.locator("#results .hit").first
    assert mark(page, 0, "yes").evaluate("b => getComputedStyle(b).opacity") == "0"
    hit.hover()
    page.wait_for_function("getComputedStyle(document.querySelector('.hit .mark')).opacity === '1'")
    mark(page, 0, "yes").click()
    kept(page, 1)
    mark(page, 1, "no").click()
    kept(page, 2)
    assert marked(page) == [(0, "yes"), (1, "no")]
    mark(page, 1, "yes").click()  # the other way round
    mark(page, 2, "no").click()
    kept(page, 3)
    # What is wrong recedes, and one click says what marks are for: they change no results yet.
    faded = page.locator("#results .hit").nth(2).locator("img")
    assert faded.evaluate("image => getComputedStyle(image).opacity") == "0.45"
    page.click(".corrections .why")
    told = page.locator("#about-corrections")
    assert "change no results yet" in told.inner_text()
    assert "clipkit corrections --out" in told.inner_text()
    page.keyboard.press("Escape")
    assert told.is_hidden()
    mark(page, 2, "no").click()  # once more takes it back
    kept(page, 2)
    assert faded.evaluate("image => getComputedStyle(image).opacity") == "1"
    assert marked(page) == [(0, "yes"), (1, "yes")]
    assert page.locator("#viewer").is_hidden()  # nothing else happened
    first = hit.get_attribute("data-id")
    assert workspace.corrections.of("red")[first] is True
    # What is shown comes from the server again: with more results, and after a reload.
    page.click("[data-do=more]")
    page.wait_for_function("document.querySelectorAll('.hit').length === 31")
    assert marked(page) == [(0, "yes"), (1, "yes")]
    page.reload()
    settled(page)
    assert marked(page) == [(0, "yes"), (1, "yes")]
    ask(page, "blue")
    assert marked(page) == []
    with page.expect_download() as download:
        page.click("text=Export corrections")
    assert download.value.suggested_filename == "clipkit-corrections.jsonl"
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert (rows[0]["image_id"], rows[0]["query"], rows[0]["right"]) == (first, "red", True)
    assert len(rows) == 2 and all(Path(row["picture"]).is_file() for row in rows)
    page.click("[data-do=home]")
    page.wait_for_selector(".home >> text=Export corrections")


def test_only_results_of_words_can_be_marked(site: Site, visit: Open) -> None:  # noqa: F811
    page = visit(site[0])
    ask(page, "red")
    page.click(".hit [data-do=similar] >> nth=0")
    page.wait_for_selector(".summary h2 img")
    settled(page)
    assert page.locator(".hit").count() > 0 and page.locator(".mark").count() == 0
    page.click(".hit .open >> nth=0")
    page.wait_for_selector("#viewer dd")
    assert page.locator(".judge").is_hidden()
    page.keyboard.press("Escape")
    page.click("[data-do=home]")
    page.wait_for_selector(".home .chips")
    ask(page, "red -blue")
    assert page.locator(".hit").count() > 0 and page.locator(".mark").count() == 0


def test_the_keyboard_marks_too_and_says_what_is_marked(site: Site, visit: Open) -> None:  # noqa: F811
    page = visit(site[0])
    ask(page, "red")
    page.locator(".hit .open").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.role") == "checkbox"  # of the selection
    page.keyboard.press("Tab")
    label = "document.activeElement.ariaLabel + ', ' + document.activeElement.ariaPressed"
    assert page.evaluate(label) == "Result 1 is right for “red”, false"
    page.wait_for_function("getComputedStyle(document.activeElement).opacity === '1'")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    kept(page, 1)
    assert page.evaluate(label) == "Result 1 is wrong for “red”, true"
    page.keyboard.press("Space")
    kept(page, 0)
    assert page.evaluate(label) == "Result 1 is wrong for “red”, false"


def test_a_picture_can_be_judged_where_it_is_large(site: Site, visit: Open) -> None:  # noqa: F811
    page = visit(site[0])
    ask(page, "red")
    page.click(".hit .open >> nth=0")
    page.wait_for_selector("#viewer dd")
    page.click(".judge >> text=Right")
    kept(page, 1)
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('.judge [aria-pressed=true]').length === 0")
    page.click(".judge >> text=Wrong")
    kept(page, 2)
    assert marked(page) == [(0, "yes"), (1, "no")]
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".judge [data-right=yes][aria-pressed=true]")


def test_a_mark_that_was_not_kept_is_not_shown(site: Site, visit: Open) -> None:  # noqa: F811
    """Marked twice in a row while the server refuses: both are taken back, and it says why."""
    address, workspace = site
    page = visit(address)
    ask(page, "red")
    (workspace.folder / "corrections.jsonl").mkdir()
    mark(page, 0, "yes").click()
    page.wait_for_selector(".notice:visible >> text=cannot use")
    assert marked(page) == []
    (workspace.folder / "corrections.jsonl").rmdir()
    mark(page, 0, "yes").click()
    kept(page, 1)
    assert page.locator("#ask .notice").is_hidden()
    assert marked(page) == [(0, "yes")]


def test_on_a_phone_pictures_are_marked_in_the_viewer_or_several_at_once(
    site: Site,
    visit: Open,  # noqa: F811
) -> None:
    """A card on a phone has no room for buttons of 44 px; what is marked shows, and can be unmarked."""
    page = visit(site[0], **PHONE)
    ask(page, "red")
    assert page.locator(".mark:visible").count() == 0
    page.locator(".hit .open").first.tap()
    page.locator(".judge >> text=Wrong").tap()
    kept(page, 1)
    page.locator("#viewer [data-do=close]").tap()
    page.locator("[data-do=choose]").tap()
    for position in (1, 2):
        page.locator(".hit .open").nth(position).tap()
    assert page.inner_text("#selection .total") == "2 selected"
    page.locator("#selection >> text=Right").tap()
    kept(page, 3)
    assert marked(page) == [(0, "no"), (1, "yes"), (2, "yes")]
    page.locator("[data-do=clear-selection]").tap()
    box = mark(page, 0, "no").bounding_box()
    assert min(box["width"], box["height"]) >= 44
    mark(page, 0, "no").tap()
    kept(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
