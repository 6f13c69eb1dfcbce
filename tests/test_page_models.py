"""Switching the model on the page: its routes, requests in progress, other tabs, a real browser."""

# ruff: noqa: F811
from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Open, ask, browser, context, pytestmark, served, visit  # noqa: F401
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web.api import create_app
from app.web.requests import SearchRequest
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.errors import InputError
from clipkit.index_models import use_model

pytestmark, in_browser = [], pytestmark  # most of these tests need none


class Contrary(ColourModel):
    """Finds what is least like the words: its texts are the colours' opposites."""

    encoder_id = known_id = space_id = "0bb0" * 4
    spec = "contrary"
    held: threading.Event | None = None

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return -super().encode_texts(texts)

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        if self.held is not None:
            assert self.held.wait(timeout=240)
        return super().encode_images(images)


MODELS = {"colours": ColourModel, "contrary": Contrary}  # and any other spec is colours


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for colour in ("red", "blue", "green"):
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path: Path, photos: Path) -> Path:
    """Filled by both models; colours answers."""
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        for model in MODELS.values():
            index_folders(catalog, [photos], encoder=model(), activate=False)
    return tmp_path / "index"


def open_workspace(index: Path, **options: Any) -> Workspace:
    def open_model(spec: str | None) -> Any:
        if spec is None:
            with Catalog.open(index) as catalog:
                active = catalog.active_encoder()
                assert active is not None
                spec = active.spec
        return MODELS.get(Path(spec).name, ColourModel)()

    first: Any = ColourModel()
    return Workspace(index, first, follows=True, open_model=open_model, **options)


@pytest.fixture
def workspace(index: Path) -> Iterator[Workspace]:
    made = open_workspace(index)
    yield made
    made.close()


@pytest.fixture
def post(workspace: Workspace) -> Callable[..., tuple[int, str]]:
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")

    def send(what: str, body: str) -> tuple[int, str]:
        answer = client.post(f"/models/{what}", content=body)
        return answer.status_code, answer.text

    return send


def best(workspace: Workspace) -> str:
    return Path(workspace.search(SearchRequest(words="red")).hits[0].picture.path).stem


def test_the_panel_switches(workspace: Workspace, post: Any) -> None:
    """cosine(red, red) = 1; the contrary model's best for "red" is not red."""
    assert best(workspace) == "red"
    code, html = post("use", Contrary.encoder_id)
    assert code == 200 and html.count("Answers searches") == 1
    assert best(workspace) in ("blue", "green")
    assert workspace.status().encoder_id == Contrary.encoder_id
    assert workspace.status().spec.endswith("contrary")
    assert post("use", ColourModel.encoder_id)[0] == 200 and best(workspace) == "red"


def test_a_switch_by_another_process_is_followed(workspace: Workspace, index: Path) -> None:
    assert best(workspace) == "red"
    use_model(index, Contrary.encoder_id)
    assert best(workspace) != "red"


