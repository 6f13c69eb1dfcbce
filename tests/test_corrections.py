"""Marks of right and wrong: what they speak of, kept and shared."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import corrections as module
from app.corrections import Corrections, Mark, as_query, marked_words
from clipkit.errors import CatalogBusy, ClipkitError, InputError, QueryError
from clipkit.query import parse

HOST = "http://127.0.0.1:7860"
ONE, TWO = "1" * 32, "2" * 32
Run = Callable[..., tuple[int, str, str]]


def words(typed: str) -> str | None:
    return marked_words(parse(typed))


# ---- what a mark speaks of


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("  a   red car ", "a red car"),
        ("a red car after:2023 path:trips sort:date", "a red car"),
        ("car red^2", "car red"),
        (r"\-5 degrees", "-5 degrees"),
        ("\u202egnp\u200e red", "gnp red"),  # marks of order only
        ("after:2023", None),
        ("", None),
        ("\u200e", None),
        ("dog -leash", None),  # a wrong hit may well be a dog
        ('dog "invoice 42"', None),
        (f"dog +{ONE}", None),
        ("x" * 1001, None),
    ],
)
def test_a_mark_speaks_of_the_words_alone(typed: str, expected: str | None) -> None:
    assert words(typed) == expected


@given(st.text(max_size=40))
def test_what_was_said_is_said_again_when_it_is_sent(typed: str) -> None:
    """The page sends `as_query(words)`, which must not be read as another question."""
    try:
        once = words(typed)
    except QueryError:
        return
    if once is not None:
        assert words(as_query(once)) == once


@pytest.mark.parametrize(
    ("query", "right", "sentence"),
    [
        ("aftr:2023", True, "unknown key 'aftr'"),
        ("dog -leash", True, "only results of a search by words"),
        ("after:2023", False, "only results of a search by words"),
    ],
)
def test_what_is_no_mark_is_refused_in_a_sentence(query: str, right: bool, sentence: str) -> None:
    """Fields that are missing or of another type are refused by the API: see test_api_v1.py."""
    with pytest.raises(InputError, match=re.escape(sentence)):
        Mark.of_query(ONE, query, right)


# ---- keeping


@pytest.fixture
def kept(tmp_path: Path) -> Corrections:
    return Corrections(tmp_path)


def test_one_mark_for_a_picture_and_a_query_and_the_last_counts(kept: Corrections) -> None:
    """Queries are one if they differ in case, accents' form or full stop only, as captions are."""
    kept.put(Mark(ONE, "a red car", True))
    kept.put(Mark(TWO, "a red car", True))
    kept.put(Mark(ONE, "A Red Car.", False))
    kept.put(Mark(ONE, "a blue car", True))
    assert kept.of("a red car") == {ONE: False, TWO: True} == kept.of("A RED CAR")
    assert kept.total() == 3
    assert [(m.image_id, m.query, m.right) for m in kept.all()] == [
        (TWO, "a red car", True),
        (ONE, "A Red Car.", False),
        (ONE, "a blue car", True),
    ]
    kept.put(Mark(ONE, "a red car", None))
    kept.put(Mark(ONE, "a red car", None))  # what is not there need not be taken back
    assert kept.of("a red car") == {TWO: True}
    assert len(kept.path.read_bytes().splitlines()) == 5


def test_it_is_on_the_disk_when_the_mark_is_made(kept: Corrections, tmp_path: Path) -> None:
    """A process that is killed right after the mark: nothing is closed, nothing flushed."""
    code = f"""
import os, signal
from pathlib import Path
from app.corrections import Corrections, Mark
Corrections(Path({str(tmp_path)!r})).put(Mark({ONE!r}, "a red car", True))
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False)
    assert kept.of("a red car") == {ONE: True}
    kept.put(Mark(TWO, "a red car", False))  # the lock died with its holder
    assert Corrections(tmp_path).of("a red car") == {ONE: True, TWO: False}


def test_many_who_mark_at_once_lose_nothing(tmp_path: Path) -> None:
    """4 pages (as 4 processes have them) x 2 threads x 15 marks; two of the pages look meanwhile."""
    pages = [Corrections(tmp_path) for _ in range(4)]

    def work(page: int, half: int) -> None:
        for number in range(15):
            pages[page].put(Mark(f"{page}{half}{number:02}".zfill(32), "red", number % 2 == 0))
            pages[page - 1].total()

    threads = [threading.Thread(target=work, args=(p, h)) for p in range(4) for h in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [page.total() for page in pages] == [120] * 4
    lines = (tmp_path / "corrections.jsonl").read_bytes().splitlines()
    assert len(lines) == 120 and all(json.loads(line) for line in lines)


def test_half_a_line_costs_that_line_only(
    kept: Corrections, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut in the middle of a write, then life goes on."""
    kept.put(Mark(ONE, "red", True))
    with kept.path.open("ab") as file:
        file.write(b'{"image_id": "2222')
    again = Corrections(kept.path.parent)
    assert kept.of("red") == again.of("red") == {ONE: True}  # it might still be being written
    again.put(Mark(TWO, "red", False))
    with caplog.at_level(logging.WARNING):
        assert kept.of("red") == again.of("red") == {ONE: True, TWO: False}
    assert "line skipped" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"image_id": 1, "query": "x", "right": true, "at": ""}',
        b'{"image_id": "1", "query": "x", "right": "yes", "at": ""}',
    ],
)
def test_lines_that_are_none_are_left_out(kept: Corrections, line: bytes) -> None:
    kept.put(Mark(ONE, "red", True))
    with kept.path.open("ab") as file:
        file.write(line + b"\n\n")
    kept.put(Mark(TWO, "red", True))
    assert kept.total() == 2 == Corrections(kept.path.parent).total()


def test_a_file_that_was_moved_away_or_put_back_is_noticed(kept: Corrections) -> None:
    kept.put(Mark(ONE, "red", True))
    away = kept.path.rename(kept.path.with_name("backup"))
    assert kept.total() == 0
    kept.put(Mark(TWO, "red", True))
    assert kept.of("red") == {TWO: True}
    away.replace(kept.path)
    assert kept.of("red") == {ONE: True}


def test_a_lock_that_is_held_is_said_and_readers_do_not_wait(kept: Corrections) -> None:
    kept.put(Mark(ONE, "red", True))
    busy = Corrections(kept.path.parent)
    busy._lock.timeout = 1.5
    with filelock.FileLock(kept.path.parent / "corrections.lock"):
        failed: list[Exception] = []

        def mark() -> None:
            try:
                busy.put(Mark(TWO, "red", True))
            except CatalogBusy as error:
                failed.append(error)

        thread = threading.Thread(target=mark)
        thread.start()
        time.sleep(0.1)
        assert busy.of("red") == {ONE: True}
        assert thread.is_alive()  # so that was while it waited
        thread.join()
    assert "try again" in str(failed[0])


def test_a_full_or_forbidden_disk_is_a_sentence_and_leaves_no_half_line(
    kept: Corrections, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.put(Mark(ONE, "red", True))
    whole = kept.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", full)
        with pytest.raises(ClipkitError, match="No space left on device; it needs free disk space"):
            kept.put(Mark(TWO, "red", True))
    assert kept.path.read_bytes() == whole and kept.total() == 1
    monkeypatch.setattr(module, "MOST_BYTES", len(whole) + 10)
    with pytest.raises(InputError, match=r"the limit is 0 MB; export the corrections, then move"):
        kept.put(Mark(TWO, "red", True))
    with pytest.raises(ClipkitError, match="cannot use"):
        kept.path.unlink()
        kept.path.mkdir()
        kept.put(Mark(TWO, "red", True))
