"""EvalReport, the result of every evaluator, and its JSON, Markdown and terminal forms."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from clipkit.arrays import Float64, Floats
from clipkit.errors import ImageError
from clipkit.metrics import Interval
from clipkit.wording import count, duration, printable
from eval.data import Pictures
from eval.features import thumbnail_uri
from eval.reports.wording import (
    interval_text,
    markdown_head,
    markdown_table,
    markdown_tables,
    setting_text,
    table_text,
    text_table,
    to_json,
    value_text,
)

FORMAT = "clipkit-eval-report/1"
TASKS = {
    "retrieval": "Retrieval",
    "zeroshot": "Zero-shot classification",
    "probe": "Probes",
    "space": "Health of the space",
    "drift": "Drift",
    "index": "Index quality",
    "robustness": "Robustness",
    "study": "Study",
}
COLUMNS = ("metric", "value", "95 % interval", "n")
MOST_FIGURES = 16  # that a terminal prints, and that the page shows before anything else
_HEADLINE = re.compile(r"(?:.*/)?(?:R|acc|recall)@\w+|mean_per_class_recall|mAP")


@dataclass(frozen=True, slots=True, eq=False)
class EvalReport:
    """One evaluation of one model on one dataset.

    `metrics` are Intervals (value, low, high, n), fractions where the field prints percent, by names
    such as "text_to_image/R@1" or "acc@1"; a metric without an honest interval has low and high NaN.
    `details` hold what the HTML page shows; html.py lists the keys.
    """

    task: str  # a key of TASKS
    dataset: str  # as the user named it
    split: str | None
    model: str  # its spec
    encoder_id: str
    n: Mapping[str, int]  # {"pictures": 1000, "captions": 5000}
    metrics: Mapping[str, Interval]
    settings: Mapping[str, Any]  # what changes the numbers: templates, tie rule, precision, seeds
    fingerprint: str  # of the data
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    created_at: str = ""  # UTC, ISO
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Float64] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return "Retrieval on flickr8k/captions.jsonl, split dev"; of a long path only the end."""
        split = f", split {self.split}" if self.split else ""
        name = "/".join(re.split(r"[/\\]", self.dataset)[-2:])
        return f"{TASKS.get(self.task, self.task)} on {name}{split}"

    @property
    def headline(self) -> dict[str, Interval]:
        """Return the metrics that answer first: those that the evaluator names, else at most six."""
        if "headline" in self.details:
            return {name: self.metrics[name] for name in self.details["headline"]}
        names = [name for name in self.metrics if _HEADLINE.fullmatch(name)][:6]
        return {n: self.metrics[n] for n in (names if len(names) > 1 else [*self.metrics][:4])}

    @property
    def counts(self) -> list[str]:
        """Return ["1,000 pictures", "1 caption"]."""
        names = {k: k.replace("_", " ") for k in self.n}
        return [
            f"{number:,} {names[k].removesuffix('s') if number == 1 else names[k]}"
            for k, number in self.n.items()
        ]

    @property
    def computed(self) -> str:
        """Return "float32 on cpu", what the model's vectors were computed in; "" if that is unknown."""
        return " on ".join(
            str(self.settings[key]) for key in ("precision", "device") if key in self.settings
        )

    def provenance(self) -> list[tuple[str, str]]:
        """Return model, data, counts, times, versions and command as (name, value)."""
        counts = [(_label(name), f"{number:,}") for name, number in self.n.items()]
        pairs = [
            ("Model", self.model),
            ("Encoder", self.encoder_id),
            ("Data", self.dataset + (f", split {self.split}" if self.split else "")),
            ("Data fingerprint", self.fingerprint),
            *counts,
            ("Created", self.created_at),
            ("Time", ", ".join(f"{name} {duration(time)}" for name, time in self.seconds.items())),
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("Command", self.command),
        ]
        return [(name, value) for name, value in pairs if value]

    def chosen(self) -> list[tuple[str, str]]:
        """Return the settings as (name, value)."""
        return [(_label(name), setting_text(value)) for name, value in self.settings.items()]

    def to_json(self) -> str:
        """Return everything but the samples as strict JSON; numbers that are not finite are null."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        return to_json({"format": FORMAT, "title": self.title, **content})

    def to_markdown(self) -> str:
        """Return figures, warnings and provenance as Markdown, without pictures and curves."""
        parts = [
            *markdown_head(self.title, self.warnings, self.details.get("words", ())),
            markdown_table(COLUMNS, self._rows(self.metrics)),
            *markdown_tables(self.details.get("tables", ())),
            "## Settings and data",
            markdown_table(("name", "value"), [*self.provenance(), *self.chosen()]),
        ]
        return "\n\n".join(parts) + "\n"

    def lines(self) -> list[str]:
        """Return what a terminal shows: the metrics, or of many the headline; the tables that are
        marked for it; sentences and warnings."""
        computed = f", {self.computed}" if self.computed else ""
        head = f"{self.title}: {self.model} ({self.encoder_id[:8]}){computed}, {', '.join(self.counts)}"
        shown = self.metrics if len(self.metrics) <= MOST_FIGURES else self.headline
        lines = [printable(head), *text_table(("", *COLUMNS[1:]), self._rows(shown))]
        for table in self.details.get("tables", ()):
            if table.get("terminal"):
                rows = [[c[0] if isinstance(c, list) else c for c in row] for row in table["rows"]]
                lines += [
                    printable(table["title"]),
                    *text_table(*table_text(table | {"rows": rows})),
                ]
        lines += map(printable, self.details.get("words", ()))
        lines += [f"warning: {printable(warning)}" for warning in self.warnings]
        more = len(self.metrics) - len(shown)
        return [*lines, f"{count(more, 'more figure')} in the report"] if more else lines

    def _rows(self, metrics: Mapping[str, Interval]) -> list[tuple[str, str, str, str]]:
        return [
            (name, value_text(name, i.value), interval_text(name, i), f"{i.n:,}")
            for name, i in metrics.items()
        ]


def exhibit(
    pictures: Pictures | None,
    row: int,
    *,
    expected: str,
    got: str = "",
    score: float | None = None,
) -> dict[str, Any]:
    """Return a picture with its caption, as an item of a report's details["mistakes"].

    The thumbnail is empty where there are no pictures or the file cannot be read any more.
    """
    name, thumbnail = f"picture {row}", ""
    if pictures is not None:
        name = pictures.name(row)
        with contextlib.suppress(ImageError):
            thumbnail = thumbnail_uri(pictures, row)
    texts = {"name": name, "expected": expected, "got": got}
    return {**texts, "score": score, "thumbnail": thumbnail}


def curve(
    title: str, x_label: str, y_label: str, series: Sequence[Mapping[str, Any]], **options: Any
) -> dict[str, Any]:
    """Return an item of a report's details["curves"]; html.py lists the options."""
    labels = {"title": title, "x_label": x_label, "y_label": y_label}
    return {**labels, "series": series, **options}


def interval_series(name: str, x: Sequence[float], intervals: Sequence[Interval]) -> dict[str, Any]:
    """Return a curve's series of figures over x with their bounds as a band."""
    series: dict[str, Any] = {"name": name, "x": list(x), "y": [i.value for i in intervals]}
    for bound in ("low", "high"):
        ends = [(getattr(i, bound), i.value) for i in intervals]
        series[bound] = [value if math.isnan(end) else end for end, value in ends]
    return series


def histogram_series(name: str, values: Floats, bins: Float64) -> dict[str, Any]:
    """Return a curve's series with the share of the values in each bin."""
    shares = np.histogram(values, bins)[0] / len(values)
    return {"name": name, "x": ((bins[1:] + bins[:-1]) / 2).round(4).tolist(), "y": shares.tolist()}


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()
