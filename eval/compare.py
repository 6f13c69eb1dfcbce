"""Compare models: the same figures on the same pictures, and which differences are significant.

    compare(encoders, datasets)                 evaluates each model on each dataset, then compares
    compare_reports([[report, ...] per model])  compares reports that are there, saved ones too

Two models are tested against each other only where their reports have the same data fingerprint;
p-values are corrected together for all tests of one dataset and task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, Literal

import numpy as np

from clipkit.arrays import Float64
from clipkit.errors import InputError
from clipkit.metrics import corrected_p, paired_test
from clipkit.wording import count
from eval.data import Captioned, Labelled
from eval.features import Encoder
from eval.prompts import Templates, default_templates
from eval.reports.comparison import Comparison, Pair, Row, Section
from eval.reports.report import EvalReport, exhibit
from eval.reports.wording import (
    change_text,
    direction,
    metric_text,
    p_text,
    setting_text,
    value_text,
)
from eval.retrieval import evaluate_retrieval, unit_weights
from eval.session import Session
from eval.zero_shot import evaluate_zero_shot

EXAMPLES = 12  # pictures of each kind
# settings that must be equal for two models' figures to mean the same
COMPARED = frozenset(("templates", "queries", "ks", "ties", "tie_rule", "seed", "relevance"))


def compare(
    encoders: Sequence[Encoder],
    datasets: Sequence[Captioned | Labelled],
    *,
    templates: Templates | None = None,
    ks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    command: str = "",
    session: Session | None = None,
) -> Comparison:
    """Evaluate each model on each dataset and compare: retrieval where there are captions, zero-shot
    where there are classes. Cached features are not encoded again.

    `templates` None: those that belong to each dataset's name. Raises what the evaluators raise.
    """
    session = session or Session()
    cuts: dict[str, Any] = {} if ks is None else {"ks": tuple(ks)}
    models: list[list[EvalReport]] = []
    examples: dict[str, Captioned | Labelled] = {}
    for encoder in encoders:
        models.append([])
        for data in datasets:
            if isinstance(data, Captioned):
                queries: Literal["captions", "tags"] = "captions" if data.captions else "tags"
                report = evaluate_retrieval(encoder, data, queries=queries, session=session, **cuts)
            else:
                prompts = templates or default_templates(data.name)
                report = evaluate_zero_shot(
                    encoder, data, templates=prompts, session=session, **cuts
                )
            models[-1].append(report)
            if report.n["pictures"] == len(data.pictures) and "tags" not in report.n:
                examples[report.fingerprint] = data
    return compare_reports(
        models, names=names, title=title, examples=examples, command=command, seed=session.seed
    )


def compare_reports(
    models: Sequence[Sequence[EvalReport]],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    examples: Mapping[str, Captioned | Labelled] | None = None,
    command: str = "",
    seed: int = 0,
) -> Comparison:
    """Compare models by their reports, one list per model, with the first model as the baseline.

    Reports belong together by task, dataset and split. `names` are the models' (default: their
    specs); `examples`, by the data's fingerprint, are datasets whose rows are those of the samples:
    their pictures are shown. Raises InputError for fewer than two models, a model without reports, or
    names that do not match.
    """
    if len(models) < 2 or not all(models):
        raise InputError(f"{len(models)} models to compare, with {[len(m) for m in models]} reports; "
                         "at least two models with one report each are needed")  # fmt: skip
    names = tuple(names) if names is not None else _names(models)
    if len(names) != len(models) or len(set(names)) != len(names):
        raise InputError(f"{len(models)} models but names {list(names)}; give each its own name")
    keys = {(r.task, r.dataset, r.split): None for reports in models for r in reports}
    sections = []
    for key in keys:
        matching = tuple(
            next((r for r in reports if (r.task, r.dataset, r.split) == key), None)
            for reports in models
        )
        sections.append(_section(matching, names, examples or {}, seed))
    return Comparison(
        title=title or _title(names),
        names=names,
        sections=tuple(sections),
        sentences=tuple(_summary(section, names) for section in sections if section.tested),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        encoder_ids=tuple(reports[0].encoder_id for reports in models),
    )


# ---- one task on one dataset


def _section(
    reports: tuple[EvalReport | None, ...],
    names: Sequence[str],
    examples: Mapping[str, Captioned | Labelled],
    seed: int,
) -> Section:
    there = [(at, report) for at, report in enumerate(reports) if report is not None]
    metrics = {name: None for _, report in there for name in report.metrics}
    pairs = _tests(there, seed)
    rows = []
    for metric in metrics:
        tested = pairs.get(metric, [])
        intervals = tuple(r.metrics.get(metric) if r is not None else None for r in reports)
        best = _best(metric, tested, {at for at, i in enumerate(intervals) if i is not None})
        rows.append(Row(metric, intervals, tuple(tested), best))
    diagrams = [
        {**diagram, "title": f"{names[at]}: {diagram['title']}"}
        for at, report in there
        for diagram in report.details.get("reliability", ())
    ]
    return Section(
        title=there[0][1].title,
        reports=reports,
        rows=tuple(rows),
        curves=tuple(_overlaid(there, names)),
        reliability=tuple(diagrams),
        changed=tuple(_changed(there, names, examples)),
        settings=_settings(reports, names),
        warnings=tuple(_warnings(there, names)),
    )


def _comparable(first: EvalReport, second: EvalReport, metric: str) -> bool:
    a, b = first.samples.get(metric), second.samples.get(metric)
    if a is None or b is None or first.fingerprint != second.fingerprint or len(a) != len(b):
        return False
    return bool(np.isfinite(a).all() and np.isfinite(b).all() and len(a))


def _tests(there: Sequence[tuple[int, EvalReport]], seed: int) -> Mapping[str, list[Pair]]:
    """Test every pair of models in every metric that both measured on the same units.

    The metrics of a pair, and of one kind of unit (pictures or classes), are a family: corrected
    together by `corrected_p`, and for the number of families by Bonferroni.
    """
    families = []
    for (a, first), (b, second) in combinations(there, 2):
        units: dict[int, list[str]] = {}
        for metric in first.metrics:
            if _comparable(first, second, metric):
                units.setdefault(len(first.samples[metric]), []).append(metric)
        families += [(a, first, b, second, metrics) for metrics in units.values()]
    pairs: dict[str, list[Pair]] = {}
    for a, first, b, second, metrics in families:
        changes = [second.samples[metric] - first.samples[metric] for metric in metrics]
        for metric, p_value in zip(metrics, corrected_p(changes, seed=seed), strict=True):
            paired = paired_test(first.samples[metric], second.samples[metric], seed=seed)
            pair = Pair(a, b, paired, min(1.0, float(p_value) * len(families)))
            pairs.setdefault(metric, []).append(pair)
    return pairs


def _best(metric: str, pairs: Sequence[Pair], models: set[int]) -> int | None:
    """Return the model that wins its test against every other model that has the metric."""
    good = direction(metric)
    won: dict[int, set[int]] = {at: set() for at in models}
    for pair in pairs:
        gain = pair.paired.difference * good
        if pair.significant and gain:
            winner, loser = (pair.second, pair.first) if gain > 0 else (pair.first, pair.second)
            won[winner].add(loser)
    best = [at for at, beaten in won.items() if len(models) > 1 and beaten == models - {at}]
    return best[0] if best else None


def _overlaid(
    there: Sequence[tuple[int, EvalReport]], names: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Draw curves of one title in one plot, each series under its model's name."""
    curves: dict[str, dict[str, Any]] = {}
    for at, report in there:
        for plot in report.details.get("curves", ()):
            shared = curves.setdefault(plot["title"], {**plot, "series": []})
            alone = len(plot["series"]) == 1
            for number, series in enumerate(plot["series"]):
                name = names[at] if alone else f"{names[at]}: {series['name']}"
                dash = at if alone else number
                shared["series"].append({**series, "name": name, "hue": at, "dash": dash})
    return list(curves.values())


