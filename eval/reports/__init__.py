"""Reports of evaluations and comparisons, saved as a folder of JSON, Markdown and HTML.

report.json     everything but the samples; written last, so its existence means the rest is whole
report.md       figures, warnings and provenance
report.html     one page that works offline
figures.csv     every figure: dataset, split, task, model, encoder, precision, metric, value, interval, n
samples.npz     of an EvalReport: the values per picture, for paired tests between models
"""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval.reports.comparison import Comparison
from eval.reports.html import render_comparison, render_report
from eval.reports.overview import overview
from eval.reports.report import FORMAT, EvalReport, exhibit

__all__ = ["Comparison", "EvalReport", "exhibit", "load", "overview", "save"]

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)


def save(
    result: EvalReport | Comparison, folder: Path, *, parts: Sequence[EvalReport] = ()
) -> None:
    """Write a report or a comparison into `folder`, which is created; replace one that is there.

    With `parts`, the reports of an overview, figures.csv has theirs and the overview's means.
    """
    files: dict[str, str | bytes] = {}
    if isinstance(result, EvalReport):
        samples = io.BytesIO()
        np.savez_compressed(samples, allow_pickle=False, **dict(result.samples))
        files = {"samples.npz": samples.getvalue(), "report.html": render_report(result)}
    else:
        files = {"report.html": render_comparison(result)}
    reports = [result] if isinstance(result, EvalReport) else result.reports
    if isinstance(result, EvalReport) and parts:
        means = {n: i for n, i in result.metrics.items() if n.startswith("mean of ")}
        reports = [*parts, replace(result, metrics=means)]
    files |= {
        "figures.csv": figures_csv(reports),
        "report.md": result.to_markdown(),
        "report.json": result.to_json(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        write_whole(folder / name, data, sync=False)


def figures_csv(reports: Sequence[EvalReport]) -> str:
    """Return every figure of the reports as CSV; shares are from 0 to 1, a missing bound is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow("dataset split task model encoder_id precision metric value low high n".split())
    for report in reports:
        precision = report.settings.get("precision", "")
        own = (report.dataset, report.split or "", report.task, report.model, report.encoder_id)
        for name, i in report.metrics.items():
            numbers = ("" if math.isnan(x) else repr(float(x)) for x in (i.value, i.low, i.high))
            table.writerow([*own, precision, name, *numbers, i.n])
    return text.getvalue()


def load(folder: Path) -> EvalReport:
    """Read the report that `save` wrote. Raises InputError if there is none or it is damaged."""
    path = folder / "report.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError(f"{path} is not a report of one evaluation ({FORMAT})")
        del content["title"]
        content["metrics"] = {name: _interval(i) for name, i in content["metrics"].items()}
        content["warnings"] = tuple(content["warnings"])
        archive = io.BytesIO((folder / "samples.npz").read_bytes())
        with np.load(archive, allow_pickle=False) as arrays:
            samples = {name: arrays[name].astype(np.float64) for name in arrays.files}
        return EvalReport(**content, samples=samples)
    except FileNotFoundError as error:
        raise InputError(f"there is no report in {folder}: {error.filename} is missing") from error
    except _DAMAGE as error:
        raise InputError(
            f"the report in {folder} is damaged: {error}; run the evaluation again"
        ) from error


def _interval(fields: Mapping[str, Any]) -> Interval:
    """Return the interval that JSON holds; null stands for NaN."""
    value, low, high = (
        math.nan if fields[k] is None else fields[k] for k in ("value", "low", "high")
    )
    return Interval(float(value), float(low), float(high), int(fields["n"]))
