"""The HTTP side: pictures by content hash only, and everything else refused."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from colours import ColourModel, paint
from PIL import Image
from starlette.testclient import TestClient

from app.web.api import create_app
from app.web.pictures import Decoding, DroppedPictures, Places, UnknownPictureError
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.errors import CatalogBusy, ClipkitError, IndexDamaged, InputError, QueryError
from clipkit.images import Limits, image_id

HOST = "http://127.0.0.1:7860"
Served = Callable[..., TestClient]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def serve(tmp_path: Path, photos: Path) -> Iterator[Served]:
    """serve(): a client of the API over an index of what lies in `photos` by then."""
    opened: list[Workspace] = []

    def client(**options: Any) -> TestClient:
        model = ColourModel()
        with Catalog.open(tmp_path / "index", write=True) as catalog:
            index_folders(catalog, [photos], encoder=model)
        workspace = Workspace(tmp_path / "index", model, **options)  # type: ignore[arg-type]
        opened.append(workspace)
        app = create_app(workspace)
        app.state.workspace = workspace
        return TestClient(app, base_url=HOST, raise_server_exceptions=False)

    yield client
    for workspace in opened:
        workspace.close()


def name_of(path: Path) -> str:
    return image_id(path.read_bytes())


# ---- pictures out


def test_health_says_what_answers(serve: Served, photos: Path) -> None:
    paint(photos / "a.png", "red")
    told = serve().get("/health").json()
    assert (told["name"], told["model"], told["pictures"], told["indexing"]) == (
        "clipkit",
        "colours",
        1,
        False,
    )


def test_a_thumbnail_is_small_and_may_be_kept_for_ever(serve: Served, photos: Path) -> None:
    path = paint(photos / "a.png", "red", size=(900, 600))
    answer = serve().get(f"/thumbnails/{name_of(path)}")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (320, 213)


def test_a_lost_thumbnail_is_made_again_and_kept(
    serve: Served, photos: Path, tmp_path: Path
) -> None:
    path = paint(photos / "a.png", "green")
    serve()
    for file in (tmp_path / "index").glob("thumbnails.sqlite*"):
        file.unlink()
    client = serve()
    first = client.get(f"/thumbnails/{name_of(path)}")
    assert first.status_code == 200
    path.unlink()  # the second time it can only come from thumbnails.sqlite
    assert client.get(first.url.path).content == first.content


def test_a_picture_leaves_without_its_metadata(serve: Served, photos: Path) -> None:
    """Where a photo was taken (GPS) and the camera's comments stay on this machine."""
    photos.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "home of Jane Roe"  # ImageDescription
    exif.get_ifd(0x8825)[1] = "N"  # GPSLatitudeRef
    path = photos / "gps.jpg"
    Image.new("RGB", (64, 64), "red").save(path, exif=exif, comment=b"home of Jane Roe")
    assert b"Jane Roe" in path.read_bytes()
    client = serve()
    for kind in ("pictures", "thumbnails"):
        sent = client.get(f"/{kind}/{name_of(path)}")
        assert sent.status_code == 200
        assert b"Jane Roe" not in sent.content and b"Exif" not in sent.content
        assert not Image.open(io.BytesIO(sent.content)).getexif()


def test_what_browsers_cannot_show_is_sent_as_jpeg(serve: Served, photos: Path) -> None:
    photos.mkdir()
    path = photos / "print.tif"
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(path)
    sent = serve().get(f"/pictures/{name_of(path)}")
    assert sent.headers["content-type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(sent.content))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("kind", ["thumbnails", "pictures", "details", "queries"])
@pytest.mark.parametrize(
    "name",
    [
        "0" * 32,  # nobody's
        "0" * 31,
        "A" * 32,
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e%2fcatalog.sqlite",
        "../../../etc/passwd",
        "%00" + "0" * 31,
        "",
    ],
)
def test_what_is_no_id_of_ours_is_not_found(
    serve: Served, photos: Path, kind: str, name: str
) -> None:
    paint(photos / "a.png", "red")
    answer = serve().get(f"/{kind}/{name}")
    assert answer.status_code in (404, 405)
    assert answer.json()["error"]
    assert "Traceback" not in answer.text and "root:" not in answer.text


def test_a_picture_that_is_gone_or_changed_says_so(serve: Served, photos: Path) -> None:
    gone, changed = paint(photos / "gone.png", "red"), paint(photos / "changed.png", "blue")
    names = [name_of(gone), name_of(changed)]
    client = serve()
    gone.unlink()
    paint(changed, "green")
    for name, file in zip(names, ("gone.png", "changed.png"), strict=True):
        answer = client.get(f"/pictures/{name}")
        assert answer.status_code == 410
        expected = f"the file {file} was deleted or has changed; index its folder again"
        assert answer.json() == {"error": expected}


def test_any_place_that_still_holds_the_picture_serves_it(serve: Served, photos: Path) -> None:
    one, two = paint(photos / "one.png", "red"), paint(photos / "sub" / "two.png", "red")
    name = name_of(one)
    client = serve()
    one.unlink()
    assert client.get(f"/pictures/{name}").status_code == 200
    two.unlink()
    assert client.get(f"/pictures/{name}").status_code == 410


def test_details_are_printable_whatever_the_file_is_called(serve: Served, photos: Path) -> None:
    path = paint(photos / "plain.png", "red")
    odd = Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9\n\xe2\x80\xae.png"))
    try:
        path.rename(odd)
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    told = serve().get(f"/details/{name_of(odd)}").json()
    assert told["name"] == "caf\ufffd␊\ufffd.png"
    assert (told["width"], told["height"], told["format"]) == (90, 60, "PNG")


# ---- pictures in


def test_a_dropped_picture_is_remembered_by_its_content(serve: Served, photos: Path) -> None:
    data = paint(photos / "a.png", "red").read_bytes()
    client = serve()
    told = client.post("/queries", content=data)
    assert told.json() == {"id": image_id(data)}
    sample = client.get(f"/queries/{image_id(data)}")
    assert Image.open(io.BytesIO(sample.content)).format == "JPEG"


def test_what_is_no_picture_is_refused_in_a_sentence(serve: Served, photos: Path) -> None:
    paint(photos / "a.png", "red")
    client = serve()
    for junk in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"0" * 90):
        answer = client.post("/queries", content=junk)
        assert answer.status_code == 422
        assert re.fullmatch(r"\{'error': .{15,}\}", str(answer.json()))


