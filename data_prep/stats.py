"""What a data set looks like, in numbers and in one picture."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.errors import DatasetError, ImageError
from clipkit.images import decode, image_id, read_bytes
from clipkit.records import SPLITS
from clipkit.sources import Broken, RawPair, Source
from data_prep.load import in_order

SHEET = (14, 5)  # pictures across and down the contact sheet
TILE = 144  # pixels

# Words that say nothing of what a picture shows.
_STOP = frozenset(
    """a an the and or of in on at to for from with by as is are was were be been being it its this that
    these those there their his her he she they them him while into onto over up down out off near next
    some one two three who which has have having him not no s t el la los las un una de del en y con der
    die das und ein eine einer einem einen mit auf im am den dem ist von zu""".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """Counts over all splits together."""

    pictures: Mapping[str, int]  # by split; "" for none
    captions_per_picture: NDArray[np.int64]  # (N,)
    caption_words: NDArray[np.int64]  # (M,) words in each caption
    sizes: NDArray[np.int64]  # (R, 2): width, height of the pictures that could be read
    words: Counter[str]  # without those that say little
    captions: int
    distinct_captions: int
    unreadable: int
    tiles: tuple[Image.Image, ...]  # of a sample by content: the same in each run


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    image_id: str
    size: tuple[int, int]
    rgb: Image.Image  # small


def collect(
    source: Source,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Stats:
    """Goes through a source once; every picture is read. DatasetError if there is none."""
    pictures: Counter[str] = Counter()
    per_picture: list[int] = []
    lengths: list[int] = []
    sizes: list[tuple[int, int]] = []
    words: Counter[str] = Counter()
    distinct: set[int] = set()
    unreadable = 0
    # The greatest hashes are put out first, so the least remain: a sample that content decides.
    best: list[tuple[int, int, Image.Image]] = []
    order = itertools.count()
    for done, (pair, future) in enumerate(in_order(source.rows(), _start, workers), 1):
        if isinstance(pair, Broken):
            unreadable += 1
        else:
            pictures[pair.split or ""] += 1
            per_picture.append(len(pair.captions))
            for caption in pair.captions:
                said = re.findall(r"\w+(?:['’]\w+)?", caption.casefold())
                lengths.append(len(said))
                words.update(w for w in said if _telling(w))
                distinct.add(hash(caption.casefold()))
            seen = future.result() if future else None
            if seen is None:
                unreadable += 1
            else:
                sizes.append(seen.size)
                rank = -int(seen.image_id[:12], 16)
                heapq.heappush(best, (rank, next(order), seen.rgb))
                if len(best) > SHEET[0] * SHEET[1]:
                    heapq.heappop(best)
        if on_progress:
            on_progress(done, source.total)
    if not pictures:
        raise DatasetError(f"{source.path} holds no pictures that can be counted")
    return Stats(
        dict(pictures),
        np.array(per_picture, np.int64),
        np.array(lengths, np.int64),
        np.array(sizes, np.int64).reshape(-1, 2),
        words,
        len(lengths),
        len(distinct),
        unreadable,
        tuple(rgb for _, _, rgb in sorted(best, key=lambda item: item[:2], reverse=True)),
    )


def _telling(word: str) -> bool:
    """Not a number, not a lone Latin letter, not a word that stands with everything."""
    return word not in _STOP and not word.isdigit() and (len(word) > 1 or not word.isascii())


def _start(pool: ThreadPoolExecutor, pair: RawPair | Broken) -> Future[_Seen | None] | None:
    return None if isinstance(pair, Broken) else pool.submit(_see, pair.picture)


def _see(picture: Path | bytes) -> _Seen | None:
    try:
        data = read_bytes(picture) if isinstance(picture, Path) else picture
        decoded = decode(data, target=TILE // 2)
    except ImageError:
        return None
    small = decoded.rgb
    small.thumbnail((TILE, TILE), Image.Resampling.BICUBIC)
    return _Seen(image_id(data), (decoded.width, decoded.height), small)


def lines(stats: Stats) -> list[str]:
    """The numbers in words, a line each."""
    total = sum(stats.pictures.values())
    splits = [n for n in (*SPLITS, "") if n in stats.pictures]
    told = ", ".join(f"{name or 'no split'} {stats.pictures[name]:,}" for name in splits)
    found = [f"pictures   {total:,} ({told})"]
    if stats.unreadable:
        found.append(f"unreadable {stats.unreadable:,}")
    each = stats.captions_per_picture
    found.append(
        f"captions   {stats.captions:,}, {stats.distinct_captions:,} distinct; "
        f"{each.min()} to {each.max()} a picture, mean {each.mean():.2f}"
    )
    if stats.caption_words.size:
        low, middle, high = np.percentile(stats.caption_words, (5, 50, 95))
        found.append(
            f"words      {middle:g} in a caption (5 % below {low:g}, 5 % above {high:g}, "
            f"longest {stats.caption_words.max():,})"
        )
        common = ", ".join(f"{word} {count:,}" for word, count in stats.words.most_common(15))
        found.append(f"frequent   {common}")
    if stats.sizes.size:
        sides = stats.sizes.min(axis=1)
        width, height = np.median(stats.sizes, axis=0)
        found.append(
            f"sizes      median {width:.0f} x {height:.0f}; shorter side {sides.min()} to "
            f"{sides.max()} pixels"
        )
    return found
