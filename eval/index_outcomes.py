"""What was measured of index settings, and what follows: the recommendation, tables, the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError
from clipkit.metrics import Interval, mean_interval, statistic_interval

__all__ = [
    "UNNOTICED_MS",
    "Outcome",
    "best_per_goal",
    "metrics_of",
    "recommend",
    "scatter",
    "table",
]

Float64 = npt.NDArray[np.float64]
Times = Mapping[str, tuple[float, float]]  # per kind, seconds to save and to load

# Turning words into a vector takes about 11 ms on two cores: what the search adds up to this is
# not felt, and a quicker kind would only risk to lose hits.
UNNOTICED_MS = 15.0
_NOTE = (
    "Recall against the exact kind on the same codes; the last recall is the lowest of the groups of "
    "queries, by which settings are judged. p50, p95, p99: one query, one thread, k = {k}; the batch "
    "uses all cores; loading is from a warm disk cache. A kind that would have to look at over an "
    "eighth of the vectors scans them all instead, so in small libraries its recall is 1."
)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one setting of one kind was measured to do."""

    kind: str
    name: str  # "ivf nprobe=32 refine=32"
    recall: Mapping[int, Float64]  # per K, float64 (Q,)
    worst: float  # recall at the K that decides, mean of the worst group of queries
    ms: Float64  # (Q,) milliseconds of each query alone
    batched: float  # queries per second, all at once
    bytes: int  # codes, ids and structure
    build_seconds: float

    @property
    def p50(self) -> float:
        return float(np.median(self.ms))

    @property
    def p95(self) -> float:
        return float(np.quantile(self.ms, 0.95))


def recommend(
    outcomes: Sequence[Outcome], goal: float, *, unnoticed_ms: float = UNNOTICED_MS
) -> tuple[Outcome, str]:
    """The setting to take and why, in a sentence; InputError if there is nothing to choose from.

    Of those that meet the recall and answer unnoticed: exact, or else the kind that is quickest to
    build. If none answers unnoticed, whichever is quickest to answer.
    """
    if not outcomes:
        raise InputError("no index kind was measured, so none can be recommended; name at least 1")
    meeting = [o for o in outcomes if o.worst >= goal]
    if not meeting:
        best = max(outcomes, key=lambda o: o.worst)
        return best, (
            f"no measured setting reaches recall {goal:g}; {best.name} comes nearest with "
            f"{best.worst:.3f} (the exact kind has 1 by definition)"
        )
    unnoticed = [o for o in meeting if o.p95 <= unnoticed_ms]
    if not unnoticed:
        best = min(meeting, key=lambda o: o.p50)
        return best, (
            f"{best.name} is the quickest that reaches recall {goal:g}, {best.p50:.1f} ms, though "
            f"nothing that does stays under {unnoticed_ms:g} ms for 95 % of the queries"
        )
    best = min(unnoticed, key=lambda o: (o.kind != "exact", o.build_seconds, o.p50))
    if best.kind == "exact":
        why = "and misses nothing: an approximate kind would only risk to lose hits"
    else:
        why = f"with recall {best.worst:.3f}, and is the quickest to build of those that do"
    limit = f"95 % of the queries within {best.p95:.2g} ms, unnoticed (under {unnoticed_ms:g} ms),"
    return best, f"{best.name} answers {limit} {why}"


def metrics_of(
    outcomes: Sequence[Outcome], times: Times, size: int, seed: int
) -> dict[str, Interval]:
    """Recall and p50 with intervals over queries; what was measured once has none."""

    def bare(value: float, n: int) -> Interval:
        return Interval(float(value), math.nan, math.nan, n)

    metrics: dict[str, Interval] = {}
    for o in outcomes:
        for k, hits in o.recall.items():
            metrics[f"{o.name}/recall@{k}"] = mean_interval(hits, seed=seed)
        count = len(o.ms)
        median = partial(_median, o.ms)
        metrics[f"{o.name}/p50_ms"] = statistic_interval(median, count, seed=seed)
        metrics[f"{o.name}/p95_ms"] = bare(o.p95, count)
        metrics[f"{o.name}/p99_ms"] = bare(float(np.quantile(o.ms, 0.99)), count)
        metrics[f"{o.name}/batched_per_second"] = bare(o.batched, count)
        metrics[f"{o.kind}/bytes"] = bare(o.bytes, size)
        metrics[f"{o.kind}/build_seconds"] = bare(o.build_seconds, size)
    for kind, (saving, loading) in times.items():
        metrics[f"{kind}/save_seconds"] = bare(saving, size)
        metrics[f"{kind}/load_seconds"] = bare(loading, size)
    return metrics


def _median(ms: Float64, rows: npt.NDArray[np.int64]) -> float:
    return float(np.median(ms[rows]))


def table(outcomes: Sequence[Outcome], times: Times, judged: int) -> dict[str, Any]:
    """One row per setting."""
    ks = list(outcomes[0].recall)
    columns = ["setting", *(f"recall@{k}" for k in ks), f"recall@{judged}, worst group"]
    columns += ["p50 ms", "p95 ms", "p99 ms", "batched/s", "MB", "build s", "save s", "load s"]
    rows = [
        [
            o.name,
            *(float(o.recall[k].mean()) for k in ks),
            o.worst,
            *(float(np.quantile(o.ms, q)) for q in (0.5, 0.95, 0.99)),
            o.batched,
            o.bytes / 1e6,
            o.build_seconds,
            *times.get(o.kind, (None, None)),
        ]
        for o in outcomes
    ]
    note = _NOTE.format(k=judged)
    return {"title": "Every kind and setting", "columns": columns, "rows": rows, "note": note}


def best_per_goal(
    outcomes: Sequence[Outcome], goals: Sequence[float], judged: int
) -> dict[str, Any]:
    """Per recall goal, the setting that answers first of those that reach it."""
    rows: list[list[Any]] = []
    for goal in sorted(goals):
        meeting = [o for o in outcomes if o.worst >= goal]
        best = min(meeting, key=lambda o: o.p50, default=None)
        rows.append([goal, *((best.name, best.worst, best.p50) if best else (None, None, None))])
    columns = [f"recall@{judged} at least", "quickest setting", "recall, worst group", "p50 ms"]
    return {"title": "The quickest that meets a recall", "columns": columns, "rows": rows}


def scatter(outcomes: Sequence[Outcome], judged: int) -> dict[str, Any]:
    """Recall against time; the best are those that no other beats in both."""

    def beaten(o: Outcome) -> bool:
        return any(
            p.worst >= o.worst and p.p50 <= o.p50 and (p.worst, p.p50) != (o.worst, o.p50)
            for p in outcomes
        )

    return {
        "title": "Recall against time",
        "x_label": "milliseconds of one query (p50)",
        "y_label": f"recall@{judged}, worst group",
        "points": [
            {"name": o.name, "x": o.p50, "y": o.worst, "best": not beaten(o)} for o in outcomes
        ],
    }
