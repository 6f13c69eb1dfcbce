"""Find leaks between splits: the same file, a look-alike, the same caption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from clipkit.embed import in_order
from clipkit.errors import DatasetError, ImageError
from clipkit.images import decode, image_id
from clipkit.records import SPLITS
from clipkit.sources import Broken, Picture, Row, Source
from data_prep.clean import same_caption
from data_prep.split import HASH_BYTES, MAX_RADIUS, near_pairs, perceptual_hash

_Look = tuple[str, bytes]  # image_id, perceptual hash


@dataclass(frozen=True, slots=True)
class Leak:
    """A picture or caption that occurs in two splits."""

    kind: str  # "same-file", "look-alike", "same-caption"
    splits: tuple[str, str]
    pictures: tuple[str, str]  # for a caption the first picture of each split
    detail: str


@dataclass(frozen=True, slots=True)
class Leaks:
    """Leaks between splits. Equal captions are listed apart: two pictures may both be "A dog runs."."""

    pictures: dict[str, int]  # by split
    pairs: tuple[Leak, ...]  # pictures
    shared_captions: tuple[Leak, ...]
    unreadable: tuple[tuple[str, str], ...]  # picture or row, why


def find_leaks(
    source: Source,
    *,
    radius: int = MAX_RADIUS,
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Leaks:
    """Compare the pictures and captions of all splits; every picture is read and hashed.

    A picture is listed once for each other split in which it occurs, with the first picture there.
    Raises DatasetError if the source has no splits.
    """
    names: list[str] = []
    splits: list[int] = []
    ids: list[str] = []
    looks = bytearray()
    # image_id or caption -> split -> first picture there
    files: dict[str, dict[int, str]] = defaultdict(dict)
    captions: dict[str, dict[int, str]] = defaultdict(dict)
    unreadable: list[tuple[str, str]] = []
    for done, (row, future) in enumerate(in_order(source.rows(), _start, workers), 1):
        if isinstance(row, Broken):
            unreadable.append((row.place, row.detail))
        elif row.split is not None:
            split = SPLITS.index(row.split)
            for caption in row.captions:
                captions[same_caption(caption)].setdefault(split, row.name)
            look = future.result() if future else "not read"
            if isinstance(look, str):
                unreadable.append((row.name, look))
            else:
                names.append(row.name)
                splits.append(split)
                ids.append(look[0])
                looks += look[1]
                files[look[0]].setdefault(split, row.name)
        if on_progress:
            on_progress(done, source.total)
    if not splits:
        raise DatasetError(
            f"{source.path} has no pictures in splits; build a dataset of it: clipkit data build "
            f"{source.path} --out DIR"
        )
    hashes = np.frombuffer(bytes(looks), np.uint8).reshape(len(ids), HASH_BYTES)
    return Leaks(
        {split: splits.count(n) for n, split in enumerate(SPLITS) if n in splits},
        (*_shared("same-file", files), *_look_alikes(hashes, radius, ids, splits, names)),
        tuple(_shared("same-caption", captions)),
        tuple(unreadable),
    )


def _start(pool: ThreadPoolExecutor, row: Row | Broken) -> Future[_Look | str] | None:
    return None if isinstance(row, Broken) else pool.submit(_look, row.picture)


def _look(picture: Picture) -> _Look | str:
    """Return (image_id, perceptual hash) of a picture, or why it cannot be read."""
    try:
        data = picture.read()
        return image_id(data), perceptual_hash(decode(data, target=128).rgb)
    except ImageError as error:
        return str(error)


def _shared(kind: str, first: dict[str, dict[int, str]]) -> Iterator[Leak]:
    """Yield a leak for each two splits that share a key; `first` is key -> split -> picture."""
    for key, places in first.items():
        for one, two in combinations(sorted(places), 2):
            yield Leak(kind, (SPLITS[one], SPLITS[two]), (places[one], places[two]), key)


def _look_alikes(
    hashes: NDArray[np.uint8], radius: int, ids: list[str], splits: list[int], names: list[str]
) -> Iterator[Leak]:
    for row, other in _crossing(hashes, radius, splits):
        if ids[row] != ids[other]:
            one, two = sorted((row, other), key=lambda n: splits[n])
            bits = int(np.bitwise_count(hashes[one] ^ hashes[two]).sum())
            detail = f"{bits} of 256 bits of the perceptual hash differ"
            of = (SPLITS[splits[one]], SPLITS[splits[two]])
            yield Leak("look-alike", of, (names[one], names[two]), detail)


def _crossing(
    hashes: NDArray[np.uint8], radius: int, splits: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield near pairs across splits.

    Rows of one hash count as one in each split: near_pairs chains equal rows, and a chain's links need
    not cross splits where its ends do.
    """
    unique, back = np.unique(hashes, axis=0, return_inverse=True)
    back = back.ravel()
    members: dict[int, dict[int, int]] = defaultdict(dict)  # hash -> split -> first row
    for row, (number, split) in enumerate(zip(back.tolist(), splits, strict=True)):
        members[number].setdefault(split, row)
    for places in members.values():
        yield from combinations(places.values(), 2)
    for one, two in near_pairs(unique, radius).tolist():
        for split, row in members[one].items():
            for other, rival in members[two].items():
                if split != other:
                    yield row, rival
