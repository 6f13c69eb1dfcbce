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
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from clipkit import images
from clipkit.embed import ahead
from clipkit.errors import DatasetError, ImageError
from clipkit.towers import DualEncoder
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.distributed import own_slice, rank, world_size
from clipkit.training.towers import TrainableTowers

_VIEW = 2  # what a random stream is for; `data` has 0 and 1
_AHEAD = 256  # pictures decoded before they are needed, at most
_IN_MEMORY = 2**26  # bytes of a batch's pictures; more lie in a file until their chunk's turn
_RATIO = 4 / 3  # a crop is at most so much wider or narrower than the whole

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This process's share of a plan, ready for the towers."""

    plan: Plan
    data: CaptionedPictures
    images: torch.Tensor | SpilledPictures
    texts: torch.Tensor
    text_order: torch.Tensor | None  # texts by length: chunks are cut to their longest

    @property
    def same(self) -> torch.Tensor | None:
        """Pairs of the plan that are true beside its own: see `CaptionedPictures.same`."""
        return self.data.same(self.plan)


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
        """This process's share of each plan's batch, augmented."""

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
        crop: float = 1.0,
        flip: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.data = data
        self._encoder = towers.encoder
        self._crop, self._flip, self._seed = crop, flip, seed
        self.workers = workers or max(2, os.cpu_count() or 1)

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch]:
        plans = list(plans)
        jobs = ((plan, int(p)) for plan in plans for p in plan.pictures[self._own(plan)])
        views = ahead(jobs, lambda job: self._view(*job), workers=self.workers, bound=_AHEAD)
        with closing(views):
            for plan in plans:
                captions = [self.data.texts[text] for text in plan.texts[self._own(plan)]]
                pixels = self._gathered(views, len(captions))
                order = torch.tensor(np.argsort([len(text) for text in captions], kind="stable"))
                yield Batch(plan, self.data, pixels, self._encoder.tokenize(captions), order)

    def pictures(self) -> Generator[torch.Tensor]:
        share = range(len(self.data))[even_share(len(self.data))]
        chunk = self._encoder.preferred_batch
        jobs = ahead(
            share, lambda p: self._made(p, self.served), workers=self.workers, bound=_AHEAD
        )
        with closing(jobs) as views:
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
        """The next `count` views."""
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

    def _view(self, plan: Plan, picture: int) -> torch.Tensor:
        """uint8 (3, H, W)."""
        rng = np.random.default_rng([self._seed, _VIEW, plan.epoch, picture])
        flipped = self._flip and rng.random() < 0.5
        if self._crop < 1:
            config = self._encoder.config
            view = random_view(
                self._made(picture, self._decoded),
                config.image_size,
                rng,
                keep=self._crop,
                squash=config.resize_mode == "squash",
                interpolation=config.interpolation,
            )
        else:
            view = self._made(picture, self.served)
        return view.flip(2) if flipped else view


def random_view(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    keep: float,
    squash: bool,
    interpolation: Any = "bicubic",
) -> torch.Tensor:
    """A random resized crop (Szegedy et al. 2014; torchvision's RandomResizedCrop), on uint8.

    It keeps between `keep` and all of the area and is resized, antialiased, to `size` (height,
    width). Its shape varies around the one that is served: the picture's own if that is squashed,
    else the target's. Gives uint8 (3, H, W).
    """
    width, height = image.size
    target = width / height if squash else size[1] / size[0]
    whole_w, whole_h = min(width, round(height * target)), min(height, round(width / target))
    left, top = (width - max(whole_w, 1)) // 2, (height - max(whole_h, 1)) // 2
    box = (left, top, left + max(whole_w, 1), top + max(whole_h, 1))  # where no crop fits
    for _ in range(10):
        area = rng.uniform(keep, 1.0) * width * height
        ratio = target * _RATIO ** rng.uniform(-1.0, 1.0)
        crop_w, crop_h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            left = int(rng.integers(0, width - crop_w + 1))
            top = int(rng.integers(0, height - crop_h + 1))
            box = (left, top, left + crop_w, top + crop_h)
            break
    pixels = torch.from_numpy(np.array(image.crop(box), np.uint8)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode=interpolation, antialias=True)[0].contiguous()


def text_batch(encoder: DualEncoder) -> int:
    """Return the number of captions to encode at a time; all are of about one length."""
    return min(4 * encoder.preferred_batch, 1024)


def even_share(count: int) -> slice:
    """This process's part of `count` things; parts may differ by one."""
    bounds = [count * r // world_size() for r in range(world_size() + 1)]
    return slice(bounds[rank()], bounds[rank() + 1])
