"""Index quality: recall, latency, memory and build time of every index kind on given vectors.

Recall@K is measured against the exact kind on the same half-precision codes, tie-aware: a hit that
scores what the true K-th scores is no miss. Latency is of `VectorIndex.search` as the app calls it:
one query on one thread, after a warm-up, per query the median of `repeats`; a batch uses all cores.
Percentiles and intervals are over queries: they do not cover how busy the machine is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Float64, Int64
from clipkit.errors import InputError
from clipkit.index import KINDS, VectorIndex, snapshot_kind, typical_queries
from clipkit.metrics import Interval, mean_interval, statistic_interval
from clipkit.wording import percent
from eval.features import Stopped, fingerprint
from eval.reports.report import EvalReport
from eval.session import Results, Session

# Turning words into a vector takes about 11 ms on two cores: what the search adds up to this is
# not noticed, and a faster kind would only risk losing hits.
UNNOTICED_MS = 15.0
_WARM_UP = 10  # queries before timing
_NOTE = (
    "Recall against the exact kind on the same codes; the lowest of the groups of queries decides which "
    "setting is recommended. p50, p95, p99: one query, one thread, k = {k}; "
    "the batch uses all cores. A kind that would have to scan over "
    "an eighth of the vectors scans them all instead, so in small libraries its recall is 1."
)


def evaluate_index(
    ids: Int64,
    vectors: npt.NDArray[np.float16] | Float32,
    *,
    queries: Float32 | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    recall_goals: Sequence[float] = (0.9, 0.95, 0.99),
    ks: Sequence[int] = (1, 10, 100),
    query_count: int = 200,
    repeats: int = 3,
    dataset: str = "vectors",
    model: str = "",
    encoder_id: str = "",
    session: Session | None = None,
) -> EvalReport:
    """Measure every setting of `kinds` on `vectors` (N, D), unit rows, with `ids` (N,).

    Searches for `query_count` queries made from the vectors, and for `queries` (Q, D), such as encoded
    texts, if given. A stopped session ends it early with what was measured; raises Stopped if that is
    nothing yet, InputError for no vectors, unknown kinds, goals outside 0..1, and what
    VectorIndex.build raises.
    """
    session, results = session or Session(), Results("index")
    _check(vectors, kinds, recall_goals, ks, query_count, repeats)
    kinds = [kind for kind in KINDS if kind in kinds]
    size, seed = len(vectors), session.seed
    ks = sorted({min(k, size) for k in ks})
    judged = 10 if 10 in ks else ks[-1]
    queries, groups = _queries(vectors, queries, query_count, seed)
    total = sum(len(_levels(kind)) for kind in kinds)

    session.on_progress("building the index that clipkit index would", 0, total)
    auto = VectorIndex.build(ids, vectors, kind=snapshot_kind(size), seed=seed)
    exact = auto if auto.kind == "exact" else VectorIndex.build(ids, vectors, kind="exact")
    truth = {k: np.array([s[k - 1] for _, s in exact.search(queries, k)]) for k in ks}
    automatic = _name(auto)
    built = {index.kind: index for index in (auto, exact) if index.kind in kinds}
    del auto, exact  # an index of millions of vectors takes gigabytes: free what is not needed
    run = _Run(queries, groups, truth, judged, repeats, session, total, results)
    try:
        for kind in kinds:
            run.check_stop()  # before minutes of building
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
        results.warnings.append(
            f"stopped after {len(run.outcomes)} of {total} settings: the recommendation is among those"
        )
    outcomes = run.outcomes

    best, reason = recommend(outcomes, max(recall_goals))
    counts = ", ".join(f"{len(rows)} {group}" for group, rows in groups.items())
    same = "the same" if automatic == best.name else f"not the recommended {best.name}"
    results.sentences = [
        f"{size:,} vectors of {vectors.shape[1]} dimensions; {len(queries)} queries ({counts}).",
        f"Recommended: {reason}.",
        f"clipkit index chooses {automatic} by itself: {same}.",
    ]
    results.metrics = _intervals(outcomes, size, seed)
    results.samples = {
        f"{o.name}/recall@{k}": hits for o in outcomes for k, hits in o.recall.items()
    }
    table, further = _settings_tables(outcomes, judged)
    results.tables = [_goal_table(outcomes, recall_goals, judged), table, further]
    results.headline = [
        f"{best.name}/{figure}" for figure in (f"recall@{judged}", "p50_ms", "p95_ms")
    ]
    results.scatter = [scatter(outcomes, judged)]
    results.settings |= {
        "kinds": kinds,
        "recall_goals": list(recall_goals),
        "ks": ks,
        "judged_at": judged,
        "repeats": repeats,
        "unnoticed_ms": UNNOTICED_MS,
        "recommended": best.name,
        "auto": automatic,
        "ties": "a hit that scores what the true K-th scores counts",
    }
    return results.report(
        session,
        n={"vectors": size, "queries": len(queries)},
        fingerprint=fingerprint("", _blocks(ids, vectors, queries)),
        dataset=dataset,
        model=model,
        encoder_id=encoder_id,
    )


def _check(
    vectors: npt.NDArray[Any],
    kinds: Sequence[str],
    recall_goals: Sequence[float],
    ks: Sequence[int],
    query_count: int,
    repeats: int,
) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown index kind {kind!r}; known kinds: {', '.join(KINDS)}")
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


# ---- queries


def made_queries(vectors: npt.NDArray[Any], count: int, seed: int) -> Float32:
    """Make queries like users' from vectors (N, D): float32 (count, D), unit rows.

    They are made as the index makes them to measure its own recall: half near a picture each, half as
    far from every picture as words are (`clipkit.index.typical_queries`).
    """
    random = np.random.default_rng(seed)
    own = vectors[random.integers(0, len(vectors), count)].astype(np.float32)
    drawn = random.choice(len(vectors), min(4096, len(vectors)), replace=False)
    return typical_queries(own, vectors[np.sort(drawn)].astype(np.float32), random)


def _queries(
    vectors: npt.NDArray[Any], extra: Float32 | None, count: int, seed: int
) -> tuple[Float32, dict[str, range]]:
    """Return all queries, float32 (Q, D), and the rows of each group of them."""
    made, half = made_queries(vectors, count, seed), count // 2
    groups = {"near a picture": range(half), "like words": range(half, count)}
    if extra is None or len(extra) == 0:
        return made, groups
    extra = np.asarray(extra, np.float32)
    if extra.ndim != 2 or extra.shape[1] != vectors.shape[1]:
        raise InputError(
            f"queries have shape {extra.shape}; (Q, {vectors.shape[1]}) is expected, as the vectors; "
            "encode them with the same model"
        )
    groups["given"] = range(count, count + len(extra))
    return np.concatenate([made, extra]), groups


# ---- measuring


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The measurements of one setting of one kind."""

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
        """Return the median milliseconds of a query."""
        return float(np.median(self.ms))

    @property
    def p95(self) -> float:
        """Return the milliseconds within which 95 % of the queries are answered."""
        return float(np.quantile(self.ms, 0.95))


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The queries of a run, how to time them, and the outcomes so far."""

    queries: Float32  # (Q, D)
    groups: Mapping[str, range]
    truth: Mapping[int, Float32]  # per K, (Q,): the score of the true K-th
    judged: int  # the K that decides
    repeats: int
    session: Session
    total: int  # settings
    results: Results
    outcomes: list[Outcome] = field(default_factory=list)

    def check_stop(self) -> None:
        """Raise Stopped if the session is stopped."""
        if self.session.stop.is_set():
            raise Stopped("stopped while measuring the index kinds")

    def measure(self, kind: str, index: VectorIndex) -> None:
        """Measure every setting of one kind."""
        if index.kind != kind:
            self.results.warnings.append(
                f"{index.size} vectors are too few for {kind}: it would search exactly"
            )
            return
        for setting in _settings(index):
            done = len(self.outcomes)
            self.session.on_progress(f"measuring {_name(setting)}", done, self.total)
            self.outcomes.append(self._outcome(setting))

    def _outcome(self, index: VectorIndex) -> Outcome:
        self.check_stop()
        recall = {}
        for k, last in self.truth.items():  # a search per K: for a larger one, a kind scans more
            hits = index.search(self.queries, k)
            # 1e-6: what summing in another order may move a cosine by
            shares = [np.mean(s >= t - 1e-6) for (_, s), t in zip(hits, last, strict=True)]
            recall[k] = np.array(shares, np.float64)
        single = [self.queries[i : i + 1] for i in range(len(self.queries))]
        for query in single[:_WARM_UP]:
            index.search(query, self.judged)
        ms = np.empty((self.repeats, len(single)))
        for cell in np.ndindex(ms.shape):
            self.check_stop()
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


def _levels(kind: str) -> tuple[Mapping[str, int], ...]:
    structure = KINDS[kind]
    return ({},) if structure is None else structure.levels


def _name(index: VectorIndex) -> str:
    keys = _levels(index.kind)[0]
    return " ".join([index.kind, *(f"{key}={index.settings[key]}" for key in keys)])


def _settings(index: VectorIndex) -> Iterator[VectorIndex]:
    """Yield the index at each level of its kind, from fast to thorough, all on one structure."""
    for level in _levels(index.kind):
        other = copy.copy(index)
        other.settings = {**index.settings, **level}
        yield other


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def _blocks(*arrays: npt.NDArray[Any]) -> Iterator[bytes]:
    """Yield the arrays' types, shapes and bytes, a few megabytes at a time."""
    for array in arrays:
        yield f"{array.dtype}{array.shape}".encode()
        for start in range(0, len(array), 8192):
            yield array[start : start + 8192].tobytes()


