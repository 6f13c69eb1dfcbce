"""The real command as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clipkit.catalog import Catalog

PICTURES = Path(__file__).parent.parent / "data_prep" / "gallery" / "pictures"


def clipkit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def hits(*arguments: object) -> list[dict[str, object]]:
    done = clipkit("search", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("timm-hf")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of the sample pictures, with their captions, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for source in sorted(PICTURES.rglob("*.png"))[::28][:12]:
        (folder / source.parent.name).mkdir(exist_ok=True)
        shutil.copy(source, folder / source.parent.name)
        captions = source.parent / "metadata.jsonl"
        if captions.exists():
            shutil.copy(captions, folder / source.parent.name)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def index(photos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place") / "index"
    done = clipkit("index", photos, "--index", place, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "12 added, 2 skipped" in done.stdout
    return place


def test_index_says_what_it_skipped_and_why(index: Path, photos: Path) -> None:
    told = clipkit("status", "--skipped", "--index", index).stdout
    assert "12 in 12 files" in told
    assert f"{photos / 'empty.jpg'}: file is empty" in told or str(photos / "empty.jpg") in told
    assert str(photos / "text.png") in told


def test_a_second_run_changes_nothing(index: Path, photos: Path) -> None:
    """Without --model the index's own is meant; nothing is loaded, so it is quick."""
    done = clipkit("index", photos, "--index", index)
    assert "12 unchanged, 2 skipped before in" in done.stdout, done.stdout + done.stderr


def test_words_give_hits_as_json_and_as_a_table(index: Path) -> None:
    found = hits("red", "car", "--index", index, "-k", 5)
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    assert set(found[0]) == {"rank", "path", "image_id", "score", "strength"}
    scores = [hit["score"] for hit in found]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    table = clipkit("search", "red", "car", "--index", index, "-k", "5").stdout
    assert all(str(hit["path"]) in table for hit in found)
    assert "5 of 12 pictures" in table


def test_k_has_no_cap(index: Path) -> None:
    assert len(hits("car", "--index", index, "-k", 5000)) == 12


def test_a_picture_finds_itself(index: Path, photos: Path) -> None:
    """Random towers put all pictures close together: it is among the first by its own cosine."""
    picture = sorted(photos.rglob("*/*.png"))[3]
    found = {hit["path"]: hit["score"] for hit in hits("--image", picture, "--index", index)}
    assert found[str(picture)] == pytest.approx(1, abs=1e-3)


def test_filters_and_phrases_need_no_towers(index: Path, photos: Path) -> None:
    folder = next(path for path in sorted(photos.iterdir()) if path.is_dir())
    inside = sorted(map(str, folder.glob("*.png")))
    assert sorted(h["path"] for h in hits(f"folder:{folder}", "--index", index)) == inside  # type: ignore[type-var]


def test_deleted_and_forgotten(photos: Path, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(photos, mine)
    assert clipkit("index", mine, "--index", tmp_path / "i", "--model", model).returncode == 0
    gone = sorted(mine.rglob("*/*.png"))[0]
    gone.unlink()
    assert "1 removed" in clipkit("index", mine, "--index", tmp_path / "i").stdout
    assert str(gone) not in {
        hit["path"] for hit in hits("car", "-k", 99, "--index", tmp_path / "i")
    }
    shutil.move(mine, tmp_path / "unplugged")
    told = clipkit("index", mine, "--index", tmp_path / "i").stdout
    assert "nothing was removed from the index" in told
    assert (
        "11 files forgotten" in clipkit("index", mine, "--forget", "--index", tmp_path / "i").stdout
    )
    assert hits("car", "--index", tmp_path / "i") == []


def test_ctrl_c_ends_soundly_and_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(400):
        Image.effect_noise((600, 450), 10 + i % 90).convert("RGB").save(photos / f"{i}.jpg")
    arguments = ["index", photos, "--index", tmp_path / "i", "--model", model, "--batch-size", 8]
    run = subprocess.Popen(
        [sys.executable, "-m", "app.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and pictures(tmp_path / "i") == 0:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    told, warned = run.communicate(timeout=60)
    assert run.returncode == 130, told + warned
    assert "stopped; run the same command again to go on" in told
    assert "Traceback" not in warned
    kept = pictures(tmp_path / "i")
    assert 0 < kept < 400
    done = clipkit(*arguments)
    assert f"{400 - kept} added" in done.stdout and f"{kept} unchanged" in done.stdout
    assert pictures(tmp_path / "i") == 400


def pictures(index: Path) -> int:
    if not (index / "catalog.sqlite").exists():
        return 0
    try:
        with Catalog.open(index) as catalog:
            return catalog.stats().pictures
    except Exception:  # the very first moments: a file, but no catalog in it yet
        return 0


BAD_INPUT = {
    "no folder": (["index"], "Missing argument"),
    "unknown folder": (["index", "/nowhere"], "folder /nowhere does not exist"),
    "unknown option": (["index", ".", "--modle", "x"], "No such option"),
    "workers": (["index", ".", "--workers", "0"], "greater than or equal to 1"),
    "unknown model": (["index", "{photos}", "--model", "nonsense"], "model 'nonsense' is unknown"),
    "other model": (["search", "x", "--index", "{index}", "--model", "nonsense"], "is unknown"),
    "nothing asked": (["search", "--index", "{index}"], "give words, or a picture with --image"),
    "unknown key": (["search", "aftr:2020", "--index", "{index}"], "after"),
    "open quote": (["search", '"open', "--index", "{index}"], "quote"),
    "bad date": (["search", "after:yesterday", "--index", "{index}"], "yesterday"),
    "k": (["search", "x", "-k", "0", "--index", "{index}"], "greater than or equal to 1"),
    "no index": (["search", "x", "--index", "/nowhere"], "no index at /nowhere; create one with"),
    "no picture": (["search", "--image", "/nowhere.png", "--index", "{index}"], "/nowhere.png"),
    "not a picture": (["search", "--image", "{photos}/text.png", "--index", "{index}"], "picture"),
    "device": (
        ["search", "--image", "{picture}", "--device", "toaster", "--index", "{index}"],
        "device 'toaster' is not usable here",
    ),
    "app without index": (["app", "--port", "99999"], "less than or equal to 65535"),
    "status": (["status", "--index", "/nowhere"], "no index at /nowhere"),
    "dataset as index": (["index", "{photos}", "--index", "{photos}/{caption}"], "is a dataset"),
    "unknown command": (["serch"], "No such command"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_sentence_and_exit_code_2(case: str, index: Path, photos: Path) -> None:
    arguments, sentence = BAD_INPUT[case]
    values = {
        "{index}": str(index),
        "{photos}": str(photos),
        "{picture}": str(sorted(photos.rglob("*/*.png"))[0]),
        "{caption}": next(photos.rglob("metadata.jsonl")).parent.name,
    }
    for name, value in values.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    done = clipkit(*arguments)
    told = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in told
    assert "Traceback" not in told


def test_every_command_has_help_with_an_example() -> None:
    for command in ("index", "search", "app", "status"):
        told = clipkit(command, "--help").stdout
        assert f"clipkit {command}" in told and "Examples:" in told
