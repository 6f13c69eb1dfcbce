"""The pass from pictures to vectors: in order, bounded; a file read once, a content encoded once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from clipkit import images
from clipkit.embed import Encoded, Known, Unreadable, ahead, encode_pictures
from clipkit.errors import ImageError

# ---- the thread pool


def test_results_come_in_order_whichever_is_done_first() -> None:
    """Item 0 ends only when item 1 has begun: one after the other would never end."""
    begun = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert begun.wait(30)
        begun.set()
        return 10 * item

    assert list(ahead(range(5), work, workers=2)) == [0, 10, 20, 30, 40]
    assert list(ahead([], work)) == []


def test_no_more_than_the_bound_is_worked_on_ahead() -> None:
    """At any time at most `bound` items were taken and not handed out."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 40:
            taken += 1
            yield taken

    ahead_by = []
    for done, _ in enumerate(ahead(items(), lambda item: item, workers=3, bound=7), 1):
        ahead_by.append(taken - (done - 1))
    assert taken == 40
    assert max(ahead_by) == 7


def test_an_error_is_raised_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ValueError("item 1")
        return item

    results = ahead(range(100), work, workers=4, bound=50)
    assert next(results) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_closing_begins_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 items are submitted to 2 threads, which hold items 1 and 2 until the generator is closed: the
    other 47 are never begun. Fails for a pool that works off its queue first."""
    held = threading.Event()
    begun: list[int] = []
    shutdown = ThreadPoolExecutor.shutdown

    def releasing(pool: ThreadPoolExecutor, wait: bool = True, **options: Any) -> None:
        shutdown(pool, wait=False, **options)
        held.set()
        shutdown(pool, wait=wait)

    def work(item: int) -> int:
        begun.append(item)
        if item > 0:
            assert held.wait(30)
        return item

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", releasing)
    with closing(ahead(range(100), work, workers=2, bound=50)) as results:
        assert next(results) == 0
    assert len(begun) <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# ---- the pass


class Pass:
    """Items are numbers, a picture's bytes are its content's name; a vector is [length of the bytes]."""

    preferred_batch = 3

    def __init__(self, *contents: bytes | None, known: dict[bytes, float] | None = None) -> None:
        self.contents = contents
        self.stored = {images.image_id(data): v for data, v in (known or {}).items()}
        self.reads: list[int] = []
        self.batches: list[list[bytes]] = []
        self.loaded = False

    def towers(self) -> Any:
        self.loaded = True
        return self

    def read(self, item: int) -> bytes:
        self.reads.append(item)
        if (data := self.contents[item]) is None:
            raise ImageError("file is empty (0 bytes)", reason="empty")
        return data

    def encode_images(self, pixels: list[bytes]) -> Any:
        self.batches.append(pixels)
        return np.array([[len(p)] for p in pixels], np.float32)

    def run(self, *, store: bool = True) -> list[tuple[int, str]]:
        """(item, what became of it), in the order of the results."""
        outcome = []
        for result in encode_pictures(
            range(len(self.contents)),
            self.towers,
            read=self.read,
            lookup=self.stored.get,
            prepare=lambda item, _, data: (data, f"extra {item}"),
            workers=2,
        ):
            if isinstance(result, Known):
                outcome.append((result.item, f"known {result.stored:g}"))
            elif isinstance(result, Unreadable):
                outcome.append((result.item, result.error.reason))
            else:
                assert isinstance(result, Encoded)
                for picture, vector in zip(result.pictures, result.vectors, strict=True):
                    assert picture.extra == f"extra {picture.item}"
                    assert picture.image_id == images.image_id(picture.pixels)
                    outcome.append((picture.item, f"new {vector[0]:g}"))
                    if store:
                        self.stored[picture.image_id] = float(vector[0])
        return outcome


def test_each_file_is_read_once_and_each_content_encoded_once() -> None:
    """Batches of 3 that were prepared: "a", "bb" and the copy "a" are one, "ccc" and "bb" the next.
    Copies within a batch and of an earlier batch are known by the time they are handed out."""
    run = Pass(b"a", None, b"dddd", b"bb", b"a", b"ccc", b"bb", known={b"dddd": 4})
    assert sorted(run.run()) == [
        (0, "new 1"),
        (1, "empty"),
        (2, "known 4"),
        (3, "new 2"),
        (4, "known 1"),
        (5, "new 3"),
        (6, "known 2"),
    ]
    assert sorted(run.reads) == list(range(7))
    assert run.batches == [[b"a", b"bb"], [b"ccc"]]


def test_the_towers_are_not_loaded_for_what_is_known_or_broken() -> None:
    run = Pass(b"a", None, known={b"a": 7})
    assert run.run() == [(0, "known 7"), (1, "empty")]
    assert not run.loaded


def test_a_copy_of_a_picture_that_the_caller_refuses_is_handed_out_too() -> None:
    """The caller stores nothing, as for a vector that is not finite: no item is lost or repeated."""
    run = Pass(b"a", b"a", b"a", b"bb")
    assert sorted(run.run(store=False)) == [(0, "new 1"), (1, "new 1"), (2, "new 1"), (3, "new 2")]
