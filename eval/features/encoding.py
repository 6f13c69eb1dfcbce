"""The work behind features: a model and its place in the cache, and one pass over pictures.

Threads read, hash, decode and resize, a bounded number ahead; the calling thread runs the tower.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from clipkit import images
from clipkit.errors import ClipkitError, ImageError, InputError, ModelError
from eval.data import Pictures
from eval.features.cache import FeatureCache, Shelf

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.towers import DualEncoder

Float32 = npt.NDArray[np.float32]
OnProgress = Callable[[str, int, int], None]  # what, done, total

KEEP_SECONDS = 10.0  # a killed run loses no more than this


class Stopped(ClipkitError):
    """The run was stopped as asked; what it had done is in the cache."""


class Encoder(Protocol):
    """A model by its spec, its towers loaded when they are needed (`clipkit.lazy_encoder`)."""

    @property
    def spec(self) -> str: ...
    @property
    def encoder_id(self) -> str: ...
    @property
    def precision(self) -> str: ...
    def towers(self) -> DualEncoder: ...


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of the decoded picture before it is resized for the tower.

    `name` says all that it depends on (kind, severity): features are kept by it. `apply` gets an RGB
    picture, its shorter side at least twice the tower's where the original has that, and a generator
    seeded by the picture's content, so that noise is the same in every order and every run.
    """

    name: str
    apply: Callable[[Image.Image, np.random.Generator], Image.Image]


class Model:
    """An encoder and its part of the cache."""

    def __init__(self, encoder: Encoder, cache: FeatureCache, kind: str) -> None:
        self.encoder = encoder
        self.cache = cache
        self.key = (encoder.encoder_id, encoder.precision)
        self.shelf = cache.shelf(*self.key, kind)
        self.meta = cache.meta(*self.key)
        self._lock = threading.Lock()
        self._towers: DualEncoder | None = None

    def towers(self) -> DualEncoder:
        with self._lock:
            if self._towers is None:
                towers = self.encoder.towers()
                if (towers.encoder_id, towers.precision) != self.key:
                    raise ModelError(
                        f"model {self.encoder.spec} changed while it was evaluated; start again"
                    )
                self.meta = {
                    "spec": self.encoder.spec,
                    "dim": towers.dim,
                    "logit_scale": towers.logit_scale,
                    "side": towers.preferred_side,
                }
                self.cache.keep_meta(*self.key, self.meta)
                self._towers = towers
            return self._towers

    def fact(self, name: str) -> float:
        """One of the facts in meta.json, from the towers if it is not there."""
        if not isinstance(self.meta.get(name), int | float):
            self.towers()
        value: float = self.meta[name]
        return value


class Keeping:
    """Writes to a shelf from time to time, and at the end whatever the end is."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.kept_at = time.monotonic()

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, *_: object) -> None:
        self.shelf.flush()

    def add(self, ids: Sequence[bytes], vectors: Float32) -> None:
        self.shelf.add(ids, vectors)
        if time.monotonic() - self.kept_at > KEEP_SECONDS:
            self.shelf.flush()
            self.kept_at = time.monotonic()


T = TypeVar("T")


@dataclass(slots=True)
class PicturePass:
    """One pass over pictures: hash all, then encode what is missing."""

    model: Model
    pictures: Pictures
    transform: Transform | None
    workers: int
    batch_size: int | None
    on_progress: OnProgress
    stop: threading.Event

    def read_all(self) -> tuple[dict[int, bytes], dict[int, ImageError]]:
        """By row: the ids of the pictures that can be read, in order, and why others cannot."""
        ids: dict[int, bytes] = {}
        skipped: dict[int, ImageError] = {}
        for row, found in self._ahead("reading pictures", range(len(self.pictures)), self._read):
            if isinstance(found, ImageError):
                skipped[row] = found
            else:
                ids[row] = found
        return ids, skipped

    def encode(
        self, rows: Sequence[int], ids: Mapping[int, bytes]
    ) -> Iterator[tuple[int, Float32 | ImageError]]:
        """The vectors of these rows, float32 (D,) each, or why there is none."""
        batch: list[tuple[int, Any]] = []
        with Keeping(self.model.shelf) as keeping:
            decoded = self._ahead(
                "encoding pictures", rows, lambda row: self._pixels(row, ids[row])
            )
            for row, pixels in decoded:
                if isinstance(pixels, ImageError):
                    yield row, pixels
                    continue
                batch.append((row, pixels))
                towers = self.model.towers()
                if len(batch) >= (self.batch_size or towers.preferred_batch):
                    yield from self._flush(batch, ids, keeping)
                    batch = []
            yield from self._flush(batch, ids, keeping)

    def _flush(
        self, batch: Sequence[tuple[int, Any]], ids: Mapping[int, bytes], keeping: Keeping
    ) -> Iterator[tuple[int, Float32]]:
        if not batch:
            return
        vectors = self.model.towers().encode_images([pixels for _, pixels in batch])
        for (row, _), vector in zip(batch, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise InputError(
                    f"model {self.model.encoder.spec} gives no finite vector for "
                    f"{self.pictures.name(row)}; its weights or its precision are unfit"
                )
        keeping.add([ids[row] for row, _ in batch], vectors)
        for (row, _), vector in zip(batch, vectors, strict=True):
            yield row, vector

    def _read(self, row: int) -> bytes:
        return content_hash(self.pictures.read(row))

    def _pixels(self, row: int, key: bytes) -> Any:
        """In a decode thread: what the image tower sees of a picture."""
        data = self.pictures.read(row)
        if content_hash(data) != key:
            raise ImageError("it changed while it was read; evaluate again", reason="changed")
        # The side may be known from the cache: a broken picture alone does not load the towers.
        picture = images.decode(data, target=int(self.model.fact("side"))).rgb
        if self.transform is not None:
            seed = int.from_bytes(key, "big")
            picture = self.transform.apply(picture, np.random.default_rng(seed))
        return self.model.towers().preprocess(picture)

    def _ahead(
        self, what: str, rows: Sequence[int], work: Callable[[int], T]
    ) -> Iterator[tuple[int, T | ImageError]]:
        """`work` on each row in threads, results in order, a bounded number ahead."""
        waiting: deque[tuple[int, Future[T]]] = deque()
        bound = 4 * self.workers + (self.batch_size or 32)
        done = 0
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            try:
                todo = iter(rows)
                while True:
                    if self.stop.is_set():
                        raise Stopped(f"stopped while {what}; what was done is kept")
                    while len(waiting) < bound and (row := next(todo, None)) is not None:
                        waiting.append((row, pool.submit(work, row)))
                    if not waiting:
                        return
                    row, future = waiting.popleft()
                    try:
                        result: T | ImageError = future.result()
                    except ImageError as error:
                        result = error
                    yield row, result
                    done += 1
                    self.on_progress(what, done, len(rows))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def content_hash(data: bytes) -> bytes:
    """16 bytes: of a picture, `images.image_id` in binary."""
    return hashlib.blake2b(data, digest_size=16).digest()
