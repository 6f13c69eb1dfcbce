"""Readers beside a writer, two writers, and a writer that is killed: whole commits only."""

# ruff: noqa: F811
from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from catalogs import DIM, ENCODER, add, folder, found, image_id, reader, writer  # noqa: F401

from clipkit.catalog import Catalog
from clipkit.errors import CatalogBusy, InputError


def test_readers_see_whole_commits_and_the_writer_its_own_work(
    writer: Catalog, reader: Catalog
) -> None:
    counter = reader.change_counter()
    num = add(writer, 1, "/p/cat.jpg")
    assert found(writer, "cat") == [num]
    assert found(reader, "cat") == []
    assert reader.change_counter() == counter
    writer.commit()
    assert found(reader, "cat") == [num]
    assert reader.change_counter() == counter + 1
    writer.add_skipped("/p/bad", size=1, mtime_ns=1, reason="r", message="m")
    writer.commit()
    assert reader.change_counter() == counter + 1  # no search answers otherwise


def test_what_is_not_committed_never_was(folder: Path) -> None:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="s", config_json="{}", dim=DIM)
        add(catalog, 2, "/p/2")
    with pytest.raises(ZeroDivisionError), Catalog.open(folder, write=True) as catalog:
        add(catalog, 3, "/p/3", thumbnail=b"t")
        raise ZeroDivisionError
    catalog = Catalog.open(folder, write=True)
    add(catalog, 4, "/p/4")
    catalog.close()
    with Catalog.open(folder) as reader:
        assert list(dict(reader.known_files("/p"))) == ["/p/2"]
        assert reader.thumbnail(image_id(3)) is None


def test_a_reader_cannot_write(reader: Catalog) -> None:
    with pytest.raises(InputError, match="open it with write=True"):
        add(reader, 1, "/p/1")


def test_a_closed_catalog_says_so(folder: Path) -> None:
    catalog = Catalog.open(folder, write=True)
    catalog.close()
    catalog.close()
    with pytest.raises(InputError, match="was closed"):
        catalog.stats()


def test_reading_while_writing_in_threads(writer: Catalog, reader: Catalog) -> None:
    """Trap 30: adding during a search. Every read shows a whole number of 10-picture commits."""
    commits, size = 25, 10
    done = threading.Event()
    problems: list[str] = []

    def read() -> None:
        seen = 0
        while not done.is_set():
            stats = reader.stats(ENCODER)
            if not stats.pictures == stats.vectors == stats.places or stats.pictures % size:
                problems.append(f"half a commit: {stats}")
            stored = reader.vectors(ENCODER)
            if len(stored.nums) % size or len(set(stored.nums.tolist())) != len(stored.nums):
                problems.append(f"{len(stored.nums)} vectors")
            if any(len(reader.rows([num])) != 1 for num in stored.nums[-3:]):
                problems.append("a vector without its picture")
            if len(stored.nums) < seen:
                problems.append("went backwards")
            seen = len(stored.nums)
            reader.phrase("common")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for commit in range(commits):
        for number in range(commit * size, (commit + 1) * size):
            add(writer, number, f"/p/common_{number}.jpg")
        writer.commit()
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(reader.phrase("common").nums) == commits * size


def test_two_writers_in_one_process(folder: Path) -> None:
    first = Catalog.open(folder, write=True)
    with pytest.raises(CatalogBusy, match="this process is writing to the index"):
        Catalog.open(folder, write=True)
    first.close()
    Catalog.open(folder, write=True).close()


def python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE, text=True
    )


def test_another_process_is_named_and_its_death_frees_the_lock(folder: Path) -> None:
    code = """
        import sys, time
        from clipkit.catalog import Catalog
        catalog = Catalog.open(sys.argv[1], write=True)
        print("open", flush=True)
        time.sleep(60)
    """
    with python(code, str(folder)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CatalogBusy, match=f"process {other.pid} is writing .* wait for it"):
            Catalog.open(folder, write=True)
        with Catalog.open(folder) as reader:
            assert reader.stats().pictures == 0
        other.kill()
        other.wait()
        Catalog.open(folder, write=True).close()


def test_kill_9_at_any_time_leaves_whole_commits(folder: Path) -> None:
    """Each commit holds 5 pictures with place and vector. After a kill, at least what was reported
    as committed is there, at most one commit more, and the next run goes on from there."""
    code = """
        import sys
        import numpy as np
        from clipkit.catalog import Catalog
        catalog = Catalog.open(sys.argv[1], write=True)
        catalog.register_encoder("enc-1", spec="s", config_json="{}", dim=64)
        start = catalog.stats("enc-1").pictures
        for first in range(start, start + 100_000, 5):
            nums = []
            for n in range(first, first + 5):
                num = catalog.add_picture(image_id=f"{n:032x}", width=1, height=1, format="PNG",
                    bytes=1, thumbnail=b"t" * 5000)
                catalog.add_place(num, f"/p/name_{n}.jpg", size=1, mtime_ns=n,
                    captions=[f"caption {n} " * 20])
                nums.append(num)
            catalog.add_vectors("enc-1", np.array(nums), np.full((5, 64), 1 / 8, np.float32))
            catalog.commit()
            print(first + 5, flush=True)
    """
    rng = random.Random(5)
    for _ in range(6):
        with python(code, str(folder)) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            told = int((process.stdout.read().split("\n")[-2:-1] or [told])[0])
        with Catalog.open(folder) as reader:
            stats = reader.stats(ENCODER)
            assert stats.pictures in (told, told + 5)
            assert stats.vectors == stats.places == stats.pictures
            assert len(reader.phrase("caption").nums) == stats.pictures
            assert len(reader.vectors(ENCODER).nums) == stats.pictures
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        db.execute("INSERT INTO texts (texts) VALUES ('integrity-check')")  # raises if not
    db.close()
