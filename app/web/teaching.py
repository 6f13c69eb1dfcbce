"""Teaching the model from the page: marks and captions -> dataset -> training -> switch.

One lesson at a time. Dataset, training and report are made by app.web.teaching_worker in a process of
its own, below INDEX/teaching, which is removed at the end, and by the next lesson after a kill; only a
whole result is renamed to INDEX/models/NAME. In a small library both sides of the model learn, and all
pictures are then encoded again, beside the model that answers. In a large one only the text side learns:
the result has the vectors of the model before, and the switch is one transaction. What waits for an
answer, or can be undone, is noted in INDEX/teaching.json.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock

from app.web.teaching_worker import Task, captions_of
from clipkit.durable import write_whole
from clipkit.errors import CatalogBusy, ClipkitError, InputError
from clipkit.index_models import OWN_MODELS
from clipkit.wording import count
from data_prep.clean import same_caption

if TYPE_CHECKING:
    from app.web.workspace import Workspace

log = logging.getLogger(__name__)

# As many pictures are encoded again in minutes. In a larger library only the text side is trained, so
# that every picture keeps its vector. With 100 marks that gained 1.65 points of mean recall instead of
# 2.62 on names that the model had never read, and nothing, as both sides, on captions of everyday photos
# (tests/bench/bench_teaching.py).
ENCODED_AGAIN = 20_000
PICTURES = 50  # with a caption or a right mark: fewer leave too little to train and to test on
TEXTS = 10  # different ones: a model learns from what tells pictures apart
SCRATCH, NOTED, LOCK = "teaching", "teaching.json", "teaching.lock"
WAIT_SECONDS = 0.2  # between two looks at an indexing run

Stage = Literal[
    "gathering", "building", "training", "measuring", "filling", "choosing", "done", "failed"
]
WORKING = ("gathering", "building", "training", "measuring", "filling")


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to learn from."""

    right: int  # marks
    wrong: int
    captioned: int  # pictures with captions of their own
    pictures: int  # with a caption or a right mark
    texts: int  # different captions and marked queries

    @property
    def missing(self) -> str:
        """A sentence that says what is missing; empty if there is enough."""
        needs = []
        if self.pictures < PICTURES:
            needs.append(
                f"{PICTURES} pictures with a right mark or a caption (here {self.pictures})"
            )
        if self.texts < TEXTS:
            needs.append(f"{TEXTS} different searches or captions among these (here {self.texts})")
        return f"It needs {' and '.join(needs)}." if needs else ""


@dataclass(frozen=True, slots=True)
class Lesson:
    """The state of a lesson. "choosing": it is trained, and a person decides; "done": it answers."""

    stage: Stage
    what: str = ""
    done: int = 0
    total: int = 0
    stopping: bool = False
    error: str = ""
    verdict: Mapping[str, Any] = field(default_factory=dict)  # of the run's report
    spec: str = ""  # of the result, once it is whole
    before: str = ""  # encoder_id of the model that was taught
    before_spec: str = ""

    @property
    def working(self) -> bool:
        return self.stage in WORKING


