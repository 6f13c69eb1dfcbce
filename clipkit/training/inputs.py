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
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from clipkit import images
from clipkit.embed import ahead
from clipkit.errors import DatasetError, ImageError
from clipkit.losses.pairs import Same
from clipkit.towers import DualEncoder
from clipkit.training.data import CaptionedPictures, Ints, Plan, replaced
from clipkit.training.distributed import collect, own_slice, rank, world_size
from clipkit.training.towers import TrainableTowers

_VIEW, _FIXED_VIEW = 2, 3  # what a random stream is for; `data` has 0 and 1
_AHEAD, _MOST_AHEAD = 256, 1024  # pictures decoded before they are needed
_IN_MEMORY = 2**26  # bytes of a batch's pictures; more lie in a file until their chunk's turn
_LISTED = 8  # pictures that an error lists
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


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a batch that could not be made: names and reasons of its pictures that cannot be read,
    by number."""

    pictures: Mapping[int, str]


class UnreadablePicturesError(DatasetError):
    """Pictures of a split cannot be read; `pictures` has their names and reasons by number."""

    def __init__(self, data: CaptionedPictures, pictures: Mapping[int, str]) -> None:
        self.data, self.pictures = data, pictures
        super().__init__(
            f"{len(pictures)} of {len(data)} pictures of {data.folder} cannot be read: "
            f"{listed(pictures)}; restore them, or build the dataset again"
        )


def listed(unreadable: Mapping[int, str]) -> str:
    """Return the first of the names and reasons."""
    more = f"; and {len(unreadable) - _LISTED} more" if len(unreadable) > _LISTED else ""
    return "; ".join([*unreadable.values()][:_LISTED]) + more


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

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch | Unreadable]:
        """Yield this process's share of each plan's batch, augmented."""

    def pictures(self) -> Generator[torch.Tensor]:
        """Yield this process's share of all pictures in chunks, preprocessed as at inference.

        Raises UnreadablePicturesError, after the last one, for all that cannot be read.
        """

    def without(self, pictures: Collection[int]) -> Inputs:
        """Return the same for a split without some pictures."""

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
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, by torchrun
        self.workers = workers or max(2, (os.cpu_count() or 1) // processes)

    def without(self, pictures: Collection[int]) -> PictureInputs:
        other = copy(self)
        other.data = self.data.without(pictures)
        return other

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch | Unreadable]:
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
        with (
            closing(
                ahead(jobs, lambda job: self._view(*job), workers=self.workers, bound=bound)
            ) as views,
            closing(ahead(plans, self._texts, workers=1, bound=2)) as texts,
        ):
            for plan in plans:
                own = plan.pictures[self._own(plan)]
                broken: dict[int, str] = {}
                pictures = tuple(self._gathered(views, own, broken) for _ in range(self._views))
                batch = Batch(plan, self.data, pictures, *next(texts))
                yield Unreadable(broken) if broken else batch

    def _texts(self, plan: Plan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens of this process's captions, and their order by length; one of each a view."""
        views = [[self.data.texts[t] for t in texts] for texts in plan.texts[:, self._own(plan)]]
        orders = [np.argsort([len(text) for text in texts], kind="stable") for texts in views]
        return [self._encoder.tokenize(texts) for texts in views], list(map(torch.tensor, orders))

    def pictures(self) -> Generator[torch.Tensor]:
        return self._all(lambda picture: self._made(picture, self.served))

    def fixed_views(self, augment: Augment, number: int) -> Generator[torch.Tensor]:
        """Yield view `number` of this process's share of all pictures in chunks, the same each time."""

        def view(picture: int) -> torch.Tensor | str:
            rng = np.random.default_rng([self._seed, _FIXED_VIEW, picture, number])
            return self._made(picture, lambda file: augment(self._decoded(file), rng))

        return self._all(view)

    def _all(self, make: Callable[[int], torch.Tensor | str]) -> Generator[torch.Tensor]:
        share = range(len(self.data))[even_share(len(self.data))]
        chunk = self._encoder.preferred_batch
        broken: dict[int, str] = {}
        with closing(ahead(share, make, workers=self.workers, bound=_AHEAD)) as views:
            for start in range(0, len(share), chunk):
                own = np.array(share[start : start + chunk])
                yield torch.stack(list(self._readable(views, own, broken)))
        if broken:
            raise UnreadablePicturesError(self.data, broken)

    def captions(self) -> Generator[torch.Tensor]:
        share = self.data.texts[even_share(len(self.data.texts))]
        chunk = text_batch(self._encoder)
        for start in range(0, len(share), chunk):
            yield self._encoder.tokenize(share[start : start + chunk])

    def _gathered(
        self, views: Iterator[torch.Tensor | str], pictures: Ints, broken: dict[int, str]
    ) -> torch.Tensor | SpilledPictures:
        """Return the next views, of `pictures`, uint8; large batches go to a temporary file."""
        own = self._readable(views, pictures, broken)
        shape = (len(pictures), 3, *self._encoder.config.image_size)
        if math.prod(shape) > _IN_MEMORY:
            return SpilledPictures(own)
        # pinned: copied to a GPU while it computes
        pinned = self._encoder.device.type == "cuda"
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        for row, view in zip(pixels, own, strict=True):
            row.copy_(view)
        return pixels

    def _readable(
        self, views: Iterator[torch.Tensor | str], pictures: Ints, broken: dict[int, str]
    ) -> Iterator[torch.Tensor]:
        """Yield the next views, of `pictures`; of one that cannot be read black, and note the reason."""
        for picture, view in zip(pictures, itertools.islice(views, len(pictures)), strict=True):
            if isinstance(view, str):
                broken[int(picture)] = f"{self.data.paths[picture]}: {view}"
            yield (
                torch.zeros((3, *self._encoder.config.image_size), dtype=torch.uint8)
                if isinstance(view, str)
                else view
            )

    def _own(self, plan: Plan) -> slice:
        return own_slice(len(plan.pictures))

    def read(self, picture: int) -> bytes:
        """Return a picture's file. Raises ImageError."""
        return self.data.picture(picture).read()

    def served(self, file: bytes, admit: Callable[[int], None] | None = None) -> torch.Tensor:
        """Decode and preprocess a picture as at inference: uint8 (3, H, W). Raises ImageError."""
        return self._encoder.preprocess(self._decoded(file, admit))

    def _decoded(self, file: bytes, admit: Callable[[int], None] | None = None) -> Image.Image:
        return images.decode(file, target=self._encoder.preferred_side, admit=admit).rgb

    def _made(self, picture: int, make: Callable[[bytes], torch.Tensor]) -> torch.Tensor | str:
        """Return what is made of a picture's file; the reason if it cannot be read or decoded."""
        try:
            return make(self.read(picture))
        except ImageError as error:
            return str(error)

    def _view(self, plan: Plan, picture: int, number: int) -> torch.Tensor | str:
        """Return uint8 (3, H, W), or why there is none."""
        augment = self._augment
        if augment is None:
            return self._made(picture, self.served)
        # The first view's stream has no number, so that adding views changes none.
        stream = [self._seed, _VIEW, plan.epoch, picture, *([number] if number else [])]
        rng = np.random.default_rng(stream)
        return self._made(picture, lambda file: augment(self._decoded(file), rng))


def readable_batch(inputs: Inputs, plan: Plan) -> Batch:
    """Return this process's share of a plan's batch, with other pictures in the place of those that no
    process can read. All processes must call it."""
    unreadable: set[int] = set()
    while True:
        with closing(inputs.stream(replaced([plan], unreadable, inputs.data))) as batches:
            batch = next(batches)
        found = set(batch.pictures) if isinstance(batch, Unreadable) else set()
        if not (new := set().union(*collect(found))):
            assert isinstance(batch, Batch)
            return batch
        unreadable |= new


def text_batch(encoder: DualEncoder) -> int:
    """Return the number of captions to encode at a time; all are of about one length."""
    return min(4 * encoder.preferred_batch, 1024)


def even_share(count: int) -> slice:
    """Return the slice of `count` items that is this process's share; shares differ by at most one."""
    bounds = [count * r // world_size() for r in range(world_size() + 1)]
    return slice(bounds[rank()], bounds[rank() + 1])
