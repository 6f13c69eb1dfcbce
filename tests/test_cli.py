"""The commands on an index as a user runs them, mostly in a process of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from app.cli import cli, terminal
from clipkit.catalog import Catalog

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "data_prep" / "gallery" / "pictures"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def hits(*arguments: object) -> list[dict[str, object]]:
    done = run("search", *arguments, "--json")
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
    done = run("index", photos, "--index", place, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "12 added, 2 skipped" in done.stdout
    return place


def test_index_says_what_it_skipped_and_why(index: Path, photos: Path) -> None:
    told = run("status", "--skipped", "--index", index).stdout
    assert "12 in 12 files" in told
    assert f"{photos / 'empty.jpg'}: file is empty" in told or str(photos / "empty.jpg") in told
    assert str(photos / "text.png") in told


def test_a_second_run_changes_nothing(index: Path, photos: Path) -> None:
    """Without --model the index's own is meant; nothing is loaded, so it is quick."""
    done = run("index", photos, "--index", index)
    assert "12 unchanged, 2 skipped before in" in done.stdout, done.stdout + done.stderr


def test_words_give_hits_as_json_and_as_a_table(index: Path) -> None:
    found = hits("red", "car", "--index", index, "-k", 5)
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    keys = {"rank", "path", "image_id", "score", "strength", "probability", "named"}
    assert set(found[0]) == keys
    scores = [hit["score"] for hit in found]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    table = run("search", "red", "car", "--index", index, "-k", "5").stdout
    assert all(str(hit["path"]) in table for hit in found)
    assert "5 of 12 pictures" in table


