"""From plans to tensors: decode threads, random crops and flips, tokens.

Each view is drawn from (seed, epoch, picture), so that it depends neither on the number of threads
nor on where a run was taken up again.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from clipkit import images
from clipkit.embed import ahead
from clipkit.errors import DatasetError, ImageError
from clipkit.losses.pairs import Same
from clipkit.towers import DualEncoder
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.distributed import own_slice, rank, world_size
from clipkit.training.towers import TrainableTowers

_VIEW, _FIXED_VIEW = 2, 3  # what a random stream is for; `data` has 0 and 1
_AHEAD, _MOST_AHEAD = 256, 1024  # pictures decoded before they are needed
_IN_MEMORY = 2**26  # bytes of a batch's pictures; more lie in a file until their chunk's turn
Made = TypeVar("Made")
Augment = Callable[[Image.Image, np.random.Generator], torch.Tensor]  # -> uint8 (3, H, W)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This process's share of a plan, ready for the towers."""

    plan: Plan
    data: CaptionedPictures
    pictures: Sequence[torch.Tensor | SpilledPictures]  # one for each view, uint8 (b, 3, H, W)
    texts: Sequence[torch.Tensor]  # one for each view, int64 (b, L)
    text_orders: Sequence[
        torch.Tensor
    ]  # of each: by length, so that chunks are cut to their longest

    @property
    def same(self) -> Same | None:
        """Pairs of the plan that are true beside its own: see `CaptionedPictures.same`."""
        return self.data.same(self.plan)

    @property
    def labels(self) -> torch.Tensor:
        """Return int64 (B,): the labels of the plan's pictures, of all processes."""
        assert self.data.labels is not None
        return torch.from_numpy(self.data.labels[self.plan.pictures])


class SpilledPictures:
    """uint8 (N, 3, H, W) in a file without a name: a batch of 16,384 is 2.5 GB, of which a step needs
    a chunk at a time. Rows are read as they are asked for; the file goes with the object."""

    device = torch.device("cpu")

    def __init__(self, views: Iterable[torch.Tensor]) -> None:
        self._file = tempfile.TemporaryFile(prefix="clipkit-batch-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._shape: tuple[int, ...] = ()
        self._count = 0
        for view in views:
            self._shape = tuple(view.shape)
            self._file.write(view.contiguous().numpy().data)
            self._count += 1
        self._size = int(np.prod(self._shape))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        pixels = torch.empty((len(rows), *self._shape), dtype=torch.uint8)
        for at, row in enumerate(rows.tolist()):
            self._file.seek(row * self._size)
            self._file.readinto(pixels[at].numpy().data)
        return pixels


class Inputs(Protocol):
    """A split as the towers take it: pictures and tokens, or features of frozen towers."""

    @property
    def data(self) -> CaptionedPictures:
        """What the split holds."""

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch]:
        """Yield this process's share of each plan's batch, augmented."""

    def pictures(self) -> Generator[torch.Tensor]:
        """Yield this process's share of all pictures in chunks, preprocessed as at inference."""

    def captions(self) -> Generator[torch.Tensor]:
        """Yield this process's share of all distinct captions in chunks."""


