"""Marks in the app: beside the search, on the page, over HTTP, exported, and built into a dataset."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from colours import ColourModel, paint
from data_samples import read_dataset
from starlette.testclient import TestClient

from app.corrections import Mark
from app.web import render
from app.web.api import create_app
from app.web.pictures import UnknownPictureError
from app.web.requests import SearchRequest
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.errors import ClipkitError
from clipkit.images import image_id

HOST = "http://127.0.0.1:7860"
ONE, TWO = "1" * 32, "2" * 32
Run = Callable[..., tuple[int, str, str]]


# ---- beside the search


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two red pictures and two blue ones, one of them in two places, captioned."""
    folder = tmp_path / "photos"
    for number, colour in enumerate(("red", "red", "blue", "blue")):
        paint(folder / f"{colour} {number}.png", colour, number=50 + 997 * number)
    (folder / "copy").mkdir()
    (folder / "copy" / "red.png").write_bytes((folder / "red 0.png").read_bytes())
    (folder / "blue 2.txt").write_text("Something blue")
    return folder


@pytest.fixture
def index(tmp_path: Path, photos: Path) -> Path:
    reindex(tmp_path / "index", photos)
    return tmp_path / "index"


def reindex(folder: Path, photos: Path) -> None:
    model = ColourModel()
    with Catalog.open(folder, write=True) as catalog:
        index_folders(catalog, [photos], encoder=model)


@pytest.fixture
def workspace(index: Path) -> Iterator[Workspace]:
    made = Workspace(index, ColourModel())  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def client(workspace: Workspace) -> TestClient:
    return TestClient(create_app(workspace), base_url=HOST, raise_server_exceptions=False)


def name_of(path: Path) -> str:
    return image_id(path.read_bytes())


def test_a_search_shows_its_own_marks(workspace: Workspace, photos: Path) -> None:
    red = name_of(photos / "red 0.png")
    assert workspace.mark(Mark(red, "red", True)) == 1
    assert workspace.mark(Mark(red, "blue", False)) == 2
    answer = workspace.search(SearchRequest(words="RED  path:photos"))
    assert (answer.words, answer.marks) == ("RED", {red: True})
    assert workspace.search(SearchRequest(words="blue")).marks == {red: False}
    assert workspace.search(SearchRequest(words="green")).marks == {}
    assert workspace.status().corrections == 2


def test_only_a_text_query_has_something_to_mark(workspace: Workspace, photos: Path) -> None:
    red = name_of(photos / "red 0.png")
    dropped = workspace.dropped.add((photos / "red 0.png").read_bytes())
    for request in (
        SearchRequest(similar=red),
        SearchRequest(images=(dropped,)),
        SearchRequest(images=(dropped,), words="red"),
        SearchRequest(words="path:photos"),
        SearchRequest(words=f"red +{red}"),
    ):
        answer = workspace.search(request)
        assert answer.hits and answer.words is None


def test_a_mark_survives_a_restart_a_move_and_a_new_index(index: Path, photos: Path) -> None:
    red, copy = photos / "red 0.png", photos / "copy" / "red.png"
    name = name_of(red)
    first = Workspace(index, ColourModel())  # type: ignore[arg-type]
    first.mark(Mark(name, "red", True))
    first.close()
    copy.unlink()
    red.rename(photos / "moved.png")
    for file in index.glob("catalog.sqlite*"):
        file.unlink()
    reindex(index, photos)
    again = Workspace(index, ColourModel())  # type: ignore[arg-type]
    assert again.search(SearchRequest(words="red")).marks == {name: True}
    assert [row["picture"] for row in again.exported()] == [str(photos / "moved.png")]
    again.close()


def test_indexing_and_marking_do_not_wait_for_each_other(
    workspace: Workspace, index: Path, photos: Path
) -> None:
    """The catalog's writer holds its transaction open all the while."""
    red = name_of(photos / "red 0.png")
    with Catalog.open(index, write=True) as writer:
        writer.add_root(photos / "copy")  # begins the transaction
        begun = time.monotonic()
        assert workspace.mark(Mark(red, "red", True)) == 1
        assert workspace.search(SearchRequest(words="red")).marks == {red: True}
        assert len(list(workspace.exported())) == 1
        assert time.monotonic() - begun < 5  # SQLite alone would wait 30 s
        writer.commit()


