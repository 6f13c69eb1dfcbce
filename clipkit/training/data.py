"""Plan batches of pictures from (seed, epoch) alone, before any picture is read.

A picture appears once an epoch, with one of its captions, so that no batch holds a picture twice.
Plans have no state: a run that is resumed at epoch 3, batch 17 computes the same plans again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipkit.errors import DatasetError
from clipkit.losses.pairs import Same
from clipkit.records import METADATA, SPLITS, stripped
from clipkit.sources import Broken, Options, Picture, PictureFile, Row, TarMember, open_source
from clipkit.training.registry import Need

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_SEARCHED = 10  # candidates for each hard negative
_SCORES = 2**24  # similarities in memory at a time
_CAPTIONS: frozenset[Need] = frozenset(("captions",))


def mine(
    pictures: Vectors,
    texts: Vectors,
    data: CaptionedPictures,
    *,
    count: int,
    margin: float = 0.95,
    share: slice = slice(None),
    device: torch.device | str = "cpu",
) -> Ints:
    """Return int64 (n, count): the hardest negatives of each picture of `share`, hardest first; -1 if
    there are fewer.

    pictures float32 (N, D) and texts (distinct captions, D) are unit rows of the pictures and captions
    of `data`. Pictures with a caption of the same meaning, and those closer to a caption than `margin`
    of its own picture's similarity, are no negatives. All pictures are compared, on `device`, with a
    block of captions at a time; of each caption the 10 * count + 1 nearest are candidates.
    """
    chosen = np.arange(len(data))[share]
    having = np.unique(data.meanings[data.captions] * len(data) + data.owner)
    rows = torch.from_numpy(pictures).to(device)
    most = min(_SEARCHED * count + 1, len(data))
    widest = max(len(numbers) for numbers in data.owned)
    block = max(1, _SCORES // (len(data) * widest))  # pictures at a time
    result = np.full((len(chosen), count), -1, np.int64)
    for start in range(0, len(chosen), block):
        part = chosen[start : start + block]
        owned = [data.owned[picture] for picture in part]
        numbers = np.concatenate(owned)
        local = np.repeat(np.arange(len(part)), [len(own) for own in owned])  # of each caption
        scores = torch.from_numpy(texts[numbers]).to(device) @ rows.T
        own = scores[torch.arange(len(numbers)), torch.from_numpy(part[local])]
        nearest = scores.topk(most, dim=1)
        near = nearest.values > (own - (1 - margin) * own.abs())[:, None]
        # A candidate of several captions counts once, with its highest score, and is spared for any.
        keys, place = np.unique(
            local[:, None] * len(data) + nearest.indices.cpu().numpy(), return_inverse=True
        )
        score = np.full(len(keys), -np.inf, np.float32)
        np.maximum.at(score, place.ravel(), nearest.values.cpu().numpy().ravel())
        spared = np.bincount(place.ravel(), near.cpu().numpy().ravel(), len(keys)) > 0
        picture, candidate = np.divmod(keys, len(data))
        meanings = np.full((len(part), widest), -1)
        meanings[local, _ranks(local)] = data.meanings[numbers]
        spared |= _found(meanings[picture] * len(data) + candidate[:, None], having).any(1)
        order = np.lexsort((candidate, -score, picture))
        order = order[~spared[order]]
        rank = _ranks(picture[order])
        hardest, rank = order[rank < count], rank[rank < count]
        result[start + picture[hardest], rank] = candidate[hardest]
    return result


def _ranks(groups: Ints) -> Ints:
    """Return each value's place among its equals, from 0; equal values are neighbours: (N,)."""
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(first, np.diff(first, append=len(groups)))


def _found(values: Ints, among: Ints) -> npt.NDArray[np.bool_]:
    """Return which of `values` are in `among`, sorted: of the shape of `values`."""
    places = np.minimum(np.searchsorted(among, values), len(among) - 1)
    found: npt.NDArray[np.bool_] = among[places] == values
    return found


