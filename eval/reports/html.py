"""Render reports and comparisons as one HTML file each, which works offline and loads nothing.

Names of models, classes and files come from outside: Jinja escapes every value, `printable` removes
characters that reorder or hide text, and the page's content security policy allows no script.

The keys of `EvalReport.details`, each optional:

    words       [sentence]
    headline    [metric]            which figures come first
    curves      [{title, x_label, y_label, series: [{name, x, y, low?, high?}], log_x?, mark?, note?}]
                            (a series may choose its `hue` and `dash`, from 0, and may be `faint`, not
                             in the legend; `mark` is an x with a vertical line)
    reliability [{title, bins: [{low, high, confidence, accuracy, n}], note?}]
    scatter     [{title, x_label, y_label, points: [{name, x, y, best?}], note?}]
    confusion   {classes, counts}        counts[truth][predicted]; up to MOST_CLASSES as a heat map
    tables      [{title, columns, rows, note?, first?, terminal?, heat?}]
                            first: directly after the headline; terminal: printed there too;
                            (a cell may be [value, interval] as text)
                            heat: shares from 0 to 1, one for each cell but the first of a row
    mistakes    [{title, items: [exhibit], labels?}]    labels: headings of `expected` and `got`

`Comparison.details` has curves and tables, and that of a training run also outcome (what the first
sentence says), summary ({columns, groups: [{title, rows}]}) and commands ([(what, command)]).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.wording import printable
from eval.reports import plots
from eval.reports.comparison import Comparison
from eval.reports.report import MOST_FIGURES, EvalReport
from eval.reports.wording import (
    cell_text,
    change_text,
    interval_text,
    is_share,
    number_text,
    p_text,
    setting_text,
    value_text,
)

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CLASSES = 50  # in a heat map
MOST_PICTURES = 48  # of each group of mistakes
MOST_ROWS = 2_000  # of a table
_TEMPLATES = Path(__file__).parent / "templates"
_WORDS = {"mean_per_class_recall": "Mean per-class recall"}


def render_report(report: EvalReport) -> str:
    """Render one evaluation."""
    metrics = list(report.metrics.items())
    details = report.details
    return _render(
        "report.html",
        title=report.title,
        report=report,
        headlines=list(report.headline.items()),
        many=len(metrics) > MOST_FIGURES,
        groups=_groups(metrics),
        strips=any(is_share(name) for name, _ in metrics),
        plots=figures(details),
        confusion=_heat_map(details),
        tables=_tables(details),
        mistakes=_pictures(details.get("mistakes", ())),
    )


def render_comparison(comparison: Comparison) -> str:
    """Render several models side by side."""
    sections = [
        {
            "section": section,
            "rows": _groups([(row.metric, row) for row in section.rows]),
            "plots": figures({"curves": section.curves, "reliability": section.reliability}),
            "changed": _pictures(section.changed),
        }
        for section in comparison.sections
    ]
    return _render(
        "comparison.html",
        title=comparison.title,
        comparison=comparison,
        sections=sections,
        plots=figures(comparison.details),
        tables=_tables(comparison.details),
    )


def figures(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw the curves, reliability diagrams and scatter plots of `details`.

    A figure has an `svg`, safe without escaping, `kind`, `title`, `note` and a `legend`: series by
    colour and dashes, or points (`dashes` None) by their number.
    """
    drawn = []
    for curve in details.get("curves", ()):
        legend: list[dict[str, Any]] = [
            {
                "name": series["name"],
                "colour": series.get("hue", number) % plots.SERIES + 1,
                "dashes": plots.DASHES[series.get("dash", number) % plots.SERIES],
                "best": False,
            }
            for number, series in enumerate(curve["series"])
            if not series.get("faint")
        ]
        if len(legend) == 1 and legend[0]["name"] == curve["title"]:
            legend = []
        drawn.append(_figure("curve", curve, plots.curves(curve), legend))
    for diagram in details.get("reliability", ()):
        note = "Bars on the dashed line: accuracy equals confidence."
        svg = plots.reliability(diagram)
        drawn.append(_figure("reliability", {"note": note, **diagram}, svg))
    for plot in details.get("scatter", ()):
        points = [
            {"name": p["name"], "dashes": None, "best": p.get("best", False)}
            for p in plot["points"]
        ]
        drawn.append(_figure("scatter", plot, plots.scatter(plot), points))
    return drawn


