"""A folder indexed from the page in a real Chromium: searched meanwhile, stopped, or refused."""

# ruff: noqa: F811
from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Open, ask, browser, context, pytestmark, served, visit  # noqa: F401
from colours import ColourModel, paint

from app.web.page import Page
from app.web.workspace import Workspace
from clipkit.errors import InputError


class HeldModel(ColourModel):
    """Encodes 16 pictures at once; what comes after them waits until `released` is set."""

    preferred_batch = 2

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self._encoded = 0

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        if self._encoded >= 16:
            assert self.released.wait(timeout=240)
        self._encoded += len(images)
        return super().encode_images(images)


def wait_for_stopping(workspace: Workspace) -> None:
    """Wait until the click on Stop has reached the run."""
    while workspace.run is None or workspace.run.state != "stopping":
        time.sleep(0.01)  # pytest-timeout ends what never happens


def test_a_folder_is_indexed_from_the_page(
    tmp_path: Path, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is held after 16 of 60 pictures, so it cannot end before it is stopped."""
    monkeypatch.setattr("clipkit.embed.run.COMMIT_SECONDS", 0)
    photos = tmp_path / "photos"
    for number in range(60):
        paint(photos / f"blue {number:03}.png", "blue", number=number)
    (photos / "broken <b>.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    model = HeldModel()
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    with served(workspace) as address:
        page = visit(address)
        assert page.inner_text("#results h1") == "Nothing indexed yet"
        page.click("[data-do=folders]")  # the same in a dialog, which must not open unseen
        page.wait_for_selector("#folders form.add input")
        page.click("#folders [data-do=close-dialog]")
        for folder, said in (("photos", "not a full path"), ("/no/such", "no folder")):
            page.fill("#results form.add input", folder)
            page.click("#results form.add button")
            page.wait_for_selector(f"#refusal .run.failed >> text={said}")
        page.fill("#results form.add input", str(photos))
        page.click("#results form.add button")
        page.wait_for_selector("#run .run.running progress[max]")
        assert re.search(r"\d+ of 6[01] pictures", page.inner_text("#run"))
        # The first are found while the rest is on its way.
        page.wait_for_selector(".home .chips")
        ask(page, "blue")
        assert page.locator(".hit").count() > 0
        assert page.locator("#run .run.running").count() == 1
        # One run at a time, and it can be stopped and gone on with.
        page.click("#tools [data-do=folders]")
        page.fill("#folders input", str(photos))
        page.click("#folders form button")
        page.wait_for_selector("#refusal .run.failed >> text=already in progress")
        page.wait_for_selector("#run [data-do=stop]")
        page.click("#run [data-do=stop]")
        wait_for_stopping(workspace)
        model.released.set()
        page.wait_for_selector("#run .run.stopped")
        page.click("#tools [data-do=folders]")
        page.fill("#folders input", str(photos))
        page.click("#folders form button")
        page.wait_for_selector("#run .run.done")
        assert re.search(r"\d+ added, \d+ unchanged, 1 skipped", page.inner_text("#run p"))
        page.click("#run summary")
        assert "broken <b>.jpg" in page.inner_text("#run details")
        assert "60 pictures" in page.inner_text("#status")
        ask(page, "blue blue")
        assert "of 60 pictures" in page.inner_text(".summary p")
        page.click("#run [data-do=dismiss]")
        page.wait_for_selector("#run .run", state="detached")  # the server shows it no more
        page.close()  # before the server: one more tick may be on its way


def test_a_run_that_ends_while_the_page_is_drawn_is_shown_as_ended(
    tmp_path: Path, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails for the version that asks whether the page will change after drawing it: the timer
    stops, and "Stopping" stands for good."""
    for number in range(60):
        paint(tmp_path / "photos" / f"{number}.png", "blue", number=number)
    model = HeldModel()
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    drawn = Page.tick

    def tick(self: Page) -> Any:
        answer = drawn(self)
        while (run := workspace.run) is not None and run.state == "stopping" and not run.over:
            time.sleep(0.05)
        return answer

    monkeypatch.setattr(Page, "tick", tick)
    with served(workspace) as address:
        page = visit(address)
        page.fill("#results form.add input", str(tmp_path / "photos"))
        page.click("#results form.add button")
        page.wait_for_selector("#run [data-do=stop]")
        page.click("#run [data-do=stop]")
        wait_for_stopping(workspace)
        model.released.set()
        page.wait_for_selector("#run .run.stopped")
        page.close()  # before the server: one more tick may be on its way


def test_tabs_show_one_run(tmp_path: Path, visit: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tab that was open before sees the run when somebody turns to it, one that is opened later at
    once; both search meanwhile, and a stop in one is shown in all. The run is held after 16 pictures."""
    monkeypatch.setattr("clipkit.embed.run.COMMIT_SECONDS", 0)
    for number in range(60):
        paint(tmp_path / "photos" / f"{number}.png", "blue", number=number)
    model = HeldModel()
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    with served(workspace) as address:
        first, second = visit(address), visit(address)
        first.fill("#results form.add input", str(tmp_path / "photos"))
        first.click("#results form.add button")
        first.wait_for_selector("#run .run.running progress[max]")
        turned = "document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))"
        second.evaluate(turned)
        third = visit(address)
        for page in (second, third):
            page.wait_for_selector("#run .run.running progress[max]")
            assert re.search(r"\d+ of 60 pictures", page.inner_text("#run"))
            page.wait_for_selector(".home .chips")
            ask(page, "blue")
            assert page.locator(".hit").count() > 0
        second.click("#run [data-do=stop]")
        for page in (first, second, third):
            page.wait_for_selector("#run .run.stopping")
            assert page.locator("#run [data-do=stop]").count() == 0
        model.released.set()
        for page in (first, second, third):
            page.wait_for_selector("#run .run.stopped")
        third.click("#run [data-do=dismiss]")
        for page in (first, second, third):
            page.wait_for_selector("#run .run", state="detached")
            page.close()  # before the server: one more tick may be on its way


def test_a_page_open_to_the_network_does_not_index(tmp_path: Path, visit: Open) -> None:
    workspace = Workspace(tmp_path / "index", ColourModel(), may_index=False)  # type: ignore[arg-type]
    with served(workspace) as address:
        page = visit(address)
        assert page.locator("form.add").count() == 0
        assert "clipkit index FOLDER" in page.inner_text("#results")
        with pytest.raises(InputError, match="may not index"):  # nor when asked by other means
            workspace.index([str(tmp_path)])


def test_a_start_page_that_failed_is_asked_for_again(tmp_path: Path, visit: Open) -> None:
    """An index that is just being made cannot be opened for a moment. Fails for the version that took
    the error for an answer: it stayed, whatever was indexed afterwards."""
    refused: list[str] = []

    def busy(route: Any) -> None:
        if len(refused) < 2:
            refused.append(route.request.url)
            route.fulfill(status=503, json={"error": "the index is being made"})
        else:
            route.continue_()

    workspace = Workspace(tmp_path / "index", HeldModel())  # type: ignore[arg-type]
    with served(workspace) as address:
        page = visit(address)
        page.route("**/start", busy)
        page.reload()
        page.wait_for_selector("#results >> text=the index is being made")
        page.wait_for_selector("#results h1 >> text=Nothing indexed yet")
        assert len(refused) == 2
