"""A run that was killed or stopped goes on and ends as if it had not been."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import metrics, run

from clipkit.errors import InputError
from clipkit.training import Progress, RunSummary, TrainConfig, resume, train
from clipkit.training.run_folder import RunFolder

pytestmark = pytest.mark.end_to_end


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state, by its path."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    parts = [leaves(part, f"{path}/{key}") for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def final_state(folder: Path) -> dict[str, Any]:
    state = RunFolder(folder).load()
    assert state is not None
    assert len(state["history"]["best_weights"]) == len(state["parameters"]) > 0
    return {path: leaf for path, leaf in leaves(state).items() if path != "/history/seconds"}


class Killed(BaseException):
    """As the operating system does it: nothing is caught, nothing tidied up."""


def train_with_a_kill(config: TrainConfig, folder: Path, step: int) -> RunSummary:
    def kill(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == step:
            raise Killed

    with pytest.raises(Killed):
        train(config, on_progress=kill)
    (folder / "checkpoints" / "step_000099").mkdir()  # begun, and not finished
    (folder / "checkpoints" / "step_000099" / ".training_state.pt.tmp").write_bytes(b"PK")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    return resume(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "full", "dropout": True, "hard_negatives": 2, "drift": 0.05},
        {"recipe": "lora", "hardness": 0.3, "hard_negatives": 1, "hard_negatives_every": 2},
        {"recipe": "heads", "ema": 0.9},
        {
            "start": "scratch:cifar-resnet10-w16",
            "batch_norm": "batch",
            "chunk": 0,
            "ema": 0.9,
            "learning_rate": 0.01,
        },
    ],
    ids=["full", "lora", "heads", "batch-norm"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Model, running statistics, optimizer, mean of the weights, best, random states, negatives: every
    bit.

    Fails for any version that forgets one of them, or the position within the epoch.
    """
    options |= {"checkpoint_every": 1, **changes}
    whole = run(options)
    expected = final_state(whole.folder)
    killed_at = int(np.random.default_rng(len(changes)).choice([2, 4]))  # amid an epoch
    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", killed_at)
    got = final_state(again.folder)
    assert got.keys() == expected.keys() and again.steps == whole.steps == 6
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[path], value), path
        else:
            assert got[path] == value, path
    assert again.encoder_id == whole.encoder_id and again.after == whole.after
    lines = metrics(again.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(options)
    stop = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.phase == "training" and progress.done == 3:
            stop.set()

    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    stopped = train(config, on_progress=ask, stop=stop)
    assert stopped.stopped and stopped.steps == 3 and stopped.checkpoint is None
    finished = resume(stopped.folder)
    assert not finished.stopped and finished.encoder_id == whole.encoder_id


def test_a_run_is_resumed_from_another_working_folder(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails for a version that keeps the starting model's path as it was given, and for one that looks
    for the features of the frozen towers below the new folder."""
    shutil.copytree(options["start"], tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    stop = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.phase == "training":
            stop.set()

    options |= {"start": "model", "out": "made", "recipe": "heads"}
    stopped = train(TrainConfig.from_mapping(options), on_progress=ask, stop=stop)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    computed: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "features":
            computed.append(progress.message)

    assert not resume(tmp_path / stopped.folder, on_progress=watch).stopped
    assert not computed and not any(Path().iterdir())


def test_only_what_began_is_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    done = run(options, max_steps=1)
    with pytest.raises(
        InputError, match="holds a run already; resume it, or give this one another"
    ):
        run(options)
    with pytest.raises(InputError, match=r"is not a training run: config\.json cannot be read"):
        resume(tmp_path / "nothing")
    path = done.folder / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "data": {"pictures": 3, "fingerprint": "x"}}))
    with pytest.raises(InputError, match=r"began with data .*'x'.*start a new run"):
        resume(done.folder)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create({})
    assert folder.load() is None
    folder.save(3, {"history": {"step": 3}})
    assert folder.load() == {"history": {"step": 3}}
    torch.save({"format": 1, "step": 3}, folder.states / "step_000003" / "training_state.pt")
    with pytest.raises(InputError, match=r"has state format 1; this version of clipkit reads 3"):
        folder.load()
