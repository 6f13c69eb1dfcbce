"""Teaching the model from the page, the whole way: tiny towers, plain colours with captions."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from textured import textured

from app.corrections import Mark
from app.web import teaching
from app.web.api import create_app
from app.web.requests import SearchRequest
from app.web.teaching import PICTURES, TEXTS, Material
from app.web.workspace import Workspace
from clipkit import Library
from clipkit.durable import write_whole
from clipkit.errors import CatalogBusy, InputError
from clipkit.library import open_encoder

WORDS = "red green blue cake car dog cat penguin guitar tree house boat".split()


def write_photos(folder: Path, count: int, *, captioned: bool = True) -> Path:
    """Twelve hues, each with a name of its own, under a texture that no other picture has."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        hue = np.random.default_rng(number % 12).integers(20, 235, 3)
        plain = Image.new("RGB", (96, 72), tuple(map(int, hue)))
        Image.blend(plain, textured((96, 72), seed=number), 0.3).save(folder / f"{number:03}.png")
        if captioned:
            (folder / f"{number:03}.txt").write_text(WORDS[number % 12])
    return folder


@pytest.fixture
def open_workspace(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Workspace]]:
    """open_workspace(count, **options): over an index of so many pictures by a tiny model."""
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPKIT_PRECISION", "float32")
    opened: list[Workspace] = []
    index = tmp_path / "index"

    def make(count: int = 0, **options: Any) -> Workspace:
        if count:
            photos = write_photos(tmp_path / "photos", count, **options)
            with Library.open(index, model=str(tiny_checkpoint("vit"))) as library:
                library.add(photos)
        made = Workspace(index, open_encoder(index), follows=True)
        opened.append(made)
        return made

    yield make
    for workspace in opened:
        workspace.close()


def ended(workspace: Workspace) -> Any:
    """The lesson, once nothing happens by itself."""
    while workspace.teacher.working:
        time.sleep(0.05)  # pytest-timeout ends what never happens
    return workspace.teacher.lesson


def reached(workspace: Workspace, stage: str) -> None:
    while (lesson := workspace.teacher.lesson) is None or lesson.stage != stage:
        assert workspace.teacher.working, lesson
        time.sleep(0.02)


def leftovers(workspace: Workspace) -> list[str]:
    names = (teaching.SCRATCH, teaching.NOTED)
    return [name for name in names if (workspace.folder / name).exists()]


def scores(workspace: Workspace) -> list[float | None]:
    return [hit.score for hit in workspace.search(SearchRequest(words="red", limit=100)).hits]


# ---- what there is to learn from


def test_material_says_what_is_missing() -> None:
    assert Material(60, 3, 0, PICTURES, TEXTS).missing == ""
    assert Material(3, 0, 0, 3, 2).missing == (
        "It needs 50 pictures with a right mark or a caption (here 3) and 10 different searches or "
        "captions among these (here 2)."
    )
    assert "pictures" not in Material(90, 0, 0, 90, 1).missing.partition("searches")[0]


def test_too_little_is_refused_and_marks_are_counted(open_workspace: Any) -> None:
    """Three pictures without captions, of which two are marked."""
    workspace = open_workspace(3, captioned=False)
    hits = workspace.search(SearchRequest(words="red")).hits
    workspace.mark(Mark(hits[0].picture.image_id, "red", True))
    workspace.mark(Mark(hits[1].picture.image_id, "red", False))
    assert workspace.teacher.material() == Material(1, 1, 0, 1, 1)
    with pytest.raises(InputError, match=r"too little to learn from\. It needs 50 .*\(here 1\)"):
        workspace.teach("start")
    assert workspace.teacher.lesson is None and not leftovers(workspace)


# ---- the whole way


