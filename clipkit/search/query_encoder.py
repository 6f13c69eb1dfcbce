"""Query -> one unit vector, with an encoder that is loaded by the first text or picture.

The vector is normalise(sum of weight * unit vector of each text and example picture, less
EXCLUDED * weight * unit vector of each excluded text).
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit import images
from clipkit.errors import EncoderMismatch, ImageError, ModelError, QueryError
from clipkit.lazy_encoder import Encoder
from clipkit.query import Query

EXCLUDED = 0.5  # how hard `-word` pushes, against 1 for a word
CACHED_TEXTS = 512

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Searched:
    """The vectors that a query will be compared with: whose they are, and those that are stored."""

    spec: str
    encoder_id: str
    stored: Callable[[str], Float32 | None]  # the unit vector (D,) of a picture by its image_id

    def mismatch(self, spec: str, encoder_id: str) -> EncoderMismatch:
        """The error for a query of another encoder."""
        if spec == self.spec:  # such as a checkpoint that was trained further in its place
            return EncoderMismatch(
                f"{spec} has changed since the index was made (encoder {self.encoder_id} then, "
                f"{encoder_id} now); index the pictures again: clipkit index FOLDER --model {spec}"
            )
        return EncoderMismatch(
            f"this index holds vectors of {self.spec} (encoder {self.encoder_id}), but the search is "
            f"with {spec} (encoder {encoder_id}); search with --model {self.spec}, or index the "
            f"pictures with the other model: clipkit index FOLDER --model {spec}"
        )


class QueryEncoder:
    """Threads may share it. Vectors of texts are kept, the CACHED_TEXTS last used."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._texts: OrderedDict[str, Float32] = OrderedDict()  # the least recently used first
        self._caching = threading.Lock()

    def vector(
        self,
        query: Query,
        image: Image.Image | bytes | None,
        *,
        searched: Searched,
        files: bool,
    ) -> Float32:
        """The unit vector (D,) of the query's texts and examples, `image` (RGB, or a file's bytes)
        being one more example.

        An example that is among the stored ones needs no encoder. Without `files` one that names a
        file is refused. Raises QueryError, ImageError (a picture cannot be read), EncoderMismatch,
        ModelError (a vector that is not finite).
        """
        texts = self._encode_texts([term.text for term in (*query.terms, *query.exclude)], searched)
        parts = [term.weight * texts[term.text] for term in query.terms]
        parts += [-EXCLUDED * term.weight * texts[term.text] for term in query.exclude]
        for example in query.examples:
            parts.append(example.weight * self._example(example.path, searched, files))
        if image is not None:
            parts.append(self._encode_image(image, searched))
        total = np.sum(parts, axis=0, dtype=np.float32)
        norm = float(np.linalg.norm(total))
        if norm < 1e-3:
            raise QueryError("the query's terms cancel out; change a weight or leave one out")
        return np.asarray(total / norm, dtype=np.float32)

    def _fitting(self, searched: Searched) -> Encoder:
        encoder = self._encoder
        if encoder.encoder_id != searched.encoder_id:
            raise searched.mismatch(encoder.spec, encoder.encoder_id)
        return encoder

    def _encode_texts(self, texts: Sequence[str], searched: Searched) -> dict[str, Float32]:
        """Unit vectors (D,) by text; new ones in one batch."""
        if not texts:
            return {}
        encoder = self._fitting(searched)
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

    def _example(self, path: str, searched: Searched, files: bool) -> Float32:
        if re.fullmatch(r"[0-9a-f]{32}", path) and (vector := searched.stored(path)) is not None:
            return vector
        if not files:
            raise QueryError(
                f"example '+{path}' names a file, which cannot be read from here; "
                "give the picture itself, or the image_id of one in the library"
            )
        try:
            return self._encode_image(images.read_bytes(Path(path).expanduser()), searched)
        except ImageError as error:
            raise ImageError(f"example '+{path}': {error}", reason=error.reason) from None

    def _encode_image(self, image: Image.Image | bytes, searched: Searched) -> Float32:
        """A picture's unit vector (D,): the stored one if the library has these very bytes."""
        if isinstance(image, bytes):
            if (vector := searched.stored(images.image_id(image))) is not None:
                return vector
            side = self._fitting(searched).towers().preferred_side
            image = images.decode(image, target=side).rgb
        towers = self._fitting(searched).towers()
        rows = _finite(towers.encode_images([image]), "the example picture")
        return np.asarray(rows[0])


def _finite(vectors: Float32, what: str) -> Float32:
    if not np.isfinite(vectors).all():
        raise ModelError(
            f"the model's vector of {what} has values that are not finite; its weights are damaged "
            "or its precision is too low: try --precision float32, or another model"
        )
    return vectors