class Teacher:
    """The lessons of one workspace. Threads may share it."""

    def __init__(self, workspace: Workspace, *, device: str = "auto") -> None:
        self._workspace = workspace
        self._device = device
        self._folder = workspace.folder
        self._lock = threading.Lock()
        self._noting = threading.Lock()  # what is stored last is what was set last
        self._lesson = self._noted()
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._material: tuple[tuple[int, int], Material] | None = None

    @property
    def lesson(self) -> Lesson | None:
        return self._lesson

    @property
    def working(self) -> bool:
        lesson = self._lesson
        return lesson is not None and lesson.working

    def material(self) -> Material:
        """Count what there is to learn from; cached until marks or pictures change."""
        contents, corrections = self._workspace.contents(), self._workspace.corrections
        key = (contents.changes, corrections.total())
        if self._material is None or self._material[0] != key:
            marks = corrections.all()
            right = [mark for mark in marks if mark.right]
            pictures = {mark.image_id for mark in right}
            texts, captioned = {same_caption(mark.query) for mark in right}, 0
            if contents.catalog is not None:
                catalog = contents.catalog
                for _, captions in captions_of(catalog, self._workspace.model.encoder_id):
                    captioned += 1
                    texts.update(map(same_caption, captions))
            # A picture that is both marked and captioned counts twice here, and once in training.
            total = len(pictures) + captioned
            made = Material(len(right), len(marks) - len(right), captioned, total, len(texts))
            self._material = key, made
        return self._material[1]

    # ---- what a person asks for

    def start(self) -> None:
        """Start a lesson of the present model. Raises InputError if there is too little to learn from,
        CatalogBusy if one is in progress."""
        if missing := self.material().missing:
            raise InputError(f"there is too little to learn from. {missing}")
        model = self._workspace.model
        lesson = Lesson("gathering", before=model.encoder_id, before_spec=model.spec)
        self._begin(lesson, self._learn)

    def use(self) -> None:
        """Use the trained model although it is not better."""
        lesson = self._expect("choosing")
        self._begin(replace(lesson, stage="filling", error="", done=0, total=0), self._fill)

    def keep(self) -> None:
        """Keep the model before, and delete the trained one with the vectors that it has so far."""
        lesson = self._expect("choosing", "failed")
        self._note(None)
        if lesson.spec:
            with suppress(InputError):  # it has no vector yet
                self._workspace.drop_model(lesson.spec)
            shutil.rmtree(lesson.spec, ignore_errors=True)

    def undo(self) -> None:
        """Go back to the model before the last lesson; the trained one stays in the index."""
        lesson = self._expect("done")
        self._workspace.use_model(lesson.before)
        self._note(None)

    def dismiss(self) -> None:
        """Close the result of the last lesson."""
        self._expect("done", "failed")
        self._note(None)

    def cancel(self) -> None:
        """Stop the lesson. Nothing of it is kept except vectors that were encoded while filling."""
        with self._lock:
            if self._lesson is None or not self._lesson.working:
                return
            self._lesson = replace(self._lesson, stopping=True)
            self._stop.set()
            if self._process is not None:
                self._process.kill()  # it writes into the scratch folder only
        if self._lesson.stage == "filling":
            self._workspace.stop()

    def close(self) -> None:
        """Stop the lesson and wait for its end."""
        self.cancel()
        if self._thread is not None:
            self._thread.join()

    # ---- the work, in a thread

    def _begin(self, lesson: Lesson, work: Any) -> None:
        with self._lock:
            if self._lesson is not None and self._lesson.working:
                raise CatalogBusy("a lesson is in progress already; wait for it, or cancel it")
            self._lesson, self._stop = lesson, threading.Event()
            self._thread = threading.Thread(
                target=self._guarded,
                args=(work, self._thread),
                name="clipkit-teaching",
                daemon=True,
            )
            self._thread.start()

    def _guarded(self, work: Any, before: threading.Thread | None) -> None:
        """Run a part of the lesson under the index's lock, and show an error as a sentence."""
        error = ""
        if before is not None:
            before.join()  # it shows its result just before it gives the lock back
        try:
            with filelock.FileLock(self._folder / LOCK, timeout=0):
                work()
        except filelock.Timeout:
            error = "another process teaches with this index; wait for its end"
        except ClipkitError as caught:
            error = str(caught)
        except OSError as caught:
            error = f"cannot write to {self._folder}: {caught.strerror or caught}"
        except Exception:  # the person reads a sentence, the terminal has the traceback
            log.exception("teaching failed")
            error = "unexpected error while teaching; see the terminal for details"
        lesson = self._lesson
        if lesson is None or not lesson.working:
            return
        if lesson.stage == "filling":  # trained, but not filled: this can go on
            self._note(replace(lesson, stage="choosing", stopping=False, error=error))
        elif self._stop.is_set():
            self._note(None)
        else:
            self._note(replace(lesson, stage="failed", error=error))

    def _learn(self) -> None:
        scratch = self._folder / SCRATCH
        task = self._task(scratch)
        shutil.rmtree(scratch, ignore_errors=True)  # of a lesson that was killed
        try:
            scratch.mkdir()
            result = self._trained(task)
            if result is None:
                return
            self._update(verdict=result)
            if result["unchanged"]:
                self._note(replace(self._required(), stage="done"))
                return
            spec = self._place(task)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if result["outcome"] == "better":
            self._note(replace(self._required(), stage="choosing", spec=spec), shown=False)
            self._update(stage="filling", spec=spec, done=0, total=0)
            self._fill()
        else:
            self._note(replace(self._required(), stage="choosing", spec=spec))

    def _task(self, scratch: Path) -> Task:
        lesson, folder = self._required(), self._folder.absolute()
        return Task(
            index=str(folder),
            scratch=str(scratch.absolute()),
            target=str(folder / OWN_MODELS / f"taught-{datetime.now():%Y%m%d-%H%M%S}"),
            start=lesson.before_spec,
            encoder_id=lesson.before,
            device=self._device,
            both_sides=self._workspace.contents().pictures <= ENCODED_AGAIN,
        )

    def _trained(self, task: Task) -> dict[str, Any] | None:
        """Run the worker; return its result, None if it was cancelled. Raises ClipkitError."""
        command = [sys.executable, "-m", "app.web.teaching_worker"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            with self._lock:
                self._process = process
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asdict(task)) + "\n")
                process.stdin.flush()
            answer: dict[str, Any] = {}
            for line in process.stdout:
                answer = json.loads(line)
                if "stage" in answer:
                    self._update(**answer)
            # Its standard input stays open until it has ended.
            code = process.wait()
        self._process = None
        if self._stop.is_set():
            return None
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        raise ClipkitError(
            answer.get("error") or f"the training process ended with code {code}; see the terminal"
        )

    def _place(self, task: Task) -> str:
        """Move the finished run to the index's own models, and return its spec."""
        shutil.rmtree(task.run / "checkpoints", ignore_errors=True)  # states to resume from
        Path(task.target).parent.mkdir(exist_ok=True)
        os.rename(task.run, task.target)
        return task.target

    def _fill(self) -> None:
        """Switch to the trained model, after encoding the pictures if they lack its vectors."""
        spec, workspace = self._required().spec, self._workspace
        while True:
            if self._stop.is_set():
                raise ClipkitError("cancelled; what was encoded so far stays")
            try:
                # nothing is missing, or it has the vectors of the model before
                workspace.use_model(spec)
                break
            except CatalogBusy as busy:  # a folder is being indexed
                self._update(what=str(busy))
                self._stop.wait(WAIT_SECONDS)
                continue
            except InputError:
                pass
            self._encode(spec)
        self._note(replace(self._required(), stage="done", stopping=False))

    def _encode(self, spec: str) -> None:
        """Run the indexing once. Raises ClipkitError if pictures still have no vector after it."""
        workspace = self._workspace
        try:
            workspace.fill(spec)
        except CatalogBusy as busy:
            self._update(what=str(busy))
            self._stop.wait(WAIT_SECONDS)
            return
        while workspace.indexing:
            run = workspace.run
            if run is not None and run.progress is not None:
                self._update(what="", done=run.progress.done, total=run.progress.total)
            time.sleep(WAIT_SECONDS)
        run = workspace.run
        if run is not None and run.error is not None:
            raise ClipkitError(run.error)
        if run is not None and run.summary is not None and run.summary.stopped:
            raise ClipkitError("stopped; what was encoded so far stays")
        filled = next((model for model in workspace.models() if model.spec == spec), None)
        if filled is not None and not filled.complete:
            raise ClipkitError(
                f"{count(filled.missing, 'picture')} could not be read, and would not be found any "
                "more; mount their disks, or forget their folders"
            )

    # ---- the state

    def _required(self) -> Lesson:
        assert self._lesson is not None
        return self._lesson

    def _expect(self, *stages: str) -> Lesson:
        lesson = self._lesson
        if lesson is None or lesson.stage not in stages:
            raise InputError("the lesson is not in this state any more; look at the panel again")
        return lesson

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._lesson = replace(self._required(), **changes)

    def _note(self, lesson: Lesson | None, *, shown: bool = True) -> None:
        """Set the state, and store it for after a restart."""
        path = self._folder / NOTED
        with self._noting:
            if shown:
                with self._lock:
                    self._lesson = lesson
            try:
                if lesson is None:
                    path.unlink(missing_ok=True)
                else:
                    write_whole(path, json.dumps(asdict(lesson)).encode())
            except OSError as error:  # a full disk: the lesson is forgotten with the server
                log.warning("cannot write %s: %s", path, error)

    def _noted(self) -> Lesson | None:
        """Return the state that was stored, if its model is still there."""
        try:
            content = json.loads((self._folder / NOTED).read_bytes())
            lesson = Lesson(**content)
        except (OSError, ValueError, TypeError):
            return None
        waits = lesson.stage in ("choosing", "done", "failed")
        return lesson if waits and (not lesson.spec or os.path.isdir(lesson.spec)) else None
