"""Plan batches of pairs from (seed, epoch) alone, before any picture is read.

A picture appears once an epoch, with one of its captions, so that no batch holds a picture twice.
Plans have no state: a run that is resumed at epoch 3, batch 17 computes the same plans again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clipkit.errors import DatasetError
from clipkit.index import VectorIndex
from clipkit.records import METADATA, SPLITS, stripped
from clipkit.sources import Broken, Options, Picture, PictureFile, Row, TarMember, open_source

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_SEARCHED = 10  # candidates for each hard negative


def mine(
    pictures: Vectors, texts: Vectors, data: CaptionedPictures, *, count: int, margin: float = 0.95
) -> Ints:
    """Return int64 (N, count): each picture's hardest negatives, hardest first; -1 if there are fewer.

    pictures float32 (N, D) and texts (distinct captions, D) are unit rows of the pictures and captions
    of `data`. Pictures with a caption of the same meaning, and those closer to a caption than `margin`
    of its own picture's similarity, are no negatives.
    """
    index = VectorIndex.build(np.arange(len(pictures)), pictures)
    having: dict[int, set[int]] = {}  # pictures that have a caption of this meaning
    for picture, numbers in enumerate(data.owned):
        for number in numbers:
            having.setdefault(int(data.meanings[number]), set()).add(picture)
    result = np.full((len(data), count), -1, np.int64)
    for picture, numbers in enumerate(data.owned):
        candidates: dict[int, float] = {}
        excluded = {picture}
        hits = index.search(texts[numbers], _SEARCHED * count + 1)
        for number, (ids, scores) in zip(numbers, hits, strict=True):
            own = float(texts[number] @ pictures[picture])
            limit = own - (1 - margin) * abs(own)
            excluded |= having[int(data.meanings[number])]
            excluded |= set(ids[scores > limit].tolist())
            for candidate, score in zip(ids.tolist(), scores.tolist(), strict=True):
                candidates[candidate] = max(score, candidates.get(candidate, -2.0))
        hardest = sorted((-s, c) for c, s in candidates.items() if c not in excluded)[:count]
        result[picture, : len(hardest)] = [c for _, c in hardest]
    return result


_ORDER, _CAPTION = 0, 1  # the purpose of a random stream, beside seed and epoch


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One batch over all processes: numbers of pictures and of their captions."""

    epoch: int
    number: int  # of the batch within its epoch
    pictures: Ints  # (B,)
    texts: Ints  # (B,)


