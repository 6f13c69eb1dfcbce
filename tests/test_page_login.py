"""The page in Chromium where others can reach it: the login link, deep links, behind a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Watched, ask, browser, pytestmark  # noqa: F401
from serving import Server, serving
from test_attacks import library

SECRET = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = library(tmp_path_factory.mktemp("login"))
    with serving(folder, token=True, secret=SECRET, root_path="/photos") as running:
        yield running


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:  # noqa: F811
    watched = Watched(browser.new_context().new_page())
    yield watched.page
    watched.page.context.close()
    assert not watched.faults, watched.faults


def test_the_printed_link_logs_in_and_the_token_leaves_the_address(
    server: Server, page: Any
) -> None:
    assert server.address.endswith(f"/photos/login#token={SECRET}")
    page.goto(server.address)
    page.wait_for_selector("#results [data-view]")
    assert page.url == f"http://127.0.0.1:{server.port}/photos/"
    ask(page, "red")
    assert page.locator(".hit").count() == 3
    assert page.evaluate("document.cookie") == ""  # HttpOnly
    page.go_back()
    assert SECRET not in page.url


def test_a_link_to_a_search_survives_the_login(server: Server, page: Any, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/photos/"
    page.goto(f"{address}#words=red")
    assert page.title() == "Log in – clipkit"
    page.fill("input", "wrong")
    page.click("button")
    page.wait_for_selector("[role=alert]")
    page.fill("input", SECRET)
    page.click("button")
    page.wait_for_selector(".summary h2")
    assert "red" in page.inner_text(".summary h2") and SECRET not in page.url
    # Another site's link comes without the cookie, which is SameSite=Strict: still no second login.
    (tmp_path / "link.html").write_text(f'<a href="{address}#words=red">pictures</a>')
    other = page.context.new_page()  # leaving the first one would cut off Gradio's streams
    other.goto(f"file://{tmp_path}/link.html")
    other.click("a")
    other.wait_for_selector(".summary h2")
