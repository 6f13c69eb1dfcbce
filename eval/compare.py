"""Models side by side: the same figures on the same pictures, and which differences are real.

    compare(encoders, datasets)          evaluates what is missing, then compares
    compare_reports([[report, ...] per model])        compares reports that are there, saved ones too

Two models are tested against each other only where their reports have the data's fingerprint in
common; p-values are corrected together for all tests of one data set and task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipkit.errors import InputError
from clipkit.metrics import corrected_p, paired_test
from eval.reports.comparison import Comparison, Pair, Row, Section, change_text, p_text
from eval.reports.report import EvalReport, direction, setting_text, value_text

if TYPE_CHECKING:
    from eval.data import Captioned, Labelled
    from eval.features import Encoder, FeatureCache
    from eval.prompts import Templates

CHANGED = 12  # pictures shown of each kind
# settings that must be equal for two models' figures to mean the same
COMPARED = frozenset(("templates", "queries", "ks", "ties", "tie_rule", "seed", "relevance"))
Show = Callable[[int], Mapping[str, Any]]  # a picture's row -> {name, expected, thumbnail}


def compare_reports(
    models: Sequence[Sequence[EvalReport]],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    pictures: Mapping[str, Show] | None = None,
    command: str = "",
    seed: int = 0,
) -> Comparison:
    """Compare models by their reports, one list per model; the first model is the yardstick.

    Reports belong together by task, data set and split. `names` are the models' (default: their
    specs). `pictures` shows single pictures, by the data's fingerprint: see `shower`. InputError:
    fewer than two models, a model without reports, names that do not fit.
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
        found = tuple(
            next((r for r in reports if (r.task, r.dataset, r.split) == key), None)
            for reports in models
        )
        sections.append(_section(found, names, pictures or {}, seed))
    return Comparison(
        title=title or _title(names),
        names=names,
        sections=tuple(sections),
        words=tuple(_summary(section, names) for section in sections if section.tested),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        encoder_ids=tuple(reports[0].encoder_id for reports in models),
    )