def _changed(
    there: Sequence[tuple[int, EvalReport]],
    names: Sequence[str],
    examples: Mapping[str, Captioned | Labelled],
) -> list[Mapping[str, Any]]:
    """Return the pictures that changed most from the first model to the last, better and worse."""
    (a, first), (b, second) = there[0], there[-1]
    # Means over classes weigh a picture by the size of its class: no figure of one picture.
    shared = [
        m
        for m in first.samples
        if m in second.samples
        and _comparable(first, second, m)
        and not m.endswith("mean_per_class_recall")
    ]
    data = examples.get(first.fingerprint)
    if a == b or not shared or data is None:
        return []
    # a graded figure tells pictures apart that all count as one hit
    metric = next((m for m in shared if m.endswith("MRR")), shared[0])
    before, after = (_own_means(data, metric, report.samples[metric]) for report in (first, second))
    gain = (after - before) * (direction(metric) or 1)
    groups: list[Mapping[str, Any]] = []
    for word, sign in (("better", 1), ("worse", -1)):
        rows = [int(r) for r in np.argsort(-sign * gain, kind="stable")[:EXAMPLES]]
        change = {r: [value_text(metric, float(v[r])) for v in (before, after)] for r in rows}
        groups.append(
            {
                "title": f"{names[b]} does {word} than {names[a]} ({metric} of the picture)",
                "items": [
                    _card(data, r, " → ".join(change[r])) for r in rows if sign * gain[r] > 0
                ],
                "labels": ("Expected", "Change"),
            }
        )
    return groups


