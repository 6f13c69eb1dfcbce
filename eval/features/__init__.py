"""Many pictures or texts -> float32 unit rows, encoded only where the cache has none.

Features are found by what they are made from: encoder, precision, version, kind ("pictures", "texts",
"pictures-..." under a transform) and the hash of a picture's bytes or of a text, never a path. A
changed file is a miss, a renamed one a hit, an overwritten checkpoint another encoder. What was
encoded before an error or Ctrl-C is kept; if nothing is missing the towers are not loaded.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import clipkit
from clipkit import images
from clipkit.arrays import Float32, Int64
from clipkit.catalog import VectorStore
from clipkit.embed import Encoded, Known, encode_pictures
from clipkit.errors import ClipkitError, ImageError, InputError, ModelError
from clipkit.lazy_encoder import Encoder, Towers
from clipkit.wording import count
from eval.data import Pictures

if TYPE_CHECKING:
    from PIL import Image


__all__ = [
    "CachedModel",
    "Encoder",
    "FeatureCache",
    "Features",
    "OnProgress",
    "Stopped",
    "Transform",
    "fingerprint",
    "logit_scale",
    "no_progress",
    "picture_features",
    "text_features",
    "thumbnail_uri",
]

OnProgress = Callable[[str, int, int], None]  # what, done, total

STORE = "vectors-1.sqlite"  # the number changes with its schema
# How bytes become vectors, beside the encoder. Raise the number when decoding or resizing changes.
PREPROCESSING = f"{clipkit.__version__}-1"
TEXT_BATCH = 128


def no_progress(what: str, done: int, total: int) -> None:
    """Do nothing."""


class Stopped(ClipkitError):
    """The run was stopped on request; what it had encoded is in the cache."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in one precision, and how many vectors the cache has of it."""

    spec: str  # as it was given when it was last loaded; "" if it never was
    encoder_id: str
    precision: str
    version: str  # of the preprocessing; only the present one is ever looked up
    pictures: int
    texts: int

    @property
    def name(self) -> str:
        return _name(self.encoder_id, self.precision, self.version)


def _name(encoder_id: str, precision: str, version: str) -> str:
    """Return the first part of the model's spaces, and the space of its facts."""
    return f"{encoder_id}-{precision}-{version}"


class FeatureCache:
    """Features of pictures and texts in `folder`; None keeps nothing. Processes may share it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def store(self, space: str) -> VectorStore:
        """Return the vectors of one encoder and kind."""
        return VectorStore(None if self.folder is None else self.folder / STORE, space)

    def models(self) -> list[CachedModel]:
        """Return the models that have features here, those with most first."""
        counts: dict[str, Counter[str]] = {}
        with self.store("") as store:
            for space, rows in store.spaces().items():
                name, slash, kind = space.partition("/")
                of = counts.setdefault(name, Counter())
                if slash:  # the other rows are facts
                    of[kind.partition("-")[0]] += rows
            models = []
            for name, of in counts.items():
                encoder_id, precision, version = name.split("-", 2)
                spec = store.facts(name).get("spec", "")
                models.append(
                    CachedModel(spec, encoder_id, precision, version, of["pictures"], of["texts"])
                )
        return sorted(models, key=lambda model: -(model.pictures + model.texts))

    def remove(self, models: Sequence[CachedModel]) -> None:
        """Remove the features of these models. Other processes may use the cache meanwhile."""
        names = {model.name for model in models}
        with self.store("") as store:
            store.remove([space for space in store.spaces() if space.partition("/")[0] in names])


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of the decoded picture before it is resized for the tower.

    `name` states all that it depends on (kind, severity): features are cached under it. `apply` gets
    an RGB picture, its shorter side at least twice the tower's where the original has that, and a
    generator seeded by the picture's content, so that noise is the same in every order and every run.
    """

    name: str
    apply: Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The vectors of the pictures that could be read."""

    vectors: Float32  # (N, D), unit rows
    rows: Int64  # (N,) which rows of the pictures these are, ascending
    skipped: tuple[tuple[int, str, str, str], ...]  # row, name, reason, message
    fingerprint: str  # of the contents, in order
    repeated: int  # pictures whose bytes came before
    device: str  # that the model's vectors were last computed on, such as "cpu"
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the sentences that a report must show about these pictures."""
        sentences = []
        if self.skipped:
            _, name, _, message = self.skipped[0]
            total = len(self.rows) + len(self.skipped)
            sentences.append(
                f"left out {len(self.skipped):,} of {count(total)}, the first {name}: {message}"
            )
        if self.repeated:
            verb = "is a copy" if self.repeated == 1 else "are copies"
            sentences.append(f"{count(self.repeated)} {verb} of others, byte by byte")
        return tuple(sentences)


