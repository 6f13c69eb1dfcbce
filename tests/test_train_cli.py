"""`clipkit data build`, `clipkit train`, `clipkit index --model RUN`: from captions to a search."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from app.cli import train as train_command
from clipkit.training import Progress, TrainConfig

pytestmark = pytest.mark.end_to_end

Run = Callable[..., tuple[int, str, str]]
WORDS = ("cake", "car", "dog", "cat", "house", "boat")


@pytest.fixture
def captions(tmp_path: Path, noise_picture: Callable[..., Image.Image]) -> Path:
    """Forty pictures, and a table with odd column names that captions them."""
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Bilddatei", "Was man sieht"])
        for i in range(40):
            noise_picture(seed=i).save(tmp_path / f"{i}.png")
            table.writerow([f"{i}.png", f"a {WORDS[i % 6]} of the {WORDS[i // 6 % 6]}"])
    return tmp_path / "captions.csv"


def test_from_captions_to_a_search_with_the_trained_towers(
    clipkit: Run, tmp_path: Path, captions: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    dataset, runs = tmp_path / "dataset", tmp_path / "runs"
    code, out, err = clipkit("data", "build", captions, "--out", dataset, "--validation", 0.2)
    assert code == 0, err
    code, out, err = clipkit(
        "train", dataset, "--model", tiny_checkpoint(), "--recipe", "full", "--epochs", 2,
        "--batch", 8, "--learning-rate", 1e-3, "--out", runs, "--name", "mine", "--no-tensorboard",
        "--generic", captions.parent / "dataset",
    )  # fmt: skip
    assert code == 0, err
    first, *lines = out.split("\n\n")[1].splitlines()
    assert first.startswith(("Better", "Worse", "No difference"))  # before any table
    assert "text to image R@1" in out and "Validation split," in out and "Test split," in out
    assert "Use it" in out and f"clipkit index ~/Pictures --model {runs}/mine" in out
    assert "Go back" in out and "Curves" not in out  # no events were written
    assert "held-out pictures can show large changes only" in out and "--test 0.3" in out
    assert len(lines) + out.count("\n") < 40 and "step 3 of" in err
    made = {path.name for path in (runs / "mine").iterdir()}
    assert made >= {"config.json", "metrics.jsonl", "checkpoint", "report.html", "summary.json"}
    page = (runs / "mine" / "report.html").read_text(encoding="utf-8")
    assert "before" in page and "Validation loss" in page and "--learning-rate 0.001" in page
    code, out, err = clipkit(
        "index", tmp_path, "--index", tmp_path / "index", "--model", runs / "mine"
    )
    assert code == 0, err
    code, out, err = clipkit("search", "a", "cake", "--index", tmp_path / "index", "--json")
    assert code == 0, err
    assert json.loads(out)
    written = (runs / "mine" / "report.html").stat().st_mtime_ns
    code, out, err = clipkit("train", "--resume", runs / "mine")  # of a finished run
    assert code == 0 and "is finished" in out and first in out and "report.html" in out
    assert (runs / "mine" / "report.html").stat().st_mtime_ns == written
    (runs / "mine" / "report.html").unlink()  # as Ctrl-C leaves it
    code, out, err = clipkit("train", "--resume", runs / "mine", "--generic", dataset)
    assert code == 0 and first in out and (runs / "mine" / "report.html").exists()
    code, out, err = clipkit("train", "--resume", runs / "mine", "--epochs", 3)
    assert code == 2 and "give no others" in err


def test_a_file_of_options_is_read_and_flags_win(
    clipkit: Run, tmp_path: Path, captions: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    assert clipkit("data", "build", captions, "--out", tmp_path / "dataset")[0] == 0
    file = tmp_path / "run.toml"
    file.write_text('recipe = "heads"\nepochs = 9\nbatch = 8\ntensorboard = false\n')
    code, _, err = clipkit(
        "train", tmp_path / "dataset", "--config", file, "--model", tiny_checkpoint(),
        "--out", tmp_path / "runs", "--name", "a", "--max-steps", 1, "--epochs", 1, "--no-report",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())["config"]
    assert (config["epochs"], config["batch"], config["recipe"]) == (1, 8, "heads")


def test_a_device_in_a_file_is_checked_before_a_dataset_is_built(
    clipkit: Run, tmp_path: Path, captions: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('device = "tpu"\n')
    code, out, err = clipkit("train", captions, "--config", file, "--out", tmp_path / "runs")
    assert code == 2 and not out and "device 'tpu' is unknown; use auto, cpu" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "data is not given"),
        (("no/such",), "no/such"),
        (("x", "--epochs", "many"), "--epochs is 'many'; it must be a whole number"),
        (("x", "--recipe", "head"), "--recipe is 'head'; did you mean 'heads'?"),
        (("x", "--config", "none.toml"), "cannot read none.toml"),
        (("--resume", "no/run"), "no/run"),
        (("--no-flip", "x", "--warmup", "1"), "--warmup is 1.0; it must be at least 0 and below 1"),
        (("--batch", "many", "x"), "--batch is 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_a_sentence_and_exit_code_2(
    clipkit: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    code, out, err = clipkit("train", *arguments)
    assert code == 2, err
    assert sentence in err
    assert err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("x", "--epoch", "3"), "No such option: --epoch (Possible options: --epochs"),
        (("x", "--learning-rte", "1"), "--learning-rate"),
        (("x", "y"), "unexpected extra argument"),
        (("x", "--batch"), "'--batch' requires an argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistyped_option_is_named_as_it_is_typed(
    clipkit: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    """For --epoch: --epochs, not the key `epochs` of a configuration file."""
    code, out, err = clipkit("train", *arguments)
    assert code == 2 and not out
    assert sentence in " ".join(err.replace("│", " ").split())


def test_the_options_of_a_method_are_listed(clipkit: Run) -> None:
    code, out, _ = clipkit("train", "--options", "--method", "simclr")
    assert code == 0 and out.startswith("defaults of recipe full and method simclr")
    assert "--crop" in out and "keep [0.2]" in out and "--temperature" in out
    assert "--text-rate" not in out and "--hard-negatives" not in out


def test_every_option_is_listed(clipkit: Run) -> None:
    code, out, _ = clipkit("train", "--options", "--recipe", "lora")
    assert code == 0
    assert "--hard-negatives" in out and "--lora-rank" in out


@pytest.mark.parametrize(("seconds", "lines"), [(600.0, 1), (20.0, 0)])
def test_a_long_run_on_a_cpu_says_once_what_it_takes(
    capsys: pytest.CaptureFixture[str], seconds: float, lines: int
) -> None:
    """After three steps, if ten minutes are left, and not if twenty seconds are; heads are quick."""

    def config(recipe: str) -> TrainConfig:
        return TrainConfig.from_mapping({"data": "x", "recipe": recipe, "device": "cpu"})

    assert train_command._slow(config("heads")) == ""
    with train_command._progress(train_command._slow(config("full")), quiet=False) as show:
        for step in range(1, 6):
            show(Progress("training", step, 100, eta_seconds=seconds))
    told = capsys.readouterr().err
    assert told.count("about 10 min left: recipe full is slow on a CPU, recipe heads") == lines
