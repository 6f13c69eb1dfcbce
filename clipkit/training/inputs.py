"""From plans to tensors: decode threads, random crops and flips, tokens.

Each view is drawn from (seed, epoch, picture), so that it depends neither on the number of threads
nor on where a run was taken up again.
"""

from __future__ import annotations

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
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from clipkit import images
from clipkit.arrays import Float32
from clipkit.embed import ahead
from clipkit.errors import DatasetError, ImageError
from clipkit.losses.pairs import Same
from clipkit.towers import DualEncoder, use_one_torch_thread
from clipkit.training.augment import Augment, CropAndFlip
from clipkit.training.data import CaptionedPictures, Ints, Plan, replaced
from clipkit.training.distributed import collect, own_slice, rank, world_size
from clipkit.training.towers import TrainableTowers

_VIEW, _FIXED_VIEW = 2, 3  # what a random stream is for; `data` has 0 and 1
_AHEAD, _MOST_AHEAD = 256, 1024  # pictures decoded before they are needed
_SMALL = 96  # pixels of a longer side: such pictures are kept, decoded
_KEPT_BYTES, _KEPT_OVERHEAD = 2**28, 1024  # of all that are kept, and of one beside its pixels
_IN_MEMORY = 2**26  # bytes of a batch's pictures; more lie in a file until their chunk's turn
MOST_UNREADABLE = 0.1  # of the training pictures that may be left out
_LISTED = 8  # pictures that an error lists
_BLOCK = 2**18  # values of the views that a thread makes at a time; they stay in its cache
_VALUES_PER_THREAD = 2**11  # of a view: threads that make small ones only wait for Python
_PIECE = 2**23  # values of the views that a GPU finishes at a time
Stream = Callable[[int], list[int]]  # picture -> what, beside the seed, its view is drawn from


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


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """A few views, uint8 (n, 3, H, W), black for pictures that cannot be read, of which `broken` has
    names and reasons by number. `drawn` (n, P) is what is still to be done to them; P may be 0."""

    pixels: torch.Tensor
    drawn: Float32
    broken: Mapping[int, str]


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