def _figure(
    kind: str, plot: Mapping[str, Any], svg: str, legend: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    from markupsafe import Markup

    note = plot.get("note", "")
    return {
        "kind": kind,
        "title": plot["title"],
        "svg": Markup(svg),
        "legend": legend,
        "note": note,
    }


# ---- parts


def _groups(metrics: Sequence[tuple[str, Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Group metrics by the part of their name before the last "/", in order of appearance."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in metrics:
        groups.setdefault(name.rpartition("/")[0], []).append((name, value))
    return [(label(group) if group else "", members) for group, members in groups.items()]


def _heat_map(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    confusion = details.get("confusion") or {"classes": ()}
    if not 0 < len(confusion["classes"]) <= MOST_CLASSES:
        return []
    plot = {
        "title": "True class by row, predicted class by column",
        "note": "The darker a cell, the larger its share of the row; cells off the diagonal are errors.",
    }
    svg = plots.confusion(confusion["classes"], confusion["counts"])
    return [_figure("confusion", plot, svg)]


def _tables(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = []
    for table in details.get("tables", ()):
        note, rows = table.get("note", ""), table["rows"]
        if len(rows) > MOST_ROWS:
            note = f"The first {MOST_ROWS:,} of {len(rows):,} rows; report.json has all. {note}"
        tables.append({**table, "rows": rows[:MOST_ROWS], "note": note.strip()})
    return tables


def _word_columns(table: Mapping[str, Any]) -> list[bool]:
    """Return which columns hold text rather than numbers and are aligned left."""
    number = re.compile(r"[+−-]?[\d.,]+( ?%)?( .*\d.*)?|[–-]?")
    return [
        any(isinstance(row[at], str) and not number.fullmatch(row[at]) for row in table["rows"])
        for at in range(len(table["columns"]))
    ]


def _pictures(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    for group in groups:
        items = [
            {
                "name": item.get("name", ""),
                "expected": setting_text(item.get("expected", "")),
                "got": setting_text(item.get("got", "")),
                "score": _score(item.get("score")),
                # Only data: URIs: a report must not load anything.
                "thumbnail": _data_uri(item.get("thumbnail")),
            }
            for item in group["items"][:MOST_PICTURES]
        ]
        labels = group.get("labels", ("Expected", "Got"))
        if items:
            drawn.append({"title": group["title"], "items": items, "labels": labels})
    return drawn


def _data_uri(value: Any) -> str:
    valid = isinstance(value, str) and re.fullmatch(r"data:image/\w+;base64,[\w+/=]+", value)
    return value if valid else ""


def _score(value: Any) -> str | None:
    return number_text(float(value)) if isinstance(value, int | float) else value


def label(name: str) -> str:
    """Return a metric's name as a heading: "text_to_image/R@1" -> "Text to image, R@1"."""
    parts = [_WORDS.get(part, part.replace("_", " ")) for part in name.split("/")]
    if not parts[0][:1].isupper() and re.fullmatch(r"[a-z ]+", parts[0]):
        parts[0] = parts[0].capitalize()
    return ", ".join(parts)


# ---- the template engine


def _render(template: str, **values: Any) -> str:
    from markupsafe import Markup

    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(**values, style=Markup(style), style_hash=digest)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        )

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "change": change_text,
        "p": p_text,
        "label": label,
        "short_label": lambda name: label(name.rpartition("/")[2]),
        "value": value_text,
        "interval": interval_text,
        "cell": cell_text,
        "is_share": is_share,
        "word_columns": _word_columns,
    }
    return environment
