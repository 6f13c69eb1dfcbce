"""`clipkit eval ...` as a person runs it: real commands, real pictures, sentences for bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from app.web.saved_reports import SavedReports
from eval.reports import load

pytestmark = pytest.mark.end_to_end

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def captioned(tmp_path: Path, noise_picture: Callable[..., Image.Image]) -> Path:
    """Six pictures with two captions and a tag each, named by a JSONL file."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for i, word in enumerate(("cake", "car", "dog", "cat", "house", "boat")):
        noise_picture(seed=i).save(folder / f"{word}.png")
        captions = [f"a photo of a {word}", f"the red {word}"]
        lines.append({"image": f"{word}.png", "captions": captions, "keywords": [word, "thing"]})
    file = folder / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def classed(tmp_path: Path, noise_picture: Callable[..., Image.Image]) -> Path:
    """A folder per class, three pictures each."""
    for seed in range(9):
        folder = tmp_path / "classed" / ("cake", "car", "dog")[seed // 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise_picture(seed=seed).save(folder / f"{seed}.png")
    return tmp_path / "classed"


def test_the_real_command_measures_keeps_and_repeats(
    tmp_path: Path, captioned: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Once cold, once from the cache: the same numbers; the report says how it was made."""
    environment = os.environ | {"CLIPKIT_CACHE": str(tmp_path / "cache")}
    reports = []
    for number in range(2):
        out = tmp_path / f"report{number}"
        command = [sys.executable, "-m", "app.cli", "eval", "retrieval", "--data", str(captioned)]
        command += ["--model", str(tiny_checkpoint()), "-k", "1,3", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "text_to_image/R@3" in done.stdout and "6 pictures" in done.stdout
        assert f"report: {out / 'report.html'}" in done.stdout
        reports.append(load(out))
    assert reports[0].metrics == reports[1].metrics
    assert reports[0].n["captions"] == 12
    assert "--data" in reports[0].command
    assert (tmp_path / "report1" / "report.html").stat().st_size > 10_000


def test_zero_shot_probe_and_robustness(
    clipkit: Run, classed: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = ("--model", tiny_checkpoint())
    code, out, err = clipkit("eval", "zeroshot", "--data", classed, *model, "--templates", "simple")
    assert code == 0, err
    assert "acc@1" in out and "9 pictures" in out
    code, out, err = clipkit(
        "eval", "probe", "--train", classed, "--data", classed, *model, "--kinds", "knn", "-k", "1"
    )
    assert code == 0, err
    assert "knn@1/acc@1" in out and "100.0 %" in out, "a picture's nearest neighbour is itself"
    code, out, err = clipkit(
        "eval",
        "robustness",
        "--data",
        classed,
        *model,
        "--corruptions",
        "jpeg_compression",
        "--severities",
        "1",
    )
    assert code == 0, err
    assert "jpeg" in out


def test_space_drift_and_comparison(
    clipkit: Run, tmp_path: Path, captioned: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    first, second = tiny_checkpoint(), tiny_checkpoint(seed=1)
    code, out, err = clipkit("eval", "space", "--data", captioned, "--model", first)
    assert code == 0, err
    assert "effective_rank" in out
    code, out, err = clipkit(
        "eval", "drift", "--data", captioned, "--model", first, "--against", second
    )
    assert code == 0, err
    code, out, err = clipkit(
        "eval",
        "compare",
        first,
        second,
        "--data",
        captioned,
        "-k",
        "1",
        "--out",
        tmp_path / "compared",
    )
    assert code == 0, err
    assert "R@1" in out and (tmp_path / "compared" / "report.html").is_file()


def test_json_is_json_alone(
    clipkit: Run, captioned: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    code, out, err = clipkit(
        "eval",
        "retrieval",
        "--data",
        captioned,
        "--model",
        tiny_checkpoint(),
        "--queries",
        "tags",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["task"] == "retrieval"
    assert "report:" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("retrieval", "--data", "no/such"), "no/such"),
        (("retrieval", "--data", "CAPTIONED", "-k", "0,5"), "-k is '0,5'"),
        (("retrieval", "--data", "CAPTIONED", "--queries", "words"), "captions, tags"),
        (("retrieval", "--data", "CAPTIONED", "--model", "no/such"), "use builtin"),
        (("retrieval", "--data", "CAPTIONED", "--split", "dev"), "dev"),
        (("retrieval", "--data", "hf:nobody/nothing"), "nobody/nothing"),
        (("retrieval", "--data", "flickr30k"), "could not be reached"),
        (("zeroshot", "--data", "CAPTIONED"), "class"),
        (("zeroshot", "--data", "CLASSED", "--templates", "no-such"), "no-such"),
        (("zeroshot", "--data", "CLASSED", "--classes", "no-such.txt"), "no-such.txt"),
        (("zeroshot", "--data", "CLASSED", "--classes", "TWO"), "3"),
        (("probe", "--train", "CLASSED", "--data", "CLASSED", "--kinds", "svm"), "knn, linear"),
        (("robustness", "--data", "CLASSED", "--corruptions", "rust"), "rust"),
        (("space",), "either --data DATA or --index DIR"),
        (("drift", "--data", "CAPTIONED"), "--against"),
        (("index", "--index", "no/such"), "no/such"),
        (("compare", "builtin"), "--data"),
        (("compare", "builtin", "--data", "CAPTIONED"), "at least two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_a_sentence_and_exit_code_2(
    clipkit: Run,
    tmp_path: Path,
    captioned: Path,
    classed: Path,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    (tmp_path / "two.txt").write_text("cake\ncar\n")
    places = {"CAPTIONED": captioned, "CLASSED": classed, "TWO": tmp_path / "two.txt"}
    code, out, err = clipkit("eval", *(places.get(argument, argument) for argument in arguments))
    assert code == 2, err
    assert sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not out and not (tmp_path / "reports").exists()


def test_figures_are_computed_in_float32_unless_told_otherwise(
    clipkit: Run,
    tmp_path: Path,
    captioned: Path,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the CPU can do; CLIPKIT_PRECISION and, above it, --precision choose another. The
    feature cache keeps them apart."""
    common = ("space", "--data", captioned, "--model", tiny_checkpoint(), "--device", "cpu")
    for number, (variable, option, expected) in enumerate(
        [
            (None, (), "float32"),
            ("", (), "float32"),
            ("bfloat16", (), "bfloat16"),
            ("bfloat16", ("--precision", "float32"), "float32"),
        ]
    ):
        monkeypatch.delenv("CLIPKIT_PRECISION", raising=False)
        if variable is not None:
            monkeypatch.setenv("CLIPKIT_PRECISION", variable)
        folder = tmp_path / str(number)
        code, out, err = clipkit("eval", *common, *option, "--out", folder)
        assert code == 0, err
        assert f", {expected} on cpu, 6 pictures" in out.splitlines()[0]
        assert f"<span>{expected} on cpu</span>" in (folder / "report.html").read_text()
        assert load(folder).settings["precision"] == expected
    plain, rough, again = (load(tmp_path / name).samples for name in "023")
    assert any((plain[name] != rough[name]).any() for name in plain)
    assert all((plain[name] == again[name]).all() for name in plain)


def test_a_report_is_not_replaced_unasked(
    clipkit: Run, tmp_path: Path, captioned: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    out = tmp_path / "mine"
    command = ("eval", "space", "--data", captioned, "--model", tiny_checkpoint(), "--out", out)
    assert clipkit(*command)[0] == 0
    before = (out / "report.json").read_bytes()
    code, _, err = clipkit(*command, "--seed", "1")
    assert code == 2 and err.count("\n") == 1
    assert f"{out} holds a report already; give --overwrite to replace it, or another --out" in err
    assert (out / "report.json").read_bytes() == before
    assert clipkit(*command, "--seed", "1", "--overwrite")[0] == 0
    assert load(out).settings["seed"] == 1
    code, _, err = clipkit(*command[:-1], captioned)
    assert code == 2 and "is a file; give --out the folder" in err


def test_several_datasets_and_models_in_one_call(
    clipkit: Run, tmp_path: Path, classed: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """A row each in one table, a mean, a report each below, one CSV; the page lists the overview."""
    second = tmp_path / "two" / "classed"
    shutil.copytree(classed / "cake", second / "cake")
    shutil.copytree(classed / "dog", second / "dog")
    models = [tiny_checkpoint(), tiny_checkpoint(seed=1)]
    arguments = ["eval", "zeroshot", "--data", classed, "--data", second, "-k", "1"]
    arguments += ["--templates", "simple", "--model", models[0], "--model", models[1]]
    code, out, err = clipkit(*arguments)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith(("classed", "mean of"))]
    assert len([row for row in rows if row.startswith("classed")]) == 4
    assert "2 datasets, 15 pictures" in out
    (row,) = SavedReports(tmp_path / "reports").rows()
    assert row.title == "Zero-shot classification on classed"
    folder = tmp_path / "reports" / row.name
    below = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert [name[:10] for name in below] == [f"{number}-classed" + "-" for number in (1, 2, 3, 4)]
    parts = [load(folder / name) for name in below]
    assert [part.n["pictures"] for part in parts] == [9, 6, 9, 6]
    figures = list(csv.DictReader((folder / "figures.csv").read_text("utf-8").splitlines()))
    own = [float(f["value"]) for f in figures if f["metric"] == "acc@1"]
    means = [float(f["value"]) for f in figures if f["metric"].endswith("/acc@1")]
    assert own == [part.metrics["acc@1"].value for part in parts]
    assert means == pytest.approx([sum(own[:2]) / 2, sum(own[2:]) / 2])
    code, _, err = clipkit("eval", "zeroshot", "--data", classed, "--data", classed)
    assert code == 2 and "is given twice; a mean must count it once" in err
    code, _, err = clipkit(*arguments, "--classes", "cifar10")
    assert code == 2 and "--classes names the classes of one dataset, but 2 are given" in err
