"""Where a run's numbers go besides metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from clipkit.errors import InputError
from clipkit.training import TrainConfig
from clipkit.training.run_folder import RunFolder, Tracker


def made(tmp_path: Path, trackers: str = "", *, tensorboard: bool = False) -> Tracker:
    folder = RunFolder(tmp_path / "mine")
    folder.create({})
    options = {"data": "x", "trackers": trackers, "tensorboard": tensorboard}
    return Tracker(folder, TrainConfig.from_mapping(options))


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = made(tmp_path, tensorboard=True)
    tracker.write(1, {"loss": 2.5})
    tracker.write(2, {"loss": 1.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "mine")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


def test_a_tracker_of_accelerates_gets_configuration_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking

    class Notebook(tracking.GeneralTracker):  # type: ignore[misc]
        name = "notebook"
        requires_logging_directory = False
        calls: ClassVar[list[Any]] = []

        def __init__(self, run_name: str) -> None:
            super().__init__()
            self.calls.append(run_name)

        @property
        def tracker(self) -> list[Any]:
            return self.calls

        def start(self) -> None:
            self.calls.append("start")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.calls.append(values["recipe"])

        def log(self, values: dict[str, Any], step: int | None) -> None:
            self.calls.append((step, values))

        def finish(self) -> None:
            self.calls.append("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    tracker = made(tmp_path, "notebook")
    tracker.write(3, {"loss": 0.5})
    tracker.close()
    assert Notebook.calls == ["mine", "start", "heads", (3, {"loss": 0.5}), "finish"]


def test_an_unknown_tracker_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"names 'wandbb', which accelerate does not have; use one of .*mlflow.*wandb",
    ):
        made(tmp_path, "wandbb")


def test_a_tracker_that_is_not_installed_says_so(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    try:
        import swanlab  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="'swanlab', which is not installed"):
            made(tmp_path, "swanlab")
