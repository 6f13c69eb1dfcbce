"""clipkit.client against the real app, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web.api import create_app
from app.web.workspace import Workspace
from clipkit import client as module
from clipkit.catalog import Catalog
from clipkit.client import Client
from clipkit.embed import index_folders
from clipkit.errors import CatalogBusy, ClipkitError, InputError
from clipkit.images import image_id

URL = "http://127.0.0.1:7860"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "photos" / f"red {number}.png", "red", number=number)
    paint(tmp_path / "photos" / "blue.png", "blue")
    return tmp_path / "photos"


@pytest.fixture
def client(tmp_path: Path, photos: Path) -> Iterator[Client]:
    model = ColourModel()
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [photos], encoder=model)
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    app = TestClient(create_app(workspace), base_url=URL)

    def forward(request: httpx.Request) -> httpx.Response:
        headers = dict(request.headers)
        answer = app.request(
            request.method, str(request.url), content=request.content, headers=headers
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    with Client(URL, transport=httpx.MockTransport(forward)) as made:
        yield made
    workspace.close()


def answering(*answers: httpx.Response) -> tuple[Client, list[httpx.Request]]:
    """A client whose server gives these answers, one after the other."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers[len(requests) - 1]

    return Client(URL, token="secret", transport=httpx.MockTransport(answer)), requests


def test_a_search_is_a_page_of_typed_hits(client: Client, photos: Path) -> None:
    page = client.search("blue", limit=2, filters={"format": "PNG"}, sort="score")
    assert page.total == 7 and page.cursor is not None and page.notes == () and page.empty is None
    hit = page.hits[0]
    assert (hit.rank, hit.name, hit.path) == (1, "blue.png", str(photos / "blue.png"))
    assert hit.score == pytest.approx(1.0, abs=1e-3) and hit.captions == ()
    assert client.picture(hit.image_id).places == (str(photos / "blue.png"),)
    assert client.thumbnail(hit.image_id, 160)[:2] == client.file(hit.image_id)[:2] == b"\xff\xd8"
    empty = client.search("red folder:none").empty
    assert empty is not None and empty.offers[0].query == "red"


def test_the_printed_address_has_the_token() -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, content=b"JPEG")

    transport = httpx.MockTransport(answer)
    for url in ("https://a.example/photos/", "https://a.example/photos/login#token=a%20secret"):
        with Client(url, transport=transport) as one:
            one.file("0" * 32)
    assert {str(one.url) for one in requests} == {
        f"https://a.example/photos/api/v1/pictures/{'0' * 32}/file"
    }
    assert [one.headers.get("authorization") for one in requests] == [None, "Bearer a secret"]


def test_an_unknown_certificate_has_its_own_remedy() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    with (
        Client("https://a.example", transport=httpx.MockTransport(answer)) as one,
        pytest.raises(ClipkitError, match=r"self-signed .* name its file in SSL_CERT_FILE"),
    ):
        one.status()


def test_all_hits_come_page_by_page(client: Client) -> None:
    hits = list(client.search_all("red", limit=3))
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6, 7]
    assert len({hit.image_id for hit in hits}) == 7
    assert len(list(itertools.islice(client.search_all("red", limit=2), 3))) == 3


def test_pictures_are_given_as_files_bytes_and_ids(client: Client, photos: Path) -> None:
    path = photos / "blue.png"
    name = image_id(path.read_bytes())
    for image in (path, str(path), path.read_bytes(), name):
        assert client.search(images=[image]).hits[0].image_id == name
    assert name not in {hit.image_id for hit in client.similar(name).hits}
    with pytest.raises(InputError, match=r"nothing\.png cannot be read: No such file"):
        client.search(images=["nothing.png"])


def test_vectors_are_arrays(client: Client, photos: Path) -> None:
    texts = client.embed_texts(["red", "blue"])
    assert texts.shape == (2, 3) and texts.dtype == np.float32
    assert client.embed_texts([]).shape == (0, 3)
    images = client.embed_images([photos / "blue.png"])
    assert float(images[0] @ texts[1]) == pytest.approx(1.0, abs=1e-3)
    sides = {"text": "red"}, {"image": photos / "blue.png"}
    assert client.similarity(*sides) == pytest.approx(-1 / 3, abs=1e-2)


