"""Recipe heads: features that are computed once, and heads that stay near a good start."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import altered, run, write_colours

from clipkit import towers
from clipkit.catalog import VectorStore
from clipkit.errors import InputError
from clipkit.training import Progress, TrainConfig, resume, train


def stored(options: dict[str, Any], *, full: bool = False) -> list[tuple[str, bytes]]:
    """The spaces (without `full` only their kind) and keys of the stored features."""
    with closing(sqlite3.connect(options["out"] / ".features" / "vectors-1.sqlite")) as db:
        rows = db.execute("SELECT space, key FROM vectors").fetchall()
    return [(space if full else space.rpartition("/")[2], key) for space, key in rows]


def test_features_are_computed_once_for_an_encoder_and_its_data(options: dict[str, Any]) -> None:
    """Fails for a cache that is keyed by a path: other weights under the same name reuse it."""
    phases: list[str] = []

    def again(**changes: Any) -> int:
        phases.clear()
        config = TrainConfig.from_mapping({**options, "recipe": "heads", "max_steps": 1, **changes})
        train(config, on_progress=lambda p: phases.append(p.phase))
        return phases.count("features")

    assert again(name="a") > 0
    assert again(name="b") == 0
    start = Path(options["start"])
    moved = altered(start, options["out"] / "moved", lambda t: t["visual.conv1.weight"].mul_(2))
    assert again(name="c", start=moved) > 0


def test_a_run_stopped_while_features_are_computed_goes_on_from_them(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first batch of 4: the resumed run computes the other 10 only, and ends with the
    unbroken run's weights."""
    monkeypatch.setattr(towers.DualEncoder, "preferred_batch", 4)
    options = {**options, "recipe": "heads"}
    unbroken = run({**options, "name": "unbroken"})
    shutil.rmtree(options["out"] / ".features")
    stop = threading.Event()
    stop.set()
    stopped = train(TrainConfig.from_mapping({**options, "name": "broken"}), stop=stop)
    assert stopped.stopped and stopped.checkpoint is None and stopped.steps == 0
    assert [space for space, _ in stored(options)] == ["pictures"] * 4
    updates: list[Progress] = []
    resumed = resume(stopped.folder, on_progress=updates.append)
    assert [p.done for p in updates if p.phase == "features"][:3] == [8, 12, 14]
    assert resumed.encoder_id == unbroken.encoder_id


def test_a_loss_that_is_not_a_number_names_the_step_and_the_pictures(
    options: dict[str, Any],
) -> None:
    """One picture's features are made NaN: the run stops in the step that meets it and names it.
    Fails for a trainer that goes on: every weight would be NaN one step later."""
    options |= {"recipe": "heads", "batch": 14}
    run(options, name="first", max_steps=1)
    lines = (Path(options["data"]) / "train" / "metadata.jsonl").read_text().splitlines()
    image_id = json.loads(lines[5])["image_id"].encode()
    spaces = [space for space, key in stored(options, full=True) if key == image_id]
    (space,) = (s for s in spaces if sum(s == t for t, _ in stored(options, full=True)) == 14)
    with VectorStore(options["out"] / ".features" / "vectors-1.sqlite", space) as store:
        store.put([image_id], np.full_like(store.get([image_id])[image_id], np.nan)[None])
    with pytest.raises(
        InputError, match=r"the loss at step 1 is not finite; pictures: train/5\.png; "
    ):
        run(options, name="second")


@pytest.mark.end_to_end
def test_heads_stay_near_a_start_that_knows_the_data(options: dict[str, Any]) -> None:
    """New heads have no limit; a start better than chance has 0.06 * sqrt(12 / 1,000) = 0.66 % of its
    weights' size; a configured limit is used as it is.

    Fails for one rule for all: a few captions spoil a good start, and new heads learn nothing when
    they are held back.
    """
    data = write_colours(options["out"].parent / "colours")
    options |= {"data": data, "recipe": "heads", "epochs": 1, "batch": 12}

    def drift(**changes: Any) -> float:
        return run(options, **changes).drift

    assert drift(name="new") == 0
    assert drift(name="configured", drift=0.5) == 0.5
    taught = run(options, name="taught", recipe="full", learning_rate=3e-3, epochs=40)
    fitted = drift(name="fitted", start=str(taught.checkpoint))
    assert fitted == pytest.approx(0.06 * math.sqrt(12 / 1000))
    assert drift(name="free", start=str(taught.checkpoint), drift=0) == 0