class _Decoded:
    """Small pictures, decoded, by their id: an epoch of 50,000 thumbnails then reads no file twice.

    most: bytes that they may take; when these are full, no more are kept.
    """

    def __init__(self, most: int = _KEPT_BYTES) -> None:
        self._most, self._used = most, 0
        self._images: dict[str, Image.Image] = {}

    def get(self, image_id: str) -> Image.Image | None:
        return self._images.get(image_id)

    def keep(self, image_id: str, image: Image.Image) -> None:
        size = 4 * image.width * image.height + _KEPT_OVERHEAD  # Pillow has four bytes for RGB
        if max(image.size) <= _SMALL and self._used + size <= self._most:
            self._used += size  # threads may miss each other's: the bound is not sharp
            self._images[image_id] = image


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
        self._served = CropAndFlip(towers.encoder, flip=False)  # as at inference
        self._augment, self._views = augment or self._served, views
        self._seed = seed
        self._decoded_before = _Decoded()
        self._values = 3 * math.prod(towers.encoder.config.image_size)  # of a picture
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, by torchrun
        cores = max(2, (os.cpu_count() or 1) // processes)
        # Views of 32 pixels are mostly Python's work: one thread makes 5,000 a second, two 3,700.
        self.workers = workers or min(cores, max(1, self._values // _VALUES_PER_THREAD))

    def without(self, pictures: Collection[int]) -> PictureInputs:
        other = copy(self)
        other.data = self.data.without(pictures)
        return other

    def stream(self, plans: Iterable[Plan]) -> Generator[Batch | Unreadable]:
        plans = list(plans)
        shares = [plan.pictures[own_slice(len(plan.pictures))] for plan in plans]
        columns = [
            (own, partial(_stream, plan.epoch, number))
            for plan, own in zip(plans, shares, strict=True)
            for number in range(self._views)
        ]
        # A whole step's pictures ahead: the next ones are decoded while the towers compute.
        bound = min(max(_AHEAD, self._views * max(map(len, shares), default=0)), _MOST_AHEAD)
        with (
            closing(self._blocks(self._augment, columns, bound)) as blocks,
            closing(ahead(plans, self._texts, workers=1, bound=2)) as texts,
        ):
            for plan, own in zip(plans, shares, strict=True):
                broken: dict[int, str] = {}
                pictures = tuple(
                    self._gathered(
                        self._finished(self._augment, blocks, len(own), broken), len(own)
                    )
                    for _ in range(self._views)
                )
                batch = Batch(plan, self.data, pictures, *next(texts))
                yield Unreadable(broken) if broken else batch

    def _texts(self, plan: Plan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens of this process's captions, and their order by length; one of each a view."""
        own = plan.texts[:, own_slice(len(plan.pictures))]
        views = [[self.data.texts[t] for t in texts] for texts in own]
        orders = [np.argsort([len(text) for text in texts], kind="stable") for texts in views]
        return [self._encoder.tokenize(texts) for texts in views], list(map(torch.tensor, orders))

    def pictures(self) -> Generator[torch.Tensor]:
        return self._all(self._served, lambda picture: [picture])

    def fixed_views(self, augment: Augment, number: int) -> Generator[torch.Tensor]:
        """Yield view `number` of this process's share of all pictures in chunks, the same each time."""
        return self._all(augment, lambda picture: [_FIXED_VIEW, picture, number])

    def _all(self, augment: Augment, stream: Stream) -> Generator[torch.Tensor]:
        share = np.arange(len(self.data))[even_share(len(self.data))]
        chunk = self._encoder.preferred_batch
        chunks = [(share[start : start + chunk], stream) for start in range(0, len(share), chunk)]
        broken: dict[int, str] = {}
        with closing(self._blocks(augment, chunks, _AHEAD)) as blocks:
            for own, _ in chunks:
                yield torch.cat(list(self._finished(augment, blocks, len(own), broken)))
        if broken:
            raise UnreadablePicturesError(self.data, broken)

    def captions(self) -> Generator[torch.Tensor]:
        share = self.data.texts[even_share(len(self.data.texts))]
        chunk = text_batch(self._encoder)
        for start in range(0, len(share), chunk):
            yield self._encoder.tokenize(share[start : start + chunk])

    def _blocks(
        self, augment: Augment, columns: Iterable[tuple[Ints, Stream]], bound: int
    ) -> Generator[_Block]:
        """Yield blocks of each column's views, `bound` pictures or so before they are asked for."""
        size = self._rows(_BLOCK)
        jobs = (
            (own[start : start + size], stream)
            for own, stream in columns
            for start in range(0, len(own), size)
        )
        return ahead(
            jobs,
            lambda job: self._block(augment, *job),
            workers=self.workers,
            bound=max(-(-bound // size), 2 * self.workers),
            initializer=partial(use_one_torch_thread, torch.get_num_threads()),
        )

    def _rows(self, values: int) -> int:
        """Return how many pictures, as the tower takes them, have about so many values."""
        return max(1, values // self._values)

    def _block(self, augment: Augment, pictures: Ints, stream: Stream) -> _Block:
        """Make a view of each picture; on a CPU wholly, for a GPU as far as it needs the picture."""
        drawn, broken = [], {}
        for picture in pictures.tolist():
            try:
                image = self._image(picture)
            except ImageError as error:
                broken[picture] = f"{self.data.paths[picture]}: {error}"
                image = Image.new("RGB", self._encoder.config.image_size[::-1])
            drawn.append(augment.draw(image, np.random.default_rng([self._seed, *stream(picture)])))
        pixels, numbers = torch.stack([view for view, _ in drawn]), np.stack([n for _, n in drawn])
        if self._encoder.device.type == "cpu":
            pixels, numbers = augment.finish(pixels, numbers), numbers[:, :0]
        return _Block(pixels, numbers, broken)

    def _finished(
        self, augment: Augment, blocks: Iterator[_Block], count: int, broken: dict[int, str]
    ) -> Iterator[torch.Tensor]:
        """Yield the next `count` pictures' views in pieces, uint8, and add to `broken`. They lie on the
        GPU if it had something to do, else in this machine's memory."""
        waiting: list[_Block] = []
        while count:
            waiting.append(next(blocks))
            count -= len(waiting[-1].pixels)
            broken |= waiting[-1].broken
            if count and sum(len(b.pixels) for b in waiting) < self._rows(_PIECE):
                continue
            pixels = torch.cat([block.pixels for block in waiting])
            numbers = np.concatenate([block.drawn for block in waiting])
            if numbers.size:
                on_device = self._pinned(pixels).to(self._encoder.device, non_blocking=True)
                pixels = augment.finish(on_device, numbers)
            waiting = []
            yield pixels

    def _pinned(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels in memory that a CUDA device copies from while it computes, if there is one."""
        waiting = self._encoder.device.type == "cuda" and pixels.device.type == "cpu"
        return pixels.pin_memory() if waiting else pixels

    def _gathered(
        self, pieces: Iterator[torch.Tensor], count: int
    ) -> torch.Tensor | SpilledPictures:
        """Join views, uint8 (count, 3, H, W); large batches go to a temporary file."""
        shape = (count, 3, *self._encoder.config.image_size)
        if math.prod(shape) > _IN_MEMORY:
            return SpilledPictures(view for piece in pieces for view in piece.cpu())
        return self._pinned(torch.cat(list(pieces) or [torch.empty(shape, dtype=torch.uint8)]))

    def read(self, picture: int) -> bytes:
        """Return a picture's file. Raises ImageError."""
        return self.data.picture(picture).read()

    def served(self, file: bytes, admit: Callable[[int], None] | None = None) -> torch.Tensor:
        """Decode and preprocess a picture as at inference: uint8 (3, H, W). Raises ImageError."""
        return self._encoder.preprocess(self._decoded(file, admit))

    def _decoded(self, file: bytes, admit: Callable[[int], None] | None = None) -> Image.Image:
        return images.decode(file, target=self._encoder.preferred_side, admit=admit).rgb

    def _image(self, picture: int) -> Image.Image:
        """Decode a picture, or take it from those that are kept. Raises ImageError."""
        image_id = self.data.image_ids[picture]
        if (image := self._decoded_before.get(image_id)) is None:
            image = self._decoded(self.read(picture))
            self._decoded_before.keep(image_id, image)
        return image


def _stream(epoch: int, number: int, picture: int) -> list[int]:
    # The first view's stream has no number, so that adding views changes none.
    return [_VIEW, epoch, picture, *([number] if number else [])]


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
