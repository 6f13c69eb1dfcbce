"""The base class of training methods: the columns of a batch, the loss over them, and own state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clipkit.losses import Loss
from clipkit.training.augment import Augment, CropAndFlip
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.towers import Towers
from clipkit.training.validation import Scores, of_pairs

Side = Literal["image", "text"]


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """The input of a method's constructor: the run's configuration, with every "auto" resolved."""

    config: TrainConfig
    loss: Loss | None  # None for a method with a loss of its own
    options: Any  # an instance of the method's own options
    loss_options: Mapping[str, Any]
    towers: Towers
    data: CaptionedPictures  # the training split
    batch: int  # pictures in a batch, over all processes
    steps: int  # of the whole run
    held_out: CaptionedPictures | None = None  # the validation split, if there is one


class Method:
    """A training method. One is made for each run; what changes in it, `state_dict` saves.

    A step calls `views`, passes each view through its encoder in chunks, gathers the rows of all
    processes, calls `loss` once with all of them, goes back through the encoders, steps the optimizer,
    and calls `after_step`. So the gradients do not depend on the chunks and the processes.

    What must be known before a method is made is in its entry (`registry.MethodEntry`).
    """

    # Of the class, or of an instance where its options decide.
    sides: frozenset[Side] = frozenset(("image", "text"))  # towers that it trains
    picture_views: int = 1  # views of each picture in a batch
    text_views: int = 1  # captions of each picture in a batch
    leaves_start: bool = False  # the start's space is left: `drift` is not limited unless it is set

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @property
    def towers(self) -> Mapping[str, torch.nn.Parameter]:
        """Own parameters that encoders use: their gradients are summed over processes."""
        return {}

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        """Own parameters that `loss` uses: their gradients are complete in every process."""
        return {}

    def prepare(
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        """Compute, once before the first step, what the run needs of the whole training split.

        It is called again when a run is resumed, before `load_state_dict`: what takes long should be
        stored. on_progress: gets what it is computed of, the number done and the total. Raises
        FeaturesStopped once `stop` is set; all processes must raise it together.
        """

    def plans(
        self,
        inputs: Inputs,
        *,
        epoch: int,
        batch: int,
        searching: Callable[[], None],  # noqa: ARG002
    ) -> Sequence[Plan]:
        """Plan an epoch's batches, the same ones whenever it is called within an epoch.

        searching: to be called before long work, so that the user sees it.
        """
        seed = self.setup.config.seed
        return inputs.data.plans(epoch=epoch, batch=batch, seed=seed, texts=self.text_views)

    def augment(self) -> Augment | None:
        """Return what draws a view of a picture; None for the picture as at inference."""
        config, encoder = self.setup.config, self.setup.towers.encoder
        return CropAndFlip(encoder, keep=config.crop, flip=config.flip)

    def views(self, batch: Batch) -> Sequence[View]:
        """Return the columns of this process's share of a batch."""
        raise NotImplementedError

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Compute the loss over all processes' rows (B, D), one tensor a view."""
        raise NotImplementedError

    def evaluate(self, inputs: Inputs) -> Scores:
        """Measure the towers on the validation split; see `validation`. All processes call this."""
        return of_pairs(self.setup.towers, inputs)

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:
        """Clamp, enqueue or average after the optimizer's step number `step`. The rows have no graph."""

    def metrics(self) -> dict[str, float]:
        """Return what is written beside the loss after each step."""
        return {}

    def warning(self) -> str | None:
        """Return a sentence if training goes wrong in a way that `evaluate` cannot see, else None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes during a run, but parameters: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
