"""The saved reports of evaluations and of training runs: their list, and the page of each."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.paths import reports_folder
from clipkit.errors import InputError

REPORTS_SHOWN = 200
REPORT_MEGABYTES = 64
_NAME = re.compile(r"(run@)?([A-Za-z0-9][A-Za-z0-9._-]{0,119})")


class UnknownReportError(InputError):
    """No report has this name."""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A saved report as the list shows it."""

    name: str  # of its folder; of a training run's after "run@"
    title: str
    models: tuple[str, ...]
    created_at: str  # UTC, ISO 8601; empty if the report has no date


class SavedReports:
    """List and read the reports in `folder`, by default `paths.reports_folder()`, and those of the
    training runs in `runs`, by default runs/ where the process was started; without caching."""

    def __init__(self, folder: Path | None = None, runs: Path = Path("runs")) -> None:
        self._folder = folder or reports_folder()
        self._runs = runs.absolute()

    def rows(self) -> list[ReportRow]:
        """List up to REPORTS_SHOWN reports, the newest first; folders without one are left out."""
        names = []
        for prefix, folder in (("", self._folder), ("run@", self._runs)):
            with suppress(OSError):
                names += [prefix + path.name for path in folder.iterdir()]
        rows = [row for name in names if (row := self._row(name)) is not None]
        rows.sort(key=lambda row: (row.created_at, row.name), reverse=True)
        return rows[:REPORTS_SHOWN]

    def page(self, name: str) -> bytes:
        """Return a report's HTML by the name of its folder. Raises UnknownReportError."""
        path = self._file(name, "report.html")
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
        folder, name = self._runs if match[1] else self._folder, match[2]
        path = folder / name / file
        try:
            real = path.resolve(strict=True)
            return path if real == folder.resolve() / name / file else None
        except (OSError, RuntimeError):
            return None
