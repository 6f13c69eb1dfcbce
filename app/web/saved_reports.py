"""The saved reports of evaluations, training runs and taught models: their list, the page of each."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.paths import reports_folder
from clipkit.errors import InputError

PAGE = "report.html"
REPORTS_SHOWN = 200
REPORT_MEGABYTES = 64
_NAME = re.compile(r"(run@|taught@)?([A-Za-z0-9][A-Za-z0-9._-]{0,119})")


class UnknownReportError(InputError):
    """No report has this name."""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A saved report as the list shows it."""

    # of its folder; of a training run's after "run@", of a taught model's after "taught@"
    name: str
    title: str
    models: tuple[str, ...]
    created_at: str  # UTC, ISO 8601; empty if the report has no date


class SavedReports:
    """List and read reports, without caching: those in `folder`, by default `paths.reports_folder()`,
    of the training runs in `runs`, by default runs/ where the process was started, and of the models in
    `taught`, an index's own."""

    def __init__(
        self, folder: Path | None = None, runs: Path = Path("runs"), taught: Path | None = None
    ) -> None:
        self._folders = {"": folder or reports_folder(), "run@": runs.absolute()}
        if taught is not None:
            self._folders["taught@"] = taught.absolute()

    def rows(self) -> list[ReportRow]:
        """List up to REPORTS_SHOWN reports, the newest first; folders without one are left out."""
        names = []
        for prefix, folder in self._folders.items():
            with suppress(OSError):
                names += [prefix + path.name for path in folder.iterdir()]
        rows = [row for name in names if (row := self._row(name)) is not None]
        rows.sort(key=lambda row: (row.created_at, row.name), reverse=True)
        return rows[:REPORTS_SHOWN]

    def name_of(self, spec: str) -> str:
        """Return the name of the report of a training run or a taught model, by its folder; empty if
        `spec` is none of them or has no report."""
        place = Path(spec)
        for prefix, folder in self._folders.items():
            if prefix and place.parent == folder and self._file(name := prefix + place.name, PAGE):
                return name
        return ""

    def page(self, name: str) -> bytes:
        """Return a report's HTML by the name of its folder. Raises UnknownReportError."""
        path = self._file(name, PAGE)
        try:
            if path is not None and path.stat().st_size <= REPORT_MEGABYTES * 1_000_000:
                return path.read_bytes()
        except OSError:
            pass  # the same error as for a file that is absent
        raise UnknownReportError("there is no such report; it may have been deleted")

    def _row(self, name: str) -> ReportRow | None:
        path = self._file(name, "report.json")
        try:
            if path is None or path.stat().st_size > REPORT_MEGABYTES * 1_000_000:
                return None
            report = json.loads(path.read_bytes())
            models = report["names"] if "names" in report else [report["model"]]
            title, created_at = str(report["title"]), str(report.get("created_at", ""))
            return ReportRow(name, title, tuple(map(str, models)), created_at)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _file(self, name: str, file: str) -> Path | None:
        """Return the path of a report's file; None for a name that is malformed or that leads, by
        a symbolic link, out of its folder."""
        match = _NAME.fullmatch(name)
        if match is None or ".." in name:
            return None
        folder, name = self._folders.get(match[1] or ""), match[2]
        if folder is None:
            return None
        path = folder / name / file
        try:
            real = path.resolve(strict=True)
            return path if real == folder.resolve() / name / file else None
        except (OSError, RuntimeError):
            return None
