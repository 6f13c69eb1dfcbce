"""The comparison of trainers: steps that fit the time, pairs drawn evenly."""

from __future__ import annotations

import csv
import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_trainers")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("trainer_runs")


def test_steps_fit_what_the_pilot_took(bench: ModuleType) -> None:
    """Steps end after 12, 14, 16 and 21 s of 25: a step takes 2 s (the median of 2, 2 and 5), so
    25 - 4 x 2 = 17 s are fixed. Of 117 s, 3 % are spared: (113.49 - 17) / 2 = 48.2 steps."""
    timing = bench.Timing(25.0, (12.0, 14.0, 16.0, 21.0), 0)
    assert timing.per_step == 2
    assert timing.fixed == 17
    assert bench.fitted_steps(117.0, timing) == 48
    assert bench.fitted_steps(5.0, timing) == 1


def test_a_run_is_timed_by_its_lines(bench: ModuleType, tmp_path: Path) -> None:
    """A line of clipkit's and one of open_clip_train's are a step each; a failure ends with its tail."""
    code = "print('step 1'); print('x | INFO | Train Epoch: 0 [ 64/128 (50%)]'); print('stepped')"
    timing = bench.timed([bench.sys.executable, "-c", code], tmp_path / "log.txt", 1)
    assert len(timing.stamps) == 2
    assert timing.stamps[-1] <= timing.seconds
    assert timing.peak > 2**20
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        bench.timed([bench.sys.executable, "-c", "print('step 1'); 1 / 0"], tmp_path / "log.txt", 1)


def test_epochs_hold_all_pairs_where_there_is_time(runs: ModuleType) -> None:
    """Of 1,000 pairs in batches of 64, 15 steps are an epoch: 40 steps are two epochs of 20, 10 steps
    a part of one."""
    assert runs.fitted_epochs(40, 1000, 64) == (2, 20)
    assert runs.fitted_epochs(10, 1000, 64) == (1, 10)


def test_pairs_are_drawn_evenly_and_read_back(runs: ModuleType, tmp_path: Path) -> None:
    """Seven rows of three pairs: each twice, one of them a third time; quotes and tabs survive."""
    pictures = [("a.jpg", ['a "red" dog', "two\tdogs"]), ("b.jpg", ["a boat"])]
    runs.write_pairs(tmp_path / "pairs.tsv", pictures, 7, seed=0)
    with (tmp_path / "pairs.tsv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file, delimiter="\t")]
    counts = Counter(rows)
    assert set(counts) == {(path, text) for path, captions in pictures for text in captions}
    assert sorted(counts.values()) == [2, 2, 3]