def picture_features(
    encoder: Encoder,
    pictures: Pictures,
    *,
    cache: FeatureCache,
    transform: Transform | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    on_progress: OnProgress = no_progress,
    stop: threading.Event | None = None,
) -> Features:
    """Encode pictures, each file read once; those that cannot be read are skipped and named.

    Raises Stopped once `stop` is set, InputError if no picture can be read or the model gives no
    finite vector, ModelError if it cannot be loaded.
    """
    started = time.monotonic()
    kind = "pictures" if transform is None else f"pictures-{fingerprint('', [transform.name])}"
    model = _Model(encoder, cache, kind)
    keys: dict[int, bytes] = {}  # by row
    vectors: dict[bytes, Float32] = {}
    skipped: dict[int, ImageError] = {}

    def lookup(image_id: str) -> Float32 | None:
        key = bytes.fromhex(image_id)
        return vectors[key] if key in vectors else model.store.get([key]).get(key)

    def prepare(
        _: int, image_id: str, data: bytes, admit: Callable[[int], None]
    ) -> tuple[Any, None]:
        # The side may be known from the cache: a broken picture alone does not load the towers.
        picture = images.decode(data, target=int(model.fact("side")), admit=admit).rgb
        if transform is not None:
            picture = transform.apply(picture, np.random.default_rng(int(image_id, 16)))
        return model.towers().preprocess(picture), None

    results = encode_pictures(
        range(len(pictures)),
        model.towers,
        read=pictures.read,
        lookup=lookup,
        prepare=prepare,
        workers=workers,
        batch_size=batch_size,
    )
    with model, closing(results):
        while True:
            if stop is not None and stop.is_set():
                raise Stopped("stopped while encoding pictures; what was done is kept")
            if (result := next(results, None)) is None:
                break
            if isinstance(result, Known):
                keys[result.item] = key = bytes.fromhex(result.image_id)
                vectors[key] = result.stored
            elif isinstance(result, Encoded):
                new = {p.item: bytes.fromhex(p.image_id) for p in result.pictures}
                for at in _not_finite(result.vectors):
                    raise model.no_vector(pictures.name(result.pictures[at].item))
                model.store.put(list(new.values()), result.vectors)
                vectors.update(zip(new.values(), result.vectors, strict=True))
                keys |= new
            else:
                skipped[result.item] = result.error
            on_progress("encoding pictures", len(keys) + len(skipped), len(pictures))
        device = str(model.fact("device")) if keys else ""
    if not keys:
        raise InputError(_no_picture_read(pictures, skipped))
    rows = sorted(keys)
    used = [keys[row] for row in rows]
    return Features(
        np.stack([vectors[key] for key in used]),
        np.array(rows, np.int64),
        tuple((r, pictures.name(r), e.reason, str(e)) for r, e in sorted(skipped.items())),
        fingerprint("", used),
        len(used) - len(set(used)),
        device,
        time.monotonic() - started,
    )


