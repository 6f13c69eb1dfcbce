"""A run's folder, and states that a killed run goes on from, bit for bit on the CPU.

    runs/NAME/config.json                      all that decided the run; written first
              metrics.jsonl                    a line a step, and one an evaluation
              checkpoints/step_000500/
                  training_state.pt            all of `State`; the only file that torch unpickles
                  best.safetensors             the weights of the best evaluation so far
              checkpoint/                      the result: an OpenCLIP folder; written last

Only the newest state is kept. A file is written under a temporary name, synced and renamed, so a kill at
any moment leaves the state before it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clipkit.durable import whole_file, write_whole
from clipkit.errors import InputError
from clipkit.training import distributed
from clipkit.training.config import TrainConfig


class Tracker:
    """Writes from the first process only."""

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        self._folder = folder
        self._first = distributed.rank() == 0
        self._events = _events(folder) if config.tensorboard and self._first else None
        names = [name.strip() for name in config.trackers.split(",") if name.strip()]
        self._others = [_tracker(name, folder, config) for name in names if self._first]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._first:
            self._folder.write_line({"step": step, **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        for other in self._others:
            other.log(dict(values), step=step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        for other in self._others:
            other.finish()


def _events(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(folder.path))


def _tracker(name: str, folder: RunFolder, config: TrainConfig) -> Any:
    """One of accelerate's trackers, started."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as known  # noqa: N811
    except ImportError as error:
        raise InputError(
            f"trackers is {config.trackers!r}, which needs accelerate: pip install accelerate {name}"
        ) from error
    if name not in known:
        raise InputError(f"trackers names {name!r}; accelerate knows {', '.join(sorted(known))}")
    place = {"logging_dir": folder.path} if known[name].requires_logging_directory else {}
    try:
        tracker = known[name](folder.path.name, **place)
        tracker.main_process_only = False  # this is the main process; no state to look it up in
        tracker.start()
    except ImportError as error:
        raise InputError(f"trackers names {name!r}, which is not installed: {error}") from error
    tracker.store_init_configuration(config.to_json())
    return tracker


_FORMAT = 1
_STEP = re.compile(r"step_(\d+)")


@dataclass(slots=True, eq=False)
class State:
    """Everything that changes while a run goes on. The sampler's position is `step` alone: which
    pairs come next is computed from the seed and it."""

    step: int  # steps done
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, torch.Tensor]
    random: list[dict[str, torch.Tensor]]  # of each process
    alike: torch.Tensor | None  # the hard negatives in use
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    start_scores: dict[str, Any] = field(default_factory=dict)
    best_scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # of training so far


class RunFolder:
    """The files of one run, by name."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.states = self.path / "checkpoints"
        self.checkpoint = self.path / "checkpoint"

    def check_new(self) -> None:
        """InputError if there is a run already: nothing is written over."""
        if self.config.exists():
            raise InputError(
                f"{self.path} holds a run already; resume it, or give this one another name"
            )

    def create(self, facts: Mapping[str, Any]) -> None:
        self.states.mkdir(parents=True, exist_ok=True)
        write_json(self.config, facts)

    def facts(self) -> dict[str, Any]:
        """What `create` was given. InputError if this is no run."""
        try:
            facts = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a training run: config.json cannot be read ({error})"
            ) from None
        return dict(facts)

    def save(self, state: State, best: Mapping[str, torch.Tensor] | None) -> None:
        """Keep a state and, with it, the best weights; older states are removed afterwards."""
        folder = self.states / f"step_{state.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        if best:
            with whole_file(folder / "best.safetensors") as temporary:
                save_file({n: t.detach().cpu().contiguous() for n, t in best.items()}, temporary)
        with whole_file(folder / "training_state.pt") as path, path.open("wb") as file:
            fields = {name: getattr(state, name) for name in State.__dataclass_fields__}
            torch.save({"format": _FORMAT, **fields}, file)
        for other in self.states.iterdir():
            if other != folder and _STEP.fullmatch(other.name):
                shutil.rmtree(other)

    def load(self) -> tuple[State, dict[str, torch.Tensor]] | None:
        """The newest whole state and its best weights; None if the run was not saved yet."""
        found = [p.parent for p in self.states.glob("step_*/training_state.pt")]
        if not found:
            return None
        folder = max(found, key=lambda p: int(p.name.removeprefix("step_")))
        content = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu")
        version = content.pop("format")
        if version != _FORMAT:
            raise InputError(
                f"{folder} has state format {version}; this clipkit reads {_FORMAT}; "
                "resume it with the version that wrote it"
            )
        best = folder / "best.safetensors"
        return State(**content), load_file(best) if best.exists() else {}

    def write_line(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, and a line cut off by a kill."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        write_whole(self.metrics, "".join(kept).encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, all or nothing."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8"))
