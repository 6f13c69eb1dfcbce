"""Comparison, the result of eval/compare.py, and its JSON, Markdown and terminal forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from clipkit.metrics import Interval, Paired
from clipkit.wording import printable
from eval.reports.report import EvalReport
from eval.reports.wording import (
    change_text,
    direction,
    interval_text,
    markdown,
    markdown_head,
    markdown_table,
    markdown_tables,
    p_text,
    text_table,
    to_json,
    value_text,
)

FORMAT = "clipkit-comparison/2"
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """The paired test of model `second` against model `first`, by position, in one metric."""

    first: int
    second: int
    paired: Paired  # second - first
    p_value: float  # corrected for all tests of the section

    @property
    def significant(self) -> bool:
        """Return whether the difference is more than chance at the level ALPHA."""
        return self.p_value < ALPHA


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of all models. `best` is the model that significantly beats every other one."""

    metric: str
    intervals: tuple[Interval | None, ...]  # one per model
    pairs: tuple[Pair, ...] = ()
    best: int | None = None

    @property
    def direction(self) -> int:
        """Return 1 if greater is better, -1 if smaller is, 0 if neither."""
        return direction(self.metric)

    def against_first(self, model: int) -> Pair | None:
        """Return the test of a model against the first one, None if there is none."""
        return next((p for p in self.pairs if (p.first, p.second) == (0, model)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One task on one dataset. `curves`, `reliability`, `changed` (pictures that got better and
    worse) and `settings` (a table) have the keys that html.py lists."""

    title: str
    reports: tuple[EvalReport | None, ...]  # one per model
    rows: tuple[Row, ...]
    curves: tuple[Mapping[str, Any], ...]
    reliability: tuple[Mapping[str, Any], ...]
    changed: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def tested(self) -> int:
        """Return the number of tests."""
        return sum(len(row.pairs) for row in self.rows)

    def changes(self, model: int) -> tuple[list[str], list[str]]:
        """Return the metrics that are significantly better, and worse, than the first model's, each
        as "metric +1.2"."""
        better: list[str] = []
        worse: list[str] = []
        for row in self.rows:
            pair = row.against_first(model)
            if pair is not None and pair.significant and row.direction:
                gain = pair.paired.difference * row.direction
                change = f"{row.metric} {change_text(row.metric, pair.paired.difference)}"
                (better if gain > 0 else worse).append(change)
        return better, worse

    @property
    def note(self) -> str:
        """Return the line below the section's table."""
        if not self.tested:
            return "No difference was tested: see the warning, or the reports hold no samples."
        return f"{self.tested} paired tests, corrected together."


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Several models side by side; `eval.reports.save` writes it to a folder."""

    title: str
    names: tuple[str, ...]  # one per model, all different
    sections: tuple[Section, ...]
    sentences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    created_at: str = ""  # UTC, ISO
    command: str = ""
    encoder_ids: tuple[str, ...] = ()  # one per model
    # Curves and tables of the whole, such as a training run's; html.py lists the keys.
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def computed(self) -> str:
        """Return "float32 on cpu", or both where models differ; see `EvalReport.computed`."""
        return ", ".join(dict.fromkeys(r.computed for r in self.reports if r.computed))

    @property
    def reports(self) -> list[EvalReport]:
        """Return the reports that are compared."""
        return [r for section in self.sections for r in section.reports if r is not None]

    def to_json(self) -> str:
        """Return names, figures and tests as strict JSON."""
        sections = [
            {
                "title": section.title,
                "warnings": section.warnings,
                "rows": [_row_fields(row) for row in section.rows],
                "made": section.settings,
            }
            for section in self.sections
        ]
        return to_json(
            {
                "format": FORMAT,
                "title": self.title,
                "names": self.names,
                "encoder_ids": self.encoder_ids,
                "words": self.sentences,
                "warnings": self.warnings,
                "sections": sections,
                "details": self.details,
                "created_at": self.created_at,
                "command": self.command,
            }
        )

    def to_markdown(self) -> str:
        """Return sentences, figures, tests and settings as Markdown."""
        parts = markdown_head(self.title, self.warnings, self.sentences)
        for section in self.sections:
            parts.append(f"## {markdown(section.title)}")
            parts += [f"> **Warning:** {markdown(warning)}" for warning in section.warnings]
            parts += [markdown_table(*self._table(section)), markdown(section.note)]
            cells = [[str(cell) for cell in row] for row in section.settings["rows"]]
            parts.append(markdown_table(section.settings["columns"], cells))
        parts += markdown_tables(self.details.get("tables", ()))
        if self.command:
            parts.append(f"Command: {markdown(self.command)}")
        return "\n\n".join(parts) + "\n"

    def lines(self) -> list[str]:
        """Return the lines of tables for a terminal, with sentences and warnings."""
        lines = [printable(f"{self.title}, {self.computed}" if self.computed else self.title)]
        for section in self.sections:
            lines += ["", printable(section.title), *text_table(*self._table(section))]
            lines += [f"warning: {printable(warning)}" for warning in section.warnings]
        lines += [f"warning: {printable(warning)}" for warning in self.warnings]
        return [*lines, *map(printable, self.sentences)]

    def _table(self, section: Section) -> tuple[list[str], list[list[str]]]:
        columns = [""]
        for at, name in enumerate(self.names):
            columns += [name, "change"] if at and section.tested else [name]
        return columns, [_cells(row, tested=bool(section.tested)) for row in section.rows]


def _cells(row: Row, *, tested: bool) -> list[str]:
    cells = [row.metric]
    for at, interval in enumerate(row.intervals):
        cell = "–"
        if interval is not None:
            star = " *" if row.best == at else ""
            value = value_text(row.metric, interval.value)
            cell = f"{value}{star} ({interval_text(row.metric, interval)})"
        cells.append(cell)
        if at and tested:
            pair = row.against_first(at)
            change = pair and change_text(row.metric, pair.paired.difference)
            cells.append(f"{change}, {p_text(pair.p_value)}" if pair else "–")
    return cells


def _row_fields(row: Row) -> Mapping[str, Any]:
    tests = [
        {
            **asdict(pair.paired),
            "first": pair.first,
            "second": pair.second,
            "p_value_corrected": pair.p_value,
        }
        for pair in row.pairs
    ]
    return {"metric": row.metric, "models": row.intervals, "best": row.best, "tests": tests}