@dataclass(frozen=True, slots=True, eq=False)
class CaptionedPictures:
    """A split of a dataset: its pictures, its distinct captions, and their pairs."""

    folder: Path
    image_ids: tuple[str, ...]  # distinct
    paths: tuple[str, ...]  # relative to `folder`; of a picture in a shard "train/00000/000000012"
    texts: tuple[str, ...]  # distinct, short ones first
    owned: tuple[Ints, ...]  # of each picture: its captions' numbers in `texts`
    meanings: Ints  # (texts,): equal for captions that differ in case, spaces or a full stop
    without_captions: int  # pictures left out
    members: tuple[TarMember, ...] = ()  # the pictures in shards; empty: files below `folder`

    @classmethod
    def read(cls, folder: Path, split: str, *, most: int = 0) -> CaptionedPictures:
        """Read the pictures of a split that have captions; equal files are one picture.

        `folder` is a dataset as `clipkit data build` writes it, with files or shards. At most `most`
        pictures are taken, the same ones each time (0: all). Raises DatasetError if the split is not
        there, a row is broken, a file is missing, or no picture has a caption.
        """
        names: dict[str, str] = {}
        pictures: dict[str, Picture] = {}
        captions: dict[str, list[str]] = {}
        without = 0
        for row in _rows(Path(folder), split):
            texts = stripped(row.captions)
            if not texts:
                without += 1
                continue
            assert row.image_id is not None
            names.setdefault(row.image_id, f"{split}/{row.name}")
            pictures.setdefault(row.image_id, row.picture)
            captions.setdefault(row.image_id, []).extend(texts)
        # Content hashes are as good as random, and stay when pictures are added.
        chosen = sorted(names)[:most] if most else list(names)
        if not chosen:
            raise DatasetError(f"{folder} has no picture with a caption in split {split!r}")
        for image_id in chosen:
            path = pictures[image_id].path
            if path is not None and not path.is_file():
                raise DatasetError(
                    f"{path} is missing, but {split}/{METADATA} names it; restore it or build the "
                    "dataset again"
                )
        # By length: captions that are encoded together then need little padding.
        texts = sorted({text: None for i in chosen for text in captions[i]}, key=len)
        numbers = {text: number for number, text in enumerate(texts)}
        owned = tuple(
            np.array([numbers[text] for text in dict.fromkeys(captions[i])], np.int64)
            for i in chosen
        )
        meanings: dict[str, int] = {}
        meant = [
            meanings.setdefault(" ".join(text.lower().split()).rstrip(" .!"), len(meanings))
            for text in texts
        ]
        return cls(
            Path(folder),
            tuple(chosen),
            tuple(names[i] for i in chosen),
            tuple(texts),
            owned,
            np.array(meant, np.int64),
            without,
            tuple(p for i in chosen if isinstance(p := pictures[i], TarMember)),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def owner(self) -> Ints:
        """Return int64 (captions,): the picture of each of `captions`."""
        return np.repeat(np.arange(len(self)), [len(texts) for texts in self.owned])

    @property
    def captions(self) -> Ints:
        """Return int64 (captions,): the numbers of all captions, in the order of the pictures."""
        return np.concatenate(self.owned)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the pictures' content, captions and order."""
        digest = hashlib.sha256()
        for image_id, numbers in zip(self.image_ids, self.owned, strict=True):
            captions = "\x1f".join(self.texts[n] for n in numbers)
            digest.update(f"{image_id}\x1e{captions}\x1d".encode())
        return digest.hexdigest()[:16]

    def check_batch(self, batch: int) -> None:
        """Raise DatasetError if there are fewer pictures than a batch: an epoch would have no step."""
        if len(self) < batch:
            raise DatasetError(
                f"{self.folder} has {len(self)} training pictures with captions, fewer than one "
                f"batch of {batch}; use a batch of at most {len(self)}"
            )

    def plans(self, *, epoch: int, batch: int, seed: int, alike: Ints | None = None) -> list[Plan]:
        """Return one epoch's batches, in an order of its own.

        The pictures behind the last whole batch are left out, different ones each epoch. `alike` (N, K)
        are hard negatives, to be put into one batch with each picture; -1 if there are fewer. Every
        picture still appears once. Raises DatasetError if there are fewer pictures than a batch.
        """
        self.check_batch(batch)
        order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self))
        if alike is not None:
            order = _together(order, alike)
        # Each epoch takes a picture's next caption, from a random first one: all are used evenly.
        counts = np.array([len(texts) for texts in self.owned])
        first = np.random.default_rng([seed, _CAPTION]).integers(0, counts)
        turn = (first + epoch) % counts
        plans = []
        for number in range(len(self) // batch):
            pictures = order[number * batch : (number + 1) * batch]
            texts = np.array([self.owned[p][turn[p]] for p in pictures], np.int64)
            plans.append(Plan(epoch, number, pictures, texts))
        return plans

    def same(self, plan: Plan) -> torch.Tensor | None:
        """Return bool (B, B): the pairs (picture i, caption j), i != j, in which picture i has a caption
        with the meaning of j, so that they are no negatives. None if there are no such pairs."""
        columns: dict[int, list[int]] = {}
        for j, text in enumerate(plan.texts):
            columns.setdefault(int(self.meanings[text]), []).append(j)
        pairs = [
            (i, j)
            for i, picture in enumerate(plan.pictures)
            for meaning in {int(self.meanings[text]) for text in self.owned[picture]}
            for j in columns.get(meaning, ())
            if i != j
        ]
        if not pairs:
            return None
        same = torch.zeros(len(plan.pictures), len(plan.pictures), dtype=torch.bool)
        rows, others = torch.tensor(pairs).T
        same[rows, others] = True
        return same

    def names(self, pictures: Sequence[int] | Ints) -> list[str]:
        return [self.paths[picture] for picture in pictures]

    def picture(self, number: int) -> Picture:
        """Return the picture of that number, to be read."""
        if self.members:
            return self.members[number]
        return PictureFile(self.folder / self.paths[number])


def has_split(folder: Path, split: str) -> bool:
    """Return whether a dataset folder has the split, as files or as shards."""
    return (folder / split / METADATA).is_file() or any((folder / split).glob("*.tar"))


def is_dataset(folder: Path) -> bool:
    """Return whether `folder` is what `clipkit data build` writes: splits whose rows have image ids."""
    split = next((name for name in SPLITS if has_split(folder, name)), None)
    if split is None:
        return False
    rows = open_source(folder / split, options=Options(indexed=True)).rows()
    first = next((row for row in rows if isinstance(row, Row)), None)
    return first is None or first.image_id is not None


def _rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a split of a dataset. Raises DatasetError for a broken one, with its place."""
    splits = [name for name in SPLITS if has_split(folder, name)]
    if not splits:
        raise DatasetError(
            f"{folder} is not a dataset: none of train/, validation/, test/ holds a {METADATA} or "
            "shards; build one: clipkit data build SOURCE --out DIR"
        )
    if split not in splits:
        hint = ""
        if split == "train":
            hint = (
                "; build it again from more captions, or put those that name no split into it: "
                "clipkit data build SOURCE --out DIR --split train"
            )
        raise DatasetError(
            f"dataset {folder} has no split {split!r}; it has {' and '.join(splits)}{hint}"
        )
    source = open_source(folder / split, options=Options(indexed=True, split=split))
    for row in source.rows():
        if isinstance(row, Broken):
            raise DatasetError(f"{source.where(row.place)}: {row.detail}")
        if row.image_id is None:
            raise DatasetError(
                f"{source.where(row.place)}: the row has no image_id; build a dataset of it: "
                f"clipkit data build {folder} --out DIR"
            )
        yield row


def fitted_batch(pictures: int, *, most: int) -> int:
    """Return the greatest power of two that leaves an epoch four batches or more, at most `most`."""
    return max(2, min(most, 1 << ((pictures // 4).bit_length() - 1) if pictures >= 8 else 2))


def _together(order: Ints, alike: Ints) -> Ints:
    """Return the order with each picture followed by its hard negatives that are not placed yet."""
    placed = np.zeros(len(order), bool)
    result: list[int] = []
    for picture in order:
        group = [picture, *(p for p in alike[picture] if p >= 0)]
        for member in dict.fromkeys(group if not placed[picture] else ()):
            if not placed[member]:
                placed[member] = True
                result.append(int(member))
    return np.array(result, np.int64)
