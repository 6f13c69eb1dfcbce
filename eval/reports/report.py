"""EvalReport: what every evaluator returns, and how it is kept and told.

A report is a folder: `report.json` (everything but the samples), `report.md`, `report.html`, and
`samples.npz` (the values per picture that a paired test between two models needs). `report.json` is
written last: where it is, the rest is.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError
from clipkit.metrics import Interval

FORMAT = "clipkit-eval-report/1"
TASKS = {
    "retrieval": "Retrieval",
    "zeroshot": "Zero-shot classification",
    "probe": "Probes",
    "space": "Health of the space",
    "drift": "Drift",
    "index": "Index quality",
    "robustness": "Robustness",
}
# What a part of a metric's name says of its values: a share of something, or good when small.
_SHARE = re.compile(
    r"(R|P|acc|recall|precision|nDCG|hit|overlap|neighbour_overlap|coverage)@\d+"
    r"|acc|accuracy|recall|mean_per_class_recall|balanced_accuracy|mAP|AP|MRR|nDCG|F1|ECE"
)
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)
_BETTER_SMALL = re.compile(r"ECE|NLL|(median|mean|best)_rank|.*(_|^)(ms|seconds|bytes|MB)")


@dataclass(frozen=True, slots=True, eq=False)
class EvalReport:
    """One evaluation of one model on one dataset.

    `metrics` are Intervals (value, low, high, n), fractions where the field prints percent, by names
    such as "text_to_image/R@1" or "acc@1"; a metric without an honest interval has low and high NaN.
    `details` hold what a page can show: see page.py for the keys it knows.
    """

    task: str  # "retrieval", "zeroshot", "probe", "space", "drift", "index", "robustness"
    dataset: str  # as it was named
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
    samples: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """ "Retrieval on flickr8k/captions.jsonl, split dev": of a long path, its end."""
        split = f", split {self.split}" if self.split else ""
        name = "/".join(re.split(r"[/\\]", self.dataset)[-2:])
        return f"{TASKS.get(self.task, self.task)} on {name}{split}"

    # ---- kept

    def to_json(self) -> str:
        """Everything but the samples, as strict JSON: what is not a finite number is null."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        told["metrics"] = {
            name: {"value": i.value, "low": i.low, "high": i.high, "n": i.n}
            for name, i in self.metrics.items()
        }
        return to_json({"format": FORMAT, "title": self.title, **told})

    def save(self, folder: Path) -> None:
        """Write the report into `folder`, which is made; a report that is there is replaced."""
        from eval.reports.html import render_report

        samples = io.BytesIO()
        np.savez_compressed(samples, allow_pickle=False, **dict(self.samples))
        files = {"report.html": render_report(self), "report.md": self.to_markdown()}
        write_report(folder, {"samples.npz": samples.getvalue(), **files}, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. InputError: there is no report, or it is damaged."""
        path = folder / "report.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
                raise InputError(f"{path} is not a report of one evaluation ({FORMAT})")
            del told["title"]
            told["metrics"] = {name: _interval(i) for name, i in told["metrics"].items()}
            told["warnings"] = tuple(told["warnings"])
            kept = io.BytesIO((folder / "samples.npz").read_bytes())
            with np.load(kept, allow_pickle=False) as stored:
                samples = {name: stored[name].astype(np.float64) for name in stored.files}
            return cls(**told, samples=samples)
        except FileNotFoundError as error:
            raise InputError(
                f"there is no report in {folder}: {error.filename} is missing"
            ) from error
        except _DAMAGE as error:
            raise InputError(
                f"the report in {folder} is damaged: {error}; make it again"
            ) from error

    # ---- told

    def to_markdown(self) -> str:
        """The numbers, warnings and provenance, without pictures and curves."""
        rows = [
            (name, value_text(name, i.value), interval_text(name, i), f"{i.n:,}")
            for name, i in self.metrics.items()
        ]
        parts = [f"# {markdown(self.title)}"]
        parts += [f"> **Warning:** {markdown(warning)}" for warning in self.warnings]
        parts += [markdown(sentence) for sentence in self.details.get("words", ())]
        parts.append(markdown_table(("metric", "value", "95 % interval", "n"), rows))
        for table in self.details.get("tables", ()):
            parts.append(f"## {markdown(table['title'])}")
            cells = [
                [cell_text(*pair) for pair in zip(row, table["columns"], strict=True)]
                for row in table["rows"]
            ]
            parts.append(markdown_table(table["columns"], cells))
            if table.get("note"):
                parts.append(markdown(table["note"]))
        parts.append("## How it was made")
        parts.append(markdown_table(("what", "value"), [*self.provenance(), *self.chosen()]))
        return "\n\n".join(parts) + "\n"

    def provenance(self) -> list[tuple[str, str]]:
        """What was measured with what, as (name, value)."""
        pairs = [
            ("Model", self.model),
            ("Encoder", self.encoder_id),
            ("Data", self.dataset + (f", split {self.split}" if self.split else "")),
            ("Data fingerprint", self.fingerprint),
            *(
                (name.replace("_", " ").capitalize(), f"{count:,}")
                for name, count in self.n.items()
            ),
            ("Made", self.created_at),
            ("Took", ", ".join(f"{name} {took:.1f} s" for name, took in self.seconds.items())),
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("Command", self.command),
        ]
        return [(name, value) for name, value in pairs if value]

    def chosen(self) -> list[tuple[str, str]]:
        """The settings, as (name, value)."""
        return [
            (name.replace("_", " ").capitalize(), setting_text(value))
            for name, value in self.settings.items()
        ]

    def lines(self) -> list[str]:
        """A table for a terminal, a line each."""
        rows = [
            (name, value_text(name, i.value), interval_text(name, i), f"{i.n:,}")
            for name, i in self.metrics.items()
        ]
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.n.items())
        head = f"{self.title}: {self.model} ({self.encoder_id[:8]}), {counts}"
        table = text_table(("", "value", "95 % interval", "n"), rows)
        warned = [f"warning: {printable(warning)}" for warning in self.warnings]
        return [printable(head), *table, *map(printable, self.details.get("words", ())), *warned]


def _interval(told: Mapping[str, Any]) -> Interval:
    value, low, high = (math.nan if told[k] is None else told[k] for k in ("value", "low", "high"))
    return Interval(float(value), float(low), float(high), int(told["n"]))


# ---- what a metric's name says


def is_share(name: str) -> bool:
    """Whether the metric is a fraction, printed as percent: "text_to_image/R@1" is, a rank not."""
    return any(_SHARE.fullmatch(part.strip()) for part in re.split("[/,]", name))


def direction(name: str) -> int:
    """1 if greater is better, -1 if smaller is, 0 if neither (a temperature, an effective rank)."""
    if any(_BETTER_SMALL.fullmatch(part) for part in name.split("/")):
        return -1
    return 1 if is_share(name) else 0


def value_text(name: str, value: float) -> str:
    """A metric's value as people read it: 0.4534 -> "45.3 %", a rank of 12.25 -> "12.2"."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if is_share(name) else number_text(value)


def interval_text(name: str, interval: Interval) -> str:
    """Its interval: "43.1 to 47.5" in the unit of `value_text`; "–" if there is none."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return "–"
    ends = (value_text(name, end).removesuffix(" %") for end in (interval.low, interval.high))
    return " to ".join(ends)


def number_text(value: float) -> str:
    """Three digits, or all before the point: 0.01234 -> "0.0123", 6.9 -> "6.90", 12345.6 -> "12,346"."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def setting_text(value: Any) -> str:
    """A setting's value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting_text, value))
    return "none" if value is None else str(value)


def cell_text(value: Any, column: str = "") -> str:
    """A cell of a table that an evaluator made: text as it is, numbers short, nothing as "–"; a
    number is percent where the column's name says that it holds shares."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else value_text(column, value)


# ---- text, JSON, files


def printable(text: object) -> str:
    """Text in one line that reorders or hides nothing: file and class names may hold anything."""
    shown = (
        " " if char.isspace() else char if char.isprintable() else "\ufffd" for char in str(text)
    )
    return "".join(shown)


def markdown(text: object) -> str:
    """Text as Markdown that shows it literally."""
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", printable(text))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table, the first column to the left, the rest to the right."""
    ruler = ["---", *("---:" for _ in columns[1:])]
    lines = [[markdown(cell) for cell in row] for row in (columns, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ruler, *lines[1:]))


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned lines, the first column to the left, the rest to the right."""
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def to_json(told: Mapping[str, Any]) -> str:
    """Strict JSON of nested mappings, sequences and arrays."""
    return json.dumps(_plain(told), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # a file's name may hold bytes that are not UTF-8
        return value.encode("utf-8", "replace").decode()
    return value


def write_report(folder: Path, files: Mapping[str, str | bytes], manifest: str) -> None:
    """Write files aside, then rename them; `report.json`, the manifest, last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    for name, content in {**files, "report.json": manifest}.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        aside = folder / f".{name}.{os.getpid()}"
        aside.write_bytes(data)
        aside.replace(folder / name)
