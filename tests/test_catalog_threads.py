"""Threads that read one catalog do not wait for each other, and an answer is of one committed state."""

# ruff: noqa: F811
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from catalogs import ENCODER, add, folder, reader, writer  # noqa: F401

from clipkit.catalog import Catalog, Filters, texts

PATIENCE = 60  # seconds after which a thread that should go on is taken to be stuck


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def before_lookup(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[str], None]]:
    """Functions that are called with each FTS5 expression before it is looked up in the tables."""
    functions: list[Callable[[str], None]] = []
    look_up = texts._nums_with

    def looked_up(db: Any, match: Any) -> Any:
        for function in functions:
            function(str(match))
        return look_up(db, match)

    monkeypatch.setattr(texts, "_nums_with", looked_up)
    return functions


def test_a_slow_lookup_holds_up_no_other_reader(
    writer: Catalog,
    reader: Catalog,
    threads: ThreadPoolExecutor,
    before_lookup: list[Callable[[str], None]],
) -> None:
    num = add(writer, 1, "/p/slow quick.jpg", tags=["sea"], camera="Canon")
    writer.commit()
    begun, go_on = threading.Event(), threading.Event()

    def stop_at_slow(match: str) -> None:
        if "slow" in match:
            begun.set()
            go_on.wait(PATIENCE)

    before_lookup.append(stop_at_slow)
    slow = threads.submit(reader.having, [["slow"]])
    try:
        assert begun.wait(PATIENCE)
        others = [
            threads.submit(lambda: list(reader.having([["quick"]])[0])),
            threads.submit(lambda: list(reader.phrase("quick").nums)),
            threads.submit(lambda: list(reader.matching(Filters(tags=("sea",), paths=("q",))))),
            threads.submit(lambda: list(reader.live_nums(ENCODER))),
            threads.submit(lambda: reader.listed("name", limit=9)[0]),
            threads.submit(lambda: [reader.stats(ENCODER).vectors]),
            threads.submit(lambda: [reader.facets().cameras[0][1]]),
        ]
        assert [other.result(PATIENCE) for other in others] == [[num]] * 5 + [[1]] * 2
        assert not slow.done()
    finally:
        go_on.set()
    assert list(slow.result()[0]) == [num]


def test_readers_of_different_words_look_them_up_at_once(
    writer: Catalog,
    reader: Catalog,
    threads: ThreadPoolExecutor,
    before_lookup: list[Callable[[str], None]],
) -> None:
    words = ["one", "two", "three", "four"]
    nums = [add(writer, at, f"/p/{word}.jpg") for at, word in enumerate(words, 1)]
    writer.commit()
    together = threading.Barrier(len(words))
    before_lookup.append(lambda _: together.wait(PATIENCE) and None)
    found = threads.map(lambda word: list(reader.having([[word]])[0]), words)
    assert list(found) == [[num] for num in nums]


def test_a_word_that_several_ask_for_at_once_is_looked_up_once(
    writer: Catalog,
    reader: Catalog,
    threads: ThreadPoolExecutor,
    before_lookup: list[Callable[[str], None]],
) -> None:
    num = add(writer, 1, "/p/word.jpg")
    writer.commit()
    lookups: list[str] = []
    before_lookup.append(lookups.append)
    found = threads.map(lambda _: list(reader.having([["word"]])[0]), range(8))
    assert list(found) == [[num]] * 8
    assert len(lookups) == 1


def test_an_answer_begun_before_a_commit_is_wholly_of_a_later_state(
    writer: Catalog,
    reader: Catalog,
    threads: ThreadPoolExecutor,
    before_lookup: list[Callable[[str], None]],
) -> None:
    """While a reader of the words a and b is at a, b is asked for after a commit, which adds a picture
    with both. What is kept of b has that picture now, so a must have it too."""
    first = add(writer, 1, "/p/alpha beta.jpg")
    writer.commit()
    begun, go_on = threading.Event(), threading.Event()

    def stop_at_alpha(match: str) -> None:
        if "alpha" in match and not begun.is_set():
            begun.set()
            go_on.wait(PATIENCE)

    before_lookup.append(stop_at_alpha)
    both = threads.submit(reader.having, [["alpha"], ["beta"]])
    try:
        assert begun.wait(PATIENCE)
        second = add(writer, 2, "/p/beta alpha.jpg")
        writer.commit()
        assert list(threads.submit(reader.having, [["beta"]]).result(PATIENCE)[0]) == [
            first,
            second,
        ]
    finally:
        go_on.set()
    assert [list(pictures) for pictures in both.result()] == [[first, second]] * 2


def test_answers_beside_a_writer_are_of_one_state(
    writer: Catalog, reader: Catalog, threads: ThreadPoolExecutor
) -> None:
    """Every commit adds a picture that has both words and passes the filter, and takes another's
    place away, so all answers of one state agree."""
    done = threading.Event()

    def read() -> int:
        answers = 0
        while not done.is_set() or not answers:
            one, other = reader.having([["left"], ["right"]])
            assert one == other
            assert len(reader.matching(Filters(paths=("left",), min_width=9))) <= 2
            stats = reader.stats(ENCODER)
            assert stats.pictures == stats.vectors == stats.places <= 2
            answers += 1
        return answers

    readers = [threads.submit(read) for _ in range(4)]
    try:
        for number in range(1, 40):
            add(writer, number, f"/p/left right {number}.jpg")
            if number > 2:
                writer.remove_places([f"/p/left right {number - 2}.jpg"])
            writer.commit()
    finally:
        done.set()
    assert all(answers.result(PATIENCE) for answers in readers)
    assert [list(pictures) for pictures in reader.having([["left"], ["right"]])] == [[38, 39]] * 2
