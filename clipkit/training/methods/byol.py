"""BYOL: predict what a momentum tower makes of the other view of a picture, without negatives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.losses.views import cosine_regression
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.methods.method import Setup
from clipkit.training.methods.momentum import Momentum
from clipkit.training.methods.views import Perceptron, PictureViews


class Byol(PictureViews):
    """Learn to predict, from the projection of one view, the momentum tower's projection of the other
    (BYOL; Grill et al. 2020, arXiv 2006.07733).

    With momentum 0 the target is the tower itself, without gradient: SimSiam (Chen & He 2020, arXiv
    2011.10566), but for the shapes of its heads.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        width, options = self.projection.width, setup.options
        self.predictor = Perceptron(
            width,
            width,
            layers=2 if options.predictor else 0,
            hidden=options.projection_hidden or setup.towers.encoder.dim,
            seed=setup.config.seed + 1,
        ).to(setup.towers.device)
        self._target: Momentum | None = None

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        predictor = {f"predictor.{n}": p for n, p in self.predictor.named_parameters()}
        return {**super().shared, **predictor}

    def prepare(
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        super().prepare(inputs, on_progress, stop)
        if momentum := self.setup.options.momentum:
            self._target = Momentum(
                self.setup.towers,
                self.sides,
                momentum,
                own={"projection": self.projection},
                rise=self.setup.steps,
            )

    def views(self, batch: Batch) -> Sequence[View]:
        online = super().views(batch)
        if self._target is None:
            return online
        encode = self._target.encoder(self.features)
        return [*online, *(View(encode, pixels) for pixels in batch.pictures)]

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        online, stop_gradient = rows[:2], self.setup.options.stop_gradient
        projected = [self.projection(view) for view in online]
        predictions = [F.normalize(self.predictor(view), dim=1) for view in projected]
        if self._target is not None:
            with self._target.applied():
                projected = [self.projection(view) for view in rows[2:]]
        first, second = (F.normalize(view, dim=1) for view in projected)
        return (
            cosine_regression(predictions[0], second, stop_gradient=stop_gradient)
            + cosine_regression(predictions[1], first, stop_gradient=stop_gradient)
            + self.kept_space(online, batch)
        )

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:  # noqa: ARG002
        if self._target is not None:
            self._target.update(step)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._target is None else {"target": self._target.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._target is not None:
            self._target.load_state_dict(state["target"])
