"""Several evaluations of one task in one report: a row per dataset and model, and their mean."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clipkit.metrics import Interval
from clipkit.wording import count
from eval.reports.report import EvalReport
from eval.reports.wording import interval_text, is_share, value_text

_SHORT = {
    "text_to_image/": "t2i ",
    "image_to_text/": "i2t ",
    "mean_per_class_recall": "mean recall",
}


def overview(reports: Sequence[EvalReport]) -> tuple[EvalReport, list[str]]:
    """Return one report of all, and for each of them a name that is no other's.

    Its metrics are theirs under these names, and per model the unweighted mean of each share that all
    its datasets have.
    """
    first = reports[0]
    models = list(dict.fromkeys(report.model for report in reports))
    names = _names(reports, with_model=len(models) > 1)
    figures = list(dict.fromkeys(name for report in reports for name in report.headline))
    rows: list[list[Any]] = []
    headline: list[str] = []
    metrics: dict[str, Interval] = {}
    for model in models:
        own = [(r, name) for r, name in zip(reports, names, strict=True) if r.model == model]
        for report, name in own:
            metrics |= {f"{name}/{figure}": i for figure, i in report.metrics.items()}
            rows.append([name, *_cells(figures, report.metrics)])
        if len(own) > 1:
            mean = _means([report for report, _ in own])
            of = f"mean of {count(len(own), 'dataset')}"
            name = of if len(models) == 1 else f"{of}, {_last(model)}"
            metrics |= {f"{name}/{figure}": interval for figure, interval in mean.items()}
            headline += [f"{name}/{figure}" for figure in figures if figure in mean]
            rows.append([name, *_cells(figures, mean)])
    shown = [_short(figure) for figure in figures]
    directions = "t2i: text to image, i2t: image to text. " if "t2i" in " ".join(shown) else ""
    table = {
        "title": "Datasets",
        "columns": ["dataset", *shown],
        "rows": rows,
        "note": f"{directions}A mean counts every dataset alike. Its interval is made of theirs (MOVER, "
        "Zou and Donner 2008) and holds for these datasets, not for others.",
        "first": True,
        "terminal": True,
    }
    shared = {
        key: value
        for key, value in first.settings.items()
        if all(report.settings.get(key) == value for report in reports)
    }
    pictures = sum(report.n["pictures"] for report in reports if report.model == models[0])
    return (
        EvalReport(
            task=first.task,
            dataset=", ".join(dict.fromkeys(_last(report.dataset) for report in reports)),
            split=first.split if len({report.split for report in reports}) == 1 else None,
            model=", ".join(models),
            encoder_id=", ".join(dict.fromkeys(report.encoder_id for report in reports)),
            n={"datasets": len(reports) // len(models), "pictures": pictures},
            metrics=metrics,
            settings=shared,
            fingerprint=", ".join(dict.fromkeys(report.fingerprint for report in reports)),
            warnings=tuple(
                f"{name}: {warning}"
                for report, name in zip(reports, names, strict=True)
                for warning in report.warnings
            ),
            details={"headline": headline or [*metrics][:4], "tables": [table]},
            created_at=reports[-1].created_at,
        ),
        names,
    )


def _means(reports: Sequence[EvalReport]) -> dict[str, Interval]:
    """Return the mean of each share that all reports have, n the sum of theirs.

    The bounds are the mean minus, and plus, the root of the summed squares of the distances between
    each figure and its bound, divided by the number of figures (MOVER, Zou & Donner 2008).
    """
    means = {}
    for figure in reports[0].metrics:
        if not is_share(figure) or not all(figure in report.metrics for report in reports):
            continue
        intervals = [report.metrics[figure] for report in reports]
        value = sum(i.value for i in intervals) / len(intervals)
        below = math.hypot(*(i.value - i.low for i in intervals)) / len(intervals)
        above = math.hypot(*(i.high - i.value for i in intervals)) / len(intervals)
        n = sum(i.n for i in intervals)
        means[figure] = Interval(value, value - below, value + above, n)
    return means


def _cells(figures: Sequence[str], metrics: Any) -> list[Any]:
    """Return [value, interval] of each figure, None for one that was not measured."""
    cells: list[Any] = []
    for figure in figures:
        interval = metrics.get(figure)
        texts = interval and [value_text(figure, interval.value), interval_text(figure, interval)]
        cells.append(texts)
    return cells


def _names(reports: Sequence[EvalReport], *, with_model: bool) -> list[str]:
    """Return "cifar10" or "cifar10, ViT-B-32", with a number where two would be equal."""
    names = [_last(report.dataset) for report in reports]
    if with_model:
        names = [f"{name}, {_last(r.model)}" for name, r in zip(names, reports, strict=True)]
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if names.count(name) == 1 else f"{name} {seen[name]}")
    return numbered


def _last(name: str) -> str:
    """Return the last part of a path."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _short(figure: str) -> str:
    for long, short in _SHORT.items():
        figure = figure.replace(long, short)
    return figure
