"""How well every index kind serves one's own vectors: recall, latency, memory, time to build and load.

Recall@K is measured against the exact kind on the same half-precision codes, tie-aware: a hit that
scores what the true K-th scores is no miss. Latency is of `VectorIndex.search` as the app calls it:
one query on one thread, after a warm-up, per query the median of `repeats`; a batch uses all cores.
Its percentiles are over queries, and so are the intervals: they do not cover how busy the machine is.
"""

from __future__ import annotations

import copy
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError
from clipkit.index import KINDS, VectorIndex, typical_queries
from clipkit.metrics import Interval, mean_interval, statistic_interval
from eval.features import OnProgress, Stopped, fingerprint
from eval.reports.report import EvalReport

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


Floats = npt.NDArray[np.float32]

_WARM_UP = 10  # queries asked before timing


def made_queries(vectors: npt.NDArray[Any], count: int, seed: int) -> Floats:
    """Queries float32 (count, D), unit rows, such as users will have, made of vectors (N, D).

    As the index makes them when it measures its own recall: half near a picture each, half as far
    from every picture as words are (`clipkit.index.typical_queries`).
    """
    random = np.random.default_rng(seed)
    own = vectors[random.integers(0, len(vectors), count)].astype(np.float32)
    drawn = random.choice(len(vectors), min(4096, len(vectors)), replace=False)
    return typical_queries(own, vectors[np.sort(drawn)].astype(np.float32), random)


