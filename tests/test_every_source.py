"""The same captioned pictures in every form, through `data stats`, `eval retrieval` and `train`."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import save
from test_training_resume import final_state, train_with_a_kill
from training_runs import run, weights
from written import write, write_lines, write_tar

from clipkit.images import image_id
from clipkit.sources import open_source
from clipkit.training import TrainConfig
from data_prep.build import build
from data_prep.split import Fractions

pytestmark = pytest.mark.end_to_end

Clipkit = Callable[..., tuple[int, str, str]]

# Twelve pictures with two captions each.
CAPTIONS = {f"{n:02}.png": (f"Thing number {n}", f"A {n} on a wall") for n in range(12)}


def pictures(folder: Path) -> Path:
    for n, name in enumerate(CAPTIONS):
        save(folder / name, n)
    return folder


def csv_file(folder: Path) -> Path:
    """A row per caption, odd column names, semicolons."""
    pictures(folder / "images")
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Bilddatei", "Was man sieht"])
        table.writerows((name, text) for name, texts in CAPTIONS.items() for text in texts)
    return folder / "captions.csv"


def coco_file(folder: Path) -> Path:
    pictures(folder / "images")
    images = [{"id": n, "file_name": name} for n, name in enumerate(CAPTIONS)]
    notes = [{"image_id": n, "caption": c} for n, own in enumerate(CAPTIONS.values()) for c in own]
    return write(folder / "captions.json", json.dumps({"images": images, "annotations": notes}))


def sidecars(folder: Path) -> Path:
    for name, texts in CAPTIONS.items():
        write(folder / name.replace(".png", ".txt"), "\n".join(texts))
    return pictures(folder)


def shard(folder: Path) -> Path:
    files: dict[str, bytes] = {}
    for name, texts in CAPTIONS.items():
        files[name] = (pictures(folder / "in") / name).read_bytes()
        files[name.replace(".png", ".txt")] = "\n".join(texts).encode()
    return write_tar(folder / "00000.tar", files)


def imagefolder(folder: Path) -> Path:
    rows = ({"file_name": name, "captions": list(texts)} for name, texts in CAPTIONS.items())
    write_lines(folder / "metadata.jsonl", *rows)
    return pictures(folder)


def json_lines(folder: Path) -> Path:
    pictures(folder)
    rows = [
        {"picture": name, "description": text} for name, own in CAPTIONS.items() for text in own
    ]
    return Path(write_lines(folder / "captions.jsonl", *rows))


def folder_of_json_lines(folder: Path) -> Path:
    return json_lines(folder).parent


FORMS = {
    "table": csv_file,
    "coco": coco_file,
    "folder": sidecars,
    "webdataset": shard,
    "imagefolder": imagefolder,
    "jsonl": json_lines,
    "jsonl in a folder": folder_of_json_lines,
}


def test_every_form_gives_the_same_counts_recalls_and_training(
    clipkit: Clipkit, tmp_path: Path, small_towers: Path
) -> None:
    """Pictures, captions and their order are the same, so all figures are: of the statistics, of the
    evaluation with its intervals, and of what training reads."""
    stats: dict[str, str] = {}
    recalls: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for form, write_form in FORMS.items():
        data = write_form(tmp_path / form)
        code, out, err = clipkit("data", "stats", data)
        assert code == 0, (form, err)
        stats[form] = out
        code, out, err = clipkit(
            "eval", "retrieval", "--data", data, "--model", small_towers, "--json"
        )
        assert code == 0, (form, err)
        report = json.loads(out)
        recalls[form] = report["metrics"]
        code, out, err = clipkit(
            "train", data, "--model", small_towers, "--recipe", "full", "--max-steps", 1, "--batch", 4,
            "--out", tmp_path / "runs", "--name", form, "--no-tensorboard", "--no-report",
        )  # fmt: skip
        assert code == 0, (form, err)
        assert f"dataset of {data}: " in out and ".datasets" in out
        assert (tmp_path / "runs" / form / "checkpoint" / "open_clip_model.safetensors").is_file()
        facts = json.loads((tmp_path / "runs" / form / "config.json").read_text())
        trained[form] = facts["data"]
    assert stats["table"].startswith(
        "pictures   12 (no split 12)\ncaptions   24, 24 distinct; 2 to 2"
    )
    # A picture trains if the hash of its content, as a number from 0 to 1, is below 0.8.
    hashes = [image_id((tmp_path / "folder" / name).read_bytes()) for name in CAPTIONS]
    places = [hashlib.blake2b(f"0:{h}".encode(), digest_size=8).digest()[0] / 256 for h in hashes]
    assert trained["table"]["pictures"] == sum(place < 0.8 for place in places)
    recall = {name: metric["value"] for name, metric in recalls["table"].items()}
    assert recall["text_to_image/R@10"] > recall["text_to_image/R@1"] >= 0
    for form in FORMS:
        assert recalls[form] == recalls["table"], form
        assert trained[form] == trained["table"], form


def missing(folder: Path) -> Path:
    return folder / "nowhere.csv"


def no_captions(folder: Path) -> Path:
    return write(folder / "t.csv", "file,left,right\na.jpg,a dog,a cat\nb.jpg,a cow,a pig\n")


def single_picture(folder: Path) -> Path:
    return save(folder / "a.jpg", 0)


def no_objects(folder: Path) -> Path:
    return write(folder / "x.jsonl", "[]\n")


def no_pictures(folder: Path) -> Path:
    return write(folder / "empty" / "readme.md", "nothing here").parent


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (missing, "nowhere.csv does not exist; give a file, a folder, shards"),
        (no_captions, "no column is plainly the captions; it has 'file', 'left', 'right'"),
        (single_picture, "is a single picture; give its folder, or a table of captions"),
        (no_objects, "holds no JSON objects; it needs one a line"),
        (no_pictures, "holds no pictures; looked for"),
    ],
)
def test_a_wrong_input_gives_the_same_sentence_everywhere(
    clipkit: Clipkit, tmp_path: Path, wrong: Callable[[Path], Path], sentence: str
) -> None:
    data = wrong(tmp_path)
    answers = {
        clipkit("data", "stats", data),
        clipkit("eval", "retrieval", "--data", data),
        clipkit("train", data, "--out", tmp_path / "runs"),
    }
    ((code, out, err),) = answers
    assert code == 2 and not out
    assert sentence in err and err.count("\n") == 1


def test_training_builds_once_and_again_if_the_source_changes(
    clipkit: Clipkit, tmp_path: Path, small_towers: Path
) -> None:
    data = csv_file(tmp_path / "in")
    data.write_text(data.read_text() + "gone.png;A missing picture\n")

    def train(name: str) -> str:
        code, out, err = clipkit(
            "train", data, "--model", small_towers, "--recipe", "full", "--max-steps", 1,
            "--batch", 2, "--out", tmp_path / "runs", "--name", name, "--no-tensorboard",
            "--no-report",
        )  # fmt: skip
        assert code == 0, err
        return next(line for line in out.splitlines() if line.startswith("dataset of "))

    first, second = train("a"), train("b")
    folder = first.removeprefix(f"dataset of {data}: ").partition(" (")[0]
    assert first.endswith("(12 pictures, 24 captions; 1 rejected, see rejected.jsonl there)")
    assert second == f"dataset of {data}: {folder} (built before, unchanged)"
    facts = json.loads((tmp_path / "runs" / "b" / "config.json").read_text())
    assert facts["config"]["data"] == folder  # so that a resumed run finds it
    data.write_text(data.read_text() + "00.png;Another caption\n")
    third = train("c")
    assert third.endswith("(12 pictures, 25 captions; 1 rejected, see rejected.jsonl there)")
    assert folder not in third and Path(folder).is_dir()


def test_a_source_without_usable_pairs_is_an_error(clipkit: Clipkit, tmp_path: Path) -> None:
    data = write(tmp_path / "t.csv", "image,caption\na.png,A dog\n")
    code, out, err = clipkit("train", data, "--out", tmp_path / "runs")
    assert code == 2 and not out
    assert "none of its 1 rows gives a picture; the first: line 2: a.png is not in" in err
    save(tmp_path / "a.png", 0)
    write(data, "image,caption\na.png,untitled\n")
    code, out, err = clipkit("train", data, "--out", tmp_path / "runs")
    assert code == 2 and not out
    assert "no picture with a caption is left of 1; rejected: caption placeholder 1" in err


def test_shards_train_like_the_folder_and_resume_exactly(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """`data build --shards` keeps the bytes of JPEG files, so training on the shards gives the weights
    of training on the folder, bit for bit; killed and resumed, too."""
    for n in range(14):
        save(tmp_path / "in" / f"{n:02}.jpg", n)
        write(tmp_path / "in" / f"{n:02}.txt", f"a red cake {n}")
    source = open_source(tmp_path / "in")
    for name in ("files", "shards"):
        out, shards = tmp_path / name, name == "shards"
        build([source], out, shards=shards, fractions=Fractions(0.3, 0))
    options |= {"checkpoint_every": 1, "batch": 3, "epochs": 2, "data": tmp_path / "shards"}
    whole = run(options)
    files = run(options | {"data": tmp_path / "files", "name": "of files"})
    assert weights(files.checkpoint).keys() == weights(whole.checkpoint).keys()
    for name, tensor in weights(whole.checkpoint).items():
        assert torch.equal(tensor, weights(files.checkpoint)[name]), name
    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", 2)
    expected, resumed = final_state(whole.folder), final_state(again.folder)
    assert resumed.keys() == expected.keys() and again.steps == whole.steps > 3
    for path, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: bool(a == b)
        assert same(resumed[path], value), path
