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
from clipkit.embed import Budget, Encoded, Known, Unreadable, ahead, encode_pictures
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
            prepare=lambda item, _, data, __: (data, f"extra {item}"),
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


# ---- the memory that the threads hold


def test_a_budget_admits_what_fits_and_anything_when_nothing_runs() -> None:
    """Of a limit of 10, two shares of 5 run at once; a cost of 11 waits for both and then runs alone."""
    budget = Budget(10)
    admitted = threading.Event()
    running: list[str] = []

    def large() -> None:
        with budget.share() as take:
            take(11)
            running.append("large")
            admitted.set()

    with budget.share() as one, budget.share() as other:
        one(5)
        other(5)  # would block for ever if 5 + 5 were too much
        thread = threading.Thread(target=large)
        thread.start()
        running.append("small")
    assert admitted.wait(30)
    thread.join()
    assert running == ["small", "large"]
    with pytest.raises(ValueError, match="boom"), budget.share() as take:
        take(10)
        raise ValueError("boom")
    with budget.share() as take:
        take(11)  # the failed share was given back


def test_no_more_pixels_are_decoded_at_once_than_the_budget() -> None:
    """Twelve pictures of 1 MP, 12 threads, a budget of 3 MP: never more than three at once, though
    each stays admitted until a third one has come (or none is left). One of 5 MP runs alone."""
    lock, third = threading.Condition(), 0
    at_once: set[int] = set()
    most: list[tuple[int, bool]] = []

    def prepare(item: int, _: str, __: bytes, admit: Any) -> tuple[int, None]:
        nonlocal third
        admit(5_000_000 if item == 6 else 1_000_000)
        with lock:
            at_once.add(item)
            most.append((len(at_once), 6 in at_once))
            third = max(third, len(at_once))
            lock.notify_all()
            if item < 3:
                assert lock.wait_for(lambda: third == 3, timeout=30)
            at_once.remove(item)
        return item, None

    results = encode_pictures(
        range(12),
        lambda: None,  # type: ignore[arg-type, return-value]
        read=lambda item: bytes([item]),
        lookup=lambda _: None,
        prepare=prepare,
        encode=lambda pixels: np.ones((len(pixels), 1), np.float32),
        workers=12,
        batch_size=12,
        decoded_megapixels=3,
    )
    assert sum(len(result.pictures) for result in results if isinstance(result, Encoded)) == 12
    assert max(count for count, _ in most) == 3
    assert all(count == 1 for count, large in most if large)


def test_what_waits_unread_holds_neither_file_nor_traceback() -> None:
    def prepare(*_: Any) -> tuple[bytes, None]:
        try:
            raise OSError("Pillow's")
        except OSError as error:
            raise ImageError("broken", reason="broken") from error

    (result,) = encode_pictures(
        [0],
        lambda: None,  # type: ignore[arg-type, return-value]
        read=lambda _: b"a",
        lookup=lambda _: None,
        prepare=prepare,
        workers=1,
        batch_size=1,
    )
    assert isinstance(result, Unreadable)
    assert result.error.__traceback__ is None
    assert result.error.__cause__ is None and result.error.__context__ is None
