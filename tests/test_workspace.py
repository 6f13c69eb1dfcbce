"""What the page works on: the model while it loads, runs in the background, the server's start."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from colours import ColourModel, paint
from PIL import Image

from app.web.pictures import UnknownPictureError
from app.web.requests import SearchRequest
from app.web.server import _listen
from app.web.workspace import Workspace
from clipkit import Library, lazy_encoder
from clipkit.catalog import Catalog
from clipkit.errors import CatalogBusy, InputError, ModelError
from clipkit.lazy_encoder import LazyEncoder
from clipkit.library import open_encoder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    yield made
    made.close()


def finished(workspace: Workspace) -> Any:
    """The run, once it is over."""
    for _ in range(1000):
        if workspace.run is not None and workspace.run.over:
            return workspace.run
        time.sleep(0.02)
    raise AssertionError(workspace.run)


# ---- the model


def test_a_model_is_named_before_it_is_loaded(tiny_checkpoint: Callable[..., Path]) -> None:
    model = LazyEncoder(str(tiny_checkpoint("timm-hf")))
    known = model.known_id
    assert known is not None and model.state == "unloaded"
    assert model.towers().encoder_id == known == model.encoder_id
    assert model.state == "ready"
    assert model.towers() is model.towers()


def test_words_do_not_wait_for_the_towers(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower answers while the towers load; its vectors are the towers' own."""
    loaded = threading.Event()
    monkeypatch.setattr(lazy_encoder.time, "sleep", lambda _: loaded.wait(30))
    model = LazyEncoder(str(tiny_checkpoint("timm-hf")), precision="float32")
    model.warm()
    while model.state != "ready":
        loaded.wait(0.02)
    assert model._towers is None
    early = model.encode_texts(["a red cake"])
    loaded.set()
    late = model.towers().encode_texts(["a red cake"])
    assert np.sum(early * late) == pytest.approx(1.0, abs=1e-4)


def test_a_model_that_cannot_be_loaded_says_so_each_time(tmp_path: Path, photos: Path) -> None:
    model = LazyEncoder("no/such/folder")
    model.warm()  # in the log, not in the way
    for _ in range(2):
        with pytest.raises(ModelError):
            model.towers()
    workspace = Workspace(tmp_path / "index", model)
    paint(photos / "a.png", "red")
    workspace.index([str(photos)])
    run = finished(workspace)
    assert run.state == "failed" and run.error
    workspace.close()


# ---- runs


def test_what_a_run_adds_is_found_at_once(workspace: Workspace, photos: Path) -> None:
    assert workspace.search(SearchRequest(words="red")).total == 0
    paint(photos / "red.png", "red")
    workspace.index([str(photos)])
    assert finished(workspace).state == "done"
    assert [hit.picture.path for hit in workspace.search(SearchRequest(words="red")).hits] == [
        str(photos / "red.png")
    ]
    paint(photos / "blue.png", "blue")
    workspace.index([str(photos)])
    assert finished(workspace).summary.added == 1
    assert workspace.search(SearchRequest(words="red")).total == 2
    assert workspace.status().pictures == 2


def test_broken_files_are_listed_for_the_folder_that_was_asked(
    workspace: Workspace, tmp_path: Path, photos: Path
) -> None:
    for folder in (photos, tmp_path / "others"):
        paint(folder / "good.png", "red")
        (folder / "bad.jpg").write_bytes(b"not a picture")
        workspace.index([str(folder)])
        run = finished(workspace)
        assert [row.path for row in run.skipped] == [str(folder / "bad.jpg")]
        assert run.skipped_total == 1


def test_one_run_at_a_time_here_and_in_other_processes(
    workspace: Workspace, tmp_path: Path, photos: Path
) -> None:
    paint(photos / "a.png", "red")
    with Catalog.open(tmp_path / "index", write=True):
        workspace.index([str(photos)])
        run = finished(workspace)
    assert run.state == "failed" and "is writing to the index" in run.error

    gate = threading.Event()
    workspace.model.encode_images = lambda images: gate.wait(30) and np.eye(3)[: len(images)]  # type: ignore[method-assign]
    workspace.index([str(photos)])
    with pytest.raises(CatalogBusy, match="already in progress"):
        workspace.index([str(photos)])
    workspace.stop()
    assert workspace.run is not None and workspace.run.state == "stopping"
    gate.set()
    finished(workspace)