def test_an_upload_is_cut_off_at_the_limit(
    serve: Served, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit counts what comes, not what the Content-Length says."""
    paint(photos / "a.png", "red")
    client = serve()
    monkeypatch.setattr("app.web.routes.QUERY_MEGABYTES", 1)
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield b"0" * 100_000

    answer = client.post("/queries", content=endless())
    assert answer.status_code == 413
    assert "1 MB" in answer.json()["error"]


def test_a_picture_beyond_the_pixel_limit_is_refused(serve: Served, photos: Path) -> None:
    data = paint(photos / "a.png", "red", size=(200, 200)).read_bytes()  # 0.04 MP
    answer = serve(limits=Limits(max_megapixels=0.01)).post("/queries", content=data)
    assert answer.status_code == 422
    assert "the limit is 0.01 MP" in answer.json()["error"]


def test_dropped_pictures_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(shade: int) -> bytes:
        out = io.BytesIO()
        Image.new("L", (8, 8), shade).save(
            out, "BMP"
        )  # 1,142 bytes, with 650 of a sample: two fit into 4.5 kB
        return out.getvalue()

    monkeypatch.setattr("app.web.pictures.HELD_MEGABYTES", 0.0045)
    decoding = Decoding(Places("decoding", 1, waiting=0, seconds=0), megapixels=1)
    dropped = DroppedPictures(limits=Limits(), decoding=decoding)
    first, second, third = (dropped.add(picture(shade)) for shade in (1, 2, 3))
    with pytest.raises(UnknownPictureError, match="drop it again"):
        dropped[first]
    assert dropped[second] == picture(2) and dropped[third] == picture(3)


# ---- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueryError("no such key"), 400),
        (InputError("no"), 400),
        (CatalogBusy("process 7 writes"), 409),
        (IndexDamaged("catalog.sqlite is damaged"), 500),
        (ClipkitError("disk full"), 500),
    ],
)
def test_errors_are_their_sentence(
    serve: Served,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: ClipkitError,
    status: int,
) -> None:
    paint(photos / "a.png", "red")
    client = serve()

    def fail(self: Workspace) -> None:  # noqa: ARG001
        raise error

    monkeypatch.setattr(Workspace, "status", fail)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (status, {"error": str(error)})


def test_there_may_be_no_index_yet(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "none", ColourModel())  # type: ignore[arg-type]
    client = TestClient(create_app(workspace), base_url=HOST)
    assert client.get("/health").json()["pictures"] == 0
    assert client.get(f"/pictures/{'0' * 32}").status_code == 404
    assert not (tmp_path / "none").exists()


# ---- who may ask


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "192.168.1.5:7860"]
)
def test_this_machine_and_plain_addresses_may_ask(serve: Served, photos: Path, host: str) -> None:
    paint(photos / "a.png", "red")
    assert serve().get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "localhost.evil.example", "", "[::1"]
)
def test_another_name_for_this_server_is_refused(serve: Served, photos: Path, host: str) -> None:
    """DNS rebinding: a page elsewhere whose name resolves to 127.0.0.1 for a moment."""
    paint(photos / "a.png", "red")
    answer = serve().get("/health", headers={"host": host})
    assert answer.status_code == 400
    assert "127.0.0.1 or localhost" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},  # another program's page on this machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_pages_cannot_send(
    serve: Served, photos: Path, headers: dict[str, str]
) -> None:
    data = paint(photos / "a.png", "red").read_bytes()
    client = serve()
    for path in ("/queries", "/gradio_api/queue/join"):
        answer = client.post(path, content=data, headers=headers)
        assert answer.status_code == 403, path
    own = {"origin": HOST, "sec-fetch-site": "same-origin"}
    assert client.post("/queries", content=data, headers=own).status_code == 200


def test_every_answer_is_locked_down(serve: Served, photos: Path) -> None:
    path = paint(photos / "a.png", "red")
    client = serve()
    for address in ("/health", f"/pictures/{name_of(path)}", "/nothing", "/ui/clipkit.js"):
        headers = client.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_only_the_pages_own_files_are_under_ui(serve: Served, photos: Path) -> None:
    paint(photos / "a.png", "red")
    client = serve()
    assert client.get("/ui/clipkit.css").headers["content-type"].startswith("text/css")
    for name in ("api.py", "..%2fapi.py", "../app/api.py", "clipkit.css%00"):
        assert client.get(f"/ui/{name}").status_code == 404
