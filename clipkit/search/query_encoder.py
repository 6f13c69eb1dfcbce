"""Encode a query as one unit vector; the encoder is loaded by the first text or picture.

The vector is normalise(sum of weight * unit vector of each text and example picture, less
EXCLUDED * weight * unit vector of each excluded text).
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipkit import checkpoint, models
from clipkit.arrays import Float32
from clipkit.errors import EncoderMismatch, ImageError, ModelError, QueryError
from clipkit.lazy_encoder import Encoder
from clipkit.query import Query
from clipkit.search.live_vectors import LiveVectors

if TYPE_CHECKING:  # a search by words does not wait for Pillow
    from PIL import Image

EXCLUDED = 0.5  # how hard `-word` pushes, against 1 for a word
CACHED_TEXTS = 512


def encoder_mismatch(index: tuple[str, str], query: tuple[str, str]) -> EncoderMismatch:
    """Return the error for a query of another encoder than the index's, each as (spec, encoder_id)."""
    (index_spec, index_id), (query_spec, query_id) = index, query
    if checkpoint.absolute(query_spec) == checkpoint.absolute(index_spec):
        # Such as a checkpoint that was trained further in its place.
        return EncoderMismatch(
            f"{query_spec} has changed since the index was made (encoder {index_id} then, "
            f"{query_id} now); index the pictures again: clipkit index FOLDER --model {query_spec}"
        )
    here = "" if models.is_gone(index_spec) else f"search with --model {index_spec}, or "
    return EncoderMismatch(
        f"this index holds vectors of {index_spec} (encoder {index_id}), but the search is with "
        f"{query_spec} (encoder {query_id}); {here}index the "
        f"pictures with the other model: clipkit index FOLDER --model {query_spec}"
    )


class QueryEncoder:
    """Encode queries; cache the vectors of the last CACHED_TEXTS texts. Threads may share it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._texts: OrderedDict[str, Float32] = OrderedDict()  # the least recently used first
        self._caching = threading.Lock()

    def vector(
        self,
        query: Query,
        image: Image.Image | bytes | Float32 | None,
        *,
        live: LiveVectors,
        files: bool,
    ) -> Float32:
        """Return the unit vector (D,) of the query's texts and examples, `image` (RGB, a file's bytes,
        or a unit vector) being one more example.

        An example that is among the `live` pictures needs no encoder. Without `files`, one that
        names a file is refused. Raises QueryError, ImageError (a picture cannot be read),
        EncoderMismatch, ModelError (a vector that is not finite).
        """
        texts = self._encode_texts([term.text for term in (*query.terms, *query.exclude)], live)
        parts = [term.weight * texts[term.text] for term in query.terms]
        parts += [-EXCLUDED * term.weight * texts[term.text] for term in query.exclude]
        for example in query.examples:
            parts.append(example.weight * self._example(example.path, live, files))
        if isinstance(image, np.ndarray):
            parts.append(image)
        elif image is not None:
            parts.append(self._encode_image(image, live))
        total = np.sum(parts, axis=0, dtype=np.float32)
        norm = float(np.linalg.norm(total))
        if norm < 1e-3:
            raise QueryError("the query's terms cancel out; change a weight or leave one out")
        return np.asarray(total / norm, dtype=np.float32)

    def _matching_encoder(self, live: LiveVectors) -> Encoder:
        """Return the encoder. Raises EncoderMismatch if `live` are not its vectors."""
        encoder = self._encoder
        if encoder.encoder_id != live.encoder_id:
            index, query = (live.spec, live.encoder_id), (encoder.spec, encoder.encoder_id)
            raise encoder_mismatch(index, query)
        return encoder

    def _encode_texts(self, texts: Sequence[str], live: LiveVectors) -> dict[str, Float32]:
        """Return unit vectors (D,) by text; new ones are encoded in one batch."""
        if not texts:
            return {}
        encoder = self._matching_encoder(live)
        with self._caching:
            vectors = {text: self._texts[text] for text in texts if text in self._texts}
        new = list(dict.fromkeys(text for text in texts if text not in vectors))
        if new:
            rows = encoder.encode_texts(new)
            vectors |= dict(zip(new, _finite(rows, f"text {new[0]!r}"), strict=True))
        with self._caching:
            for text in texts:
                self._texts[text] = vectors[text]
                self._texts.move_to_end(text)
            while len(self._texts) > CACHED_TEXTS:
                self._texts.popitem(last=False)
        return vectors

    def _example(self, path: str, live: LiveVectors, files: bool) -> Float32:
        if (
            re.fullmatch(r"[0-9a-f]{32}", path)
            and (vector := live.unit_vector(live.catalog.has_picture(path))) is not None
        ):
            return vector
        if not files:
            raise QueryError(
                f"example '+{path}' names a file, which cannot be read from here; "
                "give the picture itself, or the image_id of one in the library"
            )
        from clipkit import images

        try:
            return self._encode_image(images.read_bytes(Path(path).expanduser()), live)
        except ImageError as error:
            raise ImageError(f"example '+{path}': {error}", reason=error.reason) from None

    def _encode_image(self, image: Image.Image | bytes, live: LiveVectors) -> Float32:
        """Return a picture's unit vector (D,): the stored one if the library has the same bytes."""
        if isinstance(image, bytes):
            from clipkit import images

            num = live.catalog.has_picture(images.image_id(image))
            if (vector := live.unit_vector(num)) is not None:
                return vector
            side = self._matching_encoder(live).towers().preferred_side
            image = images.decode(image, target=side).rgb
        towers = self._matching_encoder(live).towers()
        rows = _finite(towers.encode_images([image]), "the example picture")
        return np.asarray(rows[0])


def _finite(vectors: Float32, what: str) -> Float32:
    if not np.isfinite(vectors).all():
        raise ModelError(
            f"the model's vector of {what} has values that are not finite; its weights are damaged "
            "or its precision is too low: try --precision float32, or another model"
        )
    return vectors
