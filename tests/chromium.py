"""What the tests of pages share: a server in a thread, a real Chromium, and pages without fault.

Tests import the fixtures, and the marks for where there is no Chromium, by name.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.web.workspace import Workspace

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def served(workspace: Workspace, *, port: int = 0) -> Iterator[str]:
    """The address of a server in a thread."""
    import uvicorn

    from app.web.page import make_app

    listener = socket.create_server(("127.0.0.1", port))
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        app = make_app(workspace, examples=("red", "blue"))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, ws="none")
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:  # or a failed test's server would keep the process alive
        servers[0].should_exit = True
        thread.join()
        listener.close()
        workspace.close()


@dataclass
class Watched:
    """A page that remembers whom it asked and what went wrong."""

    page: Any
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(60_000)  # for a machine that is busy with other things
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        # A refused request is logged by Chromium itself; that it is refused is what some tests want.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _dialog(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """One for most pages: Gradio's scripts are then compiled once."""
    shared = browser.new_context(viewport={"width": 1280, "height": 860})
    yield shared
    shared.close()


@pytest.fixture
def visit(browser: Any, context: Any) -> Iterator[Open]:
    """visit(address, **context options): a page with its first answer. Every page must stay without
    fault and ask nobody but its own server."""
    opened: list[tuple[str, Watched]] = []

    def go(address: str, **options: Any) -> Any:
        own = browser.new_context(**options) if options else context
        watched = Watched(own.new_page())
        opened.append((address, watched))
        watched.page.goto(address)
        watched.page.wait_for_selector("#results [data-view]")
        return watched.page

    yield go
    for address, watched in opened:
        watched.page.close()
        if watched.page.context is not context:
            watched.page.context.close()
        assert not watched.faults, watched.faults
        own = (address.partition("#")[0].rstrip("/") + "/", "data:", "blob:")
        strangers = [url for url in watched.requests if not url.startswith(own)]
        assert not strangers, strangers


def ask(page: Any, words: str) -> None:
    page.fill("input[name=words]", words)
    page.press("input[name=words]", "Enter")
    page.wait_for_function(
        "w => document.querySelector('.summary h2, .failure')?.textContent.includes(w)"
        " && !document.body.dataset.busy",
        arg=words,
    )


def settled(page: Any) -> None:
    page.wait_for_function(
        "document.body.dataset.view === 'results' && !document.body.dataset.busy"
    )