@pytest.mark.end_to_end
@pytest.mark.parametrize("large", [False, True])
def test_taught_filled_switched_and_undone(
    open_workspace: Any, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """The old model answers, with the same scores, until the switch, and again after the undo. In a
    large library no picture is encoded again: the new model has the vectors of the old one."""
    workspace = open_workspace(72)
    monkeypatch.setattr(teaching, "ENCODED_AGAIN", 71 if large else 72)
    filled: list[str] = []
    fill = Workspace.fill

    def counted(self: Workspace, spec: str) -> None:
        filled.append(spec)
        fill(self, spec)

    monkeypatch.setattr(Workspace, "fill", counted)
    before = scores(workspace)
    first = workspace.model.encoder_id
    workspace.teach("start")
    with pytest.raises(CatalogBusy, match="in progress already"):
        workspace.teach("start")
    reached(workspace, "training")
    assert workspace.status().teaching == "training" and scores(workspace) == before
    lesson = ended(workspace)
    if lesson.stage == "choosing":
        assert lesson.verdict["outcome"] != "better" and scores(workspace) == before
        workspace.teach("use")
        lesson = ended(workspace)
    assert (lesson.stage, lesson.error) == ("done", "")
    assert lesson.verdict["pictures"] > 0 and lesson.verdict["sentences"]
    assert Path(lesson.spec).parent == workspace.folder.absolute() / "models"
    report = f"reports/taught@{Path(lesson.spec).name}"
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
    assert f'href="{report}"' in client.get("/models").text
    page = client.get(f"/{report}")
    assert page.status_code == 200 and lesson.verdict["sentences"][0] in page.text
    assert f"clipkit use {lesson.spec} --index {workspace.folder.absolute()}" in page.text
    after = scores(workspace)
    assert workspace.model.encoder_id != first and after != before
    assert not (workspace.folder / teaching.SCRATCH).exists()
    assert [model.missing for model in workspace.models()] == [0, 0]
    assert bool(filled) != large
    assert len({model.space_id for model in workspace.models()}) == (1 if large else 2)
    # After a restart of the server too.
    again = open_workspace()
    assert again.teacher.lesson == lesson
    again.teach("undo")
    assert again.model.spec and scores(again) == before == scores(workspace)
    assert again.status().encoder_id == first and not leftovers(again)
    with Library.open(again.folder) as library:
        assert library.drop(lesson.spec) == (0 if large else 72)
    assert not Path(lesson.spec).exists()


@pytest.mark.end_to_end
def test_what_did_not_help_changes_nothing_unless_asked(
    open_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(60)
    plain = teaching.Teacher._trained

    def no_better(self: Any, task: Any) -> Any:
        return {**plain(self, task), "outcome": "same", "unchanged": False}

    monkeypatch.setattr(teaching.Teacher, "_trained", no_better)
    before = scores(workspace)
    workspace.teach("start")
    lesson = ended(workspace)
    assert lesson.stage == "choosing" and Path(lesson.spec).is_dir()
    assert scores(workspace) == before and len(workspace.models()) == 1
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
    html = client.get("/models").text
    assert "Use it all the same" in html and 'data-what="keep"' in html
    assert client.post("/teach/keep").status_code == 200
    assert workspace.teacher.lesson is None and not leftovers(workspace)
    assert not Path(lesson.spec).exists() and scores(workspace) == before
    assert client.post("/teach/use").status_code == 400
    assert client.post("/teach/_trained").status_code == 404


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", ["cancel", "killed"])
def test_a_lesson_that_ends_early_leaves_nothing(open_workspace: Any, how: str) -> None:
    """The training process is killed; the server goes on and says so, unless that was asked for."""
    workspace = open_workspace(60)
    before = scores(workspace)
    workspace.teach("start")
    reached(workspace, "training")
    if how == "cancel":
        workspace.teach("cancel")
    else:
        os.kill(workspace.teacher._process.pid, signal.SIGKILL)
    lesson = ended(workspace)
    if how == "cancel":
        assert lesson is None and not leftovers(workspace)
    else:
        assert lesson.stage == "failed" and "ended with code -9" in lesson.error
        workspace.teach("dismiss")
    assert not (workspace.folder / teaching.SCRATCH).exists()
    assert not list((workspace.folder / "models").glob("*"))
    assert scores(workspace) == before and not leftovers(workspace)


def test_a_result_that_is_dismissed_at_once_stays_dismissed(
    open_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone may click while it is still being stored. Fails for a version that stores outside of a
    lock: the result is written after it was removed, and comes back with the next start."""
    teacher = open_workspace(1).teacher
    shown = threading.Event()

    def slow(path: Path, content: bytes) -> None:
        shown.set()
        time.sleep(0.3)
        write_whole(path, content)

    monkeypatch.setattr(teaching, "write_whole", slow)
    failed = teaching.Lesson("failed", error="no reason")
    thread = threading.Thread(target=teacher._note, args=(failed,))
    thread.start()
    shown.wait()
    teacher.dismiss()
    thread.join()
    assert teacher.lesson is None and teacher._noted() is None


def test_a_full_disk_is_one_sentence(open_workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = open_workspace(60)

    def full(_: Any, task: Any) -> Any:
        (Path(task.scratch) / "half").write_bytes(b"x")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(teaching.Teacher, "_trained", full)
    workspace.teach("start")
    lesson = ended(workspace)
    assert lesson.stage == "failed" and "No space left on device" in lesson.error
    assert not (workspace.folder / teaching.SCRATCH).exists()


def test_a_damaged_note_is_no_lesson(open_workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    for content in ("", "{", "[]", '{"stage": "filling"}', '{"stage": "done", "spec": "/nowhere"}'):
        (tmp_path / "index" / teaching.NOTED).write_text(content)
        assert open_workspace().teacher.lesson is None