# ---- the recommendation


def recommend(outcomes: Sequence[Outcome], goal: float) -> tuple[Outcome, str]:
    """Return the recommended setting and the reason. Raises InputError if there are no outcomes.

    Of the settings that reach the recall and are fast enough not to be noticed: exact, or else the
    kind that is fastest to build. If none is fast enough, the one that is fastest to answer.
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
    unnoticed = [o for o in meeting if o.p95 <= UNNOTICED_MS]
    if not unnoticed:
        best = min(meeting, key=lambda o: o.p50)
        return best, (
            f"{best.name} is the fastest setting that reaches recall {goal:g}, {best.p50:.1f} ms, but "
            f"none of those answers 95 % of the queries within {UNNOTICED_MS:g} ms"
        )
    best = min(unnoticed, key=lambda o: (o.kind != "exact", o.build_seconds, o.p50))
    if best.kind == "exact":
        why = "and misses nothing: an approximate kind would only risk losing hits"
    else:
        why = f"with recall {best.worst:.3f}, and is the fastest to build of those that do"
    limit = f"95 % of the queries within {best.p95:.2g} ms (the limit is {UNNOTICED_MS:g} ms)"
    return best, f"{best.name} answers {limit} {why}"


# ---- metrics, tables, plot


def _intervals(outcomes: Sequence[Outcome], size: int, seed: int) -> dict[str, Interval]:
    """Return recall and p50 with intervals over queries; what was measured once has no bounds."""

    metrics: dict[str, Interval] = {}
    for o in outcomes:
        ms, count = o.ms, len(o.ms)

        def median(rows: Int64, ms: Float64 = ms) -> float:
            return float(np.median(ms[rows]))

        for k, hits in o.recall.items():
            metrics[f"{o.name}/recall@{k}"] = mean_interval(hits, seed=seed)
        metrics[f"{o.name}/p50_ms"] = statistic_interval(median, count, seed=seed)
        metrics[f"{o.name}/p95_ms"] = Interval.without_bounds(o.p95, count)
        metrics[f"{o.name}/p99_ms"] = Interval.without_bounds(float(np.quantile(ms, 0.99)), count)
        metrics[f"{o.name}/batched_per_second"] = Interval.without_bounds(o.batched, count)
        metrics[f"{o.kind}/bytes"] = Interval.without_bounds(o.bytes, size)
        metrics[f"{o.kind}/build_seconds"] = Interval.without_bounds(o.build_seconds, size)
    return metrics


def _settings_tables(
    outcomes: Sequence[Outcome], judged: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a table of what decides between the settings, and one of everything else."""
    ks = list(outcomes[0].recall)
    columns = ["setting", f"recall@{judged}, worst group", "p50 ms", "p95 ms", "MB", "build s"]
    rows = [[o.name, o.worst, o.p50, o.p95, o.bytes / 1e6, o.build_seconds] for o in outcomes]
    first = {
        "title": "Every kind and setting",
        "columns": columns,
        "rows": rows,
        "note": _NOTE.format(k=judged),
        "first": True,
    }
    more = ["setting", *(f"recall@{k}" for k in ks), "p99 ms", "batched/s"]
    others = [
        [
            o.name,
            *(float(o.recall[k].mean()) for k in ks),
            float(np.quantile(o.ms, 0.99)),
            o.batched,
        ]
        for o in outcomes
    ]
    return first, {"title": "Further figures of every setting", "columns": more, "rows": others}


def _goal_table(outcomes: Sequence[Outcome], goals: Sequence[float], judged: int) -> dict[str, Any]:
    """Return a table with the fastest setting per recall goal."""
    rows: list[list[Any]] = []
    for goal in sorted(goals):
        meeting = [o for o in outcomes if o.worst >= goal]
        best = min(meeting, key=lambda o: o.p50, default=None)
        rows.append(
            [percent(goal), *((best.name, best.worst, best.p50) if best else (None, None, None))]
        )
    columns = [f"recall@{judged} at least", "fastest setting", "recall, worst group", "p50 ms"]
    title = "The fastest setting for a recall"
    return {"title": title, "columns": columns, "rows": rows, "first": True, "terminal": True}


def scatter(outcomes: Sequence[Outcome], judged: int) -> dict[str, Any]:
    """Return a plot of recall over time; the best are those that no other beats in both."""

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
