"""Text for reports: metrics, numbers, settings and tables, in a terminal, Markdown or JSON.

A minus sign is U+2212, a share is written in percent, and no number is written with an exponent.
Text from outside, such as a file's name, goes through `clipkit.wording.printable`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from clipkit.metrics import Interval
from clipkit.wording import percent, printable, signed

# Parts of a metric's name which say that its values are shares, or that smaller is better.
_SHARE = re.compile(
    r"(R|P|acc|recall|precision|nDCG|hit|overlap|neighbour_overlap|coverage)@\d+(nn)?"
    r"|acc|accuracy|recall|mean_per_class_recall|balanced_accuracy|mAP|AP|MRR|nDCG|F1|ECE"
)
_BETTER_SMALL = re.compile(r"ECE|NLL|(median|mean|best)_rank|.*(_|^)(ms|seconds|bytes|MB)")


# ---- metrics


def is_share(name: str) -> bool:
    """Return whether a metric is a fraction, printed in percent: "text_to_image/R@1", not a rank, and
    not "relative/R@1", a ratio, which may be above 1."""
    return not name.startswith("relative/") and any(
        _SHARE.fullmatch(part.strip()) for part in re.split("[/,]", name)
    )


def direction(name: str) -> int:
    """Return 1 if greater is better, -1 if smaller is, 0 if neither, such as a temperature."""
    name = name.removeprefix("relative/")
    if any(_BETTER_SMALL.fullmatch(part) for part in name.split("/")):
        return -1
    return 1 if is_share(name) else 0


def metric_text(name: str) -> str:
    """Return a metric's name within a sentence: "text_to_image/R@1" -> "text to image R@1"."""
    return name.replace("/", " ").replace("_", " ")


def value_text(name: str, value: float) -> str:
    """Return a metric's value as text: 0.4534 -> "45.3 %", a rank of 12.25 -> "12.2"; NaN -> "–"."""
    if math.isnan(value):
        return "–"
    return percent(value) if is_share(name) else number_text(value)


def interval_text(name: str, interval: Interval) -> str:
    """Return "43.1 to 47.5", in the unit of `value_text` and both with as many decimals; "–" if the
    interval has no bounds."""
    ends = (interval.low, interval.high)
    if any(map(math.isnan, ends)):
        return "–"
    if is_share(name):
        return " to ".join(signed(100 * end, 1) for end in ends)
    texts = [number_text(end) for end in ends]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return " to ".join(signed(end, decimals) for end in ends)


def change_text(name: str, difference: float) -> str:
    """Return a difference with its sign, of a share in percentage points: "+2.3"."""
    text = signed(100 * difference, 1) if is_share(name) else number_text(difference)
    return text if text.startswith("−") else f"+{text}"


def p_text(p_value: float) -> str:
    """Return "p = 0.012", or "p < 0.001" for less than that."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


# ---- numbers


def percent_interval(interval: Interval) -> str:
    """Return "95 % interval 43.1 to 47.5 %"."""
    return f"95 % interval {interval_text('acc', interval)} %"


def number_text(value: float) -> str:
    """Return a number with three digits, at most 7 decimals, or all before the point: "0.0123",
    "6.90", "12,346"."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 or value == round(value):
        return signed(value, 0)
    if abs(value) < 5e-8:  # a rounding error
        return "0"
    return signed(value, min(7, 2 - math.floor(math.log10(abs(value)))))


# ---- cells and settings


def setting_text(value: Any) -> str:
    """Return a setting's value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting_text, value))
    return "none" if value is None else str(value)


def cell_text(value: Any, column: str = "") -> str:
    """Return a table's cell as text: text as it is, None as "–", [value, interval] as both, a
    number in the unit that the column's name implies (see `is_share`)."""
    if value is None:
        return "–"
    if isinstance(value, list):  # a value and its interval
        return f"{value[0]} ({value[1]})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else value_text(column, value)


# ---- Markdown, tables, JSON


def markdown(text: object) -> str:
    """Return text as Markdown that shows it literally."""
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", printable(text))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left-aligned, the rest right-aligned."""
    ruler = ["---", *("---:" for _ in columns[1:])]
    lines = [[markdown(cell) for cell in row] for row in (columns, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ruler, *lines[1:]))


def markdown_head(title: str, warnings: Sequence[str], sentences: Sequence[str]) -> list[str]:
    """Return the beginning of a report as Markdown paragraphs."""
    quotes = [f"> **Warning:** {markdown(warning)}" for warning in warnings]
    return [f"# {markdown(title)}", *quotes, *map(markdown, sentences)]


def table_text(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the cells of a table of a report's details as text."""
    columns = list(table["columns"])
    cells = [[cell_text(*pair) for pair in zip(row, columns, strict=True)] for row in table["rows"]]
    return columns, cells


def markdown_tables(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tables of a report's details as Markdown paragraphs."""
    parts = []
    for table in tables:
        parts += [f"## {markdown(table['title'])}", markdown_table(*table_text(table))]
        parts += [markdown(table["note"])] if table.get("note") else []
    return parts


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of equal width, the first column left-aligned, the rest right-aligned."""
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def to_json(content: Mapping[str, Any]) -> str:
    """Return nested mappings, dataclasses and arrays as strict JSON; NaN and infinity become null."""
    return json.dumps(_json_value(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # a file's name may hold bytes that are not UTF-8
        return value.encode("utf-8", "replace").decode()
    return value
