"""The report of a training run: a verdict in words, the figures before and after, the curves.

report.html, .md, .json    a comparison of the start and the result, as `eval.reports.save` writes it
verdict.json               the verdict, for `clipkit runs`; written last
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clipkit.durable import write_whole
from clipkit.errors import InputError
from clipkit.training.registry import METHODS
from clipkit.wording import duration, percent
from eval.compare import compare
from eval.data import Captioned, Labelled
from eval.features import Encoder
from eval.reports import save
from eval.reports.comparison import Comparison, Row, Section
from eval.reports.report import curve
from eval.reports.wording import change_text, metric_text, p_text, text_table, value_text
from eval.session import Session

VERDICT = "verdict.json"
FEW = 100  # held-out pictures, with which only large changes are significant
_COLUMNS = ("", "before", "after", "difference (95 % interval)")
_HEADLINE = "text_to_image/R@1"
_FIRST = (_HEADLINE, "image_to_text/R@1")
_RECALLS = (*_FIRST, "text_to_image/R@10", "image_to_text/R@10")
_SUBJECTS = {
    "text_to_image": "texts find the right picture",
    "image_to_text": "pictures find a right text",
}
_POINTS = 300  # of a curve


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a run on held-out pictures, decided by the paired tests of its report."""

    outcome: Literal["better", "worse", "mixed", "same"]
    sentences: tuple[str, ...]  # the first says the outcome
    start: str  # spec of the model that it is compared with
    split: str
    pictures: int  # held out
    fingerprint: (
        str  # of them and their captions; the figures of two runs compare if it is the same
    )
    before: float  # text to image R@1
    after: float


def training_report(
    run: Path,
    encoders: Sequence[Encoder],
    own: Captioned | None,
    generic: Captioned | Labelled,
    session: Session,
    commands: Sequence[tuple[str, str]] | None = None,
) -> Comparison:
    """Compare a run's start and result, (before, after), on held-out pictures of its own data and on a
    generic dataset that it should not forget, and save the report in the run's folder.

    own: None if the held-out pictures have no captions; then there is no verdict.
    `details` of the comparison has the verdict's "outcome", a "summary" table and the "commands" that
    come next, by default those of `next_commands`. Raises InputError if the folder holds no finished
    run, and what `compare` raises.
    """
    facts, summary = _run_file(run / "config.json"), _run_file(run / "summary.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    result = compare(
        encoders,
        [generic] if own is None else [own, generic],
        names=("before", "after"),
        title=f"Training run {run.name}",
        command=facts.get("command") or "",
        session=session,
    )
    warnings = list(result.warnings)
    if own is None:
        verdict = None
        sentences: tuple[str, ...] = (
            "The held-out pictures have no captions, so that words cannot be compared on them.",
            _memory(result.sections[0]),
        )
    else:
        verdict = _judge(result.sections, facts, summary)
        sentences = verdict.sentences
    if own is not None and own.split == "validation":
        warnings.append(
            "there is no test split: the figures are of the validation split, which also chose the "
            "best step and the mixture, so they are slightly too high"
        )
    if own is not None and len(own.pictures) < FEW:
        warnings.append(
            f"{len(own.pictures)} held-out pictures can show large changes only; to see smaller ones, "
            "build the dataset with a larger test share, such as `clipkit data build --test 0.3`"
        )
    result = replace(
        result,
        sentences=sentences,
        warnings=tuple(warnings),
        details={
            "outcome": verdict.outcome if verdict else "",
            "summary": {
                "columns": _COLUMNS,
                "groups": list(_groups(result.sections, facts, summary, own is not None)),
            },
            "commands": next_commands(
                run, facts["config"]["start"], verdict.outcome if verdict else ""
            )
            if commands is None
            else list(commands),
            "curves": list(_curves(lines, facts, summary)),
            "tables": [_run_table(facts, summary), *_mixtures(summary)],
        },
    )
    save(result, run)
    if verdict is not None:
        write_whole(run / VERDICT, (json.dumps(asdict(verdict), indent=2) + "\n").encode())
    return result


