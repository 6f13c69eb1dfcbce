"""Reports and comparisons as one HTML file each, that opens offline and asks nobody for anything.

Names of models, classes and files come from outside: Jinja escapes every value, `printable` takes
out what reorders or hides text, and the page carries a policy that runs no script at all.

The keys of `EvalReport.details` that are shown, each optional:

    words       [sentence]
    curves      [{title, x_label, y_label, series: [{name, x, y, low?, high?}], log_x?, note?}]
                            (a series may choose its `hue` and `dash`, from 0)
    reliability [{title, bins: [{low, high, confidence, accuracy, n}], note?}]
    scatter     [{title, x_label, y_label, points: [{name, x, y, best?}], note?}]
    confusion   {classes, counts}        counts[truth][predicted]; up to MOST_CLASSES as a heat map
    tables      [{title, columns, rows, note?}]
    mistakes    [{title, items: [{name, expected, got, score, thumbnail}]}]    thumbnail: a data: URI
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.metrics import Interval
from eval.reports import plots
from eval.reports.comparison import Comparison, change_text, p_text
from eval.reports.report import (
    EvalReport,
    cell_text,
    interval_text,
    is_share,
    number_text,
    printable,
    setting_text,
    value_text,
)

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CLASSES = 50  # that a heat map can show
MOST_CONFUSED = 30
MOST_PICTURES = 48  # of each group of mistakes
MOST_ROWS = 2_000  # of a table
_TEMPLATES = Path(__file__).parent / "templates"
_HEADLINE = re.compile(r"(?:.*/)?(?:R|acc|recall)@\w+|mean_per_class_recall|mAP")
_WORDS = {"mean_per_class_recall": "Mean per-class recall"}


@dataclass(frozen=True, slots=True)
class Legend:
    """What stands below a figure: a series by its colour and dashes, a point (`dashes` None) by its
    number."""

    name: str
    colour: int = 1
    dashes: str | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """An SVG, made by plots.py and safe as it is, with what the page writes around it."""

    kind: str
    title: str
    svg: str
    legend: tuple[Legend, ...] = ()
    note: str = ""


def render_report(report: EvalReport) -> str:
    """One evaluation as HTML."""
    metrics = list(report.metrics.items())
    details = report.details
    classes, counts = _confusion(details)
    return _render(
        "report.html",
        title=report.title,
        report=report,
        headlines=_headlines(metrics),
        groups=_groups(metrics),
        strips=any(is_share(name) for name, _ in metrics),
        plots=figures(details),
        confusion=_heat_map(classes, counts),
        confused=_most_confused(classes, counts) if len(classes) > MOST_CLASSES else None,
        tables=_tables(details),
        mistakes=_pictures(details.get("mistakes", ())),
    )


def render_comparison(comparison: Comparison) -> str:
    """Several models side by side as HTML."""
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


def figures(details: Mapping[str, Any]) -> list[Figure]:
    """The curves, reliability diagrams and scatter plots of `details`."""
    from markupsafe import Markup

    drawn = []
    for curve in details.get("curves", ()):
        legend = [
            Legend(
                series["name"],
                series.get("hue", number) % plots.SERIES + 1,
                plots.DASHES[series.get("dash", number) % plots.SERIES],
            )
            for number, series in enumerate(curve["series"])
        ]
        only = len(legend) == 1
        svg = Markup(plots.curves(curve))
        keys = () if only and legend[0].name == curve["title"] else tuple(legend)
        drawn.append(Figure("curve", curve["title"], svg, keys, curve.get("note", "")))
    for diagram in details.get("reliability", ()):
        note = diagram.get("note", "Bars on the dashed line: as often right as it is sure.")
        drawn.append(
            Figure("reliability", diagram["title"], Markup(plots.reliability(diagram)), (), note)
        )
    for plot in details.get("scatter", ()):
        points = tuple(Legend(p["name"], best=bool(p.get("best"))) for p in plot["points"])
        note = plot.get("note", "")
        drawn.append(Figure("scatter", plot["title"], Markup(plots.scatter(plot)), points, note))
    return drawn


# ---- parts


def _headlines(metrics: Sequence[tuple[str, Interval]]) -> list[tuple[str, Interval]]:
    """The three to six figures that a reader looks for first."""
    first = [(name, i) for name, i in metrics if _HEADLINE.fullmatch(name)][:6]
    return first if len(first) > 1 else list(metrics[:4])


def _groups(metrics: Sequence[tuple[str, Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Metrics under the part of their name before the last "/", in the order of their coming."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in metrics:
        groups.setdefault(name.rpartition("/")[0], []).append((name, value))
    return [(label(group) if group else "", members) for group, members in groups.items()]


def _confusion(details: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    told = details.get("confusion")
    return (list(told["classes"]), told["counts"]) if told else ([], [])


def _heat_map(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> list[Figure]:
    if not 0 < len(classes) <= MOST_CLASSES:
        return []
    from markupsafe import Markup

    title = "Rows are the truth, columns what was predicted"
    note = "The strength of a cell is its share of the row; what is off the diagonal is a mistake."
    return [Figure("confusion", title, Markup(plots.confusion(classes, counts)), (), note)]


def _most_confused(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The largest cells off the diagonal as a table."""
    cells = [
        (number, row, column)
        for row, numbers in enumerate(counts)
        for column, number in enumerate(numbers)
        if number and row != column
    ]
    cells.sort(key=lambda cell: (-cell[0], cell[1:]))
    rows = [
        [classes[row], classes[column], number, f"{100 * number / sum(counts[row]):.0f} %"]
        for number, row, column in cells[:MOST_CONFUSED]
    ]
    columns = ["truth", "predicted", "pictures", "of the class"]
    return {"title": "The most confused pairs", "columns": columns, "rows": rows, "note": ""}


def _tables(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    shown = []
    for table in details.get("tables", ()):
        note, rows = table.get("note", ""), table["rows"]
        if len(rows) > MOST_ROWS:
            note = f"The first {MOST_ROWS:,} of {len(rows):,} rows; report.json has all. {note}"
        shown.append({**table, "rows": rows[:MOST_ROWS], "note": note.strip()})
    return shown


def _word_columns(table: Mapping[str, Any]) -> list[bool]:
    """Which columns hold words rather than figures: those stand to the left."""
    figure = re.compile(r"[+−-]?[\d.,]+( ?%)?( .*\d.*)?|[–-]?")
    return [
        any(isinstance(row[at], str) and not figure.fullmatch(row[at]) for row in table["rows"])
        for at in range(len(table["columns"]))
    ]


def _pictures(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for group in groups:
        items = [
            {
                "name": item.get("name", ""),
                "expected": setting_text(item.get("expected", "")),
                "got": setting_text(item.get("got", "")),
                "score": _score(item.get("score")),
                # Nothing else may stand in src: a report must ask nobody for anything.
                "thumbnail": _data_uri(item.get("thumbnail")),
            }
            for item in group["items"][:MOST_PICTURES]
        ]
        shown.append({"title": group["title"], "items": items})
    return [group for group in shown if group["items"]]


def _data_uri(value: Any) -> str:
    known = isinstance(value, str) and re.fullmatch(r"data:image/\w+;base64,[\w+/=]+", value)
    return value if known else ""


def _score(value: Any) -> str | None:
    return number_text(float(value)) if isinstance(value, int | float) else value


def label(name: str) -> str:
    """A metric's name for people: "text_to_image/R@1" is "Text to image, R@1"."""
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

    def shown(value: Any) -> Any:
        return (
            value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)
        )

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
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