class PictureInputs:
    """Read the pictures of a dataset, in files or shards; see `Inputs`."""

    def __init__(
        self,
        data: CaptionedPictures,
        towers: TrainableTowers,
        *,
        augment: Augment | None = None,
        views: int = 1,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        """augment: draws a view of a picture; without it each is preprocessed as at inference.

        views: how many views of each picture a batch has. Texts are those of the plan.
        """
        self.data = data
        self._encoder = towers.encoder
        self._augment, self._views = augment, views
        self._seed = seed
        self.workers = workers or max(2, os.cpu_count() or 1)

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch]:
        plans = list(plans)
        jobs = (
            (plan, int(picture), view)
            for plan in plans
            for view in range(self._views)
            for picture in plan.pictures[self._own(plan)]
        )
        step = max((self._views * len(plan.pictures[self._own(plan)]) for plan in plans), default=0)
        # A whole step's pictures ahead: the next ones are decoded while the towers compute.
        bound = min(max(_AHEAD, step), _MOST_AHEAD)
        with closing(
            ahead(jobs, lambda job: self._view(*job), workers=self.workers, bound=bound)
        ) as views:
            for plan in plans:
                count = len(plan.pictures[self._own(plan)])
                pictures = tuple(self._gathered(views, count) for _ in range(self._views))
                yield Batch(plan, self.data, pictures, *self._texts(plan))

    def _texts(self, plan: Plan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens of this process's captions, and their order by length; one of each a view."""
        views = [[self.data.texts[t] for t in texts] for texts in plan.texts[:, self._own(plan)]]
        orders = [np.argsort([len(text) for text in texts], kind="stable") for texts in views]
        return [self._encoder.tokenize(texts) for texts in views], list(map(torch.tensor, orders))

    def pictures(self) -> Generator[torch.Tensor]:
        return self._all(lambda picture: self._made(picture, self.served))

    def fixed_views(self, augment: Augment, number: int) -> Generator[torch.Tensor]:
        """Yield view `number` of this process's share of all pictures in chunks, the same each time."""

        def view(picture: int) -> torch.Tensor:
            rng = np.random.default_rng([self._seed, _FIXED_VIEW, picture, number])
            return augment(self._made(picture, self._decoded), rng)

        return self._all(view)

    def _all(self, make: Callable[[int], torch.Tensor]) -> Generator[torch.Tensor]:
        share = range(len(self.data))[even_share(len(self.data))]
        chunk = self._encoder.preferred_batch
        with closing(ahead(share, make, workers=self.workers, bound=_AHEAD)) as views:
            for start in range(0, len(share), chunk):
                yield torch.stack([next(views) for _ in share[start : start + chunk]])

    def captions(self) -> Generator[torch.Tensor]:
        share = self.data.texts[even_share(len(self.data.texts))]
        chunk = text_batch(self._encoder)
        for start in range(0, len(share), chunk):
            yield self._encoder.tokenize(share[start : start + chunk])

    def _gathered(
        self, views: Iterator[torch.Tensor], count: int
    ) -> torch.Tensor | SpilledPictures:
        """Return the next `count` views, uint8; large batches go to a temporary file."""
        own = itertools.islice(views, count)
        shape = (count, 3, *self._encoder.config.image_size)
        if math.prod(shape) > _IN_MEMORY:
            return SpilledPictures(own)
        pixels = torch.empty(shape, dtype=torch.uint8)
        for row, view in zip(pixels, own, strict=True):
            row.copy_(view)
        return pixels

    def _own(self, plan: Plan) -> slice:
        return own_slice(len(plan.pictures))

    def read(self, picture: int) -> bytes:
        """Return a picture's file. Raises ImageError."""
        return self.data.picture(picture).read()

    def served(self, file: bytes, admit: Callable[[int], None] | None = None) -> torch.Tensor:
        """Decode and preprocess a picture as at inference: uint8 (3, H, W). Raises ImageError."""
        return self._encoder.preprocess(self._decoded(file, admit))

    def unreadable(self, picture: int, error: ImageError) -> DatasetError:
        """Return the error for a picture that cannot be read or decoded."""
        path = self.data.folder / self.data.paths[picture]
        return DatasetError(f"{path}: {error}; remove it, or build the dataset again")

    def _decoded(self, file: bytes, admit: Callable[[int], None] | None = None) -> Image.Image:
        return images.decode(file, target=self._encoder.preferred_side, admit=admit).rgb

    def _made(self, picture: int, make: Callable[[bytes], Made]) -> Made:
        try:
            return make(self.read(picture))
        except ImageError as error:
            raise self.unreadable(picture, error) from error

    def _view(self, plan: Plan, picture: int, number: int) -> torch.Tensor:
        """uint8 (3, H, W)."""
        if self._augment is None:
            return self._made(picture, self.served)
        # The first view's stream has no number, so that adding views changes none.
        stream = [self._seed, _VIEW, plan.epoch, picture, *([number] if number else [])]
        rng = np.random.default_rng(stream)
        return self._augment(self._made(picture, self._decoded), rng)


def text_batch(encoder: DualEncoder) -> int:
    """Return the number of captions to encode at a time; all are of about one length."""
    return min(4 * encoder.preferred_batch, 1024)


def even_share(count: int) -> slice:
    """Return the slice of `count` items that is this process's share; shares differ by at most one."""
    bounds = [count * r // world_size() for r in range(world_size() + 1)]
    return slice(bounds[rank()], bounds[rank() + 1])