def summary_lines(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return groups of rows, as in the details' "summary", as lines of one table for a terminal."""
    rows = [[f"  {label}", *cells] for group in groups for label, *cells in group["rows"]]
    head, *lines = text_table(_COLUMNS, rows)
    for group in groups:
        head += f"\n{group['title']}"
        for _ in group["rows"]:
            head += f"\n{lines.pop(0)}"
    return head.splitlines()


def next_commands(run: Path, start: str, outcome: str = "") -> list[tuple[str, str]]:
    """Return what can be done with a finished run, as (what, command)."""
    use = "Use it all the same" if outcome in ("same", "worse") else "Use it"
    commands = [
        (use, f"clipkit index ~/Pictures --model {shlex.quote(str(run))}"),
        ("Go back", f"clipkit index ~/Pictures --model {shlex.quote(start)}"),
    ]
    if any(run.glob("events.out.tfevents.*")):
        commands.append(("Curves", f"tensorboard --logdir {shlex.quote(str(run.parent))}"))
    return commands


def _run_file(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.parent} holds no finished training run: {error}") from error


# ---- the verdict


def _judge(
    sections: Sequence[Section], facts: Mapping[str, Any], summary: Mapping[str, Any]
) -> Verdict:
    """Decide by the tests of the first section, and say what the second, if any, shows."""
    own, start = sections[0], facts["config"]["start"]
    report = own.reports[1]
    assert report is not None
    pictures = report.n["pictures"]
    where = f"{pictures:,} {report.split} pictures"
    better, worse = _changed(own)
    outcome: Literal["better", "worse", "mixed", "same"] = "same"
    if better and worse:
        outcome = "mixed"
        first = f"Better and worse: {_finding(better[0])}, but {_finding(worse[0])} ({where})."
    elif better:
        outcome, first = "better", f"Better: {_finding(better[0])} ({where})."
    elif worse:
        outcome, first = "worse", f"Worse: {_finding(worse[0])} ({where}); keep {start}."
    elif summary["alpha"] == 0:
        first = (
            f"No difference: no trained weights were better than {start} on the validation split, "
        )
        first += f"so this run is {start} unchanged. {_advice(facts)}"
    else:
        first = f"No difference beyond chance: on {where} this run is no better than {start}. "
        first += _advice(facts)
    recall = next(row for row in own.rows if row.metric == _HEADLINE)
    before, after = (float(i.value) for i in recall.intervals if i is not None)
    return Verdict(
        outcome,
        (first, *map(_memory, sections[1:])),
        start,
        report.split or "",
        pictures,
        report.fingerprint,
        before,
        after,
    )


def _changed(section: Section) -> tuple[list[Row], list[Row]]:
    """Return the rows that got significantly better, and worse, the plainest figures first."""
    sides: tuple[list[Row], list[Row]] = [], []
    for row in sorted(section.rows, key=lambda row: _plainness(row.metric)):
        pair = row.against_first(1)
        if pair is not None and pair.significant and row.direction:
            sides[pair.paired.difference * row.direction < 0].append(row)
    return sides


def _plainness(metric: str) -> int:
    name = metric.rpartition("/")[2]
    return 0 if name == "R@1" else 1 if name.startswith("R@") else 2 if name == "mean_rank" else 3


def _finding(row: Row) -> str:
    """Return "texts find the right picture first in 51.9 % instead of 43.6 % of cases, p < 0.001"."""
    before, after = (value_text(row.metric, i.value) for i in row.intervals if i is not None)
    pair = row.against_first(1)
    assert pair is not None
    way, _, name = row.metric.rpartition("/")
    if way in _SUBJECTS and (cut := re.fullmatch(r"R@(\d+)", name)):
        place = "first" if cut[1] == "1" else f"among the first {cut[1]}"
        text = f"{_SUBJECTS[way]} {place} in {after} instead of {before} of cases"
    elif way in _SUBJECTS and name == "mean_rank":
        text = f"{_SUBJECTS[way]} at place {after} on average instead of {before}"
    else:
        text = f"{metric_text(row.metric)} is {after} instead of {before}"
    return f"{text}, {p_text(pair.p_value)}"


def _captioned(facts: Mapping[str, Any]) -> bool:
    """Return whether the run's method learns from captions."""
    entry = METHODS.get(facts["config"].get("method", "pairs"))
    return entry is None or "captions" in entry.needs


def _advice(facts: Mapping[str, Any]) -> str:
    count, kind = facts["data"]["pictures"], "pictures"
    if "captions" in facts and _captioned(facts):  # runs of earlier versions do not say
        count, kind = facts["captions"], "captions"
    if facts["config"]["recipe"] in ("heads", "lit"):
        return f"Try --recipe lora, or more {kind} (here {count:,})."
    return f"More {kind} may help (here {count:,})."


def _memory(generic: Section) -> str:
    """Return what became of what the model knew before."""
    worse = _changed(generic)[1]
    name = generic.title.partition(" on ")[2]
    if worse:
        return f"It forgot some of what it knew: on {name}, {_finding(worse[0])}."
    return f"It forgot nothing: on {name} no figure got worse beyond chance."


# ---- the figures


def _groups(
    sections: Sequence[Section],
    facts: Mapping[str, Any],
    summary: Mapping[str, Any],
    own: bool,  # whether the first section is of the run's own data
) -> Iterator[dict[str, Any]]:
    """Yield the headline figures of the validation split, the test split and the generic data, each
    as a title and rows (figure, before, after, difference)."""
    first = sections[0].reports[1]
    assert first is not None
    before, after = summary["before"], summary["after"]
    # The report's own figures of the validation split are the same, unless the method has others.
    if before and after and not (own and first.split == "validation" and _HEADLINE in before):
        yield validation_group(before, after, facts)
    for at, section in enumerate(sections, 0 if own else 1):
        report = section.reports[1]
        assert report is not None
        name = section.title.partition(" on ")[2] if at else f"{report.split} split"
        names = _FIRST if at else _RECALLS
        wanted = [row for row in section.rows if row.metric in names] or section.rows[:2]
        yield {
            "title": f"{name[:1].upper()}{name[1:]}, {report.n['pictures']:,} pictures",
            "rows": [_row(row) for row in wanted],
        }


def validation_group(
    before: Mapping[str, float], after: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the method's own metrics on the validation split, from a run's summary and facts."""
    chosen = ", which chose the weights" if facts["config"].get("keep", "best") == "best" else ""
    return {
        "title": f"Validation split, {facts['data']['validation_pictures']:,} pictures{chosen}",
        "rows": [
            [metric_text(name), *(value_text(name, metrics[name]) for metrics in (before, after)),
             change_text(name, after[name] - before[name])]
            for name in (_FIRST if _HEADLINE in before else before)
        ],
    }  # fmt: skip


def _row(row: Row) -> list[str]:
    values = ("–" if i is None else value_text(row.metric, i.value) for i in row.intervals)
    cells, pair = [metric_text(row.metric), *values], row.against_first(1)
    if pair is None:
        return [*cells, "–"]
    ends = (pair.paired.difference, pair.paired.low, pair.paired.high)
    change, low, high = (change_text(row.metric, end) for end in ends)
    return [*cells, f"{change} ({low} to {high})"]


# ---- the curves


def _curves(
    lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], summary: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the training loss, the validation loss, and the validation split's metrics by step."""
    steps = [line for line in lines if "loss" in line]
    if steps:
        window = max(1, len(steps) // 10)
        every = -(-len(steps) // _POINTS)
        losses = [line["loss"] for line in steps]
        raw = {
            "name": "each step",
            "x": [line["step"] for line in steps[every - 1 :: every]],
            "y": losses[every - 1 :: every],
            "hue": 0,
            "faint": window > 1,
        }
        title = f"Training loss, each of {facts['batch']:,} {_unit(facts)}"
        series = [raw]
        if window > 1:
            means = [
                sum(losses[max(0, at - window) : at]) / min(window, at)
                for at in range(every, len(losses) + 1, every)
            ]
            series.append(
                {"name": f"mean of {window} steps", "x": raw["x"], "y": means, "hue": 0, "dash": 0}
            )
        yield curve(title, "step", "loss", series)
    own = list(summary.get("before") or [_HEADLINE])
    checks = [line for line in lines if own[0] in line]
    if len(checks) < 2:
        return
    x = [line["step"] for line in checks]
    best = summary["best_step"] if facts["config"].get("keep", "best") == "best" else 0
    mark = {"mark": best} if best else {}
    pairs = own[0] == _HEADLINE
    if "validation_loss" in checks[0]:
        loss = {
            "name": "Validation loss",
            "x": x,
            "y": [line["validation_loss"] for line in checks],
        }
        note = ""
        if pairs:
            note = "Recall on the validation split decides which step is kept; where it differs by "
            note += "chance only, this loss does. It compares each caption with all pictures there."
        yield curve("Validation loss", "step", "loss", [loss], note=note, **mark)
    names = [name for name in checks[0] if ("/R@" in name if pairs else name in own)]
    ways = list(dict.fromkeys(name.partition("/")[0] for name in names))
    recalls = [
        {
            "name": metric_text(name),
            "x": x,
            "y": [line[name] for line in checks],
            "hue": ways.index(name.partition("/")[0]),
            "dash": at % (len(names) // len(ways)),
        }
        for at, name in enumerate(names)
    ]
    note = f"The vertical line is step {best:,}, which was kept." if best else ""
    what = "Recall" if all("/R@" in name for name in names) else "Accuracy"
    yield curve(f"{what} on the validation split", "step", what.lower(), recalls, note=note, **mark)


# ---- the details


def _unit(facts: Mapping[str, Any]) -> str:
    """Return what a batch consists of."""
    return "pairs" if _captioned(facts) else "pictures"


def _run_table(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    config, data = facts["config"], facts["data"]
    trained, total = summary["trained_parameters"], summary["total_parameters"]
    captions = f", {facts['captions']:,} captions" if "captions" in facts else ""
    drift, alpha = summary.get("drift", 0.0), summary["alpha"]
    mixture = f"{percent(alpha)} trained, {percent(1 - alpha)} starting model"
    rows = [
        ["Method", config.get("method", "pairs")],
        ["Recipe", config["recipe"]],
        ["Start", f"{config['start']} ({facts['encoder_id']})"],
        ["Result", summary["encoder_id"]],
        ["Trained on", f"{data['pictures']:,} pictures{captions}"],
        ["Data fingerprint", data["fingerprint"]],
        ["Batch", f"{facts['batch']:,} {_unit(facts)}"],
        ["Steps", f"{summary['steps']:,}, best {summary['best_step']:,}"],
        ["Parameters trained", f"{trained:,} of {total:,} ({percent(trained / total)})"],
        [
            "Kept near the start",
            f"a matrix changes by up to about {percent(drift)} of its size (--drift)"
            if drift
            else "no limit",
        ],
        [
            "Weights",
            {0: "the starting model, unchanged", 1: "the trained ones"}.get(alpha, mixture),
        ],
        ["Training time", duration(summary["seconds"])],
        ["Processes", facts["processes"]],
        ["Seed", config["seed"]],
        ["Versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)],
        *(["Note", f"{note[:1].upper()}{note[1:]}"] for note in summary["notes"]),
    ]
    return {"title": "Run", "columns": ["setting", "value"], "rows": rows}


def _mixtures(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a table of the mixtures with the start that were tried, if any."""
    tried: Mapping[str, Mapping[str, float]] = summary.get("mixture", {})
    if len(tried) > 1:
        own = [name for name in next(iter(tried.values())) if name != "loss"]
        names = [name for name in _FIRST if name in own] or own
        yield {
            "title": "Mixtures of the start with the trained weights, on the validation split",
            "columns": ["trained share", "loss", *map(metric_text, names), "kept"],
            "rows": [
                [percent(float(alpha)), scores.get("loss"), *(scores[name] for name in names),
                 "kept" if float(alpha) == summary["alpha"] else ""]
                for alpha, scores in sorted(tried.items(), key=lambda item: float(item[0]))
            ],
        }  # fmt: skip