def test_marks_are_made_and_listed(client: Client, photos: Path) -> None:
    name = image_id((photos / "blue.png").read_bytes())
    assert client.mark(name, "the sea", right=True) == 1
    (mark,) = client.marks()
    assert (mark.image_id, mark.query, mark.right) == (name, "the sea", True)
    assert client.status().marks == 1 and client.status().pictures == 7
    assert client.mark(name, "the sea", right=None) == 0 and list(client.marks()) == []


def test_a_refusal_is_the_server_s_sentence(client: Client) -> None:
    with pytest.raises(InputError, match=r"did you mean .folder."):
        client.search("folde:x")
    with pytest.raises(InputError, match=r"no picture 0+ in this library"):
        client.picture("0" * 32)
    with pytest.raises(InputError, match="must be less than or equal to 2400"):
        client.search("red", limit=10**6)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, InputError), (403, InputError), (409, CatalogBusy), (500, ClipkitError)],
)
def test_a_status_is_an_error_of_clipkit(status: int, kind: type[ClipkitError]) -> None:
    client, requests = answering(httpx.Response(status, json={"error": "what the server says"}))
    with pytest.raises(ClipkitError, match="what the server says") as caught:
        client.status()
    assert type(caught.value) is kind
    assert requests[0].headers["authorization"] == "Bearer secret"


def test_what_is_no_answer_of_clipkit_is_a_sentence() -> None:
    client, _ = answering(httpx.Response(502, text="<html>proxy"))
    with pytest.raises(ClipkitError, match=r"the server at .+ answered 502 Bad Gateway"):
        client.status()


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as Retry-After says, 30 s at most, and four times in all."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)

    def busy(**headers: str) -> httpx.Response:
        return httpx.Response(503, json={"error": "the server is busy"}, headers=headers)

    good = httpx.Response(200, json={"cosine": 0.5})
    client, _ = answering(busy(**{"Retry-After": "3"}), busy(**{"Retry-After": "999"}), good)
    assert client.similarity({"text": "a"}, {"text": "b"}) == 0.5
    assert pauses == [3.0, 30.0]
    client, requests = answering(*[busy()] * 9)
    with pytest.raises(ClipkitError, match="the server is busy"):
        client.status()
    assert len(requests) == 4 and pauses[2:] == [1.0] * 3


def test_no_server_is_a_sentence() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    with Client(URL, transport=httpx.MockTransport(refuse)) as client:
        with pytest.raises(ClipkitError, match=r"does not answer \(Connection refused\)"):
            client.status()
        assert not client.ready()


def test_ready_follows_the_server(client: Client) -> None:
    assert not client.ready()  # the vectors are not loaded yet
    client.search("red")
    assert client.ready()
    waiting, _ = answering(httpx.Response(503, json={"error": "not ready yet"}))
    assert not waiting.ready()


def test_a_newer_server_may_say_more() -> None:
    status = {
        "version": "9", "model": "m", "encoder_id": None, "space_id": None, "state": "ready",
        "pictures": 1, "newest": None, "indexing": False, "marks": 0, "invented": 1,
    }  # fmt: skip
    client, _ = answering(httpx.Response(200, json=status))
    assert client.status().version == "9"


def typed(make: Callable[..., Any]) -> list[str]:
    return list(make.__dataclass_fields__)  # type: ignore[attr-defined]


def test_results_have_the_fields_of_the_description() -> None:
    """A field that one side renames is found here, not by a user."""
    from app.web import schemas

    for ours, theirs, own in (
        (module.Hit, schemas.Hit, {"thumbnail"}),
        (module.Picture, schemas.PictureAnswer, {"thumbnail"}),
        (module.Page, schemas.SearchResult, set()),
        (module.Mark, schemas.StoredMark, set()),
        (module.Status, schemas.StatusAnswer, set()),
        (module.Empty, schemas.Empty, set()),
        (module.Offer, schemas.Offer, set()),
    ):
        assert set(typed(ours)) | own == set(theirs.model_fields), ours