def test_a_request_in_progress_ends_with_its_model(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held while its words are encoded, until the switch is over."""
    entered, released, answers = threading.Event(), threading.Event(), []
    plain = ColourModel.encode_texts

    def held(self: Any, texts: Any) -> Any:
        entered.set()
        assert released.wait(timeout=240)
        return plain(self, texts)

    assert workspace.search(SearchRequest(words="blue")).total == 3
    with monkeypatch.context() as patch:
        patch.setattr(ColourModel, "encode_texts", held)
        thread = threading.Thread(target=lambda: answers.append(best(workspace)))
        thread.start()
        assert entered.wait(timeout=240)
        workspace.use_model(Contrary.encoder_id)
        assert workspace.status().encoder_id == Contrary.encoder_id
        released.set()
        thread.join()
    assert answers == ["red"] and best(workspace) != "red"


def test_only_what_the_server_lists_can_be_named(
    workspace: Workspace, post: Any, tmp_path: Path
) -> None:
    """A path is a name that is not there, whatever is at it."""
    for name in ("", "contrary", str(tmp_path), "../photos", Contrary.encoder_id[:6], "x" * 3000):
        for what in ("use", "drop", "fill"):
            code, text = post(what, name)
            assert code == 400 and json.loads(text)["error"], (what, name)
    assert post("use", "x" * 5000)[0] == 413
    assert workspace.status().encoder_id == ColourModel.encoder_id


def test_drop_and_its_refusal(workspace: Workspace, post: Any) -> None:
    code, text = post("drop", ColourModel.encoder_id)
    assert code == 400 and "answers the searches" in text
    code, html = post("drop", Contrary.encoder_id)
    assert code == 200 and Contrary.encoder_id not in html
    assert [model.encoder_id for model in workspace.models()] == [ColourModel.encoder_id]


def test_filling_leaves_the_present_model_answering(workspace: Workspace, post: Any) -> None:
    post("drop", Contrary.encoder_id)
    with pytest.raises(InputError):
        workspace.use_model("contrary")
    Contrary.held = threading.Event()
    try:
        workspace.fill("contrary")
        assert best(workspace) == "red" and workspace.run and workspace.run.beside == "contrary"
        code, text = post("fill", "builtin")
        assert code == 409 and "already in progress" in text
    finally:
        Contrary.held.set()
        while workspace.indexing:
            threading.Event().wait(0.01)
        Contrary.held = None
    assert best(workspace) == "red"
    assert [model.missing for model in workspace.models()] == [0, 0]
    workspace.use_model(Contrary.encoder_id)
    assert best(workspace) != "red"


def test_a_page_open_to_the_network_does_not_switch(index: Path) -> None:
    workspace = open_workspace(index, may_index=False)
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
    for what in ("use", "fill", "drop"):
        answer = client.post(f"/models/{what}", content=Contrary.encoder_id)
        assert answer.status_code == 403
    html = client.get("/models").text
    assert "data-do=" not in html and "Answers searches" in html
    assert client.get("/models/active").json() == {
        "encoder_id": ColourModel.encoder_id,
        "indexing": False,
        "pictures": workspace.contents().pictures,
    }
    workspace.close()


def test_what_a_run_brought_is_said(index: Path, tmp_path: Path, post: Any) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    verdict = {
        "outcome": "better",
        "before": 0.436,
        "after": 0.519,
        "pictures": 120,
        "start": "builtin",
    }
    (run / "verdict.json").write_text(json.dumps(verdict))
    with Catalog.open(index, write=True) as catalog:
        catalog.move_encoder(Contrary.encoder_id, str(run))
    html = post("drop", "none") and open_and_list(index)
    assert "in <b>51.9 %</b> instead of 43.6 % of 120 test pictures" in html
    assert "trained from builtin; better" in html


def open_and_list(index: Path) -> str:
    workspace = open_workspace(index)
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
    html = client.get("/models").text
    workspace.close()
    return html


# ---- in a browser


@pytest.mark.browser
def test_the_model_is_switched_on_the_page(index: Path, visit: Open) -> None:
    """The results on the page change with it, and another tab's status line does too."""
    first = ".hit:first-child .place b"
    with served(open_workspace(index)) as address:
        page, other = visit(address), visit(address)
        ask(page, "red")
        assert page.inner_text(first) == "red.png"
        assert page.inner_text("#status .model").strip() == "colours"
        page.click("#status .model")
        page.wait_for_selector("#models li")
        assert page.locator("#models li.active").count() == 1
        page.click("#models [data-do=use-model]")
        page.wait_for_selector(f"#models li.active[data-key='{Contrary.encoder_id}']")
        page.wait_for_selector(f"#status [data-encoder='{Contrary.encoder_id}']")
        page.wait_for_function(
            f"document.querySelector({json.dumps(first)}).textContent !== 'red.png'"
        )
        assert page.inner_text("#status .model").strip() == "contrary"
        assert other.inner_text("#status .model").strip() == "colours"
        other.evaluate("document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))")
        other.wait_for_selector(f"#status [data-encoder='{Contrary.encoder_id}']")
        # Removing asks first.
        page.click(f"#models [data-key='{ColourModel.encoder_id}'] [data-do=drop-model]")
        page.click("#models [data-do=keep-model]")
        page.click(f"#models [data-key='{ColourModel.encoder_id}'] [data-do=drop-model]")
        page.click("#models [data-do=drop-model-now]")
        page.wait_for_selector(f"#models [data-key='{ColourModel.encoder_id}']", state="detached")
        page.fill("#models [name=model]", "/etc/passwd")
        page.click("#models form button")
        page.wait_for_selector("#models .problem >> text=is not listed")
        page.close()
        other.close()
