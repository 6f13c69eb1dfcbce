"""The page beyond the ten thousandth result, in a real Chromium."""

# ruff: noqa: F811
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chromium import Open, ask, browser, context, pytestmark, served, settled, visit  # noqa: F401
from colours import ColourModel
from many_pictures import fill

from app.web.workspace import Workspace

FAR = 10_000
# The last row of each grid but the last ends where the others end; no grid is higher or lower than
# the place that is kept for it.
FULL_ROWS = """() => {
    const grids = [...document.querySelectorAll('#results .grid')].slice(0, -1);
    return grids.length >= 3 && grids.every((grid) => {
        const [edge, cards] = [grid.getBoundingClientRect(), [...grid.children]];
        const boxes = cards.map((card) => card.getBoundingClientRect());
        const kept = parseFloat(grid.style.containIntrinsicHeight.split(' ')[1]);
        return boxes.at(-1).right > edge.right - 2
            && Math.abs(boxes.at(-1).bottom - boxes[0].top - kept) < 2
            && getComputedStyle(grid).contentVisibility === 'auto';
    });
}"""


def boxes(page: Any) -> int:
    """How many boxes the browser keeps for the page."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("HeapProfiler.collectGarbage")
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "LayoutObjects")


def cards(page: Any) -> list[str]:
    return page.eval_on_selector_all("#results .hit", "all => all.map(card => card.dataset.id)")


@pytest.mark.slow
def test_scrolling_goes_on_beyond_the_ten_thousandth_and_back_restores_it(
    tmp_path: Path, visit: Open
) -> None:
    """Every picture is shown once, in at most 40 requests; grids out of view keep no boxes, which would
    take 400 MB; and Back brings all of them again."""
    fill(tmp_path / "index", FAR + 300)
    with served(Workspace(tmp_path / "index", ColourModel())) as address:  # type: ignore[arg-type]
        page = visit(address)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        ask(page, "red")
        page.wait_for_function(
            """count => {
                scrollTo({top: document.documentElement.scrollHeight, behavior: 'instant'});
                return document.querySelectorAll('#results .hit').length >= count;
            }""",
            arg=FAR,
            timeout=240_000,
        )
        searches = [url for url in asked if url.endswith("/api/v1/search")]
        assert len(searches) <= 40
        page.wait_for_timeout(500)  # grids notice in a later frame that they are out of view
        assert boxes(page) < 20_000  # of 210,000 nodes
        before = cards(page)
        assert len(set(before)) == len(before) >= FAR
        card = page.locator("#results .hit").nth(FAR - 100)
        card.scroll_into_view_if_needed()
        page.wait_for_timeout(400)  # longer than the pause after which a place is noted
        place = page.evaluate("scrollY")
        chosen = card.get_attribute("data-id")
        card.hover()
        card.locator(".similar").click()
        page.wait_for_selector(".summary h2 img")
        settled(page)
        page.go_back()
        page.wait_for_function("place => Math.abs(scrollY - place) < 3", arg=place)
        settled(page)
        assert cards(page)[:FAR] == before[:FAR]
        box = page.locator(f"#results .hit[data-id='{chosen}']").bounding_box()
        assert 0 <= box["y"] <= 860


def test_many_cards_stand_in_grids_of_whole_rows(tmp_path: Path, visit: Open) -> None:
    """Rows are those of one grid, whatever the width; the keys, a selection with Shift and the viewer
    go across; and grids out of view keep their height without being laid out."""
    fill(tmp_path / "index", 600)
    with served(Workspace(tmp_path / "index", ColourModel())) as address:  # type: ignore[arg-type]
        page = visit(address)
        ask(page, "red")
        page.evaluate("document.querySelector('.hit').marked = true")
        page.wait_for_function(
            """() => {
                scrollTo({top: document.documentElement.scrollHeight, behavior: 'instant'});
                return document.querySelectorAll('#results .hit').length >= 600;
            }"""
        )
        sizes = page.eval_on_selector_all(".grid", "all => all.map(grid => grid.children.length)")
        assert len(sizes) >= 4 and all(120 <= size < 160 for size in sizes[:-1]) and sizes[-1]
        for size in ({"width": 1280, "height": 860}, {"width": 900, "height": 860}):
            page.set_viewport_size(size)
            page.wait_for_function(FULL_ROWS)
        shown = cards(page)
        assert len(set(shown)) == len(shown) == 600
        assert page.evaluate("document.querySelector('.hit').marked")  # only moved, never made anew
        # Over the border of the first two grids and back.
        first, second = ("#results .grid >> nth=0", "#results .grid >> nth=1")
        last = page.locator(f"{first} >> .hit >> nth=-1")
        next_one = page.locator(f"{second} >> .hit >> nth=0")
        names = [last.get_attribute("data-id"), next_one.get_attribute("data-id")]
        at = "document.activeElement.closest('.hit')?.dataset.id"
        last.locator(".open").focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate(at) == names[1]
        assert page.locator(".grid [tabindex='0']").count() == 5  # all grids are one stop
        page.keyboard.press("ArrowUp")
        assert page.evaluate(f"{at} && document.activeElement.closest('.grid').nextSibling")
        page.keyboard.press("ArrowDown")
        assert page.evaluate(at) == names[1]
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.wait_for_selector("#viewer[open]")
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "id => document.querySelector('#viewer').dataset.id === id", arg=names[1]
        )
        page.keyboard.press("Escape")
        page.wait_for_selector("#viewer", state="hidden")
        last.hover()
        last.locator(".select").click()
        page.locator(f"{second} >> .hit >> nth=1").locator(".open").click(modifiers=["Shift"])
        assert page.inner_text("#selection .total") == "3 selected"
