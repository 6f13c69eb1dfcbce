"""A run's folder, with states to resume from, and the trackers that its metrics are reported to.

    runs/NAME/config.json                      the configuration and facts of the run; written first
              metrics.jsonl                    a line per step, and one per evaluation
              checkpoints/step_000500/
                  training_state.pt            the newest state; the only file that torch unpickles
              checkpoint/                      the result: an OpenCLIP folder
              summary.json                     the result in numbers; written last

Only the newest state is kept. Files are written under another name, synced and renamed, so a kill at
any moment leaves the previous state.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipkit.durable import whole_file, write_whole
from clipkit.errors import InputError
from clipkit.training import distributed
from clipkit.training.config import TrainConfig

FEATURES = ".features/vectors-1.sqlite"  # beside the runs; the number changes with the schema
_FORMAT = 3
_STEP = re.compile(r"step_(\d+)")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.states = self.path / "checkpoints"
        self.checkpoint = self.path / "checkpoint"
        self.summary = self.path / "summary.json"

    def check_new(self) -> None:
        """Raise InputError if the folder holds a run already."""
        if self.config.exists():
            raise InputError(
                f"{self.path} holds a run already; resume it, or give this one another name"
            )

    def create(self, facts: Mapping[str, Any]) -> None:
        """Make the folder and write config.json."""
        self.states.mkdir(parents=True, exist_ok=True)
        write_json(self.config, facts)

    def facts(self) -> dict[str, Any]:
        """Read config.json. Raises InputError if the folder is not a run."""
        try:
            return dict(json.loads(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a training run: config.json cannot be read ({error})"
            ) from None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state, then remove older ones."""
        folder = self.states / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "training_state.pt") as path:
            torch.save({"format": _FORMAT, **state}, path)
        for other in self.states.iterdir():
            if other != folder and _STEP.fullmatch(other.name):
                shutil.rmtree(other)

    def load(self) -> dict[str, Any] | None:
        """Read the newest complete state, on the CPU; None if there is none.

        Raises InputError for a state in the format of another version.
        """
        paths = list(self.states.glob("step_*/training_state.pt"))
        if not paths:
            return None
        path = max(paths, key=lambda p: int(p.parent.name.removeprefix("step_")))
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        version = state.pop("format")
        if version != _FORMAT:
            raise InputError(
                f"{path.parent} has state format {version}; this version of clipkit reads "
                f"{_FORMAT}; resume the run with the version that wrote it"
            )
        return state

    def drop_metrics_after(self, step: int) -> None:
        """Remove the lines of later steps, which will be repeated, and a line cut off by a kill."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (ValueError, KeyError):
                continue
        write_whole(self.metrics, "".join(lines).encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, all or nothing."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8"))


class Tracker:
    """Report metrics to metrics.jsonl, TensorBoard and accelerate's trackers, from rank 0 only.

    Raises InputError for a tracker that accelerate does not have or that is not installed.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        self._folder = folder
        self._active = distributed.rank() == 0
        self._events = _tensorboard(folder) if config.tensorboard and self._active else None
        names = [name.strip() for name in config.trackers.split(",") if name.strip()]
        self._trackers = [_tracker(name, folder, config) for name in names if self._active]

    def write(self, step: int, metrics: Mapping[str, float], **lists: Sequence[float]) -> None:
        """Write a line of metrics; `lists` go to metrics.jsonl alone."""
        if self._active:
            with self._folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics, **lists}) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        for tracker in self._trackers:
            tracker.finish()


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(folder.path))


def _tracker(name: str, folder: RunFolder, config: TrainConfig) -> Any:
    """Start one of accelerate's trackers."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as classes  # noqa: N811
    except ImportError as error:
        raise InputError(
            f"trackers is {config.trackers!r}, which needs accelerate: pip install accelerate {name}"
        ) from error
    if name not in classes:
        raise InputError(
            f"trackers names {name!r}, which accelerate does not have; "
            f"use one of {', '.join(sorted(classes))}"
        )
    options = {"logging_dir": folder.path} if classes[name].requires_logging_directory else {}
    try:
        tracker = classes[name](folder.path.name, **options)
        tracker.main_process_only = False  # True looks up accelerate's own state, which is not set
        tracker.start()
    except ImportError as error:
        raise InputError(f"trackers names {name!r}, which is not installed: {error}") from error
    tracker.store_init_configuration(config.to_mapping())
    return tracker
