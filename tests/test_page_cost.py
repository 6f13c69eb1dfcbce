"""What the page asks of the catalog, and what Gradio's events take from a browser."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio
import pytest
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web import render
from app.web.api import create_app
from app.web.page import Page, build, make_app
from app.web.saved_reports import SavedReports
from app.web.sorting import Sorter
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.catalog import store as catalog_store
from clipkit.embed import index_folders

# What the full-text index runs on its own tables inside one statement of ours.
_FTS5 = re.compile(
    r"'(folder_)?texts_(data|idx|content|docsize|config)'|PRAGMA .*data_version", re.IGNORECASE
)
GALLERY = Path(__file__).parent.parent / "data_prep" / "gallery" / "pictures"
Event = Callable[..., tuple[Any, ...]]


class Events:
    """The page over a library, as Gradio's events call it. `statements` is filled from outside."""

    def __init__(self, index: Path, statements: list[str] | None = None) -> None:
        self.statements = [] if statements is None else statements
        self.workspace = Workspace(index, ColourModel())  # type: ignore[arg-type]
        page = Page(self.workspace, Sorter(self.workspace), SavedReports(index / "reports"))
        self.client = TestClient(create_app(self.workspace), base_url="http://127.0.0.1:7860")

        async def built() -> gradio.Blocks:
            return build(page)

        self.blocks = asyncio.run(built())  # where no event loop runs, Gradio leaves some open
        self.events: dict[str, Event] = {f.fn.__name__: f.fn for f in self.blocks.fns.values()}

    def send(self, event: str, **data: Any) -> int:
        """Run an event as Gradio does; return the number of SQL statements."""
        before = len(self.statements)
        arguments = () if event == "on_tick" else (gradio.EventData(None, data),)
        self.answer = self.events[event](*arguments)
        return len(self.statements) - before

    def search(self, address: str = "search", **body: Any) -> int:
        """Search as the page does; return the number of SQL statements."""
        before = len(self.statements)
        headers = {"Accept": "text/html"}
        answer = self.client.post(f"/api/v1/{address}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        self.html = answer.text
        return len(self.statements) - before


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample gallery's index, by colours: its statements are those of any model."""
    folder = tmp_path_factory.mktemp("gallery")
    model = ColourModel()
    with Catalog.open(folder, write=True) as catalog:
        index_folders(catalog, [GALLERY], encoder=model)
    return folder


@pytest.fixture
def page(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Every statement of every connection is written down."""
    connect = sqlite3.connect
    statements: list[str] = []

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*arguments, **options)
        db.set_trace_callback(lambda sql: _FTS5.search(sql) or statements.append(sql))
        return db

    monkeypatch.setattr(catalog_store.sqlite3, "connect", traced)
    events = Events(index, statements)
    yield events
    events.workspace.close()


# ---- SQL


def test_a_search_takes_at_most_fifteen_statements(page: Events) -> None:
    """BEGIN and ROLLBACK count. The version that looked up each hit again and drew the whole page
    for its status took 184 + 158."""
    page.send("on_tick")
    first = page.search(query="red")
    assert page.html.count('<li class="hit') == 24
    assert "332 pictures" in page.html and "332 pictures" in page.answer[0]
    second = page.search(query="blue path:party")
    folder = next(row for row in page.workspace.contents().folders if row.path.endswith("party"))
    narrowed = page.search(query="green", filters={"folder": folder.key, "after": "2001-01-01"})
    assert page.html.count('<li class="hit') > 0
    picture = page.workspace.contents().newest[0].image_id
    similar = page.search("similar", image_id=picture)
    assert page.html.count('<li class="hit') == 24
    phrase = page.search(query='red "cake"')
    assert max(second, narrowed, similar, phrase) <= 15, (second, narrowed, similar, phrase)
    assert 0 < first <= 25  # with loading all vectors, once


def test_the_status_costs_no_more_than_a_look_at_the_change_counter(page: Events) -> None:
    page.send("on_tick")
    assert page.statements
    for event in ("on_tick", "on_evaluate"):
        assert page.send(event) <= 3, event  # BEGIN, SELECT, ROLLBACK


def test_a_tick_sees_what_an_indexer_has_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts and folders are those of now, whoever changed the catalog; nothing is drawn twice."""
    model, index = ColourModel(), tmp_path / "index"
    paint(tmp_path / "photos" / "a" / "1.png", "red")

    def reindex(folder: Path) -> None:
        with Catalog.open(index, write=True) as catalog:
            index_folders(catalog, [folder], encoder=model)

    reindex(tmp_path / "photos")
    page = Events(index)
    drawn: list[int] = []
    draw = render.filters
    monkeypatch.setattr(render, "filters", lambda *parts: drawn.append(1) or draw(*parts))
    page.send("on_tick")
    status, folders, *_ = page.answer
    assert '">1 picture</span>' in status and "a (1)" in folders
    page.send("on_tick")
    assert page.answer[1] is folders and len(drawn) == 1
    paint(tmp_path / "photos" / "b" / "2.png", "blue")
    reindex(tmp_path / "photos")
    page.send("on_tick")
    status, folders, *_ = page.answer
    assert '">2 pictures</span>' in status and "b (1)" in folders
    # A folder that becomes a root of its own adds no picture, but changes what is listed above it.
    reindex(tmp_path)
    page.send("on_tick")
    assert f'title="{tmp_path}"' in page.answer[1]
    page.workspace.close()


# ---- Gradio's events


def test_no_event_takes_a_component_as_its_input(page: Events) -> None:
    """Gradio resolves files that a browser names in the inputs of an event (FileData, a path): an
    event without inputs has nothing to resolve."""
    assert set(page.events) == {
        "on_evaluate",
        "on_index",
        "on_stop",
        "on_dismiss",
        "on_tick",
    }
    for event in page.blocks.fns.values():
        assert event.inputs == [], event.name


def test_a_file_named_in_an_event_is_not_touched(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent to each event over HTTP: Gradio copies nothing into its cache."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    workspace = Workspace(index, ColourModel())  # type: ignore[arg-type]

    async def made() -> Any:
        return make_app(workspace)

    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}, "orig_name": "s.txt"}
    with TestClient(asyncio.run(made()), base_url="http://127.0.0.1:7860") as client:
        functions = client.get("/config").json()["dependencies"]
        assert len(functions) == 7
        for function in functions:
            payload = {"data": [file], "fn_index": function["id"], "session_hash": "x"}
            answer = client.post("/gradio_api/queue/join", json=payload)
            assert answer.status_code in (200, 400, 422), answer.text
        stream = client.get("/gradio_api/queue/data?session_hash=x").text
    messages = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith("data:")]
    completed = [m for m in messages if m["msg"] == "process_completed"]
    assert len(completed) == len(functions) and "secret" not in json.dumps(completed)
    workspace.close()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
