"""kill -9 at any moment of an index run: nothing is lost or doubled, and the next run goes on.

The real command runs as a process of its own and is killed again and again, then run to its end. A
run that ends before its kill is checked as well, and a new index begun, so that kills fall on all of
a run: imports, creation, first commits, writing, the end. The reference is one unbroken run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipkit.catalog import Catalog
from clipkit.errors import InputError

pytestmark = pytest.mark.end_to_end

PROJECT = Path(__file__).parents[1]

Vector = npt.NDArray[np.float16]
Same = Callable[[Vector, Vector], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """All that an index says: by content hash the places, texts and vector; by path the skipped."""

    places: dict[str, tuple[str, ...]]
    texts: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    vectors: dict[str, Vector]
    skipped: dict[str, str]


def make_pictures(folder: Path, count: int) -> Path:
    """`count` pictures, three of them twice, two with texts, and two files that are none."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 7}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path)
    for number in (3, count // 2, count - 1):
        shutil.copy(folder / f"{number % 7}" / f"{number:03}.jpg", folder / f"copy-{number}.jpg")
    (folder / "0" / "007.txt").write_text("A noise to remember")
    (folder / "0" / "metadata.jsonl").write_text(
        '{"file_name": "000.jpg", "keywords": ["first"]}\n'
    )
    (folder / "words.jpg").write_text("not a picture")
    (folder / "cut.jpg").write_bytes((folder / "1" / "001.jpg").read_bytes()[:5000])
    return folder


class Runs:
    """The index command over one folder, into any index, as often as wanted."""

    def __init__(self, pictures: Path, checkpoint: Path, *options: str) -> None:
        self.command = [sys.executable, "-m", "app.cli", "index", str(pictures)]
        self.options = ["--model", str(checkpoint), "--precision", "float32", *options]

    def start(self, index: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.command, "--index", str(index), *self.options],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def to_the_end(self, index: Path) -> float:
        """Seconds that it took."""
        started = time.monotonic()
        with self.start(index) as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        return time.monotonic() - started


def holding(index: Path) -> Holding:
    """Read the index through the catalog, with the vectors of the model that answers; fails when a
    picture is there twice, or without its vector."""
    with Catalog.open(index) as catalog:
        active = catalog.active_encoder()
        if active is None:
            return Holding({}, {}, {}, {row.path: row.reason for row in catalog.skipped()})
        stored = catalog.vectors(active.encoder_id)
        nums = [int(num) for num in stored.nums]
        assert len(set(nums)) == len(nums)
        rows = catalog.rows(nums)
        ids = [rows[num].image_id for num in nums]
        assert len(set(ids)) == len(ids)
        stats = catalog.stats(active.encoder_id)
        assert stats.pictures == stats.vectors == len(ids)  # none without its vector
        return Holding(
            places={row.image_id: row.places for row in rows.values()},
            texts={row.image_id: (row.captions, row.tags) for row in rows.values()},
            vectors=dict(zip(ids, stored.vectors, strict=True)),
            skipped={row.path: row.reason for row in catalog.skipped()},
        )


def check_sound(index: Path) -> None:
    """SQLite's own checks of what a kill left behind."""
    with closing(sqlite3.connect(index / "catalog.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


# Waits for the moment to kill, or until the process has ended by itself. Gets the process, its index,
# the pictures in it before, the number of kills so far and the seconds that a whole run takes.
Wait = Callable[[subprocess.Popen[bytes], Path, int, int, float], None]


def as_the_index_grows(
    process: subprocess.Popen[bytes], index: Path, before: int, _killed: int, _seconds: float
) -> None:
    """Right after a commit that adds pictures, while more of them are on their way."""
    while process.poll() is None:
        with suppress(InputError), Catalog.open(index) as catalog:  # InputError: no index yet
            encoders = catalog.encoders()
            if encoders and catalog.stats(encoders[-1].encoder_id).vectors > before:
                return
        time.sleep(0.1)


def all_over_the_run(kills: int, *, seed: int) -> Wait:
    """In turn: at a random moment of each of `kills / 2` equal parts of a whole run, parts shuffled;
    and within three seconds of a commit, which is when pictures are written."""
    rng = random.Random(seed)
    parts = (kills + 1) // 2
    moments = [(n + rng.random()) / parts for n in range(parts)]
    rng.shuffle(moments)

    def wait(
        process: subprocess.Popen[bytes], index: Path, before: int, killed: int, seconds: float
    ) -> None:
        timeout = moments[killed // 2] * seconds
        if killed % 2:
            as_the_index_grows(process, index, before, killed, seconds)
            timeout = 3 * rng.random()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=timeout)

    return wait


def survive(runs: Runs, folder: Path, same: Same, *, count: int, kills: int, wait: Wait) -> None:
    """Kill `kills` runs over `count` pictures, check after each, and compare what comes out."""
    seconds = runs.to_the_end(folder / "unbroken")
    expected = holding(folder / "unbroken")
    assert (len(expected.vectors), len(expected.skipped)) == (count, 2)
    assert sum(map(len, expected.places.values())) == count + 3
    assert sum(texts != ((), ()) for texts in expected.texts.values()) == 2

    rounds, stages = 0, []
    index, before = folder / "0", Holding({}, {}, {}, {})
    while len(stages) < kills:
        started = time.monotonic()
        with runs.start(index) as process:
            wait(process, index, len(before.vectors), len(stages), seconds)
            process.kill()
            _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            before = _after_kill(index, before)
            _check_part(before, expected, same)
            stages.append(len(before.vectors))
            continue
        # It ended first, so all is there. Once more, in a new index.
        assert process.returncode == 0, errors.decode()
        _check_equal(holding(index), expected, same)
        if not before.vectors:  # else the run had a start, and says nothing of a whole one's time
            seconds = min(seconds, time.monotonic() - started)
        rounds += 1
        assert rounds < 2 * kills
        index, before = folder / str(rounds), Holding({}, {}, {}, {})
    runs.to_the_end(index)
    check_sound(index)
    _check_equal(holding(index), expected, same)
    none, whole = stages.count(0), stages.count(count)
    print(
        f"{kills} kills in {rounds + 1} indexes, a whole run taking {seconds:.1f} s: {none} before "
        f"the first commit, {kills - none - whole} with part of the pictures, {whole} with all"
    )


def _after_kill(index: Path, before: Holding) -> Holding:
    """What the index holds now: no less than before."""
    try:
        after = holding(index)
    except InputError as error:
        # Killed before its first commit, there is no index yet; once there was one, there is.
        assert not before.vectors and "no index at" in str(error), error
        return before
    check_sound(index)
    assert before.vectors.keys() <= after.vectors.keys()
    return after


def _check_part(found: Holding, expected: Holding, same: Same) -> None:
    """What was committed is right, though not all."""
    assert found.vectors.keys() <= expected.vectors.keys()
    assert all(same(vector, expected.vectors[id]) for id, vector in found.vectors.items())
    assert all(set(places) <= set(expected.places[id]) for id, places in found.places.items())


def _check_equal(found: Holding, expected: Holding, same: Same) -> None:
    assert found.places == expected.places
    assert found.texts == expected.texts
    assert found.skipped == expected.skipped
    assert found.vectors.keys() == expected.vectors.keys()
    assert all(same(vector, expected.vectors[id]) for id, vector in found.vectors.items())


def equal_bytes(one: Vector, other: Vector) -> bool:
    return one.tobytes() == other.tobytes()


def equal_but_rounding(one: Vector, other: Vector) -> bool:
    """Equal, but for the last bit of some halves (2**-11 of values below 1): a resumed run composes
    its batches otherwise, and matrix products of another shape add up in another order."""
    return bool(np.abs(one.astype(np.float32) - other.astype(np.float32)).max() <= 2**-11)


@pytest.mark.timeout(900)
def test_killed_three_times_then_run_to_the_end(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    runs = Runs(make_pictures(tmp_path / "pictures", 200), tiny_checkpoint())
    survive(runs, tmp_path, equal_but_rounding, count=200, kills=3, wait=as_the_index_grows)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_fifty_times_then_run_to_the_end(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """One picture a batch, so that vectors must come out equal bit for bit."""
    runs = Runs(make_pictures(tmp_path / "pictures", 600), tiny_checkpoint(), "--batch-size", "1")
    wait = all_over_the_run(50, seed=2)
    survive(runs, tmp_path, equal_bytes, count=600, kills=50, wait=wait)
