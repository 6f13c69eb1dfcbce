"""The HTTP API, version 1: searching, paging, pictures, vectors, marks, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import ColourModel, paint
from PIL import Image
from starlette.testclient import TestClient

from app.web.api import create_app
from app.web.pictures import Decoding, Places, Recent, ServerBusy
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.images import image_id
from clipkit.search import live_vectors

HOST = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 red pictures and a blue one with a caption."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(30):
        paint(folder / "a" / f"red {number}.png", "red", number=number, size=(900, 600))
    paint(folder / "b" / "blue.png", "blue", size=(60, 90))
    (folder / "b" / "blue.txt").write_text("The <sea>")
    return folder


@pytest.fixture(scope="module")
def workspace(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    index, model = tmp_path_factory.mktemp("index"), ColourModel()
    with Catalog.open(index, write=True) as catalog:
        index_folders(catalog, [photos], encoder=model)
    made = Workspace(index, model)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def client(workspace: Workspace) -> TestClient:
    return TestClient(create_app(workspace), base_url=HOST, raise_server_exceptions=False)


def blue(photos: Path) -> str:
    return image_id((photos / "b" / "blue.png").read_bytes())


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def search(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/api/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---- searching


def test_a_hit_says_all_that_is_known(client: TestClient, photos: Path) -> None:
    found = search(client, query="blue", limit=1)
    assert found["total"] == 31 and found["notes"] == [] and found["empty"] is None
    (hit,) = found["hits"]
    place = str(photos / "b" / "blue.png")
    assert (hit["rank"], hit["strength"], hit["path"]) == (1, None, place)
    assert hit["score"] == pytest.approx(1.0, abs=1e-3)
    assert hit["captions"] == ["The <sea>"] and (hit["width"], hit["height"]) == (60, 90)
    # relative to the address of the request
    thumbnail = client.get(f"/api/v1/{hit['thumbnail']}")
    assert thumbnail.headers["content-type"] == "image/jpeg"


def test_cursors_lead_through_all_hits_once(client: TestClient) -> None:
    """31 pictures, 10 a page: 10, 10, 10, 1, and no cursor after the last."""
    ids, sizes, ranks, cursor = [], [], [], None
    while True:
        page = search(client, query="red", limit=10, cursor=cursor)
        sizes.append(len(page["hits"]))
        ids += [hit["image_id"] for hit in page["hits"]]
        ranks += [hit["rank"] for hit in page["hits"]]
        if (cursor := page["cursor"]) is None:
            break
    assert sizes == [10, 10, 10, 1]
    assert ranks == [*range(1, 32)] and len(set(ids)) == 31


def test_filters_are_those_of_the_page(client: TestClient, photos: Path) -> None:
    for filters in (
        {"folder": str(photos / "b")},
        {"orientation": "portrait"},
        {"orientation": "portrait", "format": "PNG", "size": 90, "after": "2001-01-01"},
    ):
        found = search(client, filters=filters)
        assert [hit["name"] for hit in found["hits"]] == ["blue.png"], filters
    assert search(client, filters={"size": 901})["total"] == 0
    none = search(client, query="red folder:none")
    assert none["empty"]["sentence"] and none["empty"]["offers"][0]["query"] == "red"


def test_pictures_are_examples_by_id_and_by_their_bytes(
    client: TestClient, photos: Path, tmp_path: Path
) -> None:
    """A blue picture (-1, -1, 1) and a yellow one (1, 1, -1) with yellow^3 sum to (2, 2, -2)."""
    stranger = encoded(paint(tmp_path / "x.png", "blue", number=9, size=(80, 80)))
    for images in (
        [blue(photos)],
        [stranger],
        [encoded(photos / "b" / "blue.png")],
        [stranger] * 2,
    ):
        hit = search(client, images=images, limit=1)["hits"][0]
        assert hit["name"] == "blue.png" and hit["score"] == pytest.approx(1.0, abs=1e-2)
    yellow = search(client, images=[stranger], query="yellow^3", limit=31)["hits"]
    assert yellow[-1]["name"] == "blue.png"
    dropped = client.post("/queries", content=base64.b64decode(stranger)).json()["id"]
    assert search(client, images=[dropped], limit=1)["hits"][0]["name"] == "blue.png"


def test_a_query_picture_is_decoded_once_for_all_pages(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.web import workspace as module

    decoded: list[int] = []
    decode = module.decode
    monkeypatch.setattr(
        module, "decode", lambda data, **options: decoded.append(1) or decode(data, **options)
    )
    image = encoded(paint(tmp_path / "x.png", "red", number=77))
    first = search(client, images=[image], limit=5)
    search(client, images=[image], limit=5, cursor=first["cursor"])
    assert decoded == [1]


def test_what_is_like_a_picture_is_found_without_itself(client: TestClient, photos: Path) -> None:
    answer = client.post("/api/v1/similar", json={"image_id": blue(photos), "limit": 50}).json()
    assert answer["total"] == 30 and blue(photos) not in {h["image_id"] for h in answer["hits"]}


def test_who_accepts_html_gets_the_page_s_cards(client: TestClient) -> None:
    headers = {"Accept": "text/html"}
    answer = client.post("/api/v1/search", json={"query": "blue", "limit": 2}, headers=headers)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["vary"] == "Accept"
    assert answer.text.count('<li class="hit') == 2 and "The &lt;sea&gt;" in answer.text


# ---- pictures


def test_thumbnails_have_the_size_that_is_asked_for(client: TestClient, photos: Path) -> None:
    """900 x 600: 320 x 213, of which 160 x 106 (106.5 to even), 640 x 427; 1280 does not enlarge."""
    name = image_id((photos / "a" / "red 0.png").read_bytes())
    address = f"/api/v1/pictures/{name}/thumbnail"
    for size, expected in (
        (160, (160, 106)),
        (320, (320, 213)),
        (640, (640, 427)),
        (1280, (900, 600)),
    ):
        answer = client.get(f"{address}?size={size}")
        assert Image.open(io.BytesIO(answer.content)).size == expected
        assert "immutable" in answer.headers["cache-control"]
    assert client.get(f"{address}?size=300").json() == {
        "error": "size is 300; it must be 160, 320, 640 or 1280"
    }


def test_a_picture_is_encoded_once_and_gone_when_its_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.web import workspace as module

    path, model = paint(tmp_path / "photos" / "a.png", "red"), ColourModel()
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        index_folders(catalog, [path.parent], encoder=model)
    workspace = Workspace(tmp_path / "index", model)  # type: ignore[arg-type]
    client = TestClient(create_app(workspace), base_url=HOST)
    encodings: list[int] = []
    encode = module.encode_for_web
    monkeypatch.setattr(
        module, "encode_for_web", lambda data, **o: encodings.append(1) or encode(data, **o)
    )
    address = f"/api/v1/pictures/{image_id(path.read_bytes())}/file"
    first, second = client.get(address), client.get(address)
    assert first.content == second.content and encodings == [1]
    path.unlink()
    assert client.get(address).status_code == 410
    workspace.close()


def test_details_are_those_of_a_hit(client: TestClient, photos: Path) -> None:
    answer = client.get(f"/api/v1/pictures/{blue(photos)}").json()
    hit = search(client, query="blue", limit=1)["hits"][0]
    assert answer["thumbnail"] == f"{blue(photos)}/thumbnail"
    assert {**answer, "thumbnail": hit["thumbnail"]}.items() <= hit.items()
    assert client.get(f"/api/v1/pictures/{'0' * 32}").status_code == 404
    assert client.get("/api/v1/pictures/nothing").status_code == 404


# ---- vectors


def test_vectors_are_the_model_s(client: TestClient, photos: Path) -> None:
    """ "red" is (1, -1, -1) / sqrt 3, "blue" (-1, -1, 1) / sqrt 3: cosine -1/3."""
    answer = client.post("/api/v1/embed/text", json={"texts": ["red", "blue"]}).json()
    assert (answer["dim"], answer["encoder_id"]) == (3, "c010" * 4)
    expected = np.array([[1, -1, -1], [-1, -1, 1]]) / 3**0.5
    assert np.allclose(answer["vectors"], expected, atol=1e-6)
    assert client.post("/api/v1/embed/text", json={"texts": []}).json()["vectors"] == []
    file = photos / "b" / "blue.png"
    several = client.post("/api/v1/embed/image", json={"images": [encoded(file)] * 2}).json()
    alone = client.post(
        "/api/v1/embed/image", content=file.read_bytes(), headers={"Content-Type": "image/png"}
    ).json()
    assert np.allclose(several["vectors"], [expected[1]] * 2, atol=2e-2)
    assert alone["vectors"] == several["vectors"][:1]


def test_two_sides_have_a_cosine(client: TestClient, photos: Path, tmp_path: Path) -> None:
    red = {"image": encoded(paint(tmp_path / "r.png", "red", number=5, size=(90, 90)))}
    for a, b, cosine in (
        ({"text": "blue"}, {"image_id": blue(photos)}, 1),
        (red, {"image_id": blue(photos)}, -1 / 3),
        ({"text": "red"}, {"text": "red"}, 1),
        (red, {"text": "red"}, 1),
    ):
        answer = client.post("/api/v1/similarity", json={"a": a, "b": b})
        assert answer.json()["cosine"] == pytest.approx(cosine, abs=1e-2), answer.text
    for side in ({}, {"text": "a", "image_id": blue(photos)}, {"text": None}):
        answer = client.post("/api/v1/similarity", json={"a": side, "b": {"text": "x"}})
        assert answer.status_code == 422
        assert answer.json() == {"error": "give one of image_id, image and text"}
    answer = client.post("/api/v1/similarity", json={"a": {"image_id": "0" * 32}, "b": red})
    assert answer.status_code == 404


# ---- marks, status


def test_marks_are_listed_in_pages(client: TestClient, photos: Path, workspace: Workspace) -> None:
    body = {"image_id": blue(photos), "query": "the  sea sort:date", "right": True}
    assert client.post("/api/v1/marks", json=body).json() == {
        **body,
        "query": "the sea",
        "total": 1,
    }
    client.post("/api/v1/marks", json={**body, "query": "sky"})
    first = client.get("/api/v1/marks?limit=1").json()
    assert [m["query"] for m in first["marks"]] == ["the sea"] and first["total"] == 2
    last = client.get(f"/api/v1/marks?limit=1&cursor={first['cursor']}").json()
    assert [m["query"] for m in last["marks"]] == ["sky"] and last["cursor"] is None
    assert client.get("/api/v1/status").json()["marks"] == 2
    for query in ("the sea", "sky"):
        client.post("/api/v1/marks", json={**body, "query": query, "right": None})
    assert workspace.corrections.total() == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([1], "it must be a JSON object"),
        ({"image_id": "../etc/passwd", "query": "x", "right": True}, "image_id"),
        ({"image_id": "0" * 32 + "\n", "query": "x", "right": True}, "image_id"),
        ({"query": "x", "right": True}, "image_id"),
        ({"image_id": "0" * 32, "right": True}, "query"),
        ({"image_id": "0" * 32, "query": "x"}, "right"),
        ({"image_id": "0" * 32, "query": "x", "right": 2}, "right is 2; it must be"),
        ({"image_id": "0" * 32, "query": "x", "right": 1}, "right is 1; it must be"),
    ],
)
def test_what_is_no_mark_is_refused_in_a_sentence(
    client: TestClient, fields: Any, sentence: str
) -> None:
    answer = client.post("/api/v1/marks", json=fields)
    assert answer.status_code == 422 and sentence in answer.json()["error"]


def test_alive_is_not_ready(client: TestClient, workspace: Workspace) -> None:
    search(client, query="red")  # which loads the vectors
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    workspace.model.state = "loading"  # type: ignore[misc]
    try:
        answer = client.get("/readyz")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
        assert answer.json() == {"error": "the model colours is loading; it is not ready yet"}
        assert client.get("/healthz").status_code == 200
    finally:
        del workspace.model.state  # type: ignore[attr-defined]


def test_the_server_is_ready_once_the_vectors_are_loaded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded in the background from when the server warms up; the check waits for nothing."""
    starting = Workspace(workspace.folder, ColourModel())  # type: ignore[arg-type]
    client = TestClient(create_app(starting), base_url=HOST)
    load, go_on = live_vectors._start, threading.Event()

    def slow(*arguments: Any) -> Any:
        go_on.wait(60)
        return load(*arguments)

    monkeypatch.setattr(live_vectors, "_start", slow)
    try:
        for _ in range(2):
            answer = client.get("/readyz")
            sentence = "the vectors of the model colours are not loaded; it is not ready yet"
            assert answer.status_code == 503 and answer.json() == {"error": sentence}
            starting.warm()
    finally:
        go_on.set()
    for thread in threading.enumerate():
        if thread.name == "clipkit-vectors":
            thread.join(60)
    monkeypatch.setattr(live_vectors, "_start", None)  # nothing is loaded any more
    assert client.get("/readyz").json() == {"status": "ok"}
    assert search(client, query="red")["hits"]
    starting.close()