def test_a_change_of_the_model_is_said(
    index: Path, photos: Path, model: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """What was encoded again is counted, and so is which model answers: also when all is unchanged."""
    place = tmp_path / "index"
    shutil.copytree(index, place)
    other = tmp_path / "runs" / "other"
    shutil.copytree(tiny_checkpoint("timm-hf", seed=1), other)
    done = run("index", photos, "--index", place, "--model", other)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(f"12 known pictures encoded with {other}, 2 skipped before in ")
    assert second == f"searches now use {other} instead of {model}, whose vectors are kept"
    status = run("status", "--index", place).stdout
    assert re.search(rf"^model +{model} \(\w+\), 12 vectors, 576 B$", status, re.MULTILINE)
    assert re.search(
        rf"^model +{other} .* 12 vectors, 576 B, answers searches$", status, re.MULTILINE
    )
    done = run("index", photos, "--index", place, "--model", model)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("12 unchanged, 2 skipped before in ")
    assert second == f"searches now use {model} instead of {other}, whose vectors are kept"
    shutil.copytree(tiny_checkpoint("timm-hf", seed=2), other, dirs_exist_ok=True)
    run("index", photos, "--index", place, "--model", other)
    shutil.copytree(tiny_checkpoint("timm-hf", seed=3), other, dirs_exist_ok=True)
    search = run("search", "red", "--index", place)
    assert f"{other} has changed since the index was made" in search.stderr
    assert f"index the pictures again: clipkit index FOLDER --model {other}" in search.stderr
    done = run("index", photos, "--index", place, "--model", other)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("12 known pictures encoded with ")
    assert second == f"searches now use {other} as it is now; its old vectors are kept"
    run("index", photos, "--index", place, "--model", model)
    other.rename(tmp_path / "elsewhere")
    assert f"{other} " in (status := run("status", "--index", place).stdout)
    assert "12 vectors, 576 B, is not there any more\n" in status
    one, *rest = sorted(folder for folder in photos.iterdir() if folder.is_dir())
    mine = tmp_path / "mine"  # of the same pictures, in a place that can be taken away
    shutil.copytree(photos, mine)
    third = tiny_checkpoint("vit")
    place = tmp_path / "another index"
    run("index", mine, "--index", place, "--model", model)
    for folder in rest:
        (mine / folder.name).rename(tmp_path / folder.name)
        (mine / folder.name).symlink_to(tmp_path / "not mounted")
    done = run("index", mine / one.name, "--index", place, "--model", third)
    here = len(list(one.glob("*.png")))
    assert f"{here} of 12 pictures have vectors of {third}; run again to go on" in done.stdout
    assert f"; searches still use {model}" in done.stdout
    status = run("status", "--index", place).stdout
    assert re.search(
        rf"^model +{model} .* 12 vectors, 576 B, answers searches$", status, re.MULTILINE
    )


def test_numbers_are_not_coloured_in_parts(index: Path) -> None:
    """Rich's highlighting would take "12" out of "5 of 12 pictures"."""
    command = [sys.executable, "-m", "app.cli", "search", "red", "-k", "5", "--index", str(index)]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "\x1b[2m5 of 12 pictures" in done.stdout


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


def test_nothing_found_says_why_and_what_else_to_try(index: Path, photos: Path) -> None:
    name = next(path for path in sorted(photos.iterdir()) if path.is_dir()).name
    done = run("search", f"folder:{name}s", "--index", index, "--json")
    assert json.loads(done.stdout) == []
    assert done.stderr.splitlines()[:2] == [
        f"No folder is called “{name}s”; did you mean “{name}”?",
        f"  Search for folder:{name}: {len(list((photos / name).glob('*.png')))} pictures",
    ]


def test_deleted_and_forgotten(photos: Path, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(photos, mine)
    assert run("index", mine, "--index", tmp_path / "i", "--model", model).returncode == 0
    gone = sorted(mine.rglob("*/*.png"))[0]
    gone.unlink()
    assert "1 removed" in run("index", mine, "--index", tmp_path / "i").stdout
    assert str(gone) not in {
        hit["path"] for hit in hits("car", "-k", 99, "--index", tmp_path / "i")
    }
    shutil.move(mine, tmp_path / "unplugged")
    told = run("index", mine, "--index", tmp_path / "i").stdout
    assert "nothing was removed from the index" in told
    assert (
        "11 files removed from the index"
        in run("index", mine, "--forget", "--index", tmp_path / "i").stdout
    )
    assert hits("car", "--index", tmp_path / "i") == []


def test_a_word_with_a_dash_is_pushed_away_and_needs_no_quotes(index: Path) -> None:
    """Also one that begins with the letter of an option, and before or after other options."""
    quoted = hits("car -kitchen", "--index", index, "-k", 5)
    assert quoted != hits("car", "--index", index, "-k", 5)
    for words in ("car -kitchen -k 5", "-k5 -kitchen car", "-k 5 car -- -kitchen"):
        done = run("search", "--json", "--index", index, *words.split())
        assert json.loads(done.stdout) == quoted, words


def test_an_index_without_pictures_says_how_to_fill_it(
    clipkit: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    """A script that asks for JSON gets an empty list."""
    (tmp_path / "photos").mkdir()
    place = tmp_path / "i"
    assert clipkit("index", tmp_path / "photos", "--index", place, "--model", model)[0] == 0
    code, out, err = clipkit("search", "dog", "--index", place)
    assert code == 2 and not out
    assert err == f"clipkit: nothing is indexed in {place} yet; fill it: clipkit index ~/Pictures\n"
    assert clipkit("search", "dog", "--index", place, "--json") == (0, "[]\n", "")
    code, out, _ = clipkit("status", "--index", place)
    assert code == 0 and "fill it: clipkit index ~/Pictures" in out


def test_status_and_index_as_json(
    clipkit: Callable[..., tuple[int, str, str]], photos: Path, model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "i"
    code, out, _ = clipkit("index", photos, "--index", place, "--model", model, "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["index"] == str(place) and summary["added"] == summary["embedded"] == 12
    assert summary["skipped"] == 2 and summary["reasons"] == {"empty": 1, "not-a-picture": 1}
    status = json.loads(clipkit("status", "--index", place, "--json", "--skipped")[1])
    assert (status["pictures"], status["files"], status["skipped"]) == (12, 12, 2)
    assert status["folders"] == [str(photos)]
    assert [(m["spec"], m["vectors"]) for m in status["models"]] == [(str(model), 12)]
    assert [(Path(s["path"]).name, s["reason"]) for s in status["skipped_files"]] == [
        ("empty.jpg", "empty"),
        ("text.png", "not-a-picture"),
    ]
    code, out, _ = clipkit("index", photos, "--index", place, "--forget", "--json")
    assert json.loads(out) == {"removed": 12, "purged": 12, "index": str(place)}


def test_skipped_files_are_summed_up_in_words(
    clipkit: Callable[..., tuple[int, str, str]], photos: Path, model: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "photos" / "cut.png"
    cut.parent.mkdir()
    cut.write_bytes(next(photos.rglob("*/*.png")).read_bytes()[:-60])
    shutil.copy(photos / "text.png", cut.parent)
    place = tmp_path / "i"
    code, out, _ = clipkit("index", cut.parent, "--index", place, "--model", model)
    assert code == 0 and "skipped: 1 cut off, 1 not a picture; list them with" in out
    out = clipkit("status", "--skipped", "--index", place)[1]
    assert "text.png: file holds text, not a picture; JPEG" in out


# Presses Ctrl-C when the third batch is written: at the same point on every machine.
INTERRUPTED = """
import os, signal
from app.cli import main
from app.cli import cli, terminal
from clipkit.catalog import Catalog

batches = 0
add_vectors = Catalog.add_vectors

def add_and_interrupt(*arguments):
    global batches
    add_vectors(*arguments)
    batches += 1
    if batches == 3:
        os.kill(os.getpid(), signal.SIGINT)

Catalog.add_vectors = add_and_interrupt
main()
"""


def test_ctrl_c_ends_soundly_and_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    """3 batches of 8 are written, and at most the 4 x 2 + 8 files that were in work besides."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(80):
        Image.effect_noise((60, 45), 10 + i).convert("RGB").save(photos / f"{i}.png")
    arguments = ["index", photos, "--index", tmp_path / "i", "--model", model, "--batch-size", 8]
    arguments += ["--workers", 2]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert "stopped; run the same command again to resume" in stopped.stdout
    assert "stopping after this batch" in stopped.stderr and "Traceback" not in stopped.stderr
    with Catalog.open(tmp_path / "i") as catalog:
        kept = catalog.stats().pictures
    assert 24 <= kept <= 40
    done = run(*arguments)
    assert f"{80 - kept} added" in done.stdout and f"{kept} unchanged" in done.stdout


BAD_INPUT = {
    "no folder": (["index"], "Missing argument"),
    "unknown folder": (["index", "/nowhere"], "folder /nowhere does not exist"),
    "unknown option": (["index", ".", "--modle", "x"], "No such option"),
    "workers": (["index", ".", "--workers", "0"], "--workers is 0; it must be at least 1"),
    "unknown model": (["index", "{photos}", "--model", "nonsense"], "model 'nonsense' is unknown"),
    "other model": (["search", "x", "--index", "{index}", "--model", "nonsense"], "is unknown"),
    "nothing asked": (["search", "--index", "{index}"], "give words, or a picture with --image"),
    "unknown key": (["search", "aftr:2020", "--index", "{index}"], "after"),
    "open quote": (["search", '"open', "--index", "{index}"], "quote"),
    "bad date": (["search", "after:yesterday", "--index", "{index}"], "yesterday"),
    "k": (["search", "x", "-k", "0", "--index", "{index}"], "-k is 0; it must be at least 1"),
    "no index": (["search", "x", "--index", "/nowhere"], "no index at /nowhere; create one with"),
    "no picture": (["search", "--image", "/nowhere.png", "--index", "{index}"], "/nowhere.png"),
    "not a picture": (["search", "--image", "{photos}/text.png", "--index", "{index}"], "picture"),
    "device": (
        ["search", "--image", "{other}", "--device", "toaster", "--index", "{index}"],
        "device 'toaster' is unknown",
    ),
    "app without index": (["app", "--port", "99999"], "--port is 99999; it must be 0 to 65535"),
    "status": (["status", "--index", "/nowhere"], "no index at /nowhere"),
    "dataset as index": (["index", "{photos}", "--index", "{photos}/{caption}"], "is a dataset"),
    "unknown command": (["serch"], "No such command"),
    "mistyped option": (["search", "x", "--jso"], "No such option: --jso (Possible options: --json)"),
    "one dash": (["search", "x", "-json"], "-json is no option: write --json, or, to push the word"),
    "a file": (["index", "{photos}/text.png", "--index", "/nowhere/i"], "give its folder: {photos}"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_sentence_and_exit_code_2(
    case: str, index: Path, photos: Path, clipkit: Callable[..., tuple[int, str, str]]
) -> None:
    arguments, sentence = BAD_INPUT[case]
    values = {
        "{index}": str(index),
        "{photos}": str(photos),
        "{other}": str(PICTURES / "party" / "birthday-cake.png"),
        "{caption}": next(photos.rglob("metadata.jsonl")).parent.name,
    }
    for name, value in values.items():
        arguments = [argument.replace(name, value) for argument in arguments]
        sentence = sentence.replace(name, value)
    code, out, err = clipkit(*arguments)
    assert code == 2, out + err
    assert sentence in " ".join(err.replace("│", " ").split())


def test_a_process_ends_with_the_sentence_and_the_code() -> None:
    done = run("index", "/nowhere", "--index", "/nowhere/index")
    assert done.returncode == 2
    assert done.stderr == (
        "clipkit: folder /nowhere does not exist; name a folder that holds pictures\n"
    )


def test_every_command_has_help_with_examples_and_explains_its_options() -> None:
    commands = dict(leaves(typer.main.get_command(cli), "clipkit"))
    assert {"clipkit search", "clipkit data build", "clipkit eval compare"} <= set(commands)
    for name, command in commands.items():
        assert command.help, name
        assert "Examples:" in (command.epilog or "") and name in command.epilog, name
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, f"{name} {option.name}"


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands below a group, by their full names."""
    if not hasattr(command, "commands"):
        yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{name} {child}")


def test_progress_is_a_line_of_text_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", -1)
    with terminal.progress_shown() as show:
        show("walking", 1234, 0)
        show("indexing", 5, 1000, "2 skipped")
    assert capsys.readouterr().err.splitlines() == [
        "walking: 1,234",
        "indexing: 5 of 1,000, 2 skipped",
    ]


def test_sizes_are_shown_in_decimal_units() -> None:
    assert [terminal.size(n) for n in (999, 1_234_567, 2.5e12)] == ["999 B", "1 MB", "2.5 TB"]
