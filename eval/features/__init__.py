"""Many pictures or texts -> float32 unit rows, encoded only where the cache has none.

Pictures are read and hashed first, which says what is missing; if nothing is, the towers are not even
loaded. What is missing is decoded and resized in threads, a bounded number ahead of the tower. What is
done is kept even if the run is stopped, so that the next one goes on from there.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit import images
from clipkit.errors import ImageError, InputError
from eval.data import Pictures
from eval.features.cache import FeatureCache
from eval.features.encoding import (
    Encoder,
    Keeping,
    Model,
    OnProgress,
    PicturePass,
    Stopped,
    Transform,
    content_hash,
)

__all__ = [
    "Encoder",
    "FeatureCache",
    "Features",
    "OnProgress",
    "Stopped",
    "Transform",
    "fingerprint",
    "logit_scale",
    "picture_features",
    "text_features",
    "thumbnail_if_there",
    "thumbnail_uri",
]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
TEXT_BATCH = 128


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
    model = Model(encoder, cache, kind)
    run = PicturePass(
        model,
        pictures,
        transform,
        workers or max(2, os.cpu_count() or 1),
        batch_size,
        on_progress or (lambda *_: None),
        stop or threading.Event(),
    )
    ids, skipped = run.read_all()
    vectors = model.shelf.find(list(ids.values()))
    first = {key: row for row, key in reversed(ids.items())}
    missing = sorted(row for key, row in first.items() if key not in vectors)
    for row, outcome in run.encode(missing, ids):
        if isinstance(outcome, ImageError):
            skipped[row] = outcome
        else:
            vectors[ids[row]] = outcome
    # A copy of a picture that cannot be decoded cannot be decoded either.
    skipped |= {row: skipped[first[key]] for row, key in ids.items() if key not in vectors}
    kept = [row for row in ids if row not in skipped]
    if not kept:
        raise InputError(_nothing_read(pictures, skipped))
    used = [ids[row] for row in kept]
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
    model = Model(encoder, cache, "texts")
    if not texts:
        return np.empty((0, int(model.fact("dim"))), np.float32)
    ids = [content_hash(text.encode("utf-8", "surrogatepass")) for text in texts]
    content = dict(zip(ids, texts, strict=True))
    vectors = model.shelf.find(ids)
    missing = sorted((key for key in content if key not in vectors), key=lambda k: len(content[k]))
    with Keeping(model.shelf) as keeping:
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
    return float(Model(encoder, cache, "texts").fact("logit_scale"))


def thumbnail_uri(pictures: Pictures, row: int, *, side: int = 160) -> str:
    """A small JPEG of a picture as a data URI. ImageError if it cannot be read."""
    picture = images.decode(pictures.read(row), target=side)
    small = images.thumbnail(picture.rgb, side=side)
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")


def thumbnail_if_there(pictures: Pictures, row: int) -> str | None:
    """`thumbnail_uri`; None for a picture that was read when it was encoded and is gone now."""
    try:
        return thumbnail_uri(pictures, row)
    except ImageError:
        return None


def fingerprint(base: str, parts: Iterable[str | bytes]) -> str:
    """Sixteen hex digits that change with any of the parts and with their order."""
    state = hashlib.blake2b(base.encode(), digest_size=8)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "big") + raw)
    return state.hexdigest()


def _nothing_read(pictures: Pictures, skipped: dict[int, ImageError]) -> str:
    if not skipped:
        return "there is no picture to encode; name data that has some"
    row, error = next(iter(sorted(skipped.items())))
    return f"none of the {len(skipped):,} pictures can be read; the first, {pictures.name(row)}: {error}"
