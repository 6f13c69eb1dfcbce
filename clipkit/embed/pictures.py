"""One pass from pictures to vectors: read, hash, look up, decode, encode.

    items ── threads: read once, hash, look up, decode, resize ──▶ batches ──▶ image tower ──▶ results

Indexing, evaluation and training with frozen towers run it; each brings its own reader and store.
Threads suffice: Pillow, hashing and torch release the interpreter lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from clipkit import images
from clipkit.arrays import Float32
from clipkit.errors import ImageError
from clipkit.heap import give_back_large_blocks

if TYPE_CHECKING:
    from clipkit.lazy_encoder import Towers

Item = TypeVar("Item")
Stored = TypeVar("Stored")
Extra = TypeVar("Extra")
Result = TypeVar("Result")

# What the threads hold at once, however many they are; a larger file or picture is worked on alone.
# A decoded pixel costs 7 bytes: 4 of Pillow's and 3 of its copy for the towers.
READ_BYTES = 64 * 10**6
DECODED_MEGAPIXELS = 40.0


class Budget:
    """Admits work while its costs together stay within `limit`; when nothing runs, any one work. Who
    came first is admitted first, so that large work is not kept waiting by small.

    A thread that holds a share of two budgets must always take them in the same order.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._used = 0
        self._freed = threading.Condition()
        self._turn = threading.Lock()  # of the one who waits for room

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield `take(cost)`, to be called once; it blocks until there is room. The share is given
        back when the block ends."""
        taken = 0

        def take(cost: int) -> None:
            nonlocal taken
            with self._turn, self._freed:
                self._freed.wait_for(lambda: not self._used or self._used + cost <= self._limit)
                self._used += cost
                taken += cost

        try:
            yield take
        finally:
            with self._freed:
                self._used -= taken
                self._freed.notify_all()


def in_order(
    items: Iterable[Item],
    start: Callable[[ThreadPoolExecutor, Item], Future[Result] | None],
    workers: int | None = None,
    bound: int | None = None,
    initializer: Callable[[], None] | None = None,
) -> Generator[tuple[Item, Future[Result] | None]]:
    """Yield each item, in order, with the work that `start(pool, item)` submitted for it, if any.

    At most `bound` items (default: 4 per thread and 16) are taken and not yet yielded; `items` and
    `start` run in the calling thread. When the generator is closed, by an error too, work that has not
    begun is cancelled.
    """
    workers = workers or max(2, os.cpu_count() or 1)
    waiting: deque[tuple[Item, Future[Result] | None]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=initializer)
    try:
        for item in items:
            waiting.append((item, start(pool, item)))
            if len(waiting) >= (bound or 4 * workers + 16):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    *,
    workers: int | None = None,
    bound: int | None = None,
    initializer: Callable[[], None] | None = None,  # of each thread
) -> Generator[Result]:
    """Yield `work(item)` of each item, in order, computed in threads before it is asked for.

    What `work` raises is raised in its turn. The number ahead is bounded as by `in_order`.
    """

    def start(pool: ThreadPoolExecutor, item: Item) -> Future[Result]:
        return pool.submit(work, item)

    with closing(in_order(items, start, workers, bound, initializer)) as started:
        for _, future in started:
            assert future is not None
            yield future.result()


@dataclass(frozen=True, slots=True)
class Known(Generic[Item, Stored]):
    """A picture whose vector is stored."""

    item: Item
    image_id: str
    stored: Stored  # what `lookup` returned


@dataclass(frozen=True, slots=True)
class Unreadable(Generic[Item]):
    """A picture that cannot be read or decoded."""

    item: Item
    error: ImageError


@dataclass(frozen=True, slots=True, eq=False)
class Prepared(Generic[Item, Extra]):
    """A picture that is ready for the image tower. The decoded original is not held."""

    item: Item
    image_id: str
    pixels: Any  # what the towers' `preprocess` returned
    extra: Extra


@dataclass(frozen=True, slots=True, eq=False)
class Encoded(Generic[Item, Extra]):
    """A batch of distinct pictures and their vectors, (B, D)."""

    pictures: list[Prepared[Item, Extra]]
    vectors: Float32


def encode_pictures(
    items: Iterable[Item],
    towers: Callable[[], Towers],
    *,
    read: Callable[[Item], bytes],
    lookup: Callable[[str], Stored | None],
    prepare: Callable[[Item, str, bytes, Callable[[int], None]], tuple[Any, Extra]],
    encode: Callable[[list[Any]], Float32] | None = None,
    size: Callable[[Item], int] = lambda _: 0,
    workers: int | None = None,
    batch_size: int | None = None,
    decoded_megapixels: float = DECODED_MEGAPIXELS,
) -> Generator[Known[Item, Stored] | Unreadable[Item] | Encoded[Item, Extra]]:
    """Yield what became of each item: a stored vector, a batch of new ones, or an error.

    In threads: `read(item)` gives a file's bytes, once; `lookup(image_id)` what is stored of them;
    `prepare(item, image_id, bytes, admit)` the tower's pixels and whatever else the caller keeps: it
    gives `admit` to `images.decode`, so that no more than `decoded_megapixels` are decoded at once.
    `size(item)` is the number of bytes that `read` will return; 0 if it is small or unknown. Then
    `encode` (default: the image tower) gets the pixels of a batch. The caller stores each batch before
    it asks for the next result, so that copies of a picture are found by `lookup` and encoded once.
    `towers` is called only if a picture must be encoded.
    """

    reading, decoding = Budget(READ_BYTES), Budget(decoded_megapixels * 1e6)

    def look(item: Item) -> Known[Item, Stored] | Unreadable[Item] | Prepared[Item, Extra]:
        try:
            with reading.share() as read_bytes, decoding.share() as admit:
                read_bytes(size(item))
                data = read(item)
                image_id = images.image_id(data)
                if (stored := lookup(image_id)) is not None:
                    return Known(item, image_id, stored)
                prepared = Prepared(item, image_id, *prepare(item, image_id, data, admit))
                del data  # before the shares are given back
                return prepared
        except ImageError as error:
            # they hold the file, and what was decoded of it
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return Unreadable(item, error)

    def encoded(
        waiting: list[Prepared[Item, Extra]],
    ) -> Iterator[Known[Item, Stored] | Encoded[Item, Extra]]:
        while waiting:
            copies: list[Prepared[Item, Extra]] = []
            batch: dict[str, Prepared[Item, Extra]] = {}
            for picture in waiting:
                if (stored := lookup(picture.image_id)) is not None:
                    yield Known(picture.item, picture.image_id, stored)
                elif picture.image_id in batch:
                    copies.append(picture)
                else:
                    batch[picture.image_id] = picture
            if pictures := list(batch.values()):
                pixels = [picture.pixels for picture in pictures]
                yield Encoded(pictures, (encode or towers().encode_images)(pixels))
            waiting = copies  # stored by now, or refused by the caller and encoded again

    give_back_large_blocks()
    workers = workers or max(2, os.cpu_count() or 1)
    bound = 4 * workers + (batch_size or 32)
    waiting: list[Prepared[Item, Extra]] = []
    with closing(ahead(items, look, workers=workers, bound=bound)) as results:
        for result in results:
            if not isinstance(result, Prepared):
                yield result
                continue
            waiting.append(result)
            if len(waiting) >= (batch_size or towers().preferred_batch):
                yield from encoded(waiting)
                waiting = []
        yield from encoded(waiting)
