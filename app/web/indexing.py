"""Indexing from the page: at most one run at a time, in a thread, with its state at any moment."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.catalog import Catalog, SkippedRow
from clipkit.embed import Progress, Summary, index_folders
from clipkit.errors import CatalogBusy, ClipkitError, InputError
from clipkit.images import Limits
from clipkit.lazy_encoder import LazyEncoder

log = logging.getLogger(__name__)

SKIPPED_SHOWN = 200  # of the list of skipped files
# How long a run that is over is shown, unless it is dismissed: with something to read, or without.
READ_SECONDS, SEEN_SECONDS = 600.0, 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """The state of an indexing run."""

    folders: tuple[str, ...]
    beside: str | None = None  # spec of the model that is filled beside the one that answers
    progress: Progress | None = None  # None: the model is not there yet
    summary: Summary | None = None
    error: str | None = None
    stopping: bool = False
    over: bool = False
    skipped: tuple[SkippedRow, ...] = ()  # below these folders, the first SKIPPED_SHOWN
    skipped_total: int = 0
    ended: float | None = None  # time.monotonic()

    @property
    def to_read(self) -> bool:
        """True if it ended with something that asks for attention."""
        unavailable = self.summary is not None and self.summary.unavailable
        return bool(self.error or self.skipped_total or unavailable)

    @property
    def state(self) -> str:
        """One of "running", "stopping", "done", "stopped", "failed"."""
        if not self.over:
            return "stopping" if self.stopping else "running"
        if self.error is not None:
            return "failed"
        return "stopped" if self.summary is not None and self.summary.stopped else "done"


class Indexer:
    """Runs index_folders for one index folder. Threads may share it."""

    def __init__(self, folder: Path, *, limits: Limits) -> None:
        self.folder = folder
        self._limits = limits
        self._lock = threading.Lock()
        self._run: Run | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def run(self) -> Run | None:
        """The run in progress, or the last one while it is shown."""
        run = self._run
        if run is not None and run.ended is not None:
            shown = READ_SECONDS if run.to_read else SEEN_SECONDS
            return run if time.monotonic() - run.ended < shown else None
        return run

    @property
    def busy(self) -> bool:
        run = self._run
        return run is not None and not run.over

    def start(self, folders: Sequence[str], model: LazyEncoder, *, beside: bool = False) -> None:
        """Start a run with `model`; `beside` another one, which goes on answering when it is over.

        Raises InputError for a path that is not a folder, and CatalogBusy while another run is in
        progress."""
        roots = [_folder(folder) for folder in folders]
        with self._lock:
            if self._run is not None and not self._run.over:
                raise CatalogBusy(
                    "indexing is already in progress; stop it or wait for it to finish"
                )
            self._run = Run(folders=tuple(map(str, roots)), beside=model.spec if beside else None)
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._work,
                args=(roots, model, self._stop),
                kwargs={"activate": not beside},
                name="clipkit-index",
                daemon=True,
            )
            self._thread.start()

    def dismiss(self) -> None:
        """Show the last run no more, if it is over."""
        with self._lock:
            if self._run is not None and self._run.over:
                self._run = None

    def stop(self) -> None:
        """Stop the run after its current batch; what it has indexed stays."""
        with self._lock:
            if self._run is not None and not self._run.over:
                self._stop.set()
                self._run = replace(self._run, stopping=True)

    def close(self) -> None:
        """Stop the run and wait for its end."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _update(self, **changes: Any) -> None:
        with self._lock:
            assert self._run is not None
            self._run = replace(self._run, **changes)

    def _work(
        self, roots: Sequence[Path], model: LazyEncoder, stop: threading.Event, *, activate: bool
    ) -> None:
        changes: dict[str, Any] = {}
        try:
            _ = model.encoder_id  # a model that cannot be loaded creates no index
            with Catalog.open(self.folder, write=True) as catalog:
                changes["summary"] = index_folders(
                    catalog,
                    roots,
                    encoder=model,
                    limits=self._limits,
                    on_progress=lambda progress: self._update(progress=progress),
                    stop=stop,
                    activate=activate,
                )
                skipped = [row for row in catalog.skipped() if _below(row.path, roots)]
            changes |= {"skipped": tuple(skipped[:SKIPPED_SHOWN]), "skipped_total": len(skipped)}
        except ClipkitError as error:
            changes["error"] = str(error)
        except Exception:  # the page shows a sentence, the terminal has the traceback
            log.exception("indexing failed")
            changes["error"] = "unexpected error while indexing; see the terminal for details"
        self._update(over=True, ended=time.monotonic(), **changes)


def _below(path: str, roots: Sequence[Path]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)


def _folder(typed: str) -> Path:
    text = typed.strip()
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise InputError(
            f"{text!r} is not a full path; use the form /home/me/Pictures or ~/Pictures"
        )
    if not path.is_dir():
        raise InputError(f"no folder {text}; check the spelling")
    return Path(os.path.abspath(path))