def test_a_server_whose_model_is_not_the_index_s_is_not_ready(workspace: Workspace) -> None:
    changed = ColourModel()
    changed.encoder_id = changed.known_id = "0" * 16  # type: ignore[misc]
    other = Workspace(workspace.folder, changed)  # type: ignore[arg-type]
    client = TestClient(create_app(other), base_url=HOST)
    sentence = client.post("/api/v1/search", json={"query": "red"}).json()["error"]
    assert "has changed since the index was made" in sentence
    answer = client.get("/readyz")
    assert answer.status_code == 503 and answer.json() == {"error": sentence}
    other.close()


def test_without_an_index_nothing_is_found_and_nothing_fails(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "none", ColourModel())  # type: ignore[arg-type]
    client = TestClient(create_app(workspace), base_url=HOST)
    assert search(client, query="red")["total"] == 0
    assert client.get("/readyz").status_code == 200
    assert client.get("/api/v1/marks").json()["marks"] == []
    similar = client.post("/api/v1/similar", json={"image_id": "0" * 32})
    assert similar.status_code == 200 and similar.json()["hits"] == []
    assert not (tmp_path / "none").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"qurey": "x"}, 422, "unknown field 'qurey'; did you mean 'query'?"),
        (
            {"filters": {"oriention": 1}},
            422,
            "unknown field 'oriention'; did you mean 'orientation'?",
        ),
        ({"limit": 10**9}, 422, "limit is 1000000000; it must be less than or equal to 2400"),
        ({"limit": 0}, 422, "limit is 0; it must be greater than or equal to 1"),
        ({"limit": "9"}, 422, "limit is '9'; it must be an integer"),
        ({"limit": True}, 422, "limit is true; it must be an integer"),
        ({"query": 3}, 422, "query is 3; it must be a string"),
        ({"query": None}, 422, "query is null; it must be a string"),
        ({"query": "\ud800"}, 422, "query is "),
        ({"sort": "size"}, 422, "sort is 'size'; it must be 'score', 'date' or 'name'"),
        ({"filters": {"size": "x"}}, 422, "filters.size is 'x'; it must be an integer"),
        ({"filters": {"after": "May"}}, 400, "'May' is not a date; use the form 2023-05-31"),
        ({"filters": {"after": "2023-02-30"}}, 400, "'2023-02-30' is not a date"),
        (
            {"filters": {"after": "2024-01-02", "until": "2024-01-01"}},
            400,
            "the first must not be later",
        ),
        ({"filters": {"folder": "0" * 16}}, 400, "folder '0000000000000000' has no pictures; give"),
        ({"cursor": "made up"}, 400, "cursor"),
        ({"query": "folde:x"}, 400, "did you mean 'folder'?"),
        ({"query": '+"/etc/passwd"'}, 400, "names a file"),
        ({"images": ["0" * 32]}, 404, "no picture 00000000000000000000000000000000 in"),
        ({"images": ["nothing!"]}, 400, "neither an image_id of 32 hex digits nor a picture"),
        ({"images": ["aGVsbG8="]}, 422, "file holds text, not a picture"),
        ({"images": ["a"] * 17}, 422, "at most 16 items"),
        ([], 422, "the body is []; it must be a JSON object"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    client: TestClient, body: Any, status: int, said: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/v1/search", content=json.dumps(body), headers=headers)
    assert answer.status_code == status and said in answer.json()["error"], answer.text


@pytest.mark.parametrize(
    ("method", "address", "status", "said"),
    [
        ("GET", "/api/v1/search", 405, "GET /api/v1/search is not possible; use POST"),
        ("DELETE", "/api/v1/marks", 405, "use GET, POST"),
        ("POST", "/api/v1/status", 405, "use GET"),
        ("GET", "/api/v1/serch", 404, "there is no /api/v1/serch; /api/v1/docs describes"),
        ("GET", f"/api/v1/pictures/{'0' * 32}/nothing", 404, "there is no /api/v1/pictures/000"),
    ],
)
def test_what_the_api_does_not_have_is_a_sentence(
    client: TestClient, method: str, address: str, status: int, said: str
) -> None:
    answer = client.request(method, address)
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    if status == 405:
        assert said.endswith(answer.headers["Allow"])


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ('{"query": "dog"}', "text/plain", "send it with Content-Type: application/json"),
        ('{"query": "dog"', "application/json", "the body is not JSON: Expecting ',' delimiter"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(
    client: TestClient, content: str, kind: str, said: str
) -> None:
    answer = client.post("/api/v1/search", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text


def test_the_examples_of_openapi_are_answered(client: TestClient) -> None:
    """Except those that name the examples' picture, which no library has."""
    api = client.get("/api/v1/openapi.json").json()
    schemas = api["components"]["schemas"]
    for address, routes in api["paths"].items():
        if "requestBody" not in routes.get("post", {}):
            continue
        schema = routes["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        for body in schema.get("examples") or [_example(schema, schemas)]:
            answer = client.post(address, json=body)
            assert answer.status_code == (404 if "image_id" in body else 200), (address, body)


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A body of the examples of its fields."""
    fields = {
        name: schemas[field["$ref"].rpartition("/")[2]] if "$ref" in field else field
        for name, field in schema["properties"].items()
    }
    return {name: field["examples"][0] for name, field in fields.items()}


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"9" * 10_000, b"\xff"])
def test_what_is_no_json_is_a_sentence(client: TestClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/v1/search", content=content, headers=headers)
    assert answer.status_code in (400, 422) and len(answer.json()["error"]) > 10


def test_a_body_is_cut_off_at_the_limit(client: TestClient) -> None:
    """The limit counts what comes, not what the Content-Length says."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/v1/embed/text", content=endless(), headers=headers)
    assert answer.status_code == 413 and "limit of 4 MB" in answer.json()["error"]


def test_a_bomb_in_a_request_is_refused_before_it_is_decoded(client: TestClient) -> None:
    """An RGBA picture of 100 MP is a PNG of 100 kB or so; one in the library may have that much."""
    buffer = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(buffer, "PNG")
    bomb = base64.b64encode(buffer.getvalue()).decode()
    answers = [
        client.post("/api/v1/search", json={"images": [bomb]}),
        client.post("/api/v1/embed/image", json={"images": [bomb]}),
        client.post("/queries", content=buffer.getvalue()),
    ]
    for answer in answers:
        assert answer.status_code == 422 and "the limit is 50 MP" in answer.json()["error"]


def test_who_finds_the_line_full_is_told_when_to_come_back(
    client: TestClient, workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place is taken and nobody may wait: every route that decodes says so, others answer."""
    full = Decoding(Places("decoding pictures", 1, waiting=0, seconds=0), megapixels=1)
    monkeypatch.setattr(workspace, "_decoding", full)
    monkeypatch.setattr(workspace.dropped, "_decoding", full)
    stranger = Image.new("RGB", (8, 8), (1, 2, 3))
    buffer = io.BytesIO()
    stranger.save(buffer, "PNG")
    with full.share():
        for answer in (
            client.post("/queries", content=buffer.getvalue()),
            client.post(
                "/api/v1/search", json={"images": [base64.b64encode(buffer.getvalue()).decode()]}
            ),
            client.get(f"/api/v1/pictures/{blue(photos)}/file"),
        ):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
            assert "busy decoding pictures" in answer.json()["error"]
        assert search(client, query="red")["total"] == 31
    assert client.post("/queries", content=buffer.getvalue()).status_code == 200


# ---- places and caches


def test_places_let_so_many_in_and_so_many_wait() -> None:
    """Two places and one that waits: the fourth is refused, and the third gets in as one leaves."""
    places = Places("working", 2, waiting=1, seconds=60)
    inside, leave = threading.Semaphore(0), threading.Semaphore(0)

    def work() -> None:
        with places.take():
            inside.release()
            leave.acquire()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=60) and inside.acquire(timeout=60)
    while places._line.acquire(blocking=False):  # until the third has its place in the line
        places._line.release()
    with pytest.raises(ServerBusy, match="busy working for others"), places.take():
        pass
    leave.release()
    assert inside.acquire(timeout=60)
    leave.release(2)
    for thread in threads:
        thread.join()
    with places.take(), places.take():
        pass


def test_a_place_is_given_back_after_an_error() -> None:
    places = Places("working", 1, waiting=0, seconds=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), places.take():
            raise ZeroDivisionError


def test_what_was_used_last_is_held() -> None:
    """2 bytes may be held: of a, b, c, the one that was not used last goes."""
    held: Recent[str] = Recent(2e-6)
    held.put("a", "A", 1)
    held.put("b", "B", 1)
    assert held.get("a") == "A"
    held.put("c", "C", 1)
    assert (held.get("a"), held.get("b"), held.get("c")) == ("A", None, "C")
    held.put("large", "L", 9)  # held alone
    assert held.get("large") == "L" and held.get("c") is None


# ---- the description


def test_the_description_has_examples_and_errors(client: TestClient) -> None:
    api = client.get("/api/v1/openapi.json").json()
    assert api["info"]["title"] == "clipkit"
    for path, methods in api["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            if path not in ("/healthz",):
                assert "503" in operation["responses"], path
            for status, answer in operation["responses"].items():
                if status >= "400":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, path
    body = api["components"]["schemas"]["SearchBody"]
    assert body["examples"] and body["additionalProperties"] is False
    assert body["properties"]["limit"]["maximum"] == 2400


def test_the_description_can_be_read_without_a_script(client: TestClient) -> None:
    answer = client.get("/api/v1/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<code>POST /api/v1/search</code>" in answer.text
    assert not re.search("<script|<link|src=|https?://", answer.text)