_ORDER, _CAPTION = 0, 1  # the purpose of a random stream, beside seed and epoch


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One batch over all processes: numbers of pictures and of texts that belong to them."""

    epoch: int
    number: int  # of the batch within its epoch
    pictures: Ints  # (B,)
    texts: Ints  # (T, B): a row for each text view; T is 0 for methods without captions


@dataclass(frozen=True, slots=True, eq=False)
class CaptionedPictures:
    """A split of a dataset: its pictures, its distinct captions, their pairs, and labels."""

    folder: Path
    image_ids: tuple[str, ...]  # distinct
    paths: tuple[str, ...]  # relative to `folder`; of a picture in a shard "train/00000/000000012"
    texts: tuple[str, ...]  # distinct, short ones first
    owned: tuple[Ints, ...]  # of each picture: its captions' numbers in `texts`
    meanings: Ints  # (texts,): equal for captions that differ in case, spaces or a full stop
    left_out: int  # pictures without what is needed
    members: tuple[TarMember, ...] = ()  # the pictures in shards; empty: files below `folder`
    labels: Ints | None = (
        None  # (N,): numbers in `classes`, -1 for none; None if no picture has one
    )
    classes: tuple[str, ...] = ()  # sorted

    @classmethod
    def read(
        cls, folder: Path, split: str, *, most: int = 0, needs: Collection[Need] = _CAPTIONS
    ) -> CaptionedPictures:
        """Read the pictures of a split that have what is needed; equal files are one picture.

        `folder` is a dataset as `clipkit data build` writes it, with files or shards. At most `most`
        pictures are taken, the same ones each time (0: all). Raises DatasetError if the split is not
        there, a row is broken, a file is missing, or no picture has what is needed.
        """
        names: dict[str, str] = {}
        pictures: dict[str, Picture] = {}
        captions: dict[str, list[str]] = {}
        labelled: dict[str, str] = {}
        left_out = 0
        for row in _rows(Path(folder), split):
            texts, label = stripped(row.captions), "" if row.label is None else str(row.label)
            if ("captions" in needs and not texts) or ("labels" in needs and not label):
                left_out += 1
                continue
            assert row.image_id is not None
            names.setdefault(row.image_id, f"{split}/{row.name}")
            pictures.setdefault(row.image_id, row.picture)
            captions.setdefault(row.image_id, []).extend(texts)
            if label:
                labelled.setdefault(row.image_id, label)
        # Content hashes are as good as random, and stay when pictures are added.
        chosen = sorted(names)[:most] if most else list(names)
        if not chosen:
            what = " and ".join(need.removesuffix("s") for need in sorted(needs))
            having = f" with a {what}" if what else ""
            hint = "; other methods need none: clipkit train --methods" if what else ""
            raise DatasetError(f"{folder} has no picture{having} in split {split!r}{hint}")
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
        classes = sorted({labelled[i] for i in chosen if i in labelled})
        number = {label: n for n, label in enumerate(classes)}
        labels = [number.get(labelled.get(i, ""), -1) for i in chosen]
        return cls(
            Path(folder),
            tuple(chosen),
            tuple(names[i] for i in chosen),
            tuple(texts),
            owned,
            np.array(meant, np.int64),
            left_out,
            tuple(p for i in chosen if isinstance(p := pictures[i], TarMember)),
            np.array(labels, np.int64) if classes else None,
            tuple(classes),
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
        return np.concatenate(self.owned) if self.owned else np.empty(0, np.int64)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the pictures' content, captions, labels and order."""
        digest = hashlib.sha256()
        for image_id, numbers in zip(self.image_ids, self.owned, strict=True):
            captions = "\x1f".join(self.texts[n] for n in numbers)
            digest.update(f"{image_id}\x1e{captions}\x1d".encode())
        if self.labels is not None:
            digest.update(json.dumps([self.classes, self.labels.tolist()]).encode())
        return digest.hexdigest()[:16]

    def check_batch(self, batch: int) -> None:
        """Raise DatasetError if there are fewer pictures than a batch: an epoch would have no step."""
        if len(self) < batch:
            raise DatasetError(
                f"{self.folder} has {len(self)} training pictures, fewer than one "
                f"batch of {batch}; use a batch of at most {len(self)}"
            )

    def order(self, epoch: int, seed: int) -> Ints:
        """Return the numbers of all pictures in an epoch's own order: int64 (N,)."""
        return np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self))

    def plans(
        self, *, epoch: int, batch: int, seed: int, order: Ints | None = None, texts: int = 1
    ) -> list[Plan]:
        """Return one epoch's batches, with `texts` captions of each picture.

        The pictures behind the last whole batch are left out, different ones each epoch. `order`
        (default: `self.order`) may put pictures beside others that they should be compared with; see
        `together`. Raises DatasetError if there are fewer pictures than a batch.
        """
        self.check_batch(batch)
        order = self.order(epoch, seed) if order is None else order
        chosen = np.empty((texts, len(self)), np.int64)
        if texts:
            # Each epoch takes a picture's next captions, from a random first one: all are used evenly.
            counts = np.array([len(owned) for owned in self.owned])
            first = np.random.default_rng([seed, _CAPTION]).integers(0, counts)
            for view in range(texts):
                turn = (first + texts * epoch + view) % counts
                chosen[view] = [owned[t] for owned, t in zip(self.owned, turn, strict=True)]
        batches = order[: len(order) // batch * batch].reshape(-1, batch)
        return [Plan(epoch, n, pictures, chosen[:, pictures]) for n, pictures in enumerate(batches)]

    def same(self, plan: Plan) -> Same | None:
        """Group pictures and captions of a plan by meaning: a picture is in the groups of all captions
        that it has, as far as the batch has such captions of other pictures, so that they are no
        negatives. None if there are none."""
        kinds, captions, counts = np.unique(
            self.meanings[plan.texts[0]], return_inverse=True, return_counts=True
        )
        owned = [self.owned[picture] for picture in plan.pictures]
        owner = np.repeat(np.arange(len(owned)), [len(numbers) for numbers in owned])
        keys = np.unique(owner * len(self.texts) + self.meanings[np.concatenate(owned)])
        pictures, meanings = np.divmod(keys, len(self.texts))
        groups = np.minimum(np.searchsorted(kinds, meanings), len(kinds) - 1)
        others = counts[groups] - (captions[pictures] == groups)  # of these captions in the batch
        shared = (kinds[groups] == meanings) & (others > 0)
        if not shared.any():
            return None
        return Same(*map(torch.from_numpy, (captions, pictures[shared], groups[shared])))

    def without(self, pictures: Collection[int]) -> CaptionedPictures:
        """Return the split without some pictures; its texts stay."""
        kept = [number for number in range(len(self)) if number not in pictures]

        def of(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[number] for number in kept)

        return replace(
            self,
            image_ids=of(self.image_ids),
            paths=of(self.paths),
            owned=of(self.owned),
            members=of(self.members) if self.members else (),
            labels=None if self.labels is None else self.labels[kept],
        )

    def names(self, pictures: Sequence[int] | Ints) -> list[str]:
        return [self.paths[picture] for picture in pictures]

    def picture(self, number: int) -> Picture:
        """Return the picture of that number, to be read."""
        if self.members:
            return self.members[number]
        return PictureFile(self.folder / self.paths[number])


def replaced(
    plans: Sequence[Plan], unreadable: Collection[int], data: CaptionedPictures
) -> list[Plan]:
    """Put other pictures, with their first captions, in the place of those that cannot be read.

    They are pictures that the plans leave out, then pictures of other batches, of the same label where
    there are labels. The same plans give the same result. Raises DatasetError if no batch can be filled.
    """
    bad = np.fromiter(unreadable, np.int64)
    if not any(np.isin(plan.pictures, bad).any() for plan in plans):
        return list(plans)
    planned = np.concatenate([plan.pictures for plan in plans])
    spare = np.concatenate([np.setdiff1d(np.arange(len(data)), planned), planned])
    spare = spare[~np.isin(spare, bad)]
    result = []
    for plan in plans:
        pictures, texts = plan.pictures.copy(), plan.texts.copy()
        for at in np.flatnonzero(np.isin(pictures, bad)):
            fitting = ~np.isin(spare, pictures)
            if data.labels is not None:
                alike = fitting & (data.labels[spare] == data.labels[pictures[at]])
                fitting = alike if alike.any() else fitting
            if not fitting.any():
                raise DatasetError(
                    f"{data.folder} has too few readable training pictures for a batch of "
                    f"{len(pictures)}: {len(bad)} of {len(data)} cannot be read"
                )
            first = int(fitting.argmax())
            other = pictures[at] = spare[first]
            spare = np.append(np.delete(spare, first), other)  # the last to be taken again
            if len(texts):
                texts[:, at] = np.resize(data.owned[other], len(texts))
        result.append(replace(plan, pictures=pictures, texts=texts))
    return result


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


def together(order: Ints, alike: Ints) -> Ints:
    """Return the order with each picture followed by its hard negatives `alike` (N, K), -1 if there are
    fewer, that are not placed yet. Every picture still appears once."""
    placed = np.zeros(len(order), bool)
    result: list[int] = []
    for picture in order:
        group = [picture, *(p for p in alike[picture] if p >= 0)]
        for member in dict.fromkeys(group if not placed[picture] else ()):
            if not placed[member]:
                placed[member] = True
                result.append(int(member))
    return np.array(result, np.int64)
