"""Two views of a picture, without captions: the base of such methods, its head, and SimCLR.

A view is the picture with a random crop and other colours (`augment.StrongView`). The loss is computed
behind a projection head, which is dropped afterwards: what it throws away, such as colour, is of use
to others (SimCLR, section 4.2).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.losses.views import cosine_regression
from clipkit.training.augment import CropAndFlip, StrongView
from clipkit.training.distributed import world_size
from clipkit.training.frozen_towers import FeaturesStopped
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import (
    Augment,
    Batch,
    Inputs,
    PictureInputs,
    UnreadablePicturesError,
)
from clipkit.training.methods.method import Method, Setup
from clipkit.training.towers import TrainableTowers
from clipkit.training.validation import Scores, gathered, of_views

_BLURRED = 0.5  # share of views, of pictures from _SMALL pixels
_SMALL = 64


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
        self._starts: torch.Tensor | None = None  # float32 (N, D), unit rows: see keep_space

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
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        """Compute the start's vectors of all pictures, if the space is to be kept."""
        if not self.setup.options.keep_space:
            return
        towers, done, total = self.setup.towers, 0, len(inputs.data)
        towers.mode(False)

        def encoded() -> Iterator[torch.Tensor]:
            nonlocal done
            with suppress(UnreadablePicturesError):  # no batch will hold them
                for pixels in inputs.pictures():
                    if stop.is_set() and world_size() == 1:  # others would wait at the gather
                        raise FeaturesStopped
                    yield towers.images(pixels)
                    done += len(pixels) * world_size()
                    on_progress("pictures", min(done, total), total)

        with torch.no_grad():
            self._starts = torch.from_numpy(gathered(encoded(), inputs.data))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, H, W) as float32 (B, D), not normalised."""
        towers = self.setup.towers
        assert isinstance(towers, TrainableTowers)  # recipe heads has no views
        return towers.image_features(pixels).float()

    def views(self, batch: Batch) -> Sequence[View]:
        return [View(self.features, pixels, side="image") for pixels in batch.pictures]

    def kept_space(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Compute the loss that keeps the space: each view's vector should be the one that the start
        has of its whole picture. Its weight is `keep_space`; 0 without."""
        weight: float = self.setup.options.keep_space
        if self._starts is None:
            return rows[0].new_zeros(())
        starts = self._starts[torch.from_numpy(batch.plan.pictures)].to(rows[0].device)
        losses = [cosine_regression(F.normalize(view, dim=1), starts) for view in rows]
        return weight * torch.stack(losses).mean()

    def evaluate(self, inputs: Inputs) -> Scores:
        assert isinstance(inputs, PictureInputs)
        augment = self.augment()
        return of_views(self.setup.towers, inputs, [inputs.fixed_views(augment, n) for n in (0, 1)])


class SimClr(PictureViews):
    """Learn that the two views of a picture are nearest each other in the batch."""

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        assert self.setup.loss is not None
        projected = F.normalize(self.projection(torch.cat(list(rows))), dim=1)
        views = projected.chunk(2)
        return self.setup.loss(*views, **self.setup.loss_options) + self.kept_space(rows, batch)