def test_a_run_that_breaks_is_a_sentence(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("deep inside")

    workspace.model.towers = broken  # type: ignore[method-assign]
    paint(photos / "a.png", "red")
    workspace.index([str(photos)])
    run = finished(workspace)
    assert run.state == "failed" and "see the terminal" in run.error
    assert "deep inside" in caplog.text
    assert not workspace.indexing


@pytest.mark.parametrize("typed", ["", "  ", "photos", "./photos", "/no/such/folder", "~nobody/x"])
def test_only_a_folder_that_is_there_can_be_indexed(workspace: Workspace, typed: str) -> None:
    with pytest.raises(InputError, match=r"full path|no folder"):
        workspace.index([typed])
    assert workspace.run is None


# ---- searching


def test_a_folder_with_an_odd_name_can_be_chosen(workspace: Workspace, photos: Path) -> None:
    """The page sends a folder's key: a name that is not UTF-8 would not survive as text."""
    odd = Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9"))
    try:
        paint(odd / "a.png", "red")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    paint(photos / "b" / "b.png", "red", number=1)
    workspace.index([str(photos)])
    finished(workspace)
    keys = {row.path: row.key for row in workspace.contents().folders}
    assert len(set(keys.values())) == len(keys) == 3
    found = workspace.search(SearchRequest(words="red", folder=keys[str(odd)]))
    assert [hit.picture.path for hit in found.hits] == [str(odd / "a.png")]
    with pytest.raises(InputError, match="choose another one"):
        workspace.search(SearchRequest(words="red", folder="0" * 16))


def test_words_name_no_file(workspace: Workspace, photos: Path) -> None:
    path = paint(photos / "a.png", "red")
    workspace.index([str(photos)])
    finished(workspace)
    with pytest.raises(InputError, match="names a file"):
        workspace.search(SearchRequest(words=f'+"{path}"'))


def test_a_forgotten_picture_is_a_sentence(workspace: Workspace, photos: Path) -> None:
    paint(photos / "a.png", "red")
    workspace.index([str(photos)])
    finished(workspace)
    with pytest.raises(UnknownPictureError, match="drop it again"):
        workspace.search(SearchRequest(images=("0" * 32,)))
    with pytest.raises(InputError, match="no picture"):
        workspace.search(SearchRequest(similar="0" * 32))


def test_a_large_library_does_not_list_itself(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        paint(photos / f"{number}.png", "red", number=number)
    workspace.index([str(photos)])
    finished(workspace)
    monkeypatch.setattr("app.web.workspace.NEWEST", 2)
    contents = workspace.contents()
    assert len(contents.newest) == 2
    monkeypatch.setattr("app.web.workspace.NEWEST_UP_TO", 2)
    assert replace(contents).newest == ()  # a copy has read nothing yet


# ---- the server


def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    from app.web.server import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port}: .+; choose another with --port"):
            serve(tmp_path / "index", port=port)


def test_an_unknown_model_ends_the_server_before_it_starts(tmp_path: Path) -> None:
    from app.web.server import serve

    with pytest.raises(ModelError, match="model 'no/such/folder' is unknown"):
        serve(tmp_path / "index", model="no/such/folder", port=0)


def test_a_page_whose_model_is_gone_searches_by_what_needs_none(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Words are answered by the sentence that says which model is missing, and where it was."""
    run = tmp_path / "run"
    shutil.copytree(tiny_checkpoint("vit"), run)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 9), "red").save(photos / "red.png")
    with Library.open(tmp_path / "index", model=str(run)) as library:
        library.add(photos)
    shutil.rmtree(run)
    workspace = Workspace(tmp_path / "index", open_encoder(tmp_path / "index"))
    try:
        (hit,) = workspace.search(SearchRequest(words="path:red")).hits
        assert workspace.search(SearchRequest(similar=hit.picture.image_id)).hits == ()
        with pytest.raises(ModelError, match=f"encoded with {run}, which is not there any more"):
            workspace.search(SearchRequest(words="a red car"))
    finally:
        workspace.close()


def test_a_browser_that_is_early_waits_and_is_not_refused() -> None:
    """Fails for a socket that is bound but does not listen: the connection is refused."""
    with _listen("127.0.0.1", 0) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()


@pytest.mark.end_to_end
def test_the_server_starts_answers_and_ends(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The real command, on a free port, without an index; one Ctrl-C ends it without a traceback."""
    command = [sys.executable, "-m", "app.cli", "app", "--index", str(tmp_path / "index")]
    command += ["--port", "0", "--model", str(tiny_checkpoint("vit"))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert address is not None
        told = httpx.get(f"{address[0]}health", timeout=60).json()
        assert told["pictures"] == 0
        assert httpx.get(f"{address[0]}gradio_api/file=/etc/passwd").status_code == 404
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in rest
    assert process.returncode in (0, 130)
    assert not (tmp_path / "index").exists()
