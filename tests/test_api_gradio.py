"""Gradio behind the guard: no file handed out or taken, no page but ours, nobody else asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders

HOST = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """The whole app, Gradio's routes included, and the folder of its photos."""
    from app.web.page import make_app

    folder = tmp_path_factory.mktemp("page")
    secret = paint(folder / "photos" / "secret.png", "red")
    model = ColourModel()
    with Catalog.open(folder / "index", write=True) as catalog:
        index_folders(catalog, [secret.parent], encoder=model)
    workspace = Workspace(folder / "index", model)  # type: ignore[arg-type]

    async def made() -> Any:
        return make_app(workspace)

    # Where no event loop runs, Gradio makes some and never closes them.
    with TestClient(asyncio.run(made()), base_url=HOST) as client:
        yield client, secret
    workspace.close()


def test_what_draws_the_status_sets_the_timer(tmp_path: Path) -> None:
    """An answer that was drawn while pictures were indexed may arrive after the last tick, and would
    then stay."""
    from app.web.page import Page, build
    from app.web.saved_reports import SavedReports
    from app.web.sorting import Sorter

    workspace = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]

    async def built() -> Any:
        return build(Page(workspace, Sorter(workspace), SavedReports()))

    events = [
        {getattr(block, "elem_id", None) or type(block).__name__ for block in event.outputs}
        for event in asyncio.run(built()).fns.values()
    ]
    workspace.close()
    drawn = [outputs for outputs in events if "status" in outputs]
    assert len(drawn) == 5 and all("Timer" in outputs for outputs in drawn), drawn


def file_routes(path: str) -> list[str]:
    relative = path.lstrip("/")
    return [
        f"/gradio_api/file={path}",
        f"/gradio_api/file=/{path}",
        f"/gradio_api/file={path}?x=1",
        f"/file={path}",
        f"/gradio_api/file/{relative}",
        f"/gradio_api/stream/{relative}",
        f"/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f{relative}",
        f"/static/js/../../../../../../../../../{relative}",
        f"/static/js/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/{relative}",
        f"/assets/..%252f..%252f..%252f{relative}",
        f"/svelte/..%2f..%2f..%2f..%2f..%2f..%2f{relative}",
        f"/assets//{relative}",
        f"/gradio_api/proxy=file://{path}",
        f"/gradio_api/custom_component/1/client/component/..%2f..%2f{relative}",
        f"/gradio_api/deep_link?session_hash={path}",
        f"/{relative}",
    ]


def test_gradio_hands_out_no_file(
    page: tuple[TestClient, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 28: not the system's, not a photo, not one of the working folder or Gradio's own cache."""
    client, photo = page
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("the working folder")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cached.txt").write_text("the cache")
    index = photo.parent.parent / "index" / "catalog.sqlite"
    targets = ["/etc/passwd", str(photo), str(index), str(tmp_path / "here.txt"), "here.txt"]
    for target in [*targets, str(tmp_path / "cache" / "cached.txt")]:
        content = Path(target).read_bytes()[:20]
        for address in file_routes(target):
            answer = client.get(address)
            assert answer.status_code in (307, 400, 403, 404), address
            assert content not in answer.content, address


def test_gradio_takes_no_upload(page: tuple[TestClient, Path]) -> None:
    client, _ = page
    for address in ("/gradio_api/upload", "/gradio_api/process_recording", "/upload"):
        answer = client.post(address, files={"files": ("a.txt", b"hello")})
        assert answer.status_code == 404, address


@pytest.mark.parametrize(
    "address",
    [
        "/docs",
        "/openapi.json",
        "/gradio_api/openapi.json",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/gradio_api/run-history/records",
        "/gradio_api/vibe-code",
        "/gradio_api/mcp/",
        "/monitoring",
        "/monitoring/summary",
        "/login",
        "/gradio_api/token",
    ],
)
def test_gradios_other_pages_do_not_exist(page: tuple[TestClient, Path], address: str) -> None:
    assert page[0].get(address).status_code == 404


def test_the_page_runs_only_its_own_scripts(page: tuple[TestClient, Path]) -> None:
    """Each inline script by its hash, so that an injected one, or an onerror="", does not run."""
    answer = page[0].get("/", headers={"accept-encoding": "br, gzip"})
    policy = answer.headers["content-security-policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is not None and "'unsafe-inline'" not in scripts[1]
    inline = re.findall(r"<script(?![^>]*src=)[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    assert len(inline) > 2
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in scripts[1]
    assert "http" not in policy


def test_gradios_scripts_are_fetched_once(page: tuple[TestClient, Path]) -> None:
    client, _ = page
    asset = re.search(r"assets/index-[\w-]+\.js", client.get("/").text)
    assert asset is not None
    assert "immutable" in client.get(f"/{asset[0]}").headers["cache-control"]
    assert "immutable" not in client.get("/assets/none.js").headers.get("cache-control", "")


def test_the_page_names_nothing_outside(page: tuple[TestClient, Path]) -> None:
    """No font, script or style from elsewhere: the page works without a network."""
    client, _ = page
    for address in ("/", "/theme.css", "/ui/clipkit.css", "/ui/clipkit.js"):
        text = client.get(address).text
        loaded = re.findall(r"""(?:src=|href=|url\(|@import )['"]?(https?:)?//""", text)
        assert not loaded, address


def test_gradio_reports_nothing_home(page: tuple[TestClient, Path]) -> None:  # noqa: ARG001
    import gradio

    assert not gradio.analytics.analytics_enabled()
