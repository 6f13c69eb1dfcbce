"""The server as a process: its ends, what it leaves behind, TLS, prefixes, read-only, the log."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from colours import ColourModel, paint
from serving import request, serving
from starlette.testclient import TestClient
from test_attacks import library

from app.web.api import create_app
from app.web.server import SCRATCH, Opening, _scratch, _tls
from app.web.workspace import NotAllowedError, Workspace
from clipkit.catalog import Catalog
from clipkit.errors import InputError
from clipkit.images import image_id

HOST = "http://127.0.0.1:7860"


# ---- its end


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """With an index run in progress and an event stream open: the run stops at a commit, the scratch
    folder goes, and so does that of a server that was killed. SIGTERM used to skip all that."""
    for at in range(1_500):
        paint(tmp_path / "photos" / f"{at}.png", "red", number=at)
    left = tmp_path / "scratch" / f"{SCRATCH}killed"
    left.mkdir(parents=True)
    (left / "lock").touch()
    with serving(tmp_path, photos=[str(tmp_path / "photos")]) as server:
        assert not left.exists()
        event = {"data": [], "event_data": None, "fn_index": 0, "session_hash": "abc"}
        assert server.post("/gradio_api/queue/join", event)[0] == 200
        stream = server.connect()
        stream.sendall(request("GET", "/gradio_api/queue/data?session_hash=abc"))
        while json.loads(server.get("/health")[1].split(b"\r\n\r\n")[1])["pictures"] == 0:
            time.sleep(0.05)
        server.process.send_signal(number)
        started = time.monotonic()
        assert server.process.wait(30) == 0
        took = time.monotonic() - started
        stream.close()
    assert took < 15, took
    assert list(server.scratch.iterdir()) == []
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()
    with Catalog.open(tmp_path / "index", write=True) as catalog:  # the writer's lock is free
        stats = catalog.stats()
        assert 0 < stats.pictures == catalog.stats(ColourModel.encoder_id).vectors


def test_scratch_of_a_server_that_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    starting = tmp_path / f"{SCRATCH}starting"  # without its lock yet
    starting.mkdir()
    (tmp_path / f"{SCRATCH}link").symlink_to(tmp_path.parent)
    with _scratch() as one, _scratch() as two:
        assert one.is_dir() and two.is_dir() and starting.is_dir()
    assert not one.exists() and not two.exists()
    old = time.time() - 3_600
    os.utime(starting, (old, old))
    with _scratch():
        assert not starting.exists()
    assert tmp_path.parent.is_dir()


# ---- how it is opened


def test_a_token_is_asked_for_where_others_can_reach_the_page() -> None:
    assert Opening().token_for("127.0.0.1") is None
    assert Opening().token_for("localhost") is None and Opening().token_for("::1") is None
    first, second = (Opening().token_for("0.0.0.0") for _ in range(2))
    assert first and second and first != second and len(first) >= 32
    for open_to_others in (
        Opening(names=("photos.example.org",)),
        Opening(root_path="/photos"),
        Opening(proxies=("127.0.0.1",)),
    ):
        assert open_to_others.token_for("127.0.0.1")
    assert Opening(token=True).token_for("127.0.0.1")
    assert Opening(token=False).token_for("0.0.0.0") is None
    assert Opening(secret="x" * 16).token_for("127.0.0.1") == "x" * 16
    with pytest.raises(InputError, match="the token has 5 characters; it must be 16 or more"):
        Opening(secret="12345").token_for("127.0.0.1")


def test_the_log_of_a_server_has_no_words(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with serving(library(tmp_path), access_log=str(log)) as server:
        assert server.searches()
        assert server.get("/etc/passwd")[0] == 404
        assert server.get(f"/thumbnails/{'0' * 32}")[0] == 404
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/api/v1/search", 200),
        ("GET", "-", 404),
        ("GET", "/thumbnails/{image_id}", 404),
    ]
    assert lines[0]["client"] == "127.0.0.9" and lines[0]["bytes"] > 500 and lines[0]["ms"] > 0
    assert "red" not in log.read_text() and "passwd" not in log.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key}"
    command += f" -out {certificate} -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(command.split(), check=True, capture_output=True)
    files = {"certificate": str(certificate), "key": str(key)}
    with serving(library(tmp_path), token=True, **files) as server:
        assert server.address.startswith("https://127.0.0.1:")
        base, _, token = server.address.partition("login#token=")
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=base, verify=trusted) as client:
            assert client.get("/health").status_code == 401
            entered = client.post("/login", data={"token": token})
            assert entered.status_code == 303 and "Secure" in entered.headers["set-cookie"]
            assert client.get("/health").json()["pictures"] == 3
            page = client.get("/").text
            assert f'"root":"{base.rstrip("/")}"' in page, "Gradio's own addresses are https"
        assert server.get("/health")[0] == 0, "not in the clear"
    for wrong in (
        {"certificate": certificate},
        {"certificate": key, "key": key},
        {"certificate": certificate, "key": tmp_path / "none"},
    ):
        with pytest.raises(InputError, match=r"TLS needs both files|cannot use .+ for TLS"):
            _tls(Opening(**wrong))


def proxy(prefix: str, upstream: str, *, strip: bool) -> Any:
    """A reverse proxy in 20 lines, as an ASGI app: what nginx does with `proxy_set_header Host`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        path = scope["path"]
        assert path.startswith(prefix)
        path = path[len(prefix) :] if strip else path
        query = scope["query_string"].decode()
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"connection",)]
        headers += [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https")]
        async with httpx.AsyncClient(timeout=60) as client:
            sent = client.build_request(
                scope["method"], f"{upstream}{path}?{query}", headers=headers, content=body
            )
            answer = await client.send(sent, stream=True)
            start = {"type": "http.response.start", "status": answer.status_code}
            await send({**start, "headers": answer.headers.raw})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await answer.aclose()
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize("strip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_behind_a_proxy_below_a_prefix(tmp_path: Path, strip: bool) -> None:
    """The page, static files, events and cookies work; the client that counts is the proxy's."""
    log = tmp_path / "access.jsonl"
    opening = {
        "root_path": "/photos",
        "names": ["photos.example.org"],
        "proxies": ["127.0.0.1"],
        "access_log": str(log),
    }
    with serving(library(tmp_path), **opening) as server:
        address, _, token = server.address.partition("/photos/login#token=")
        client = TestClient(
            proxy("/photos", address, strip=strip),
            base_url="https://photos.example.org",
            follow_redirects=False,
        )
        assert client.get("/photos/").status_code == 401
        entered = client.post("/photos/login", data={"token": token})
        assert entered.headers["location"] == "/photos/"
        assert "Path=/photos/" in entered.headers["set-cookie"]
        assert "Secure" in entered.headers["set-cookie"]
        page = client.get("/photos/")
        assert page.status_code == 200
        assert '"root":"https://photos.example.org/photos"' in page.text
        for name in re.findall(r'(?:src|href)="\.?/?((?:ui|assets)/[^"]+)"', page.text):
            assert client.get(f"/photos/{name}").status_code == 200, name
        event = {"data": [], "event_data": None, "fn_index": 0, "session_hash": "abc"}
        assert client.post("/photos/gradio_api/queue/join", json=event).status_code == 200
        stream = client.get("/photos/gradio_api/queue/data?session_hash=abc")
        assert "process_completed" in stream.text
        found = client.post("/photos/api/v1/search", json={"query": "red"})
        assert len(found.json()["hits"]) == 3
        elsewhere = client.post(
            "/photos/api/v1/search", json={}, headers={"origin": "https://evil.example"}
        )
        assert elsewhere.status_code == 403
        assert client.get("/photos/health", headers={"host": "evil.example"}).status_code == 400
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
    clients = {json.loads(line)["client"] for line in log.read_text().splitlines()}
    assert clients == {"203.0.113.7"}


# ---- read-only


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[tuple[Workspace, str]]:
    library(tmp_path)
    workspace = Workspace(tmp_path / "index", ColourModel(), read_only=True)  # type: ignore[arg-type]
    yield workspace, image_id((tmp_path / "photos" / "0.png").read_bytes())
    workspace.close()


def test_a_read_only_page_changes_nothing(read_only: tuple[Workspace, str]) -> None:
    workspace, picture = read_only
    client = TestClient(create_app(workspace), base_url=HOST)
    mark = {"image_id": picture, "query": "red", "right": True}
    root = b"/".hex()
    for path, sent in (
        ("/api/v1/marks", json.dumps(mark)),
        ("/folders/forget", root),
        ("/folders/browse", ""),
        (f"/open/{picture}", ""),
        (f"/show/{picture}", ""),
    ):
        json_body = {"content-type": "application/json"}
        answer = client.post(path, content=sent, headers=json_body)
        assert answer.status_code == 403, path
        assert "read-only" in answer.json()["error"]
    for change in (workspace.stop, workspace.dismiss, lambda: workspace.index(["/"])):
        with pytest.raises(NotAllowedError, match="read-only"):
            change()
    assert workspace.status().corrections == 0 and workspace.run is None


def test_a_read_only_page_shows_no_controls_that_change_anything(
    read_only: tuple[Workspace, str],
) -> None:
    workspace, _ = read_only
    client = TestClient(create_app(workspace), base_url=HOST)
    wanted = {"accept": "text/html"}
    found = client.post("/api/v1/search", json={"query": "red"}, headers=wanted).text
    assert found.count('class="hit') == 3 and 'data-do="mark"' not in found
    assert 'data-do="models"' not in found  # nor "teach it", beside the number of marks
    for panel in ("/folders", "/models"):
        drawn = client.get(panel).text
        assert "data-do" not in drawn and "Teach" not in drawn and "3 pictures" in drawn

    from app.web.page import Page, build
    from app.web.saved_reports import SavedReports
    from app.web.sorting import Sorter

    async def made() -> str:
        page = Page(workspace, Sorter(workspace), SavedReports())
        assert "read-only" in page.change_run(workspace.stop)
        return json.dumps(build(page).config["components"], default=str)

    drawn = asyncio.run(made())
    assert "read-only" in drawn
    for control in ("index", "browse", "open-file", "show-in-folder"):
        assert f'data-do=\\"{control}\\"' not in drawn.replace('\\\\"', '\\"'), control


# ---- the command


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--allow-host", "http://x"], "it must be a name without scheme and port"),
        (["--allow-host", "x:80"], "it must be a name without scheme and port"),
        (["--proxy", "nginx"], "it must be an address or a network"),
        (["--root-path", "photos"], "it must be a path that begins with /"),
        (["--root-path", "/a/../b"], "it must be a path that begins with /"),
        (["--max-requests", "1"], "it must be"),
        (
            ["--token-file", "/no/such/file"],
            "cannot read the token file /no/such/file: No such file",
        ),
        (["--tls-cert", "cert.pem"], "TLS needs both files"),
    ],
)
def test_wrong_options_of_the_app_are_a_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from app.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clipkit", "app", "--index", str(tmp_path), *options])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_command_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli import cli
    from app.web import server

    seen: dict[str, Any] = {}
    monkeypatch.setattr(server, "serve", lambda _, **options: seen.update(options))
    monkeypatch.setenv("CLIPKIT_TOKEN", "from-the-environment")
    words = ["--allow-host", "a.example", "--allow-host", "b.example", "--proxy", "10.0.0.0/8"]
    words += ["--root-path", "/photos/", "--read-only", "--access-log", "-", "--max-requests", "60"]
    cli(["app", "--index", str(tmp_path), *words], standalone_mode=False)
    assert seen["opening"] == Opening(
        secret="from-the-environment",
        read_only=True,
        names=("a.example", "b.example"),
        root_path="/photos",
        proxies=("10.0.0.0/8",),
        access_log=Path("-"),
        places=60,
    )
    (tmp_path / "token").write_text("from a file, 16+\n")
    cli(["app", "--token-file", str(tmp_path / "token"), "--no-token"], standalone_mode=False)
    assert (seen["opening"].secret, seen["opening"].token) == ("from a file, 16+", False)


@pytest.mark.parametrize(("chosen", "expected"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_the_server_computes_on_one_blas_thread(chosen: dict[str, str], expected: int) -> None:
    """Unless the user chose. A process of its own, as it counts before numpy is imported."""
    code = """if True:
        from app.cli import cli
        try:
            cli(["app", "--token-file", "/nowhere"], standalone_mode=False)
        except Exception as error:
            assert "token file" in str(error), error
        from threadpoolctl import threadpool_info
        found = [pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]]
        print(*found)"""
    env = {key: value for key, value in os.environ.items() if "_NUM_THREADS" not in key}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | chosen, capture_output=True, text=True, check=True
    )
    if not done.stdout.strip():
        pytest.skip("this numpy has no OpenBLAS of its own")
    assert done.stdout.split() == [str(min(expected, os.cpu_count() or 1))]
