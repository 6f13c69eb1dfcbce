"""Many pictures or texts -> float32 unit rows, encoded only where the cache has none.

Pictures are read and hashed first, which says what is missing; if nothing is, the towers are not even
loaded. What is missing is decoded and resized in threads, a bounded number ahead of the tower. What is
done is kept even if the run is stopped, so that the next one goes on from there.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from clipkit import images
from clipkit.errors import ClipkitError, ImageError, InputError, ModelError
from eval.feature_cache import FeatureCache, Shelf
from eval.source import Pictures

if TYPE_CHECKING:
    from PIL import Image

    from clipkit.towers import DualEncoder

__all__ = [
    "Encoder",
    "FeatureCache",
    "Features",
    "Stopped",
    "Transform",
    "fingerprint",
    "logit_scale",
    "picture_features",
    "text_features",
    "thumbnail_uri",
]

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
OnProgress = Callable[[str, int, int], None]  # what, done, total

KEEP_SECONDS = 10.0  # a killed run loses no more than this
TEXT_BATCH = 128


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


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The vectors of the pictures that could be read."""

    vectors: Float32  # (N, D), unit rows
    kept: Int64  # (N,) which rows of the pictures these are, ascending
    skipped: tuple[tuple[int, str, str, str], ...]  # row, name, reason, message
    fingerprint: str  # of the contents, in order
    repeated: int  # pictures whose bytes came before
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a report must say of these pictures."""
        said = []
        if self.skipped:
            _, name, _, message = self.skipped[0]
            total = len(self.kept) + len(self.skipped)
            said.append(
                f"{len(self.skipped):,} of {total:,} pictures were left out, "
                f"the first {name}: {message}"
            )
        if self.repeated:
            said.append(f"{self.repeated:,} pictures are copies of others, byte by byte")
        return tuple(said)


def picture_features(
    encoder: Encoder,
    pictures: Pictures,
    *,
    cache: FeatureCache,
    transform: Transform | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> Features:
    """The pictures' vectors; those that cannot be read are skipped and named.

    Raises Stopped once `stop` is set, InputError if no picture can be read or the model gives no
    finite vector, ModelError if it cannot be loaded.
    """
    started = time.monotonic()
    kind = "pictures" if transform is None else f"pictures-{fingerprint('', [transform.name])}"
    model = _Model(encoder, cache, kind)
    run = _Run(
        model,
        pictures,
        transform,
        workers or max(2, os.cpu_count() or 1),
        batch_size,
        on_progress or (lambda *_: None),
        stop or threading.Event(),
    )
    ids, skipped = run.read_all()
    vectors = model.shelf.find([key for key in ids if key is not None])
    first = {key: row for row, key in reversed(list(enumerate(ids))) if key is not None}
    missing = sorted(row for key, row in first.items() if key not in vectors)
    for row, outcome in run.encode(missing, ids):
        if isinstance(outcome, ImageError):
            skipped[row] = outcome
        else:
            vectors[ids[row] or b""] = outcome
    for row, key in enumerate(ids):  # copies of a picture that could not be decoded
        if key is not None and key not in vectors and row not in skipped:
            skipped[row] = skipped[first[key]]
    kept = [row for row in range(len(ids)) if row not in skipped]
    if not kept:
        raise InputError(_nothing_read(pictures, skipped))
    used = [key for key in (ids[row] for row in kept) if key is not None]
    return Features(
        np.stack([vectors[key] for key in used]),
        np.array(kept, np.int64),
        tuple((r, pictures.name(r), e.reason, str(e)) for r, e in sorted(skipped.items())),
        fingerprint("", used),
        len(used) - len(set(used)),
        time.monotonic() - started,
    )


def text_features(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    cache: FeatureCache,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> Float32:
    """Texts -> float32 (M, D), unit rows. Equal texts are encoded once, and texts of like length
    together, so that little padding is computed. Raises as `picture_features` does."""
    model = _Model(encoder, cache, "texts")
    if not texts:
        return np.empty((0, int(model.fact("dim"))), np.float32)
    ids = [_hash(text.encode("utf-8", "surrogatepass")) for text in texts]
    content = dict(zip(ids, texts, strict=True))
    vectors = model.shelf.find(ids)
    missing = sorted((key for key in content if key not in vectors), key=lambda k: len(content[k]))
    with _Keeping(model.shelf) as keeping:
        for start in range(0, len(missing), TEXT_BATCH):
            if stop is not None and stop.is_set():
                raise Stopped("stopped while encoding texts; what was done is kept")
            batch = missing[start : start + TEXT_BATCH]
            rows = model.towers().encode_texts([content[key] for key in batch])
            if not np.isfinite(rows).all():
                bad = content[batch[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])]]
                raise InputError(f"model {encoder.spec} gives no finite vector for {bad!r:.80}")
            keeping.add(batch, rows)
            vectors.update(zip(batch, rows, strict=True))
            if on_progress is not None:
                on_progress("encoding texts", start + len(batch), len(missing))
    return np.stack([vectors[key] for key in ids])


def logit_scale(encoder: Encoder, cache: FeatureCache) -> float:
    """What the model multiplies cosines by; its towers are loaded only if the cache lacks it."""
    return float(_Model(encoder, cache, "texts").fact("logit_scale"))


def thumbnail_uri(pictures: Pictures, row: int, *, side: int = 160) -> str:
    """A small JPEG of a picture as a data URI. ImageError if it cannot be read."""
    picture = images.decode(pictures.read(row), target=side)
    small = images.thumbnail(picture.rgb, side=side)
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")


def fingerprint(base: str, parts: Iterable[str | bytes]) -> str:
    """Sixteen hex digits that change with any of the parts and with their order."""
    state = hashlib.blake2b(base.encode(), digest_size=8)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "big") + raw)
    return state.hexdigest()


class _Model:
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


class _Keeping:
    """Writes to a shelf from time to time, and at the end whatever the end is."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.kept_at = time.monotonic()

    def __enter__(self) -> _Keeping:
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
class _Run:
    """One pass over pictures: hash all, then encode what is missing."""

    model: _Model
    pictures: Pictures
    transform: Transform | None
    workers: int
    batch_size: int | None
    on_progress: OnProgress
    stop: threading.Event

    def read_all(self) -> tuple[list[bytes | None], dict[int, ImageError]]:
        """Every picture's id, None for those that cannot be read."""
        ids: list[bytes | None] = [None] * len(self.pictures)
        skipped: dict[int, ImageError] = {}
        for row, found in self._ahead("reading pictures", range(len(self.pictures)), self._read):
            if isinstance(found, ImageError):
                skipped[row] = found
            else:
                ids[row] = found
        return ids, skipped

    def encode(
        self, rows: Sequence[int], ids: Sequence[bytes | None]
    ) -> Iterator[tuple[int, Float32 | ImageError]]:
        """The vectors of these rows, float32 (D,) each, or why there is none."""
        batch: list[tuple[int, Any]] = []
        with _Keeping(self.model.shelf) as keeping:
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
        self, batch: Sequence[tuple[int, Any]], ids: Sequence[bytes | None], keeping: _Keeping
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
        keeping.add([ids[row] or b"" for row, _ in batch], vectors)
        for (row, _), vector in zip(batch, vectors, strict=True):
            yield row, vector

    def _read(self, row: int) -> bytes:
        return _hash(self.pictures.read(row))

    def _pixels(self, row: int, key: bytes | None) -> Any:
        """In a decode thread: what the image tower sees of a picture."""
        data = self.pictures.read(row)
        if key is None or _hash(data) != key:
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


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _nothing_read(pictures: Pictures, skipped: dict[int, ImageError]) -> str:
    if not skipped:
        return "there is no picture to encode; name data that has some"
    row, error = next(iter(sorted(skipped.items())))
    return f"none of the {len(skipped):,} pictures can be read; the first, {pictures.name(row)}: {error}"
