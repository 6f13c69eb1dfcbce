"""The report of a training run: what it brought, what it cost, and what was forgotten.

`runs/NAME/report.html`: recall before and after on pictures that training did not see, with
intervals and paired tests, pictures that got better and worse; the same on a generic set that the
model should not forget; the curves of loss and recall; settings, cost and the command.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import InputError
from eval.compare import compare
from eval.reports.comparison import Comparison, Section, change_text

if TYPE_CHECKING:
    from eval.data import Captioned, Labelled
    from eval.features import Encoder, FeatureCache

NAMES = ("before", "after")
_FEW = 100  # pictures
_SMOOTHED = 200  # points of a curve that a reader can tell apart


def training_report(
    run: Path,
    encoders: Sequence[Encoder],
    own: Captioned,
    generic: Captioned | Labelled,
    *,
    cache: FeatureCache,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Comparison:
    """Compare a run's start and result, (before, after), on its own data and on a generic set, and
    write report.html, report.md and report.json into the run's folder.

    InputError: the folder holds no finished run; and what `compare` raises.
    """
    facts, summary = _read(run / "config.json"), _read(run / "summary.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    result = compare(
        encoders,
        [own, generic],
        names=NAMES,
        title=f"Training run {run.name}",
        cache=cache,
        command=facts.get("command") or "",
        seed=seed,
        on_progress=on_progress,
        stop=stop,
    )
    words = [_verdict(result.sections[0], "On the data it learnt from, held-out pictures")]
    if len(result.sections) > 1:
        words.append(_verdict(result.sections[1], "On the generic set"))
    warnings = list(result.warnings)
    if own.split == "validation":
        warnings.append(
            "there is no test split: the figures are of the validation split, which also chose the "
            "best step and the mixture, so they flatter a little"
        )
    if len(own.pictures) < _FEW:
        warnings.append(
            f"{len(own.pictures)} held-out pictures show great changes only; for more, build the "
            "dataset with a larger share, such as `clipkit data build --test 0.3`"
        )
    result = replace(
        result,
        words=(*words, *(f"{said[:1].upper()}{said[1:]}." for said in summary["notes"])),
        warnings=tuple(warnings),
        details={"curves": list(_curves(lines)), "tables": [_cost(facts, summary)]},
    )
    result.save(run)
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.parent} holds no finished training run: {error}") from error


def _verdict(section: Section, where: str) -> str:
    """Which figures rose and fell by more than chance; if none did, how far one may have."""
    ways = zip(("better", "worse"), section.moved(1), strict=True)
    parts = [f"{len(told)} figures got {way} ({', '.join(told)})" for way, told in ways if told]
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
        f"{where}: no figure changed by more than chance; "
        f"{row.metric} by {change} ({low} to {high}, {paired.n} pictures)."
    )


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss by step, and recall on the validation split by step."""
    found = []
    steps = [line for line in lines if "loss" in line]
    if steps:
        size = -(-len(steps) // _SMOOTHED)
        groups = [steps[i : i + size] for i in range(0, len(steps), size)]
        series = {
            "name": "loss",
            "x": [group[-1]["step"] for group in groups],
            "y": [sum(line["loss"] for line in group) / len(group) for group in groups],
        }
        title = "Loss" if size == 1 else f"Loss, means of {size} steps"
        found.append({"title": title, "x_label": "step", "y_label": "loss", "series": [series]})
    looks = [line for line in lines if "text_to_image/R@1" in line]
    if len(looks) > 1:
        series = [
            {
                "name": name,
                "x": [line["step"] for line in looks],
                "y": [line[name] for line in looks],
            }
            for name in looks[0]
            if "/R@" in name
        ]
        found.append(
            {
                "title": "Recall on the validation split",
                "x_label": "step",
                "y_label": "recall",
                "series": series,
            }
        )
    return found


def _cost(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    config = facts["config"]
    trained, total = summary["trained_parameters"], summary["total_parameters"]
    rows = [
        ["Recipe", config["recipe"]],
        ["Start", f"{config['start']} ({facts['encoder_id']})"],
        ["Result", summary["encoder_id"]],
        ["Pictures learnt from", facts["data"]["pictures"]],
        ["Data fingerprint", facts["data"]["fingerprint"]],
        ["Batch", facts["batch"]],
        ["Steps", f"{summary['steps']:,}, best {summary['best_step']:,}"],
        ["Parameters trained", f"{trained:,} of {total:,}"],
        ["Mixture", f"{summary['alpha']:.0%} tuned, {1 - summary['alpha']:.0%} start"],
        ["Seconds of training", round(summary["seconds"])],
        ["Processes", facts["processes"]],
        ["Seed", config["seed"]],
        ["Versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)],
    ]
    return {"title": "Run", "columns": ["what", "value"], "rows": rows}
