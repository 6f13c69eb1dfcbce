"""The part of teaching that runs in a process of its own: dataset, training, report.

    python -m app.web.teaching_worker

Standard input is one line of JSON, the fields of `Task`; its end ends this process at once, so that it
does not outlive the server. Standard output is JSON lines: {"stage", "what", "done", "total"}, and at
the end {"result": ...} or {"error": a sentence}. All files lie in the task's scratch folder.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.corrections import Corrections, export
from app.paths import features_folder
from clipkit.catalog import Catalog
from clipkit.errors import ClipkitError, InputError

CAPTIONS_OF = 20_000  # pictures whose own captions are taken: as many are encoded in minutes
Report = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Task:
    index: str
    scratch: str  # a folder that is there
    target: str  # the folder that the run will be renamed to
    start: str  # spec of the model that learns
    encoder_id: str  # its id
    device: str
    both_sides: bool  # train the picture side too: then pictures get other vectors

    @property
    def run(self) -> Path:
        """The training run's folder, which has its final name already."""
        return Path(self.scratch) / Path(self.target).name


def captions_of(catalog: Catalog, encoder_id: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (path, captions) of those of the first CAPTIONS_OF pictures that have captions."""
    first = catalog.live_nums(encoder_id).nums[:CAPTIONS_OF].tolist()
    for start in range(0, len(first), 500):
        nums = first[start : start + 500]
        rows = catalog.rows(nums)
        for num in nums:
            if num in rows and rows[num].captions:
                yield rows[num].path, rows[num].captions


def work(task: Task, report: Report) -> dict[str, Any]:
    """Do the task, and return what came of it. Raises ClipkitError and OSError."""
    from clipkit.sources import open_source
    from clipkit.training import TrainConfig, train
    from data_prep.build import build
    from data_prep.split import Fractions

    scratch = Path(task.scratch)
    report("gathering")
    files, pictures = _gather(task, scratch)
    report("building")
    # Held out: some 100 pictures to test on, of small sets a third at most.
    test = min(0.3, max(0.1, 100 / max(pictures, 1)))
    built = build(
        [open_source(file) for file in files],
        scratch / "dataset",
        fractions=Fractions(validation=test / 2, test=test),
        on_progress=lambda p: report("building", p.phase, p.done, p.total or 0),
    )
    config = TrainConfig.from_mapping(
        {
            "data": str(scratch / "dataset"),
            "out": str(scratch),
            "name": task.run.name,
            "start": task.start,
            "recipe": "heads",
            "image_rate": 1.0 if task.both_sides else 0.0,
            "device": task.device,
            "tensorboard": False,
        }
    )
    report("training")
    summary = train(
        config,
        on_progress=lambda p: report("training", p.message or p.phase, p.done, p.total),
    )
    if summary.encoder_id == summary.parent_id:
        verdict: dict[str, Any] = {"outcome": "same", "unchanged": True}
        verdict["sentences"] = summary.notes[-1:]
    else:
        report("measuring")
        verdict = _measure(task, scratch, report)
    return {**verdict, "encoder_id": summary.encoder_id, "trained_on": sum(built.pictures.values())}


def _gather(task: Task, scratch: Path) -> tuple[list[str], int]:
    """Write marks and captions as sources; return these, and how many rows they have."""
    marks, captions = scratch / "marks.jsonl", scratch / "captions.jsonl"
    rows = 0
    with Catalog.open(task.index) as catalog:
        with marks.open("w") as file:
            for mark in export(Corrections(Path(task.index)).all(), catalog):
                file.write(json.dumps(mark) + "\n")
                rows += 1
        with captions.open("w") as file, closing(captions_of(catalog, task.encoder_id)) as found:
            for path, texts in found:
                file.write(json.dumps({"image": path, "captions": texts}) + "\n")
                rows += 1
    kinds = {"corrections": marks, "jsonl": captions}
    return [f"{kind}:{file}" for kind, file in kinds.items() if file.stat().st_size], rows


def _measure(task: Task, scratch: Path, report: Report) -> dict[str, Any]:
    """Compare start and result on held-out pictures, and return the report's verdict."""
    from clipkit.lazy_encoder import LazyEncoder
    from data_prep import gallery
    from eval.data import open_captioned
    from eval.features import FeatureCache
    from eval.session import Session
    from eval.training_report import VERDICT, training_report

    own = open_captioned(str(scratch / "dataset"))
    if own.split not in ("test", "validation"):
        raise InputError("too few pictures to hold some out for a test; mark more results")
    general = replace(open_captioned(str(gallery.folder())), name="the sample gallery")
    encoders = [
        # float32: a verdict must not depend on the kind of CPU
        LazyEncoder(spec, device=task.device, precision="float32")
        for spec in (task.start, str(task.run))
    ]
    session = Session(
        FeatureCache(features_folder(None)),
        on_progress=lambda what, done, total: report("measuring", what, done, total),
    )
    result = training_report(task.run, encoders, own, general, session, commands=_commands(task))
    verdict = json.loads((task.run / VERDICT).read_bytes())
    return {**verdict, "warnings": result.warnings, "unchanged": False}


def _commands(task: Task) -> list[tuple[str, str]]:
    """Return the commands that the report lists, with the folder that the run is moved to."""
    index = shlex.quote(task.index)
    specs = {"Use it": task.target, "Go back": task.start}
    return [
        (what, f"clipkit use {shlex.quote(spec)} --index {index}") for what, spec in specs.items()
    ]


def main() -> None:
    """Read the task, do it, and say what came of it."""
    # What libraries print must not be taken for a line of ours.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_server, daemon=True).start()

    def report(stage: str, what: str = "", done: int = 0, total: int = 0) -> None:
        lines.write(json.dumps({"stage": stage, "what": what, "done": done, "total": total}) + "\n")

    try:
        answer: dict[str, Any] = {"result": work(task, report)}
    except ClipkitError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"cannot write to {task.scratch}: {error.strerror or error}"}
    lines.write(json.dumps(answer) + "\n")


def _end_with_the_server() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    main()
