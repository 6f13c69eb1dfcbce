"""WebDataset shards: tars of samples whose files share a name up to the first dot.

    000000012.jpg  000000012.txt  000000012.json      as img2dataset writes them
    s0000012.webp  s0000012.cls                       as clip-benchmark's datasets hold them

Read in place: an index of where each picture's bytes lie, made from the tar headers, and the small
files beside them. Nothing is unpacked, copied or unpickled. (The `datasets` library reads shards too,
but copies them, and refuses ones whose samples do not all have the same files.)
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from clipkit import images
from clipkit.errors import DatasetError, ImageError
from clipkit.records import Texts, parse_object
from eval.source import Label, Source, read_class_names, read_fields

CLASS_NAMES = "classnames.txt"
MAX_SIDECAR = 2**20  # bytes
_TEXTS = {"txt", "json", "cls", "npy"}


@dataclass(frozen=True, slots=True)
class TarPictures:
    """Pictures inside tars, read by where their bytes lie."""

    tars: tuple[Path, ...]
    names: tuple[str, ...]
    places: tuple[tuple[int, int, int], ...]  # tar, offset, size

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> bytes:
        tar, offset, size = self.places[row]
        images.Limits().check_bytes(size)
        try:
            with self.tars[tar].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise ImageError(
                f"shard {self.tars[tar]} cannot be read: {error.strerror}", reason="unreadable"
            ) from error
        if len(data) < size:
            raise ImageError(f"shard {self.tars[tar]} ends inside it", reason="truncated")
        return data


@dataclass(slots=True)
class _Sample:
    place: tuple[int, int, int] | None = None
    captions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    label: Label | None = None


def read_shards(tars: Sequence[Path], *, split: str | None = None) -> Source:
    """The samples that hold a picture, in the shards' order, and the names of their classes if a
    classnames.txt lies beside the shards or above. DatasetError for a damaged shard."""
    names: list[str] = []
    samples: list[_Sample] = []
    for number, tar in enumerate(tars):
        for key, sample in _samples(tar, number).items():
            if sample.place is not None:
                names.append(f"{tar.stem}/{key}")
                samples.append(sample)
    if not samples:
        raise DatasetError(f"{tars[0]} and its like hold no pictures; WebDataset shards do")
    places = tuple(sample.place for sample in samples if sample.place is not None)
    beside = (folder / CLASS_NAMES for folder in (tars[0].parent, tars[0].parent.parent))
    named = next((path for path in beside if path.is_file()), None)
    labels = [sample.label for sample in samples]
    return Source(
        TarPictures(tuple(tars), tuple(names), places),
        split=split,
        texts=[Texts(tuple(s.captions), tuple(dict.fromkeys(s.tags))) for s in samples],
        labels=None if all(label is None for label in labels) else labels,
        classes=None if named is None else read_class_names(named),
    )


def _samples(path: Path, number: int) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: bytes are read where they lie
            for member in tar:
                where = PurePosixPath(member.name)
                stem, dot, kind = where.name.partition(".")
                if not (member.isreg() and dot and stem):
                    continue
                kind = kind.rpartition(".")[2].lower()
                if f".{kind}" not in images.SUFFIXES and kind not in _TEXTS:
                    continue
                sample = samples.setdefault(str(where.with_name(stem)), _Sample())
                if kind not in _TEXTS:
                    sample.place = (number, member.offset_data, member.size)
                    continue
                file = tar.extractfile(member)
                data = b"" if file is None else file.read(MAX_SIDECAR)
                try:
                    _add(sample, kind, data)
                except ValueError as error:
                    raise DatasetError(f"{member.name} in {path}: {error}") from None
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"{path} is not a whole uncompressed tar: {error}") from error
    return samples


def _add(sample: _Sample, kind: str, data: bytes) -> None:
    """What a file beside the picture says. ValueError if it cannot be read."""
    if kind == "cls":
        text = data.decode("utf-8").strip()
        sample.label = int(text) if text.lstrip("-").isdigit() else text
    elif kind == "npy":  # clip-benchmark's multi-label sets: a 0/1 vector over the classes
        vector = np.load(io.BytesIO(data), allow_pickle=False)
        sample.label = tuple(int(at) for at in np.flatnonzero(vector > 0))
    elif kind == "txt":
        lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
        sample.captions = [*filter(None, lines)]
    else:
        texts, label = read_fields(parse_object(data))
        # img2dataset repeats the caption of the .txt in the .json
        sample.captions = sample.captions or list(texts.captions)
        sample.tags += texts.tags
        sample.label = label if sample.label is None else sample.label
