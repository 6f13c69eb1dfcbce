"""Teachers of method `distill`: what other models make of a dataset's pictures, computed once.

A teacher is a model's spec, or a file of vectors that anything may have made: an .npz of two arrays,

    image_ids   (N,) texts: the pictures' `image_id`, as the dataset's metadata.jsonl has them
    vectors     (N, D) numbers

as `numpy.savez(FILE, image_ids=ids, vectors=vectors)` writes it. It may hold more pictures than the
dataset, in any order.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import clipkit
from clipkit import checkpoint, images
from clipkit.arrays import Float32
from clipkit.catalog import VectorStore
from clipkit.embed import Encoded, encode_pictures
from clipkit.errors import DatasetError, InputError
from clipkit.lazy_encoder import LazyEncoder
from clipkit.training.data import CaptionedPictures, Ints
from clipkit.training.distributed import gather_uneven
from clipkit.training.inputs import even_share, listed


class Teacher(Protocol):
    """A source of vectors of pictures."""

    name: str

    @property
    def dim(self) -> int: ...

    @property
    def identity(self) -> str:
        """Return the identity of the teacher: its vectors change with it and with the pictures."""

    def vectors(self, data: CaptionedPictures, on_batch: Callable[[int], None]) -> Float32:
        """Return this process's share of a split's vectors, (n, D); zero for pictures that cannot be
        read. on_batch: gets the number done."""


def open_teacher(name: str, *, store: Path, device: str, precision: str, workers: int) -> Teacher:
    """Open a model or, if the name ends in .npz, a file of vectors.

    store: the file that keeps a model's vectors. Raises InputError or ModelError if it is neither.
    """
    if name.endswith(".npz"):
        return VectorFile(Path(name).expanduser())
    encoder = LazyEncoder(name, device=device, precision=precision)
    return ModelTeacher(encoder, store=store, workers=workers)


class ModelTeacher:
    """A model's image tower. Its vectors are stored, so that it is loaded only if some are missing."""

    def __init__(self, encoder: LazyEncoder, *, store: Path | None, workers: int = 0) -> None:
        self.encoder, self.name = encoder, encoder.spec
        self._store, self._workers = store, workers or None

    @property
    def dim(self) -> int:
        folder = checkpoint.find_folder(self.name)
        if folder is None:
            return self.encoder.towers().dim
        return int(checkpoint.read_config(folder)[0]["embed_dim"])

    @property
    def identity(self) -> str:
        return f"{self.encoder.space_id}-{self.encoder.precision}"

    def vectors(self, data: CaptionedPictures, on_batch: Callable[[int], None]) -> Float32:
        """Encode each picture as at inference, unless its vector is stored; a run that is stopped or
        killed goes on with what is missing."""
        # with the fingerprint: an image_id is whatever the dataset says, unique within it
        space = f"{self.identity}-{clipkit.__version__}/{data.fingerprint()}/teacher"
        share = range(len(data))[even_share(len(data))]
        keys = {picture: data.image_ids[picture].encode() for picture in share}
        with VectorStore(self._store, space) as store:
            rows = store.get(keys.values())
            missing = [picture for picture, key in keys.items() if key not in rows]
            for numbers, vectors in self._encoded(data, missing):
                new = [keys[number] for number in numbers]
                store.put(new, vectors)
                rows.update(zip(new, vectors, strict=True))
                on_batch(len(rows))
        result = np.zeros((len(keys), len(next(iter(rows.values()), ())) or self.dim), np.float32)
        for row, key in zip(result, keys.values(), strict=True):
            row[:] = rows.get(key, 0)
        return result

    def _encoded(
        self, data: CaptionedPictures, pictures: list[int]
    ) -> Iterator[tuple[list[int], Float32]]:
        """Yield batches of pictures that can be read, by number, and their unit rows."""
        if not pictures:
            return
        encoder = self.encoder.towers()

        def prepare(
            _: int, __: str, file: bytes, admit: Callable[[int], None]
        ) -> tuple[torch.Tensor, None]:
            decoded = images.decode(file, target=encoder.preferred_side, admit=admit)
            return encoder.preprocess(decoded.rgb), None

        def lookup(_: str) -> object | None:
            return None  # only pictures whose vectors are missing are read

        results = encode_pictures(
            pictures,
            lambda: encoder,
            read=lambda picture: data.picture(picture).read(),
            lookup=lookup,
            prepare=prepare,
            workers=self._workers,
        )
        with closing(results):
            for result in results:
                if isinstance(result, Encoded):
                    yield [picture.item for picture in result.pictures], result.vectors


class VectorFile:
    """An .npz file of vectors; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            with path.open("rb") as file:
                self.identity = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            with np.load(path, allow_pickle=False) as arrays:
                ids, self._vectors = arrays["image_ids"], arrays["vectors"]
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is no file of vectors ({error}); it needs two arrays, image_ids and "
                "vectors, as numpy.savez(FILE, image_ids=ids, vectors=vectors) writes them"
            ) from error
        shapes = f"image_ids {ids.dtype} {ids.shape} and vectors {self._vectors.dtype} "
        shapes += f"{self._vectors.shape}"
        texts, numbers = ids.dtype.kind == "U", self._vectors.dtype.kind == "f"
        if not (texts and numbers and ids.ndim == 1 and self._vectors.ndim == 2):
            raise InputError(f"{path} has {shapes}; they must be texts (N,) and floats (N, D)")
        if len(ids) != len(self._vectors):
            raise InputError(f"{path} has {shapes}; there must be as many of both")
        self._rows = {str(image_id): row for row, image_id in enumerate(ids)}

    @property
    def dim(self) -> int:
        return int(self._vectors.shape[1])

    def vectors(self, data: CaptionedPictures, on_batch: Callable[[int], None]) -> Float32:  # noqa: ARG002
        """Look the vectors up. Raises DatasetError, naming the pictures that have none."""
        missing = [n for n, image_id in enumerate(data.image_ids) if image_id not in self._rows]
        if missing:
            raise DatasetError(f"{self.name} has no vectors of {_listed(data, missing)}; add them")
        vectors: Float32
        vectors = self._vectors[[self._rows[i] for i in data.image_ids]].astype(np.float32)
        sizes = np.linalg.norm(vectors, axis=1)
        if len(broken := np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))):
            raise DatasetError(
                f"{self.name} has vectors that are zero or not finite, of {_listed(data, broken)}; "
                "leave those pictures out of the dataset, or compute their vectors again"
            )
        return vectors[even_share(len(data))]


def _listed(data: CaptionedPictures, numbers: Sequence[int] | Ints) -> str:
    """Say how many pictures those are, and name the first."""
    names = listed({int(number): data.paths[number] for number in numbers})
    return f"{len(numbers)} of {len(data)} pictures: {names}"


def unit_vectors(
    teacher: Teacher, data: CaptionedPictures, on_batch: Callable[[int], None]
) -> torch.Tensor:
    """Return a teacher's unit rows of all pictures of a split, float32 (N, D), zero for pictures that
    cannot be read; all processes must call it."""
    return F.normalize(gather_uneven(torch.from_numpy(teacher.vectors(data, on_batch))), dim=1)


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join several teachers' rows, (N, D) each, as unit rows (N, sum of D) in half precision.

    Each teacher counts alike: its rows are unit rows before they are joined.
    """
    joined = torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)
    return F.normalize(joined, dim=1).half()
