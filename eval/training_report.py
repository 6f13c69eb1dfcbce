"""The report of a training run: what improved, what was forgotten, and what it cost.

`runs/NAME/report.html`: recall before and after on pictures that training did not see, with
intervals, paired tests and the pictures that changed most; the same on a generic dataset that the
model should not forget; curves of loss and recall; settings, cost and the command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import InputError
from eval import reports
from eval.compare import compare
from eval.reports.comparison import Comparison, Section, list_text
from eval.reports.wording import change_text

if TYPE_CHECKING:
    from eval.data import Captioned, Labelled
    from eval.features import Encoder
    from eval.session import Session

NAMES = ("before", "after")
_FEW = 100  # pictures
_POINTS = 200  # of a curve


def training_report(
    run: Path,
    encoders: Sequence[Encoder],
    own: Captioned,
    generic: Captioned | Labelled,
    session: Session,
) -> Comparison:
    """Compare a run's start and result, (before, after), on its own data and on a generic dataset,
    and write report.html, report.md and report.json into the run's folder.

    Raises InputError if the folder holds no finished run, and what `compare` raises.
    """
    facts, summary = _read(run / "config.json"), _read(run / "summary.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    result = compare(
        encoders,
        [own, generic],
        names=NAMES,
        title=f"Training run {run.name}",
        command=facts.get("command") or "",
        session=session,
    )
    sentences = [_verdict(result.sections[0], "On held-out pictures of the training data")]
    if len(result.sections) > 1:
        sentences.append(_verdict(result.sections[1], "On the generic dataset"))
    warnings = list(result.warnings)
    if own.split == "validation":
        warnings.append(
            "there is no test split: the figures are of the validation split, which also chose the "
            "best step and the mixture, so they are slightly too high"
        )
    if len(own.pictures) < _FEW:
        warnings.append(
            f"{len(own.pictures)} held-out pictures can show large changes only; to see smaller ones, "
            "build the dataset with a larger test share, such as `clipkit data build --test 0.3`"
        )
    result = replace(
        result,
        sentences=(*sentences, *(f"{text[:1].upper()}{text[1:]}." for text in summary["notes"])),
        warnings=tuple(warnings),
        details={"curves": list(_curves(lines)), "tables": [_cost(facts, summary)]},
    )
    reports.save(result, run)
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.parent} holds no finished training run: {error}") from error


def _verdict(section: Section, where: str) -> str:
    """Return which metrics changed significantly, or, if none did, the change of the first one."""
    parts = [
        f"{len(changes)} metric{'s' if len(changes) > 1 else ''} got {way} ({list_text(changes)})"
        for way, changes in zip(("better", "worse"), section.changes(1), strict=True)
        if changes
    ]
    if parts:
        return f"{where}: {' and '.join(parts)}, by more than chance."
    row = next((row for row in section.rows if row.pairs), None)
    if row is None:
        return f"{where}: nothing was tested."
    paired = row.pairs[0].paired
    change, low, high = (
        change_text(row.metric, x) for x in (paired.difference, paired.low, paired.high)
    )
    return (
        f"{where}: no metric changed significantly; {row.metric} changed by {change} "
        f"({low} to {high}, {paired.n} pictures)."
    )


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the loss, and the recall on the validation split, by step."""
    curves: list[dict[str, Any]] = []
    steps = [line for line in lines if "loss" in line]
    if steps:
        size = -(-len(steps) // _POINTS)
        groups = [steps[i : i + size] for i in range(0, len(steps), size)]
        loss = {
            "name": "loss",
            "x": [group[-1]["step"] for group in groups],
            "y": [sum(line["loss"] for line in group) / len(group) for group in groups],
        }
        title = "Loss" if size == 1 else f"Loss, mean of {size} steps"
        curves.append({"title": title, "x_label": "step", "y_label": "loss", "series": [loss]})
    checks = [line for line in lines if "text_to_image/R@1" in line]
    if len(checks) > 1:
        series = [
            {
                "name": name,
                "x": [line["step"] for line in checks],
                "y": [line[name] for line in checks],
            }
            for name in checks[0]
            if "/R@" in name
        ]
        curves.append(
            {
                "title": "Recall on the validation split",
                "x_label": "step",
                "y_label": "recall",
                "series": series,
            }
        )
    return curves


def _cost(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    config = facts["config"]
    trained, total = summary["trained_parameters"], summary["total_parameters"]
    rows = [
        ["Recipe", config["recipe"]],
        ["Start", f"{config['start']} ({facts['encoder_id']})"],
        ["Result", summary["encoder_id"]],
        ["Training pictures", facts["data"]["pictures"]],
        ["Data fingerprint", facts["data"]["fingerprint"]],
        ["Batch", facts["batch"]],
        ["Steps", f"{summary['steps']:,}, best {summary['best_step']:,}"],
        ["Parameters trained", f"{trained:,} of {total:,}"],
        ["Mixture", f"{summary['alpha']:.0%} tuned, {1 - summary['alpha']:.0%} start"],
        ["Seconds", round(summary["seconds"])],
        ["Processes", facts["processes"]],
        ["Seed", config["seed"]],
        ["Versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)],
    ]
    return {"title": "Run", "columns": ["setting", "value"], "rows": rows}