def test_a_search_can_do_without_an_unusable_file(
    workspace: Workspace, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (index / "corrections.jsonl").mkdir()
    answer = workspace.search(SearchRequest(words="red"))
    assert answer.hits and answer.words is None
    assert workspace.status().corrections == 0
    assert "cannot use" in caplog.text
    with pytest.raises(ClipkitError, match="cannot use"):
        list(workspace.exported())


def test_exported_is_only_what_is_still_there(workspace: Workspace, photos: Path) -> None:
    """Gone from the disk, changed since, gone from the index: no row; one of two places is enough."""
    paths = {colour: photos / f"{colour}.png" for colour in ("red 0", "red 1", "blue 2", "blue 3")}
    for path in paths.values():
        workspace.mark(Mark(name_of(path), "red", True))
    assert len(list(workspace.exported())) == 4
    paths["red 0"].unlink()
    paths["red 1"].unlink()
    paths["blue 2"].write_bytes(b"changed")
    with Catalog.open(workspace.folder, write=True) as catalog:
        catalog.remove_places([paths["blue 3"]])
    (row,) = workspace.exported()
    assert row["picture"] == str(photos / "copy" / "red.png")
    assert workspace.corrections.total() == 4


# ---- the page's HTML


def test_a_hit_of_a_text_query_has_a_check_and_a_cross(workspace: Workspace, photos: Path) -> None:
    red = name_of(photos / "red 0.png")
    workspace.mark(Mark(red, "red", False))

    def page(**request: Any) -> str:
        search = SearchRequest(**request)
        return render.results(search, workspace.search(search), workspace.status())

    html = page(words="red path:photos")
    assert html.count('data-do="mark"') == 8  # four hits
    (tile,) = re.findall(rf'<li [^>]*data-id="{red}".*?</li>', html)
    assert re.findall(r'data-right="(\w+)" aria-pressed="(\w+)"', tile) == [
        ("yes", "false"),
        ("no", "true"),
    ]
    assert re.search('aria-label="Result [12] is wrong for “red”"', tile)
    assert 'data-query="red"' in html and "1 correction<" in html
    for other in ({"similar": red}, {"words": "path:photos"}, {"words": "red -blue"}):
        html = page(**other)
        assert 'class="hit' in html and 'data-do="mark"' not in html and 'data-query=""' in html


def test_the_start_page_offers_the_export_once_there_is_something(
    client: TestClient, photos: Path
) -> None:
    assert "corrections.jsonl" not in client.get("/start").text
    send(client, name_of(photos / "red 0.png"), "red", True)
    assert '<span class="total">1 correction</span>' in client.get("/start").text
    assert 'href="corrections.jsonl" download' in client.get("/start").text


# ---- HTTP


def send(client: TestClient, picture: str, query: str, right: bool | None, **options: Any) -> Any:
    body = {"image_id": picture, "query": query, "right": right}
    return client.post("/api/v1/marks", json=body, **options)


def test_marks_come_and_go_over_http(client: TestClient, photos: Path) -> None:
    red = name_of(photos / "red 0.png")
    told = send(client, red, "  Red   car sort:date", True)
    assert told.status_code == 200
    assert told.json() == {"image_id": red, "query": "Red car", "right": True, "total": 1}
    assert send(client, red, "red CAR", False).json()["total"] == 1
    answer = client.get("/corrections.jsonl")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-disposition"].endswith('"clipkit-corrections.jsonl"')
    (row,) = map(json.loads, answer.text.splitlines())
    at = row.pop("at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", at)
    picture = str(photos / "copy" / "red.png")  # the first of its places by name
    assert row == {"picture": picture, "query": "red CAR", "right": False, "image_id": red}
    assert send(client, red, "red car", None).json()["total"] == 0
    assert client.get("/corrections.jsonl").text == ""


def test_what_is_no_picture_of_ours_cannot_be_marked(client: TestClient) -> None:
    answer = send(client, ONE, "red", True)
    assert answer.status_code == 404
    assert answer.json() == {"error": f"no picture {ONE} in this library"}
    for picture in ("../../etc/passwd", "", "A" * 32):
        answer = send(client, picture, "red", True)
        assert answer.status_code == 422 and "image_id is" in answer.json()["error"]


def test_a_mark_that_is_none_is_a_sentence(client: TestClient, photos: Path) -> None:
    red = name_of(photos / "red 0.png")
    for body, status in ((b"", 422), (b"[", 422), (b"\xff", 400), (b" " * 4_000_001, 413)):
        headers = {"Content-Type": "application/json"}
        answer = client.post("/api/v1/marks", content=body, headers=headers)
        assert answer.status_code == status and len(answer.json()["error"]) > 15
    assert send(client, red, "dog -leash", True).status_code == 400


def test_only_our_own_page_may_mark(client: TestClient, photos: Path, index: Path) -> None:
    red = name_of(photos / "red 0.png")
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert send(client, red, "red", True, headers=headers).status_code == 403
    assert send(client, red, "red", True, headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/corrections.jsonl", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/corrections.jsonl/../catalog.sqlite").status_code == 404
    assert not (index / "corrections.jsonl").exists()
    assert send(client, red, "red", True, headers={"Origin": HOST}).status_code == 200


def test_a_library_that_is_not_there_yet_has_nothing_to_mark(tmp_path: Path) -> None:
    empty = Workspace(tmp_path / "nothing", ColourModel())  # type: ignore[arg-type]
    with pytest.raises(UnknownPictureError):
        empty.mark(Mark(ONE, "red", True))
    assert list(empty.exported()) == [] and empty.status().corrections == 0
    assert not (tmp_path / "nothing").exists()
    empty.close()


# ---- the command, and on to a dataset


def test_what_was_marked_trains(
    client: TestClient, index: Path, photos: Path, tmp_path: Path, clipkit: Run
) -> None:
    """Marked over HTTP, exported and built: right queries are captions beside those that were there,
    wrong ones are not, and take away the same caption; they are kept as not_captions."""
    red, other, blue = (name_of(photos / f"{name}.png") for name in ("red 0", "red 1", "blue 2"))
    send(client, red, "a red thing path:photos", True)
    send(client, red, "nothing at all", False)
    send(client, other, "a red thing", True)
    send(client, other, "taken back", True)
    send(client, other, "taken back", None)
    send(client, blue, "something  BLUE", False)
    send(client, blue, "the sky", True)
    out = tmp_path / "elsewhere" / "corrections.jsonl"
    out.parent.mkdir()
    code, told, _ = clipkit("corrections", "--index", index, "--out", out)
    assert code == 0 and "5 corrections: 3 right, 2 wrong" in told
    assert "clipkit data build" in told and "clipkit train dataset" in told  # what comes next
    assert out.read_text() == client.get("/corrections.jsonl").text
    assert all(
        Path(json.loads(line)["picture"]).is_absolute() for line in out.read_text().splitlines()
    )
    code, told, errors = clipkit(
        *("data", "build", photos, out, "--out", tmp_path / "dataset", "--validation", 0),
        *("--test", 0, "--allow", "blank", "--near", "ignore"),
    )
    assert code == 0, errors
    assert f"corrections {out}" in told
    records = {r.image_id: r for r in read_dataset(tmp_path / "dataset")}
    assert {name: record.captions for name, record in records.items()} == {
        red: ("a red thing",),
        other: ("a red thing",),
        blue: ("the sky",),
    }
    assert list(records[red].meta["not_captions"]) == ["nothing at all"]
    assert list(records[blue].meta["not_captions"]) == ["something BLUE"]
    lines = (tmp_path / "dataset" / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [r["reason"] for r in rejected if r["what"] == "caption"] == ["marked-wrong"]


def test_the_command_writes_to_the_terminal_or_a_file(
    workspace: Workspace, index: Path, photos: Path, tmp_path: Path, clipkit: Run
) -> None:
    code, out, err = clipkit("corrections", "--index", index)
    assert (code, out) == (2, "") and "no corrections in" in err
    workspace.mark(Mark(name_of(photos / "red 1.png"), "red", True))
    workspace.mark(Mark(name_of(photos / "blue 3.png"), "red", False))
    (photos / "blue 3.png").unlink()
    code, out, err = clipkit("corrections", "--index", index)
    (row,) = map(json.loads, out.splitlines())
    assert code == 0 and row["picture"] == str(photos / "red 1.png") and row["right"] is True
    assert "1 left out: their pictures" in err
    code, out, err = clipkit("corrections", "--index", index, "--out", tmp_path / "no" / "x.jsonl")
    assert code == 2 and "cannot write" in err and "Traceback" not in err
    code, _, err = clipkit("corrections", "--index", tmp_path / "none")
    assert code == 2 and "no index at" in err
    code, out, _ = clipkit("corrections", "--help")
    assert code == 0 and "clipkit corrections --out corrections.jsonl" in " ".join(out.split())


def test_a_name_that_is_not_utf8_survives_the_way(
    workspace: Workspace, index: Path, photos: Path, tmp_path: Path
) -> None:
    odd = photos / os.fsdecode(b"caf\xe9.png")
    try:
        (photos / "red 1.png").rename(odd)
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    reindex(index, photos)
    workspace.mark(Mark(name_of(odd), "red", True))
    from clipkit.sources import Row, open_source

    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in workspace.exported()))
    (pair,) = open_source(path).rows()
    assert isinstance(pair, Row) and pair.picture.path == odd and pair.captions == ("red",)
