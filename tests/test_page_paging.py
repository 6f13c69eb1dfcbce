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


def cards(page: Any) -> list[str]:
    return page.eval_on_selector_all("#results .hit", "all => all.map(card => card.dataset.id)")


@pytest.mark.slow
def test_scrolling_goes_on_beyond_the_ten_thousandth_and_back_restores_it(
    tmp_path: Path, visit: Open
) -> None:
    """Every picture is shown once, in at most 80 requests, and Back brings all of them again."""
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
        assert len(searches) <= 80
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