def _own_means(data: Captioned | Labelled, metric: str, samples: Float64) -> Float64:
    """Return each picture's own mean of a metric from its samples (N,): one of text-to-image retrieval
    is weighted by the number of the picture's captions."""
    if isinstance(data, Captioned) and metric.startswith("text_to_image/"):
        return samples / unit_weights(data.owner)
    return samples


def _card(data: Captioned | Labelled, row: int, got: str) -> Mapping[str, Any]:
    """Return a picture with its first caption or its class."""
    if isinstance(data, Captioned):
        expected = "".join(data.captions[i] for i in np.flatnonzero(data.owner == row)[:1])
    elif data.labels is not None:
        expected = data.classes[int(data.labels[row])]
    else:
        present = np.flatnonzero(() if data.targets is None else data.targets[row])
        expected = ", ".join(data.classes[int(i)] for i in present)
    return exhibit(data.pictures, row, expected=expected, got=got)


def _settings(reports: Sequence[EvalReport | None], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a table of each model's provenance and settings."""
    models = [dict([*r.provenance(), *r.chosen()]) if r is not None else {} for r in reports]
    columns = ["", *names]
    keys = {key: None for pairs in models for key in pairs if key not in ("Data", "Command")}
    rows = [[key, *(pairs.get(key, "–") for pairs in models)] for key in keys]
    return {"title": "Settings and data", "columns": columns, "rows": rows, "note": ""}


def _warnings(there: Sequence[tuple[int, EvalReport]], names: Sequence[str]) -> list[str]:
    """Return what makes two models' figures less comparable, and each model's own warnings."""
    at_first, baseline = there[0]
    messages = []
    for at, report in there[1:]:
        if report.fingerprint != baseline.fingerprint:
            messages.append(
                f"{names[at]} was measured on different data than {names[at_first]} (fingerprint "
                f"{report.fingerprint[:12]}, not {baseline.fingerprint[:12]}): their difference was "
                "not tested"
            )
        for key in sorted(report.settings.keys() & baseline.settings.keys() & COMPARED):
            value, usual = setting_text(report.settings[key]), setting_text(baseline.settings[key])
            if value != usual:
                messages.append(
                    f"{key} differs: {usual} for {names[at_first]}, {value} for {names[at]}"
                )
    for at, report in there:
        for warning in report.warnings:
            shared = all(warning in other.warnings for _, other in there)
            messages.append(warning if shared else f"{names[at]}: {warning}")
    return list(dict.fromkeys(messages))


# ---- names and sentences


def _names(models: Sequence[Sequence[EvalReport]]) -> tuple[str, ...]:
    """Return the models' specs, with the encoder's id where two are equal."""
    specs = [reports[0].model for reports in models]
    if len(set(specs)) == len(specs):
        return tuple(specs)
    named = [f"{reports[0].model} {reports[0].encoder_id[:8]}" for reports in models]
    if len(set(named)) == len(named):
        return tuple(named)
    return tuple(f"{name} #{at}" for at, name in enumerate(named, 1))


def _title(names: Sequence[str]) -> str:
    both = " and ".join(names)
    short = len(names) == 2 and len(both) <= 40
    return f"{both} compared" if short else f"{len(names)} models compared"


def _summary(section: Section, names: Sequence[str]) -> str:
    """Return, for each model after the first, the change of the section's first tested metric, and
    how many others changed significantly: the table has them."""
    row = next(row for row in section.rows if row.pairs)
    verdicts = []
    for at in range(1, len(names)):
        pair = row.against_first(at)
        if pair is None:
            continue
        change = f"({change_text(row.metric, pair.paired.difference)}, {p_text(pair.p_value)})"
        verdict = f"not significantly different from {names[0]} {change}"
        if pair.significant:
            gain = pair.paired.difference * (row.direction or 1) > 0
            verdict = f"{'better' if gain else 'worse'} than {names[0]} {change}"
        counts = []
        for way, changes in zip(("better", "worse"), section.changes(at), strict=True):
            others = [text for text in changes if not text.startswith(f"{row.metric} ")]
            if others:
                examples = f" ({metric_text(others[0])})" if len(others) == 1 else ""
                counts.append(f"{len(others)} {way}{examples}")
        tested = sum(r.against_first(at) is not None for r in section.rows) - 1
        if tested:
            verdict += f"; of {count(tested, 'other figure')}, {' and '.join(counts) or 'none'} "
            verdict += "by more than chance" if counts else "differs by more than chance"
        verdicts.append(f"{names[at]} is {verdict}")
    return f"{section.title}, {metric_text(row.metric)}: {'. '.join(verdicts) or 'not tested'}."
