"""What the loop is given, what it tells while it goes on, and what it hands back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from clipkit.training.checkpoint import RunFolder
from clipkit.training.config import TrainConfig
from clipkit.training.evaluation import Scores
from clipkit.training.inputs import Inputs
from clipkit.training.model import Towers
from clipkit.training.parameters import Trained

__all__ = ["Job", "Outcome", "Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run tells while it goes on."""

    phase: Literal["features", "training", "evaluating", "mixing", "saving"]
    done: int
    total: int  # 0: unknown
    loss: float | None = None
    mean_recall: float | None = None  # of the last evaluation
    best_recall: float | None = None
    pictures_per_second: float | None = None
    eta_seconds: float | None = None
    words: str = ""  # a warning, said once


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What `fit` needs, with everything "auto" decided."""

    config: TrainConfig
    loss: str
    batch: int
    chunk: int
    half: bool  # float16: the loss is scaled so that small gradients do not vanish
    towers: Towers
    trained: Trained
    inputs: Inputs
    validation: Inputs | None
    folder: RunFolder
    on_progress: Callable[[Progress], None]
    stop: threading.Event

    @property
    def steps_per_epoch(self) -> int:
        return len(self.inputs.data) // self.batch

    @property
    def steps(self) -> int:
        most = self.config.epochs * self.steps_per_epoch
        return min(most, self.config.max_steps) if self.config.max_steps else most


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Where training ended. The parameters hold the last step's weights; `best` the best ones'."""

    step: int
    stopped: bool  # asked to; a state to go on from is saved
    ended_early: bool  # validation got no better
    best: Mapping[str, torch.Tensor]
    best_step: int
    start_scores: Scores | None
    best_scores: Scores | None
    seconds: float
    warnings: tuple[str, ...]