def evaluate_index(
    ids: npt.NDArray[np.int64],
    vectors: npt.NDArray[np.float16] | Floats,
    *,
    queries: Floats | None = None,
    kinds: Sequence[str] | None = None,
    recall_goals: Sequence[float] = (0.9, 0.95, 0.99),
    ks: Sequence[int] = (1, 10, 100),
    query_count: int = 200,
    repeats: int = 3,
    unnoticed_ms: float = UNNOTICED_MS,
    dataset: str = "vectors",
    model: str = "",
    encoder_id: str = "",
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """Measure every setting of `kinds` (None: all) over `vectors` (N, D), unit rows, under `ids` (N,).

    Asks `query_count` queries made of the vectors, and `queries` (Q, D), such as encoded texts, if
    given. Setting `stop` ends it early with what was measured; Stopped if that is nothing yet.
    InputError: no vectors, unknown kinds, goals outside 0..1, and what VectorIndex.build refuses.
    """
    started = time.perf_counter()
    kinds = list(KINDS) if kinds is None else sorted(set(kinds), key=_place)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(
            f"vectors have shape {vectors.shape}; at least one row of (N, D) is needed"
        )
    if not recall_goals or not all(0 <= goal <= 1 for goal in recall_goals):
        raise InputError(f"recall goals are {list(recall_goals)}; give one or more between 0 and 1")
    if not kinds or not ks or min(*ks, query_count // 2, repeats) < 1:
        raise InputError(
            f"{len(kinds)} kinds, K {list(ks)}, {query_count} queries, {repeats} repeats; at least "
            "1 kind, 1 hit, 2 queries and 1 repeat are needed"
        )
    size = len(vectors)
    ks = sorted({min(k, size) for k in ks})
    asked, groups = _queries(vectors, queries, query_count, seed)
    tell = on_progress or (lambda *_: None)
    total = sum(len(_levels(kind)) for kind in kinds)

    tell("building the index that clipkit index would", 0, total)
    auto = VectorIndex.build(ids, vectors, seed=seed)
    exact = auto if auto.kind == "exact" else VectorIndex.build(ids, vectors, kind="exact")
    truth = {k: np.array([s[k - 1] for _, s in exact.search(asked, k)]) for k in ks}
    judged = 10 if 10 in ks else ks[-1]
    task = _Task(asked, groups, truth, judged, repeats, stop or threading.Event())
    chosen = _name(auto)
    built = {index.kind: index for index in (auto, exact) if index.kind in kinds}
    del auto, exact  # an index of millions of vectors takes gigabytes: keep none longer than needed
    run = _Run(task, total, tell)
    try:
        for kind in kinds:
            task.go_on()  # before minutes of building
            # a goal of 0 is met by the first settings, so that the structure is kept
            run.measure(
                kind,
                built.pop(kind)
                if kind in built
                else VectorIndex.build(ids, vectors, kind=kind, recall_goal=0.0, seed=seed),
            )
    except Stopped:
        if not run.outcomes:
            raise
        run.warnings.append(
            f"stopped after {len(run.outcomes)} of {total} settings: the recommendation is among those"
        )
    outcomes, times = run.outcomes, run.times

    best, reason = recommend(outcomes, max(recall_goals), unnoticed_ms=unnoticed_ms)
    made = ", ".join(f"{len(rows)} {group}" for group, rows in groups.items())
    words = [
        f"{size:,} vectors of {vectors.shape[1]} dimensions; {len(asked)} queries ({made}).",
        f"Recommended: {reason}.",
        f"`clipkit index` takes {chosen} by itself: "
        + ("the same." if chosen == best.name else f"not the recommended {best.name}."),
    ]
    return EvalReport(
        task="index",
        dataset=dataset,
        split=None,
        model=model,
        encoder_id=encoder_id,
        n={"vectors": size, "queries": len(asked)},
        metrics=metrics_of(outcomes, times, size, seed),
        settings={
            "kinds": kinds,
            "recall_goals": list(recall_goals),
            "ks": ks,
            "judged_at": judged,
            "repeats": repeats,
            "unnoticed_ms": unnoticed_ms,
            "seed": seed,
            "recommended": best.name,
            "auto": chosen,
            "ties": "a hit that scores what the true K-th scores counts",
        },
        fingerprint=fingerprint("", _pieces(ids, vectors, asked)),
        warnings=tuple(run.warnings),
        details={
            "words": words,
            "tables": [
                table(outcomes, times, judged),
                best_per_goal(outcomes, recall_goals, judged),
            ],
            "scatter": [scatter(outcomes, judged)],
        },
        seconds={"total": time.perf_counter() - started},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples={f"{o.name}/recall@{k}": hits for o in outcomes for k, hits in o.recall.items()},
    )


def _place(kind: str) -> int:
    if kind not in KINDS:
        raise InputError(f"unknown index kind {kind!r}; known kinds: {', '.join(KINDS)}")
    return list(KINDS).index(kind)


def _queries(
    vectors: npt.NDArray[Any], given: Floats | None, count: int, seed: int
) -> tuple[Floats, dict[str, range]]:
    """All queries float32 (Q, D), and which of them form a group."""
    made, half = made_queries(vectors, count, seed), count // 2
    groups = {"near a picture": range(half), "like words": range(half, count)}
    if given is None or len(given) == 0:
        return made, groups
    given = np.asarray(given, np.float32)
    if given.ndim != 2 or given.shape[1] != vectors.shape[1]:
        raise InputError(
            f"queries have shape {given.shape}; (Q, {vectors.shape[1]}) is expected, as the vectors; "
            "encode them with the same model"
        )
    groups["given"] = range(count, count + len(given))
    return np.concatenate([made, given]), groups


def _levels(kind: str) -> tuple[Mapping[str, int], ...]:
    way = KINDS[kind]
    return ({},) if way is None else way.levels


def _name(index: VectorIndex) -> str:
    keys = _levels(index.kind)[0]
    return " ".join([index.kind, *(f"{key}={index.settings[key]}" for key in keys)])


def _settings(index: VectorIndex) -> Iterator[VectorIndex]:
    """The index at each level of its kind, from quick to thorough, all on the same structure."""
    for level in _levels(index.kind):
        other = copy.copy(index)
        other.settings = {**index.settings, **level}
        yield other


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What every setting is asked, and how often."""

    queries: Floats  # (Q, D)
    groups: Mapping[str, range]
    truth: Mapping[int, npt.NDArray[np.float32]]  # per K, (Q,): the score of the true K-th
    judged: int  # the K that decides
    repeats: int
    stop: threading.Event

    def measure(self, index: VectorIndex) -> Outcome:
        """Recall and times of one setting."""
        self.go_on()
        recall = {}
        for k, last in self.truth.items():  # each K is asked for: with more, a kind looks at more
            hits = index.search(self.queries, k)
            # 1e-6: what summing in another order may move a cosine by
            found = [np.mean(s >= t - 1e-6) for (_, s), t in zip(hits, last, strict=True)]
            recall[k] = np.array(found, np.float64)
        single = [self.queries[i : i + 1] for i in range(len(self.queries))]
        for query in single[:_WARM_UP]:
            index.search(query, self.judged)
        ms = np.empty((self.repeats, len(single)))
        for cell in np.ndindex(ms.shape):
            self.go_on()
            ms[cell] = 1e3 * _seconds(index.search, single[cell[1]], self.judged)
        batch = [_seconds(index.search, self.queries, self.judged) for _ in range(self.repeats)]
        judged = recall[self.judged]
        return Outcome(
            kind=index.kind,
            name=_name(index),
            recall=recall,
            worst=min(float(judged[list(rows)].mean()) for rows in self.groups.values()),
            ms=np.median(ms, axis=0),
            batched=len(single) / float(np.median(batch)),
            bytes=index.measured.bytes,
            build_seconds=index.measured.build_seconds,
        )

    def go_on(self) -> None:
        """Raise Stopped if the person has had enough."""
        if self.stop.is_set():
            raise Stopped("stopped while measuring the index kinds")


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What has been measured so far."""

    task: _Task
    total: int  # settings
    tell: OnProgress
    outcomes: list[Outcome] = field(default_factory=list)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def measure(self, kind: str, index: VectorIndex) -> None:
        """Every setting of one kind, and how long it takes to save and to load."""
        if index.kind != kind:
            self.warnings.append(
                f"{index.size} vectors are too few for {kind}: it would search exactly"
            )
            return
        for setting in _settings(index):
            self.tell(f"measuring {_name(setting)}", len(self.outcomes), self.total)
            self.outcomes.append(self.task.measure(setting))
        try:
            self.times[kind] = _save_and_load(index)
        except OSError as error:
            self.warnings.append(f"{kind} could not be saved to the temporary folder: {error}")


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def _save_and_load(index: VectorIndex) -> tuple[float, float]:
    """Seconds of both, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="clipkit-index-") as parent:
        folder = Path(parent) / "index"
        saving = time.perf_counter()
        index.save(folder, encoder_id="", last_seq=0)
        return time.perf_counter() - saving, _seconds(VectorIndex.load, folder)


def _pieces(*arrays: npt.NDArray[Any]) -> Iterator[bytes]:
    """The arrays' types, shapes and bytes, a few megabytes at a time."""
    for array in arrays:
        yield f"{array.dtype}{array.shape}".encode()
        for start in range(0, len(array), 8192):
            yield array[start : start + 8192].tobytes()
