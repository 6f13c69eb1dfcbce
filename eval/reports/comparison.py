"""What a comparison of models is, and how it is kept and told. compare.py makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.metrics import Interval, Paired
from eval.reports.report import (
    EvalReport,
    cell_text,
    direction,
    interval_text,
    is_share,
    markdown,
    markdown_table,
    number_text,
    printable,
    text_table,
    to_json,
    value_text,
    write_report,
)

FORMAT = "clipkit-comparison/2"
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """Model `second` against model `first`, by position, in one metric."""

    first: int
    second: int
    paired: Paired  # second - first
    p_value: float  # corrected

    @property
    def significant(self) -> bool:
        return self.p_value < ALPHA


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of all models. `best` is the position of the model that significantly beats every
    other one."""

    metric: str
    intervals: tuple[Interval | None, ...]  # one per model
    pairs: tuple[Pair, ...] = ()
    best: int | None = None

    @property
    def direction(self) -> int:
        return direction(self.metric)

    def against_first(self, model: int) -> Pair | None:
        """The test of a model against the first one, if it could be made."""
        return next((p for p in self.pairs if (p.first, p.second) == (0, model)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One task on one data set. `curves`, `reliability`, `changed` and `made` are as page.py
    takes them: overlaid curves, diagrams, pictures that got better and worse, and the settings."""

    title: str
    reports: tuple[EvalReport | None, ...]  # one per model
    rows: tuple[Row, ...]
    curves: tuple[Mapping[str, Any], ...]
    reliability: tuple[Mapping[str, Any], ...]
    changed: tuple[Mapping[str, Any], ...]
    made: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def tested(self) -> int:
        """How many tests were made."""
        return sum(len(row.pairs) for row in self.rows)

    def moved(self, model: int) -> tuple[list[str], list[str]]:
        """What got better and what got worse than in the first model by more than chance, each as
        "metric +1.2"."""
        better: list[str] = []
        worse: list[str] = []
        for row in self.rows:
            pair = row.against_first(model)
            if pair is not None and pair.significant and row.direction:
                rose = pair.paired.difference * row.direction > 0
                told = f"{row.metric} {change_text(row.metric, pair.paired.difference)}"
                (better if rose else worse).append(told)
        return better, worse

    @property
    def note(self) -> str:
        if not self.tested:
            return "No difference was tested: see the warning, or the reports hold no samples."
        return f"{self.tested} paired tests, corrected together."


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What `compare` found; `save` writes report.html, report.md and report.json."""

    title: str
    names: tuple[str, ...]  # one per model, all different
    sections: tuple[Section, ...]
    words: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    created_at: str = ""  # UTC, ISO
    command: str = ""
    encoder_ids: tuple[str, ...] = ()  # as `names`
    # Curves and tables that belong to the whole, such as a training run's: see page.py for the keys.
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the comparison into `folder`, which is made; one that is there is replaced."""
        from eval.reports.html import render_comparison

        files = {"report.html": render_comparison(self), "report.md": self.to_markdown()}
        write_report(folder, files, self.to_json())

    def to_json(self) -> str:
        """Names, figures and tests, as strict JSON."""
        sections = [
            {
                "title": section.title,
                "warnings": section.warnings,
                "rows": [_row_told(row) for row in section.rows],
                "made": section.made,
            }
            for section in self.sections
        ]
        return to_json(
            {
                "format": FORMAT,
                "title": self.title,
                "names": self.names,
                "encoder_ids": self.encoder_ids,
                "words": self.words,
                "warnings": self.warnings,
                "sections": sections,
                "details": self.details,
                "created_at": self.created_at,
                "command": self.command,
            }
        )

    def to_markdown(self) -> str:
        parts = [f"# {markdown(self.title)}"]
        parts += [f"> **Warning:** {markdown(warning)}" for warning in self.warnings]
        parts += [markdown(sentence) for sentence in self.words]
        for section in self.sections:
            parts.append(f"## {markdown(section.title)}")
            parts += [f"> **Warning:** {markdown(warning)}" for warning in section.warnings]
            parts += [markdown_table(*self._table(section)), markdown(section.note)]
            cells = [[str(cell) for cell in row] for row in section.made["rows"]]
            parts.append(markdown_table(section.made["columns"], cells))
        for table in self.details.get("tables", ()):
            cells = [[cell_text(cell) for cell in row] for row in table["rows"]]
            parts += [f"## {markdown(table['title'])}", markdown_table(table["columns"], cells)]
        if self.command:
            parts.append(f"Command: {markdown(self.command)}")
        return "\n\n".join(parts) + "\n"

    def lines(self) -> list[str]:
        """Tables for a terminal, a line each."""
        lines = [printable(self.title)]
        for section in self.sections:
            lines += ["", printable(section.title), *text_table(*self._table(section))]
            lines += [f"warning: {printable(warning)}" for warning in section.warnings]
        lines += [f"warning: {printable(warning)}" for warning in self.warnings]
        return [*lines, *map(printable, self.words)]

    def _table(self, section: Section) -> tuple[list[str], list[list[str]]]:
        columns = [""]
        for at, name in enumerate(self.names):
            columns += [name, "change"] if at and section.tested else [name]
        return columns, [_cells(row, tested=bool(section.tested)) for row in section.rows]


def change_text(metric: str, difference: float) -> str:
    """A difference with its sign, shares in percentage points: "+2.3"."""
    if is_share(metric):
        return f"{100 * difference:+.1f}".replace("-", "−")
    return f"{'+' if difference >= 0 else '−'}{number_text(abs(difference))}"


def p_text(p_value: float) -> str:
    """0.0123 -> p = 0.012, as text; what is below 0.001 is told as that."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _cells(row: Row, *, tested: bool) -> list[str]:
    cells = [row.metric]
    for at, interval in enumerate(row.intervals):
        shown = "–"
        if interval is not None:
            star = " *" if row.best == at else ""
            value = value_text(row.metric, interval.value)
            shown = f"{value}{star} ({interval_text(row.metric, interval)})"
        cells.append(shown)
        if at and tested:
            pair = row.against_first(at)
            change = pair and change_text(row.metric, pair.paired.difference)
            cells.append(f"{change}, {p_text(pair.p_value)}" if pair else "–")
    return cells


def _row_told(row: Row) -> Mapping[str, Any]:
    def told(interval: Interval | None) -> Mapping[str, Any] | None:
        names = ("value", "low", "high", "n")
        return None if interval is None else {name: getattr(interval, name) for name in names}

    return {
        "metric": row.metric,
        "models": [told(interval) for interval in row.intervals],
        "best": row.best,
        "tests": [
            {
                "first": pair.first,
                "second": pair.second,
                "difference": pair.paired.difference,
                "low": pair.paired.low,
                "high": pair.paired.high,
                "n": pair.paired.n,
                "p_value": pair.paired.p_value,
                "p_value_corrected": pair.p_value,
            }
            for pair in row.pairs
        ],
    }