def text_features(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    cache: FeatureCache,
    on_progress: OnProgress = no_progress,
    stop: threading.Event | None = None,
) -> Float32:
    """Encode texts to float32 (M, D), unit rows. Equal texts are encoded once, and texts of similar
    length together, so that little padding is computed. Raises as `picture_features` does."""
    with _Model(encoder, cache, "texts") as model:
        if not texts:
            return np.empty((0, int(model.fact("dim"))), np.float32)
        keys = [
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for text in texts
        ]
        content = dict(zip(keys, texts, strict=True))
        vectors = model.store.get(keys)
        missing = [key for key in content if key not in vectors]
        missing.sort(key=lambda key: len(content[key]))
        for start in range(0, len(missing), TEXT_BATCH):
            if stop is not None and stop.is_set():
                raise Stopped("stopped while encoding texts; what was done is kept")
            batch = missing[start : start + TEXT_BATCH]
            rows = model.towers().encode_texts([content[key] for key in batch])
            for at in _not_finite(rows):
                raise model.no_vector(f"{content[batch[at]]!r:.80}")
            model.store.put(batch, rows)
            vectors.update(zip(batch, rows, strict=True))
            on_progress("encoding texts", start + len(batch), len(missing))
    return np.stack([vectors[key] for key in keys])


def logit_scale(encoder: Encoder, cache: FeatureCache) -> float:
    """Return the factor of the model's cosines; loads the towers only if the cache lacks it."""
    with _Model(encoder, cache, "texts") as model:
        return float(model.fact("logit_scale"))


class _Model:
    """An encoder and its vectors of one kind in the cache."""

    def __init__(self, encoder: Encoder, cache: FeatureCache, kind: str) -> None:
        self._encoder = encoder
        self._identity = (encoder.encoder_id, encoder.precision)
        self._name = _name(*self._identity, PREPROCESSING)
        self._checked = False
        self._facts: dict[str, Any] = {}
        self.store = cache.store(f"{self._name}/{kind}")

    def __enter__(self) -> Self:
        self._facts = self.store.facts(self._name)
        return self

    def __exit__(self, *error: object) -> None:
        self.store.__exit__(*error)

    def towers(self) -> Towers:
        """Load the towers. Raises ModelError if they are not those that the cache is searched for."""
        towers = self._encoder.towers()
        if not self._checked:
            if (towers.encoder_id, towers.precision) != self._identity:
                raise ModelError(
                    f"model {self._encoder.spec} changed while it was evaluated; start again"
                )
            facts = {
                "spec": self._encoder.spec,
                "dim": towers.dim,
                "logit_scale": towers.logit_scale,
                "side": towers.preferred_side,
                "device": str(towers.device),
            }
            if self._facts != facts:
                self.store.put_facts(self._name, facts)
                self._facts = facts
            self._checked = True
        return towers

    def fact(self, name: str) -> Any:
        """Return "dim", "logit_scale", "side" or "device", from the cache or else from the towers."""
        if name not in self._facts:
            self.towers()
        return self._facts[name]

    def no_vector(self, name: str) -> InputError:
        """Return the error for a picture or text whose vector is not finite."""
        return InputError(
            f"model {self._encoder.spec} gives no finite vector for {name}; its weights are damaged "
            "or its precision is too low"
        )


def _not_finite(vectors: Float32) -> list[int]:
    """Return the rows of `vectors` (N, D) that hold NaN or infinity."""
    rows: list[int] = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
    return rows


def thumbnail_uri(pictures: Pictures, row: int, *, side: int = 160) -> str:
    """Return a small JPEG of a picture as a data URI. Raises ImageError if it cannot be read."""
    picture = images.decode(pictures.read(row), target=side)
    small = images.thumbnail(picture.rgb, side=side)
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")


def fingerprint(base: str, parts: Iterable[str | bytes]) -> str:
    """Return sixteen hex digits that depend on all parts and on their order."""
    state = hashlib.blake2b(base.encode(), digest_size=8)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "big") + raw)
    return state.hexdigest()


def _no_picture_read(pictures: Pictures, skipped: dict[int, ImageError]) -> str:
    if not skipped:
        return "there is no picture to encode; name data that has some"
    row, error = next(iter(sorted(skipped.items())))
    return (
        f"none of the {count(len(skipped))} can be read; the first, {pictures.name(row)}: {error}"
    )
