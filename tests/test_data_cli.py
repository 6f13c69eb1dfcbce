"""`clipkit data` as a new user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_samples import read_dataset, save, save_all
from PIL import Image
from typer.testing import CliRunner

from app.cli.data import data
from clipkit.errors import DatasetError, InputError

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parent.parent


def clipkit(*arguments: object) -> tuple[int, str]:
    """(exit code, what was said). Errors of the person's come as exceptions, as `main` catches them."""
    done = CliRunner().invoke(data, [str(a) for a in arguments], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A CSV with odd column names, three broken rows, duplicated pictures."""
    folder = tmp_path / "from marketing"
    save_all(folder / "images", *(f"{n}.png" for n in range(20)))
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "3.png").read_bytes())
    rows = [f'{n};images/{n}.png;"Ein Ding Nummer {n} &amp; mehr"' for n in range(20)]
    rows += [
        "20;images/copy.png;Noch eines",
        "21;images/3.png",
        '22;images/4.png;"offen',
        "23;weg.png;x",
    ]
    path = folder / "captions.csv"
    path.write_text(
        "\n".join(["Nr;Bilddatei;Bildbeschreibung", *rows]) + "\n", encoding="utf-8-sig"
    )
    return path


def test_from_an_odd_table_to_a_data_set(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipkit", "data", "build", "my captions.csv"])
    code, said = clipkit("build", captions, "--out", tmp_path / "dataset")
    assert code == 0
    flat = " ".join(said.split())
    assert (
        "semicolon-separated, utf-8-sig: pictures from 'Bilddatei', captions from 'Bildbes" in flat
    )
    assert re.search(r"pictures 20 \(train \d+, ", flat) and "captions 21, 20 repaired (" in flat
    assert "rejected 3 rows: wrong-field-count 1, unclosed-quote 1, missing 1" in flat
    assert "rejected 1 picture: duplicate 1" in flat
    assert len(list(read_dataset(tmp_path / "dataset"))) == 20
    manifest = json.loads((tmp_path / "dataset" / "dataset.json").read_text())
    assert manifest["command"] == "clipkit data build 'my captions.csv'"


def test_a_few_pictures_make_a_dataset_to_train_on(tmp_path: Path) -> None:
    """A thousandth would train by hash: of two pictures hardly ever one. Both do, and the note says
    what is missing; a source that is all for the test is left so, and the note says that, too."""
    save_all(tmp_path, "a.png", "b.png")
    path = tmp_path / "t.csv"
    path.write_text("image,caption\na.png,A dog\nb.png,A cat\n")
    fractions = ("--validation", 0.5, "--test", 0.499)
    said = clipkit("build", path, "--out", tmp_path / "two", *fractions)[1]
    assert "pictures   2 (train 2)" in said and "none is held out" in said
    said = clipkit("build", path, "--out", tmp_path / "one", "--split", "test")[1]
    assert "pictures   2 (test 2)" in said and "there is nothing to train on" in said


def test_check_lists_leaks_and_exits_1(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    save(tmp_path / "b.jpg", 0, quality=60)
    save(tmp_path / "c.png", 2)
    path = tmp_path / "t.csv"
    path.write_text("image,caption,split\na.png,A dog,train\nb.jpg,A pet,test\nc.png,a dog,test\n")
    code, said = clipkit("check", path)
    assert code == 1
    assert "1 look-alike in train and test" in said and "train: a.png | test: b.jpg" in said
    assert "1 same-caption in train and test" in said
    clipkit("build", path, "--out", tmp_path / "out", "--near", "drop")
    assert clipkit("check", tmp_path / "out", "--strict") == (
        0,
        "pictures   test 2\nleaks      none across splits\ncaptions   none across splits\n",
    )  # of look-alikes, the one that is tested on stays
    path.write_text("image,caption,split\na.png,A dog,train\nc.png,a dog,test\n")
    assert clipkit("check", path)[0] == 0  # "A dog" may be said of two pictures,
    assert clipkit("check", path, "--strict")[0] == 1  # but not to the strict


def test_stats_in_words_and_as_a_picture(captions: Path, tmp_path: Path) -> None:
    code, said = clipkit("stats", captions, "--out", tmp_path / "stats")
    assert code == 0
    assert "frequent   ding 20, nummer 20, amp 20" in said
    assert "sizes      median 96 x 64; shorter side 64 to 64 pixels" in said
    with Image.open(tmp_path / "stats" / "stats.png") as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 24) or ()) > 1000
    with pytest.raises(InputError, match=r"cannot write the picture .*name a \.png"):
        clipkit("stats", captions, "--out", tmp_path / "x.docx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere.csv", "--out", "x"], r"nowhere\.csv does not exist"),
        (
            ["build", "{csv}", "--out", "x", "--image-column", "File"],
            r"no column 'File'; it has 'Nr'",
        ),
        (
            ["build", "{csv}", "--out", "x", "--allow", "all"],
            "--allow is 'all'; use one of blank, url",
        ),
        (["build", "{csv}", "--out", "x", "--radius", "99"], "--radius is 99; it must be 0 to 15"),
        (
            ["build", "{csv}", "--out", "x", "--test", "1.5"],
            r"--test is 1\.5; it must be at least 0",
        ),
        (["check", "{csv}"], "has no pictures in splits"),
        (["check", "{csv}", "--radius", "16"], "--radius is 16; it must be 0 to 15"),
        (["stats", "{csv}", "--kind", "cvs"], r"--kind is 'cvs'; use one of classes, coco"),
    ],
)
def test_mistakes_are_one_sentence(captions: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clipkit(*(a.format(csv=captions) for a in arguments))


@pytest.mark.parametrize("command", ["build", "check", "stats"])
def test_help_has_examples(command: str) -> None:
    code, said = clipkit(command, "--help")
    assert code == 0 and f"clipkit data {command} " in " ".join(said.split())


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = "torch datasets matplotlib scipy imagehash ftfy faiss".split()
    code = (
        "import app.cli.data, clipkit.sources, data_prep.build, data_prep.stats, sys;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_ctrl_c_leaves_nothing(captions: Path, tmp_path: Path) -> None:
    """A real interrupt in the middle of reading: exit 130, a sentence, no files."""
    import signal

    code = (
        "import signal, sys, data_prep.load as b\n"
        "slow = b.perceptual_hash\n"
        "def hashed(rgb):\n"
        "    import time; print('reading', flush=True); time.sleep(0.2); return slow(rgb)\n"
        "b.perceptual_hash = hashed\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from app.cli.data import data; data()"
    )
    arguments = ["build", str(captions), "--out", str(tmp_path / "out"), "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while "reading" not in process.stdout.readline():
            pass
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 130
    assert "stopped; " in said and "was not touched" in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["from marketing"]


def test_class_folders_without_captions(tmp_path: Path) -> None:
    """The default says what to do; then the folder, and the dataset, show classes of three pictures."""
    save_all(tmp_path / "in", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    with pytest.raises(
        DatasetError, match=r"keep pictures without captions: .* --uncaptioned keep"
    ):
        clipkit("build", tmp_path / "in", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="--uncaptioned is 'yes'; use one of reject, keep"):
        clipkit("build", tmp_path / "in", "--out", tmp_path / "out", "--uncaptioned", "yes")
    code, said = clipkit(
        "build", tmp_path / "in", "--out", tmp_path / "out", "--uncaptioned", "keep"
    )
    assert code == 0 and "folder of 6 pictures in 2 class folders" in said
    assert "captions   0; 6 pictures without\nlabels     2 classes of 3 pictures\n" in said
    for name in ("in", "out"):
        code, said = clipkit("stats", tmp_path / name)
        assert code == 0 and "captions   none\nlabels     2 classes of 3 pictures\n" in said, name
        assert "classes    cat 3, dog 3\n" in said
    code, said = clipkit("check", tmp_path / "out")
    assert code == 0 and "leaks      none across splits" in said
