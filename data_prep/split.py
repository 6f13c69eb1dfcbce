"""Assign pictures to train, validation and test by their content, look-alikes together.

A picture's split follows from its content alone: its hash (with the seed), read as a number in [0, 1),
falls into one of three ranges. Adding data moves nothing. Pictures that look alike form groups, and a
group goes to the split, in the order train, validation, test, that comes first among its members. So a
training picture never becomes a test picture when data is added; the reverse can happen, with a new
look-alike. Two exceptions, whose pictures may move again when data is added. Where fewer than
LEAST_TRAINING pictures would train, which happens to sets of a few pictures, those with the lowest
numbers train too. And where pictures have labels, each class is in each split of which its share
rounds to one picture or more (of fractions 0.8, 0.1, 0.1: a class of six): if the hashes leave it out
there, the group moves whose number is next to the split's range. A class of one picture stays.

Look-alikes are found by a perceptual hash of 256 bits (pHash, Zauner 2010, by imagehash): of 6,091
photos saved again smaller or as worse JPEGs all but 1 % stay within 8 bits, brightened by 15 % within
14, while no two different ones come within 60. The common 64 bits put different photos 8 apart. It holds
for pictures of 32 pixels, too: of 2,000 of CIFAR-10 saved again, enlarged or shrunk all but one stay
within 15, brightened by 15 % nineteen of twenty; of its 50,000 training pictures 14 pairs come that
close, each two versions of one photo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import InputError
from clipkit.records import SPLITS

if TYPE_CHECKING:
    from PIL import Image

HASH_BYTES = 32
LEAST_TRAINING = 2  # pictures: a contrastive loss compares them
MAX_RADIUS = 15  # bits; what near_pairs finds exactly
_BLOCK = 1 << 22  # pairs compared at once


@dataclass(frozen=True, slots=True)
class Fractions:
    """The fractions of pictures without an official split that go to validation and test.

    The rest trains. Raises InputError if a fraction is not in [0, 1) or nothing is left to train.
    """

    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"the {name} fraction is {getattr(self, name)}; "
                    "it must be at least 0 and below 1"
                )
        if self.validation + self.test >= 1:
            raise InputError(
                f"fractions {self.validation:g} (validation) and {self.test:g} (test) leave no "
                "training data; their sum must be below 1"
            )


def perceptual_hash(rgb: Image.Image) -> bytes:
    """Return 32 bytes that differ in few bits between pictures that look alike."""
    import imagehash

    return np.packbits(imagehash.phash(rgb, hash_size=16).hash).tobytes()


def near_pairs(hashes: NDArray[np.uint8], radius: int) -> NDArray[np.int64]:
    """Return every pair of rows that differ in at most `radius` bits: int64 (P, 2), first < second.

    `hashes` is uint8 (N, 32), radius 0..15. Exact, by the pigeonhole: 15 differing bits leave one of
    the 16 words of 16 bits untouched, so only rows that share a word are compared. Equal rows are
    chained, not paired each with each: a thousand equal pictures give 999 pairs. 100,000 hashes: 3 s.
    """
    unique, first, back = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    rows = np.arange(len(hashes))
    chained = np.stack([first[back.ravel()], rows], 1)
    parts = [chained[chained[:, 0] != rows]]
    bits = np.ascontiguousarray(unique).view(np.uint64)  # (U, 4)
    words = bits.view(np.uint16)  # (U, 16)
    for word in words.T if radius else ():
        order = np.argsort(word, kind="stable")
        ranked = word[order]
        left = np.arange(len(order))
        for gap in range(1, len(order)):  # as far as the longest run of one word
            left = left[left < len(order) - gap]
            left = left[ranked[left] == ranked[left + gap]]
            if not left.size:
                break
            for start in range(0, len(left), _BLOCK):
                one = order[left[start : start + _BLOCK]]
                two = order[left[start : start + _BLOCK] + gap]
                near = np.bitwise_count(bits[one] ^ bits[two]).sum(1) <= radius
                parts.append(np.stack([first[one[near]], first[two[near]]], 1))
    pairs = np.sort(np.concatenate(parts).astype(np.int64), axis=1)
    return np.unique(pairs, axis=0)


def groups_of(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64 (count,): the number of each row's group; rows that pairs connect form a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    numbers: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


def assign(
    image_ids: Sequence[str],
    official: Sequence[str | None],
    groups: NDArray[np.int64],
    labels: Sequence[str | None] = (),
    *,
    fractions: Fractions,
    seed: int = 0,
) -> list[str]:
    """Return a split for each picture: its official one, else that of its group.

    A group with official members follows them; if they disagree, the first of train, validation, test.
    Official splits are never changed: `leaks` reports look-alikes between them. `labels`, one a picture
    if there are any, bring the classes into all splits that they have pictures for. If fewer than
    LEAST_TRAINING pictures train, so do the groups without official members whose numbers are lowest,
    one after the other.
    """
    places = np.array([_place(image_id, seed) for image_id in image_ids])  # 0..1
    edges = (1 - fractions.test - fractions.validation, 1 - fractions.test)
    own = np.digitize(places, edges)  # 0 train, 1 validation, 2 test
    fixed = np.array([SPLITS.index(split) if split else len(SPLITS) for split in official])
    count = int(groups.max()) + 1 if len(groups) else 0
    by_hash = np.full(count, len(SPLITS))
    by_source = np.full(count, len(SPLITS))
    np.minimum.at(by_hash, groups, own)
    np.minimum.at(by_source, groups, fixed)
    of_group = np.where(by_source < len(SPLITS), by_source, by_hash)
    splits = np.where(fixed < len(SPLITS), fixed, of_group[groups])
    unofficial = (by_source == len(SPLITS))[groups]
    if any(labels):
        _spread_classes(splits, labels, groups, places, unofficial, (0.0, *edges, 1.0))
    free = np.flatnonzero((splits > 0) & unofficial)
    for row in free[np.argsort(places[free])]:
        if (splits == 0).sum() >= LEAST_TRAINING:
            break
        splits[groups == groups[row]] = 0
    return [SPLITS[n] for n in splits]


def _spread_classes(
    splits: NDArray[np.int64],
    labels: Sequence[str | None],
    groups: NDArray[np.int64],
    places: NDArray[np.float64],
    unofficial: NDArray[np.bool_],
    edges: Sequence[float],
) -> None:
    """Move unofficial groups, in `splits`, until each class is in each split of which it has a share.

    The split number s has the places from edges[s] to edges[s + 1]. A group moves only if no class that
    is due in its split is lost there.
    """
    numbers = {name: n for n, name in enumerate(sorted({label for label in labels if label}))}
    classes = np.array([numbers.get(label or "", -1) for label in labels])
    counts = np.zeros((len(numbers), len(SPLITS)), np.int64)  # pictures of each class in each split
    labelled = classes >= 0
    np.add.at(counts, (classes[labelled], splits[labelled]), 1)
    free = np.bincount(classes[labelled & unofficial], minlength=len(numbers))
    due = (np.round(free[:, None] * np.diff(edges)) >= 1) & (free > 1)[:, None]  # bool (C, 3)
    of_class = _members(classes)
    of_group = _members(groups)
    for number, split in np.argwhere(due & (counts == 0)):
        rows = of_class[number][unofficial[of_class[number]]]
        distance = np.maximum(edges[split] - places[rows], places[rows] - edges[split + 1])
        for row in rows[np.argsort(distance, kind="stable")]:
            members = of_group[groups[row]]
            moving = np.zeros(len(numbers), np.int64)
            np.add.at(moving, classes[members][classes[members] >= 0], 1)
            left = counts[:, splits[row]] - moving
            if ((left > 0) | ~due[:, splits[row]] | (moving == 0)).all():
                counts[:, splits[row]] -= moving
                counts[:, split] += moving
                splits[members] = split
                break


def _members(numbers: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Return the rows of each number."""
    order = np.argsort(numbers, kind="stable")
    values, starts = np.unique(numbers[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _place(image_id: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
