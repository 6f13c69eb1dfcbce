"""The report of a training run: the verdict that its tests give, the figures, the curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_eval_compare import Model
from test_eval_compare import data as data  # a fixture

from eval.data import Captioned, Labelled
from eval.reports.html import figures
from eval.session import Session
from eval.training_report import next_commands, summary_lines, training_report

RECALL = {f"{way}/R@{k}": 0.5 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
Data = tuple[Captioned, Labelled]


def run_folder(folder: Path, *, recipe: str = "heads", alpha: float = 1.0, steps: int = 40) -> Path:
    """A finished run as clipkit.training writes it, evaluated every ten steps, the third the best."""
    folder.mkdir(parents=True)
    facts = {
        "config": {"start": "builtin", "recipe": recipe, "seed": 0},
        "batch": 8,
        "captions": 24,
        "encoder_id": "b" * 16,
        "data": {"pictures": 12, "fingerprint": "f" * 16, "validation_pictures": 4},
        "processes": 1,
        "versions": {"torch": "2"},
        "command": "clipkit train x",
    }
    summary = {
        "before": RECALL,
        "after": {**RECALL, "text_to_image/R@1": 0.75},
        "alpha": alpha,
        "mixture": {"0.0": {"loss": 2.0, **RECALL}, "1.0": {"loss": 1.5, **RECALL}},
        "steps": steps,
        "best_step": 30 if alpha else 0,
        "seconds": 9.0,
        "encoder_id": "c" * 16,
        "trained_parameters": 10,
        "total_parameters": 100,
        "drift": 0.06,
        "notes": ["stopped early"],
    }
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            lines.append({"step": step, "loss": 100.0 - step})
        if step % 10 == 0:
            lines.append({"step": step, "validation_loss": 3.0 - step / 40, **RECALL})
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def report(
    folder: Path, data: Data, *, before: bool, after: bool, captions: bool = False, **options: Any
) -> Any:
    """The report of a run that began with a model that sees colours, or with a blind one."""
    models = [Model("builtin", blind=not before), Model("run", blind=not after)]
    own = replace(data[0], split="test")
    generic = replace(data[0], name="generic") if captions else data[1]
    return training_report(run_folder(folder, **options), models, own, generic, Session())


def test_a_run_that_helps_is_called_better(tmp_path: Path, data: Data) -> None:
    """The blind model gives all twelve pictures one vector: a text finds its picture first in a
    twelfth of the orders. The seeing one leaves a tie of the four pictures of a colour: a fourth. All
    twelve pictures gain 1/6, so the sign-flip test has p = 2 / 2^12."""
    made = report(tmp_path / "run", data, before=False, after=True)
    assert made.sentences == (
        "Better: texts find the right picture first in 25.0 % instead of 8.3 % of cases, p < 0.001 "
        "(12 test pictures).",
        "It forgot nothing: on classes no figure got worse beyond chance.",
    )
    saved = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert saved["outcome"] == "better" == made.details["outcome"]
    assert saved["after"] > saved["before"] and saved["pictures"] == 12
    assert saved["fingerprint"] == made.sections[0].reports[0].fingerprint
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.index('class="verdict better"') < page.index("clipkit index ~/Pictures --model")
    assert page.index("Validation loss") < page.index("Retrieval on captions")
    assert "6.0 % of its size" in page and "Stopped early" in page


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "this run is no better than builtin. Try --recipe lora, or more captions (here 24)."),
        ({"recipe": "lora"}, "no better than builtin. More captions may help (here 24)."),
        ({"alpha": 0.0}, "so this run is builtin unchanged. Try --recipe lora"),
    ],
)
def test_a_run_that_changes_nothing_is_told_so_with_what_to_try(
    tmp_path: Path,
    data: Data,
    options: dict[str, Any],
    sentence: str,
) -> None:
    made = report(tmp_path / "run", data, before=True, after=True, **options)
    assert made.details["outcome"] == "same"
    assert made.sentences[0].startswith("No difference") and sentence in made.sentences[0]
    assert made.details["commands"][0][0] == "Use it all the same"


def test_a_run_that_spoils_the_model_is_called_worse(tmp_path: Path, data: Data) -> None:
    made = report(tmp_path / "run", data, before=True, after=False, captions=True)
    finding = "texts find the right picture first in 8.3 % instead of 25.0 % of cases, p < 0.001"
    assert made.sentences == (
        f"Worse: {finding} (12 test pictures); keep builtin.",
        f"It forgot some of what it knew: on generic, {finding}.",
    )


def test_the_table_names_validation_and_test_apart(tmp_path: Path, data: Data) -> None:
    """Validation: 50 % before, 75 % after in text to image, an untested +25; each figure by the name
    that people use; no line is longer than a terminal."""
    made = report(tmp_path / "run", data, before=False, after=True)
    lines = summary_lines(made.details["summary"]["groups"])
    assert lines[1] == "Validation split, 4 pictures, which chose the weights"
    assert lines[2].split() == ["text", "to", "image", "R@1", "50.0", "%", "75.0", "%", "+25.0"]
    assert any("(+" in line for line in lines[4:]) and len(lines) < 16
    assert max(map(len, lines)) <= 80 and "_" not in "".join(lines)


def test_curves_show_what_decided(tmp_path: Path, data: Data) -> None:
    """40 losses from 99 down by one: the mean of four steps at step 40 is (63 + 62 + 61 + 60) / 4, at
    step 1 the only one. The validation loss has its five evaluations, with a line at the best."""
    made = report(tmp_path / "run", data, before=False, after=True)
    training, validation, recall = made.details["curves"]
    raw, smooth = training["series"]
    assert raw["faint"] and raw["y"][0] == smooth["y"][0] == 99.0
    assert smooth["name"] == "mean of 4 steps" and smooth["y"][-1] == 61.5
    assert validation["series"][0]["x"] == [0, 10, 20, 30, 40] and validation["mark"] == 30
    assert validation["series"][0]["y"] == [3.0, 2.75, 2.5, 2.25, 2.0]
    assert recall["series"][0]["name"] == "text to image R@1"
    drawn = figures(made.details)
    assert [entry["name"] for entry in drawn[0]["legend"]] == [
        "mean of 4 steps"
    ]  # not the faint one


def test_a_run_of_another_version_is_reported_as_far_as_it_says(
    tmp_path: Path,
    data: Data,
) -> None:
    """Without validation, losses of mixtures, a drift, or the number of captions."""
    folder = run_folder(tmp_path / "run")
    facts = json.loads((folder / "config.json").read_text())
    del facts["captions"]
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"before": None, "after": None, "mixture": {}}
    del summary["drift"]
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    models = [Model("builtin"), Model("run")]
    made = training_report(folder, models, *data, Session())
    assert made.sentences[0].endswith("more pictures (here 12).")
    assert [c["title"] for c in made.details["curves"]] == ["Training loss, each of 8 pairs"]


def test_a_run_without_captions_is_reported_by_its_own_measure(tmp_path: Path, data: Data) -> None:
    """The last weights are kept: no step is marked, and the split has chosen nothing."""
    folder = run_folder(tmp_path / "run")
    own = {f"view_to_view/R@{k}": 0.5 for k in (1, 5, 10)}
    facts = json.loads((folder / "config.json").read_text())
    facts["config"] |= {"method": "simclr", "keep": "last"}
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"before": own, "after": {**own, "view_to_view/R@1": 0.6}, "mixture": {}}
    lines = [{"step": n, "loss": 2.0, "validation_loss": 1.0, **own} for n in (10, 20)]
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = [Model("builtin"), Model("run", blind=True)]
    generic = replace(data[0], name="generic")
    made = training_report(folder, models, None, generic, Session())
    assert made.sentences[0].startswith("The held-out pictures have no captions")
    assert made.sentences[1].startswith("It forgot some of what it knew: on generic, texts find")
    assert not (folder / "verdict.json").exists() and (folder / "report.html").exists()
    validation, forgotten = made.details["summary"]["groups"]
    assert validation["title"] == "Validation split, 4 pictures"
    assert validation["rows"][0] == ["view to view R@1", "50.0 %", "60.0 %", "+10.0"]
    assert forgotten["title"] == "Generic, 12 pictures"
    training, loss, recall = made.details["curves"]
    assert training["title"].endswith("of 8 pictures") and "mark" not in loss
    assert [series["name"] for series in recall["series"]] == [
        f"view to view R@{k}" for k in (1, 5, 10)
    ]


def test_tensorboard_is_named_where_it_has_something_to_show(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "a"
    run.mkdir(parents=True)
    assert [what for what, _ in next_commands(run, "builtin")] == ["Use it", "Go back"]
    (run / "events.out.tfevents.1.host").write_text("")
    commands = dict(next_commands(run, "builtin"))
    assert commands["Curves"] == f"tensorboard --logdir '{tmp_path}/my runs'"
    assert commands["Use it"] == f"clipkit index ~/Pictures --model '{run}'"
    assert commands["Go back"] == "clipkit index ~/Pictures --model builtin"
