"""Two views of a picture, without captions: the base of such methods, its head, and SimCLR.

A view is the picture with a random crop and other colours (`augment.StrongView`). The loss is computed
behind a projection head, which is dropped afterwards: what it throws away, such as colour, is of use
to others (SimCLR, section 4.2).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.losses.views import cosine_regression
from clipkit.training.augment import Augment, CropAndFlip, StrongView
from clipkit.training.distributed import gather
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs, PictureInputs
from clipkit.training.methods.method import Method, Setup
from clipkit.training.methods.momentum import Momentum
from clipkit.training.towers import TrainableTowers
from clipkit.training.validation import Scores, of_views

_BLURRED = 0.5  # share of views, of pictures from _SMALL pixels
_SMALL = 64
_COLLAPSED = 0.25  # of the projections' variance at the first step


class Perceptron(torch.nn.Sequential):
    """A multilayer perceptron (B, D) -> (B, width): a projection head or a predictor.

    BatchNorm uses the batch's own statistics, always: a head is used in training only, on all
    processes' rows together. So it has no buffers.
    layers: 0 for the identity, else the number of linear layers, with `hidden` values between them.
    The values are drawn from `seed` alone, so that they are equal in all processes.
    """

    def __init__(
        self, dim: int, width: int, *, layers: int, hidden: int, seed: int, norm: bool = True
    ) -> None:
        widths = [dim, *[hidden] * (layers - 1), width] if layers else [dim]
        parts: list[torch.nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number, (before, after) in enumerate(pairwise(widths), 1):
                last = number == layers
                parts.append(torch.nn.Linear(before, after, bias=last or not norm))
                if not last:
                    if norm:
                        parts.append(torch.nn.BatchNorm1d(after, track_running_stats=False))
                    parts.append(torch.nn.ReLU())
        super().__init__(*parts)
        self.width = widths[-1]  # of its output


class PictureViews(Method):
    """Learn from two views of each picture, behind a projection head. Subclasses say by which loss.

    Rows are the image tower's vectors, before they are normalised. Raises InputError for a batch of
    one picture.
    """

    sides = frozenset(("image",))
    picture_views = 2
    text_views = 0
    norm = True  # whether the head has BatchNorm
    remedy = "lower learning_rate or raise batch"  # of a collapse

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.batch < 2:
            raise InputError(f"batch is {setup.batch}; views need others: use 2 pictures or more")
        options, encoder = setup.options, setup.towers.encoder
        self.projection = Perceptron(
            encoder.dim,
            options.projection_width,
            layers=options.projection_layers,
            hidden=options.projection_hidden or encoder.dim,
            seed=setup.config.seed,
            norm=self.norm,
        ).to(setup.towers.device)
        self._start: Momentum | None = None  # the start's weights, which stay: see keep_space
        self._chunk = setup.config.chunk or encoder.preferred_batch  # pictures, without a graph
        # The variance of the projections of a batch, in 0..1: of the first step, and of the last.
        self._variances: list[float] = []

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        return {f"projection.{name}": p for name, p in self.projection.named_parameters()}

    def augment(self) -> Augment:
        config, options, encoder = self.setup.config, self.setup.options, self.setup.towers.encoder
        large = min(encoder.config.image_size) >= _SMALL
        return StrongView(
            CropAndFlip(encoder, keep=config.crop, flip=config.flip),
            jitter=options.jitter,
            grey=options.grey,
            blur=options.blur if options.blur >= 0 else _BLURRED * large,
        )

    def prepare(
        self,
        inputs: Inputs,  # noqa: ARG002
        on_progress: Callable[[str, int, int], None],  # noqa: ARG002
        stop: threading.Event,  # noqa: ARG002
    ) -> None:
        """Keep the start's weights, if the space is to be kept."""
        if self.setup.options.keep_space:
            self._start = Momentum(self.setup.towers, self.sides, 1.0)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, H, W) as float32 (B, D), not normalised."""
        towers = self.setup.towers
        assert isinstance(towers, TrainableTowers)  # recipe heads has no views
        return towers.image_features(pixels).float()

    def unit_rows(self, projections: torch.Tensor) -> torch.Tensor:
        """Normalise the head's output (B, width), and note its variance."""
        result = F.normalize(projections, dim=1)
        variance = 1 - result.detach().mean(0).square().sum().item()
        self._variances = [*self._variances[:1], variance]
        return result

    def views(self, batch: Batch) -> Sequence[View]:
        return [View(self.features, pixels, side="image") for pixels in batch.pictures]

    def kept_space(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Compute the loss that keeps the space, times `keep_space`: the vector of a view should be the
        one that the start has of the same view (Beyer et al. 2021, arXiv 2106.05237). 0 without.

        rows: of the batch's first views, of all processes, which must all call it.
        """
        weight: float = self.setup.options.keep_space
        if self._start is None:
            return rows[0].new_zeros(())
        losses = []
        for view, pixels in zip(rows, batch.pictures, strict=False):
            with self._start.applied():
                chunks = torch.split(torch.arange(len(pixels)), self._chunk)
                own = torch.cat([self.setup.towers.images(pixels[chunk]) for chunk in chunks])
            losses.append(cosine_regression(F.normalize(view, dim=1), gather(own)[0]))
        return weight * torch.stack(losses).mean()

    def evaluate(self, inputs: Inputs) -> Scores:
        assert isinstance(inputs, PictureInputs)
        augment = self.augment()
        return of_views(self.setup.towers, inputs, [inputs.fixed_views(augment, n) for n in (0, 1)])

    def metrics(self) -> dict[str, float]:
        return {"projection_variance": self._variances[-1]} if self._variances else {}

    def warning(self) -> str | None:
        """Return a sentence if the projections have collapsed; the tower's vectors may not show it."""
        if not self._variances or self._variances[-1] > _COLLAPSED * self._variances[0]:
            return None
        return (
            f"the projections are collapsing: their variance fell from {self._variances[0]:.3g} to "
            f"{self._variances[-1]:.3g}; {self.remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"variances": self._variances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._variances = state["variances"]


class SimClr(PictureViews):
    """Learn that the two views of a picture are nearest each other in the batch."""

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        assert self.setup.loss is not None
        views = self.unit_rows(self.projection(torch.cat(list(rows)))).chunk(2)
        return self.setup.loss(*views, **self.setup.loss_options) + self.kept_space(rows, batch)
