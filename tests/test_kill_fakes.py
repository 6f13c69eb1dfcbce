"""kill -9 at random moments of the real command, with small towers and a library that changes.

In each round the library changes: pictures come, go and move, captions are written and deleted. The
command is killed several times, then runs to its end. Every other round fills a second model instead.
After each kill the index is sound, nothing that is still there is lost, nothing is there twice, every
picture has the vector of the model that answers, and that is the old one until the new one is whole.
After each round the index says the same as one that was made by an unbroken run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_kill import PROJECT, Holding, check_sound, equal_bytes, holding

from clipkit.catalog import Catalog
from clipkit.errors import InputError
from clipkit.index import load_snapshot

pytestmark = pytest.mark.end_to_end

COMMAND = [sys.executable, str(Path(__file__).with_name("colour_command.py")), "index"]


def start(pictures: Path, index: Path, model: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(pictures), "--index", str(index), "--model", model, "--batch-size", "8"],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def to_the_end(pictures: Path, index: Path, model: str) -> float:
    started = time.monotonic()
    with start(pictures, index, model) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - started


class Library:
    """Small pictures of noise whose files come, go, move and are captioned."""

    def __init__(self, folder: Path, count: int, rng: random.Random) -> None:
        self.folder, self.rng, self.made = folder, rng, 0
        for _ in range(count):
            self._add()
        (folder / "broken.png").write_bytes(b"no picture")

    def _add(self) -> None:
        colours = np.random.default_rng(self.made).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = self.folder / f"{self.made % 5}" / f"{self.made:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).resize((160, 120)).save(path, compress_level=1)
        self.made += 1

    def change(self, share: float) -> None:
        """Add, delete, move, copy and caption this share of the pictures each."""
        paths = sorted(self.folder.rglob("*.png"))
        few = max(1, int(share * len(paths)))
        self.rng.shuffle(paths)
        gone, moved, copied, named = (paths[n * few : (n + 1) * few] for n in range(4))
        for path in gone:
            path.unlink()
        for path in moved:
            path.rename(path.with_name(f"moved-{path.name}"))
        for path in copied:
            shutil.copy(path, self.folder / f"copy-{self.made}-{path.name}")
        for path in named:
            path.with_suffix(".txt").write_text(f"caption {self.made} of {path.name}")
        for _ in range(few):
            self._add()


def answering(index: Path) -> str | None:
    with Catalog.open(index) as catalog:
        active = catalog.active_encoder()
        if active is None:
            return None
        snapshot = load_snapshot(catalog, active.encoder_id, catalog.snapshot(active.encoder_id))
        pointer = catalog.snapshot(active.encoder_id)
        assert (snapshot is None) == (pointer is None)  # what is pointed to can be read
        return active.spec


def paths_of(held: Holding) -> dict[str, str]:
    return {path: id for id, places in held.places.items() for path in places}


def check_killed(index: Path, before: Holding, expected: Holding, models: set[str]) -> None:
    try:
        after = holding(index)
    except InputError as error:
        assert not before.vectors and "no index at" in str(error), error
        return
    check_sound(index)
    assert answering(index) in models | ({None} if not before.vectors else set())
    known, old, new = paths_of(after), paths_of(before), paths_of(expected)
    assert not {path for path, id in old.items() if new.get(path) == id and known.get(path) != id}
    assert all(old.get(path) == id or new.get(path) == id for path, id in known.items())
    for id, vector in after.vectors.items():
        reference = before if answering(index) == "colours" else expected
        assert id not in reference.vectors or equal_bytes(vector, reference.vectors[id])


def check_equal(held: Holding, expected: Holding) -> None:
    assert held.places == expected.places
    assert held.texts == expected.texts
    assert held.skipped == expected.skipped
    assert held.vectors.keys() == expected.vectors.keys()
    assert all(equal_bytes(held.vectors[id], v) for id, v in expected.vectors.items())


def survive(folder: Path, *, kills: int, a_round: int, pictures: int, seed: int) -> None:
    rng = random.Random(seed)
    library = Library(folder / "pictures", pictures, rng)
    index = folder / "index"
    seconds = {"colours": to_the_end(library.folder, index, "colours"), "turned": 2.0}
    done = early = rounds = late = 0
    while done < kills:
        fill = rounds % 2 == 1
        if rounds % 4 == 0:
            shutil.rmtree(index)  # every fourth round is a first run
        library.change(0.05)
        model = "turned" if fill else "colours"
        unbroken = folder / f"unbroken-{rounds}"
        if fill:  # the library changed under the old model, which then is filled beside
            to_the_end(library.folder, index, "colours")
            shutil.copytree(index, unbroken)
        seconds[model] = to_the_end(library.folder, unbroken, model)
        expected = holding(unbroken)
        before = holding(index) if index.exists() else Holding({}, {}, {}, {})
        for _ in range(min(a_round, kills - done)):
            with start(library.folder, index, model) as process:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=seconds[model] * rng.uniform(0.2, 1.05))
                process.kill()
                _, errors = process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                late += 1
            done += 1
            early += not index.exists()
            check_killed(index, before, expected, {"colours", "turned"} if fill else {"colours"})
            if index.exists() and answering(index) == "turned":
                check_equal(holding(index), expected)  # it was switched to, so it is whole
            before = holding(index) if (index / "catalog.sqlite").exists() and done else before
        to_the_end(library.folder, index, model)
        check_sound(index)
        check_equal(holding(index), expected)
        assert answering(index) == model
        if fill:
            shutil.rmtree(index)  # back to the first model
            shutil.copytree(folder / f"unbroken-{rounds - 1}", index)
        shutil.rmtree(folder / f"unbroken-{rounds - 1}", ignore_errors=True)
        rounds += 1
    print(
        f"{done} kills in {rounds} rounds of {seconds['colours']:.1f} s: {early} before there was an "
        f"index, {late} after the end"
    )


@pytest.mark.timeout(900)
def test_killed_six_times_in_runs_and_in_changes_of_the_model(tmp_path: Path) -> None:
    survive(tmp_path, kills=6, a_round=3, pictures=200, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_two_hundred_times_in_runs_and_in_changes_of_the_model(tmp_path: Path) -> None:
    survive(tmp_path, kills=200, a_round=10, pictures=400, seed=2)
