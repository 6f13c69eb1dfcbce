"""`clipkit runs`: every run in a folder, what it brought, and which compare."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


def write_run(
    folder: Path, *, made: str, test_data: str = "", after: float = 0.5, **fields: Any
) -> Path:
    """A run with a verdict on `test_data`; without one, a run as an earlier version left it; with
    `state`, one that was stopped there."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "config": {"recipe": "heads", "start": "builtin", "data": "/data/dogs"},
        "data": {"pictures": 1200},
        "created_at": made,
        "steps": 140,
    }
    recalls = {"text_to_image/R@1": 0.25}, {"text_to_image/R@1": after}
    if "state" in fields:
        state = folder / "checkpoints" / f"step_{fields['state']:06d}"
        state.mkdir(parents=True)
        (state / "training_state.pt").write_bytes(b"")
        (folder / "checkpoints" / "step_000099").mkdir()  # begun, and not finished
    else:
        summary = {"steps": 140, "before": recalls[0], "after": recalls[1]}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "report.html").write_text("")
    if test_data:
        verdict = {"outcome": "better", "split": "test", "fingerprint": test_data}
        verdict |= {"before": 0.25, "after": after}
        (folder / "verdict.json").write_text(json.dumps(verdict))
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    write_run(runs / "first", made="2026-01-01T00:00:00+00:00", test_data="aa", after=0.3)
    write_run(runs / "second", made="2026-01-02T00:00:00+00:00", test_data="aa", after=0.4)
    write_run(runs / "alone", made="2026-01-03T00:00:00+00:00", test_data="bb", after=0.9)
    write_run(runs / "old", made="2026-01-04T00:00:00+00:00", after=0.8)
    write_run(runs / "stopped", made="2026-01-05T00:00:00+00:00", state=30)
    (runs / "notes").mkdir()
    (runs / "other").mkdir()
    (runs / "other" / "config.json").write_text("[]")
    return runs


def test_runs_are_listed_newest_first_and_the_best_of_the_same_test_data_is_marked(
    clipkit: Run, folder: Path
) -> None:
    """Only first and second were tested on the same data: 0.4 is their highest, though alone and old
    have higher figures of other data."""
    code, out, err = clipkit("runs", "--json")
    assert code == 0, err
    rows = json.loads(out)
    names = [folder / Path(row["folder"]).name for row in rows]
    assert names == [folder / n for n in ("stopped", "old", "alone", "second", "first")]
    assert [row["best"] for row in rows] == [False, False, False, True, False]
    assert [row["finished"] for row in rows] == [False, True, True, True, True]
    assert (rows[0]["step"], rows[0]["steps"], rows[0]["after"]) == (30, 140, None)
    assert (rows[1]["split"], rows[1]["after"], rows[1]["outcome"]) == ("validation", 0.8, "")
    assert rows[3]["test_data"] == rows[4]["test_data"] == "aa"


def test_the_table_says_what_to_do(clipkit: Run, folder: Path) -> None:
    code, out, err = clipkit("runs", folder)
    assert code == 0, err
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "unfinished, step 30 of 140" in lines["stopped"]
    assert "25.0 → 40.0 %" in lines["second"] and "second *" in lines["second"]
    assert "not compared (validation)" in lines["old"] and "1,200" in lines["old"]
    assert f"clipkit train --resume {folder}/stopped" in out and "do not compare" in out


def test_a_report_is_opened_and_its_path_printed(
    clipkit: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    report = folder / "first" / "report.html"
    assert clipkit("runs", "open", "first")[:2] == (0, f"{report}\n")
    assert clipkit("runs", "open", folder / "first")[0] == 0
    assert opened == [report.as_uri()] * 2
    newest = folder / "old" / "report.html"  # stopped has none
    assert clipkit("runs", "open", "--print")[:2] == (0, f"{newest}\n") and len(opened) == 2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("none",), "no training runs in none; name their folder, or start one: clipkit train"),
        (("open", "thrid"), "no run 'thrid' in runs; there are stopped, old"),
        (("open", "stopped"), "has no report yet; make it with: clipkit train --resume"),
    ],
)
def test_what_is_not_there_is_a_sentence(
    clipkit: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    code, out, err = clipkit("runs", *arguments)
    assert code == 2 and sentence in err and not out
