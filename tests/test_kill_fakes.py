"""kill -9 at any moment of the real commands, with small towers and a library that changes.

Three kinds of rounds in turn: an index run after the library has changed (pictures come, go and move,
captions are written and deleted), every other one into a new index; a second model filled beside the
first; and `clipkit use`. The moments are shares of the time that an unbroken command took just before.
Only kills that hit count: a command that ended first is checked, and the round begun again. After each
kill the index is sound, nothing that is still there is lost, nothing is there twice, every picture has
the vector of the model that answers, and that is the old one until the new one is whole. After each
round the index says the same as one that was made by an unbroken run.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_kill import PROJECT, Holding, check_sound, equal_bytes, holding

from clipkit.catalog import Catalog
from clipkit.errors import InputError
from clipkit.index import load_snapshot

pytestmark = pytest.mark.end_to_end

PROGRAM = [sys.executable, str(Path(__file__).with_name("colour_command.py"))]
COMMAND = [*PROGRAM, "index"]
NOTHING = Holding({}, {}, {}, {})


class Commands:
    """Runs the real command in forks of a process that has imported everything."""

    def __init__(self, server: subprocess.Popen[str], errors: Path) -> None:
        self._server, self._errors = server, errors

    def run(self, *arguments: object, seconds: float | None = None) -> tuple[bool, float]:
        """Run a command, and kill it after `seconds`; return whether the kill hit it, and the seconds
        that it lived. A command that ends by itself must succeed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps([str(self._errors), *map(str, arguments)]), file=self._server.stdin)
        self._server.stdin.flush()
        child, started = int(self._server.stdout.readline()), time.monotonic()
        if seconds is not None and not select.select([self._server.stdout], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)  # a zombie at the worst: nobody has waited for it
        status = int(self._server.stdout.readline())
        assert status in (0, -signal.SIGKILL), self._errors.read_text()
        return status != 0, time.monotonic() - started


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    with subprocess.Popen(
        [*PROGRAM, "serve"],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as server:
        yield Commands(server, folder / "errors.txt")
        assert server.stdin is not None
        server.stdin.close()


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


def check_killed(index: Path, before: Holding, expected: Holding, models: set[str]) -> Holding:
    """Return what the index holds now."""
    try:
        after = holding(index)
    except InputError as error:
        assert not before.vectors and "no index at" in str(error), error
        return before
    check_sound(index)
    assert answering(index) in models | ({None} if not before.vectors else set())
    known, old, new = paths_of(after), paths_of(before), paths_of(expected)
    assert not {path for path, id in old.items() if new.get(path) == id and known.get(path) != id}
    assert all(old.get(path) == id or new.get(path) == id for path, id in known.items())
    for id, vector in after.vectors.items():
        reference = before if answering(index) == "colours" else expected
        assert id not in reference.vectors or equal_bytes(vector, reference.vectors[id])
    return after


def check_equal(held: Holding, expected: Holding) -> None:
    assert held.places == expected.places
    assert held.texts == expected.texts
    assert held.skipped == expected.skipped
    assert held.vectors.keys() == expected.vectors.keys()
    assert all(equal_bytes(held.vectors[id], v) for id, v in expected.vectors.items())


def restored(source: Path | None, target: Path) -> Holding:
    """Make `target` a copy of an index, or nothing; return what it holds."""
    shutil.rmtree(target, ignore_errors=True)
    if source is None:
        return NOTHING
    shutil.copytree(source, target)
    return holding(target)


def survive(folder: Path, *, kills: int, a_round: int, pictures: int, seed: int) -> None:
    rng = random.Random(seed)
    library = Library(folder / "pictures", pictures, rng)
    index, base, unbroken = folder / "index", folder / "base", folder / "unbroken"
    hits: Counter[str] = Counter()
    late: Counter[str] = Counter()

    with commands(folder) as command:

        def arguments(kind: str, model: str, where: Path) -> list[object]:
            if kind == "use":
                return ["use", model, "--index", where]
            place = ["index", library.folder, "--index", where]
            return [*place, "--model", model, "--batch-size", 8]

        command.run(*arguments("run", "colours", base))
        rounds = 0
        while hits.total() < kills:
            kind = ("run", "fill", "use")[rounds % 3]
            model = "colours" if kind == "run" else "turned"
            start: Path | None = base
            if kind == "run":
                library.change(0.05)
                start = base if rounds % 2 else None
                shutil.rmtree(unbroken, ignore_errors=True)
            else:
                restored(base, unbroken)
            if kind == "use":  # both models are whole, the old one answers
                command.run(*arguments("use", "colours", base))
                restored(base, unbroken)
            _, seconds = command.run(*arguments(kind, model, unbroken))
            expected = holding(unbroken)
            before = restored(start, index)
            done = 0
            while done < a_round and hits.total() < kills:
                moment = rng.uniform(0.02, 1) * seconds
                killed, lived = command.run(*arguments(kind, model, index), seconds=moment)
                before = check_killed(index, before, expected, {"colours", model})
                done += killed
                (hits if killed else late)[kind] += 1
                assert late.total() < 5 * kills
                if not killed:
                    seconds = min(seconds, lived)
                switched = bool(before.vectors) and answering(index) == "turned"
                if switched:  # so it is whole
                    check_equal(before, expected)
                if switched or not killed:  # once more from the start
                    before = restored(start, index)
            command.run(*arguments(kind, model, index))
            check_sound(index)
            check_equal(holding(index), expected)
            assert answering(index) == model
            if kind == "use":  # back to one model
                command.run(*arguments("use", "colours", index))
                shutil.rmtree(base)
                command.run(*arguments("run", "colours", base))
            else:
                restored(index, base)
            rounds += 1
            print(
                f"{dict(hits)} kills hit in {rounds} rounds, {dict(late)} ended first", flush=True
            )
    assert hits.total() == kills and len(hits) == 3


def of_an_earlier_version(index: Path, *, pictures: int) -> None:
    """Add pictures on a disk that is not there now, and the model "same" with vectors of its own for
    half of all, which shares no vector: so an index of an earlier version keeps them."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(pictures, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with Catalog.open(index, write=True) as catalog:
        catalog.add_root("/not-there")
        nums = []
        for number in range(pictures):
            nums.append(
                catalog.add_picture(
                    image_id=f"{number:032x}", width=8, height=8, format="PNG", bytes=9
                )
            )
            catalog.add_place(nums[-1], f"/not-there/{number}.png", size=9, mtime_ns=1)
        catalog.add_vectors("colours000000000", np.array(nums), rows)
        catalog.register_encoder("same000000000000", spec="same", config_json="{}", dim=3)
        stored = catalog.vectors("colours000000000")
        catalog.add_vectors("same000000000000", stored.nums[::2], stored.vectors[::2])
        catalog.commit()
    with closing(sqlite3.connect(index / "catalog.sqlite")) as db:
        db.execute("UPDATE encoders SET space_id = NULL")
        db.commit()


def vectors_by_model(index: Path) -> dict[str, int]:
    with Catalog.open(index) as catalog:
        return {row.spec: catalog.stats(row.encoder_id).vectors for row in catalog.encoders()}


def survive_sharing(folder: Path, *, kills: int, pictures: int, seed: int) -> None:
    """Kill runs that give "same" the vectors of "colours": a model that is new, and one of an index of
    an earlier version, whose own vectors are joined with them. No picture is encoded again."""
    rng = random.Random(seed)
    library = Library(folder / "pictures", 30, rng)
    index, bases = folder / "index", {kind: folder / kind for kind in ("new", "use", "old")}
    hits: Counter[str] = Counter()
    with commands(folder) as command:
        place = ["index", library.folder, "--index"]
        command.run(*place, bases["new"], "--model", "colours")
        for kind in ("use", "old"):
            shutil.copytree(bases["new"], bases[kind])
        command.run(*place, bases["use"], "--model", "same")
        command.run("use", "colours", "--index", bases["use"])
        of_an_earlier_version(bases["old"], pictures=pictures)
        while hits.total() < kills:
            kind = min(bases, key=lambda kind: hits[kind])
            arguments = ["use", "same", "--index", index]
            if kind != "use":
                arguments = [*place, index, "--model", "same"]
            before, models = restored(bases[kind], index), vectors_by_model(bases[kind])
            _, seconds = command.run(*arguments)
            expected = holding(index)
            assert answering(index) == "same" and expected.vectors.keys() == before.vectors.keys()
            assert all(equal_bytes(v, before.vectors[id]) for id, v in expected.vectors.items())
            restored(bases[kind], index)
            while kind == min(bases, key=lambda kind: hits[kind]) and hits.total() < kills:
                killed, _ = command.run(*arguments, seconds=rng.uniform(0.02, 1) * seconds)
                hits[kind] += killed
                check_sound(index)
                check_equal(holding(index), before)  # nothing lost or doubled, whichever answers
                assert answering(index) in {"colours", "same"}
                now, whole = vectors_by_model(index), len(before.vectors)
                assert now in (models, {"colours": whole, "same": whole})  # joined wholly or not
                if not killed:
                    assert answering(index) == "same"
                    restored(bases[kind], index)
            command.run(*arguments)
            check_equal(holding(index), before)
            assert answering(index) == "same"
        print(f"{dict(hits)} kills hit", flush=True)
    assert hits.total() == kills


@pytest.mark.timeout(900)
def test_killed_three_times_while_a_model_gets_the_vectors_of_another(tmp_path: Path) -> None:
    survive_sharing(tmp_path, kills=3, pictures=200, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_forty_times_while_a_model_gets_the_vectors_of_another(tmp_path: Path) -> None:
    survive_sharing(tmp_path, kills=40, pictures=5_000, seed=4)


@pytest.mark.timeout(900)
def test_killed_six_times_in_runs_and_in_changes_of_the_model(tmp_path: Path) -> None:
    survive(tmp_path, kills=6, a_round=2, pictures=100, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_two_hundred_times_in_runs_and_in_changes_of_the_model(tmp_path: Path) -> None:
    survive(tmp_path, kills=200, a_round=10, pictures=150, seed=2)