def compare(
    encoders: Sequence[Encoder],
    datasets: Sequence[Captioned | Labelled],
    *,
    templates: Templates | None = None,
    ks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    cache: FeatureCache | None = None,
    command: str = "",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Comparison:
    """Evaluate each model on each data set, retrieval where there are captions, zero-shot where
    there are classes, and compare. What the cache holds is not encoded again.

    `templates` None: those that go with each data set's name. Raises what the evaluators raise.
    """
    from eval.data import Captioned
    from eval.features import FeatureCache
    from eval.prompts import default_templates
    from eval.retrieval import evaluate_retrieval
    from eval.zero_shot import evaluate_zero_shot

    shared: dict[str, Any] = {
        "cache": cache or FeatureCache(None),
        "seed": seed,
        "on_progress": on_progress,
        "stop": stop,
    }
    if ks is not None:
        shared["ks"] = tuple(ks)
    models: list[list[EvalReport]] = []
    pictures: dict[str, Show] = {}
    for encoder in encoders:
        models.append([])
        for data in datasets:
            if isinstance(data, Captioned):
                queries: Literal["captions", "tags"] = "captions" if data.captions else "tags"
                report = evaluate_retrieval(encoder, data, queries=queries, **shared)
            else:
                chosen = templates or default_templates(data.name)
                report = evaluate_zero_shot(encoder, data, templates=chosen, **shared)
            models[-1].append(report)
            if report.n["pictures"] == len(data.pictures) and "tags" not in report.n:
                pictures[report.fingerprint] = shower(data)  # the samples' rows are the data's
    return compare_reports(
        models, names=names, title=title, pictures=pictures, command=command, seed=seed
    )


def shower(data: Captioned | Labelled) -> Show:
    """Shows single pictures of a data set: row -> name, what is expected, thumbnail."""
    from eval.data import Captioned
    from eval.features import thumbnail_if_there

    def show(row: int) -> Mapping[str, Any]:
        if isinstance(data, Captioned):
            first = np.flatnonzero(data.owner == row)[:1]
            expected = "".join(data.captions[i] for i in first)
        elif data.labels is not None:
            expected = data.classes[int(data.labels[row])]
        else:
            held = np.zeros(0) if data.targets is None else np.flatnonzero(data.targets[row])
            expected = ", ".join(data.classes[int(i)] for i in held)
        thumbnail = thumbnail_if_there(data.pictures, row)
        return {"name": data.pictures.name(row), "expected": expected, "thumbnail": thumbnail}

    return show


# ---- one task on one data set


def _section(
    reports: tuple[EvalReport | None, ...],
    names: Sequence[str],
    pictures: Mapping[str, Show],
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
        changed=tuple(_changed(there, names, pictures)),
        made=_made(reports, names),
        warnings=tuple(_warnings(there, names)),
    )


def _comparable(first: EvalReport, second: EvalReport, metric: str) -> bool:
    a, b = first.samples.get(metric), second.samples.get(metric)
    if a is None or b is None or first.fingerprint != second.fingerprint or len(a) != len(b):
        return False
    return bool(np.isfinite(a).all() and np.isfinite(b).all() and len(a))


def _tests(there: Sequence[tuple[int, EvalReport]], seed: int) -> Mapping[str, list[Pair]]:
    """Every pair of models in every metric that both measured on the same units.

    A pair's metrics are corrected together (see `corrected_p`), and for the number of such families:
    pairs, and where metrics are of pictures and of classes, kinds of units (Bonferroni).
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
            found = Pair(a, b, paired, min(1.0, float(p_value) * len(families)))
            pairs.setdefault(metric, []).append(found)
    return pairs


def _best(metric: str, pairs: Sequence[Pair], models: set[int]) -> int | None:
    """The model that wins its test against every other model that has the metric."""
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
    """Curves of one title in one figure, each series under its model's name."""
    curves: dict[str, dict[str, Any]] = {}
    for at, report in there:
        for curve in report.details.get("curves", ()):
            shared = curves.setdefault(curve["title"], {**curve, "series": []})
            alone = len(curve["series"]) == 1
            for number, series in enumerate(curve["series"]):
                name = names[at] if alone else f"{names[at]}: {series['name']}"
                dash = at if alone else number
                shared["series"].append({**series, "name": name, "hue": at, "dash": dash})
    return list(curves.values())


def _changed(
    there: Sequence[tuple[int, EvalReport]], names: Sequence[str], pictures: Mapping[str, Show]
) -> list[Mapping[str, Any]]:
    """The pictures that the last model gets better, and worse, than the first, with most to tell."""
    (a, first), (b, second) = there[0], there[-1]
    shared = [m for m in first.samples if m in second.samples and _comparable(first, second, m)]
    show = pictures.get(first.fingerprint)
    if a == b or not shared or show is None:
        return []
    # a graded figure tells pictures apart that all count as one hit
    metric = next((m for m in shared if m.endswith("MRR")), shared[0])
    before, after = first.samples[metric], second.samples[metric]
    gain = (after - before) * (direction(metric) or 1)
    groups: list[Mapping[str, Any]] = []
    for word, sign in (("better", 1), ("worse", -1)):
        order = np.argsort(-sign * gain, kind="stable")[:CHANGED]
        items = [
            {
                **show(int(row)),
                "got": f"{value_text(metric, float(before[row]))} → "
                f"{value_text(metric, float(after[row]))}",
                "score": None,
            }
            for row in order
            if sign * gain[row] > 0
        ]
        title = f"{names[b]} does {word} than {names[a]} ({metric} of the picture)"
        groups.append({"title": title, "items": items})
    return groups


def _made(reports: Sequence[EvalReport | None], names: Sequence[str]) -> Mapping[str, Any]:
    """How each model's figures came about, as a table."""
    told = [dict([*r.provenance(), *r.chosen()]) if r is not None else {} for r in reports]
    columns = ["", *names]
    keys = {key: None for column in told for key in column if key not in ("Data", "Command")}
    rows = [[key, *(column.get(key, "–") for column in told)] for key in keys]
    return {"title": "How it was made", "columns": columns, "rows": rows, "note": ""}


def _warnings(there: Sequence[tuple[int, EvalReport]], names: Sequence[str]) -> list[str]:
    """What makes the figures of two models less than comparable, and each model's own warnings."""
    _, yardstick = there[0]
    found = []
    for at, report in there[1:]:
        if report.fingerprint != yardstick.fingerprint:
            found.append(
                f"{names[at]} was measured on other data than {names[there[0][0]]} (fingerprint "
                f"{report.fingerprint[:12]}, not {yardstick.fingerprint[:12]}): their difference "
                "was not tested"
            )
        both = sorted(report.settings.keys() & yardstick.settings.keys())
        for key in both:
            mine, theirs = setting_text(report.settings[key]), setting_text(yardstick.settings[key])
            if mine != theirs and key in COMPARED:
                found.append(
                    f"{key} differs: {theirs} for {names[there[0][0]]}, {mine} for {names[at]}"
                )
    for at, report in there:
        found += [f"{names[at]}: {warning}" for warning in report.warnings]
    return found


# ---- told


def _names(models: Sequence[Sequence[EvalReport]]) -> tuple[str, ...]:
    """The models' specs; where two are the same, with the encoder's id."""
    specs = [reports[0].model for reports in models]
    if len(set(specs)) == len(specs):
        return tuple(specs)
    named = [f"{reports[0].model} {reports[0].encoder_id[:8]}" for reports in models]
    if len(set(named)) == len(named):
        return tuple(named)
    return tuple(f"{name} #{at}" for at, name in enumerate(named, 1))


def _title(names: Sequence[str]) -> str:
    said = " and ".join(names)
    return (
        f"{said} compared"
        if len(names) == 2 and len(said) <= 40
        else f"{len(names)} models compared"
    )


def _summary(section: Section, names: Sequence[str]) -> str:
    """For each model after the first: the section's first tested figure, and what else moved."""
    row = next(row for row in section.rows if row.pairs)
    said = []
    for at in range(1, len(names)):
        pair = row.against_first(at)
        if pair is None:
            continue
        moved = change_text(row.metric, pair.paired.difference)
        if pair.significant:
            gain = pair.paired.difference * (row.direction or 1) > 0
            verdict = (
                f"{'better' if gain else 'worse'} than {names[0]} ({moved}, {p_text(pair.p_value)})"
            )
        else:
            verdict = f"not shown to differ from {names[0]} ({moved}, {p_text(pair.p_value)})"
        for way, told in zip(("better", "worse"), section.moved(at), strict=True):
            if others := [words for words in told if not words.startswith(f"{row.metric} ")]:
                verdict += f", {way} in {', '.join(others)}"
        said.append(f"{names[at]} is {verdict}")
    return f"{section.title}, {row.metric}: {'; '.join(said) or 'not tested'}."
