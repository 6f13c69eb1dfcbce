"""eval.index_quality: what is measured of an index kind, and what is recommended."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bench.bench_index import clustered

from clipkit.errors import InputError
from clipkit.index import KINDS, Kind, building, vector_index
from clipkit.index.kinds import Ids, Store
from eval.features import Stopped
from eval.index_quality import Outcome, evaluate_index, made_queries, recommend, scatter
from eval.reports import EvalReport
from eval.session import Session

Floats = npt.NDArray[np.float32]
N, DIM = 3000, 32


@pytest.fixture(scope="module")
def rows() -> npt.NDArray[np.float16]:
    return clustered(N, DIM, per_cluster=50)


@pytest.fixture(scope="module")
def ids() -> Ids:
    return np.random.default_rng(5).permutation(np.arange(N) * 3 + 7)


def quick(ids: Ids, rows: Any, **options: Any) -> EvalReport:
    return evaluate_index(ids, rows, **{"query_count": 20, "repeats": 1, **options})


def column(report: EvalReport, name: str) -> dict[str, Any]:
    """One column by setting, of the table that has it."""
    table = next(t for t in report.details["tables"][1:] if name in t["columns"])
    at = table["columns"].index(name)
    return {row[0]: row[at] for row in table["rows"]}


def half_wrong(store: Store, queries: Floats, count: int, settings: Mapping[str, Any]) -> Ids:
    """The five best rows, then the worst ones."""
    del settings
    order = np.argsort(-(queries @ store.decode(slice(None)).T), axis=1, kind="stable")
    return np.concatenate([order[:, :5], order[:, ::-1]], axis=1)[:, :count]


USES_FAKE = pytest.mark.usefixtures("fake")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind "fake" that finds five hits and no more."""
    monkeypatch.setattr(vector_index, "structure_bytes", lambda _: 0)
    kind = Kind(lambda store, _: store, half_wrong, ({"effort": 1, "refine": 1},))
    monkeypatch.setitem(KINDS, "fake", kind)


# ---- what is measured


def test_every_kind_and_setting_is_measured(ids: Ids, rows: Any) -> None:
    report = quick(ids, rows)
    settings = sum(1 if way is None else len(way.levels) for way in KINDS.values())
    assert (
        len(column(report, "recall@10")) == settings == len(report.details["scatter"][0]["points"])
    )
    assert report.task == "index" and report.n == {"vectors": N, "queries": 20}
    for name, hits in report.samples.items():
        assert hits.shape == (20,) and hits.mean() == pytest.approx(report.metrics[name].value)
    assert report.metrics["exact/recall@10"].value == 1
    assert report.metrics["hnsw ef=2048 refine=1/recall@10"].value > 0.97
    # fp16 codes and int64 ids
    assert report.metrics["exact/bytes"].value == N * (2 * DIM + 8)
    for kind in KINDS:
        seconds = report.metrics[f"{kind}/build_seconds"]
        assert 0 < seconds.value < 60 and math.isnan(seconds.low), "measured once: no interval"
    for name in column(report, "p50 ms"):
        p50, p95, p99 = (report.metrics[f"{name}/{p}_ms"].value for p in ("p50", "p95", "p99"))
        assert 0 < p50 <= p95 <= p99
        assert report.metrics[f"{name}/p50_ms"].low <= p50 <= report.metrics[f"{name}/p50_ms"].high
    json.dumps([report.details, report.settings], allow_nan=False)


@USES_FAKE
def test_recall_by_hand(ids: Ids, rows: Any) -> None:
    """Five of the K best are found, the rest is from the far end: 1/1, 5/10, 5/100 (an index
    that loses half its results is seen). Searching one by one or in a batch is the same.
    """
    report = quick(ids, rows, kinds=("exact", "fake"))
    expected = {1: 1.0, 10: 0.5, 100: 0.05}
    for k, recall in expected.items():
        interval = report.metrics[f"fake effort=1 refine=1/recall@{k}"]
        assert interval.value == pytest.approx(recall)
        assert report.metrics[f"exact/recall@{k}"].value == 1
    goals = report.details["tables"][0]["rows"]
    assert [row[:2] for row in goals] == [
        ["90.0 %", "exact"],
        ["95.0 %", "exact"],
        ["99.0 %", "exact"],
    ]


@USES_FAKE
def test_equal_scores_are_no_misses() -> None:
    """Faiss returns ties in any order: of 400 equal vectors any ten are the ten best."""
    rows = np.zeros((400, 8), np.float16)
    rows[:, 0] = 1
    report = quick(np.arange(400), rows, kinds=("fake",), ks=(1, 10))
    assert report.metrics["fake effort=1 refine=1/recall@10"].value == 1


@USES_FAKE
def test_the_worst_group_of_queries_decides(
    monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Any
) -> None:
    """Made queries are all answered, the given ones half: the pooled recall is 0.75, the worst 0.5."""
    given = made_queries(rows, 20, seed=9)
    known = {query.tobytes() for query in given}
    right = replace(
        KINDS["fake"],  # type: ignore[type-var]
        search=lambda store, queries, count, settings: np.stack(
            [
                half_wrong(store, query[None], count, settings)[0]
                if query.tobytes() in known
                else np.argsort(-(store.decode(slice(None)) @ query), kind="stable")[:count]
                for query in queries
            ]
        ),
    )
    monkeypatch.setitem(KINDS, "fake", right)
    report = quick(ids, rows, kinds=("fake",), queries=given, recall_goals=(0.7,))
    name = "fake effort=1 refine=1"
    assert report.n["queries"] == 40
    assert report.metrics[f"{name}/recall@10"].value == pytest.approx(0.75)
    assert column(report, "recall@10, worst group")[name] == pytest.approx(0.5)
    assert "no measured setting reaches recall 0.7" in report.details["words"][1]


def test_what_clipkit_index_would_take_is_built_once(
    monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Any
) -> None:
    monkeypatch.setattr(building, "SNAPSHOT_FROM", 1000)
    way, built = KINDS["rabitq"], []
    assert way is not None

    def build(store: Store, seed: int) -> Any:
        built.append(seed)
        return way.build(store, seed)

    monkeypatch.setitem(KINDS, "rabitq", replace(way, build=build))
    report = quick(ids, rows, kinds=("rabitq", "exact"))
    assert built == [0]
    assert report.settings["auto"].startswith("rabitq refine=")
    assert report.settings["recommended"] == "exact"
    assert "not the recommended exact" in report.details["words"][2]
    assert next(iter(column(report, "p50 ms"))) == "exact", "in the order of KINDS"


@pytest.mark.parametrize("size", [1, 7, 255])
def test_too_few_vectors_for_approximate_kinds(size: int, rows: Any) -> None:
    report = quick(np.arange(size), rows[:size])
    assert list(column(report, "p50 ms")) == ["exact"]
    assert [w.partition(":")[0] for w in report.warnings] == [
        f"{size} vectors are too few for {kind}" for kind in KINDS if kind != "exact"
    ]
    assert report.settings["ks"] == sorted({min(k, size) for k in (1, 10, 100)})
    assert report.settings["recommended"] == report.settings["auto"] == "exact"
    assert "clipkit index chooses exact by itself: the same." in report.details["words"]


def test_made_queries_are_near_or_far(rows: Any) -> None:
    """Near: a row and noise of length 0.3, cosine 1 / sqrt(1.09) = 0.96; like words: far from all."""
    queries = made_queries(rows, 101, seed=3)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    best = (queries @ rows.astype(np.float32).T).max(axis=1)
    assert best[:50].mean() == pytest.approx(0.96, abs=0.02) and best[50:].mean() < 0.8
    assert np.array_equal(queries, made_queries(rows, 101, seed=3))
    assert not np.array_equal(queries, made_queries(rows, 101, seed=4))


def test_the_fingerprint_is_of_the_vectors_and_queries(ids: Ids, rows: Any) -> None:
    changed = rows.copy()
    changed[17] = rows[18]
    options: dict[str, Any] = {"kinds": ("exact",), "ks": (1,)}
    prints = [quick(ids, r, **options).fingerprint for r in (rows, rows.copy(), changed)]
    prints.append(quick(ids, rows, session=Session(seed=1), **options).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


# ---- stopping


def test_stopping_keeps_what_was_measured(ids: Ids, rows: Any) -> None:
    stop = threading.Event()

    def progress(what: str, _done: int, total: int) -> None:
        assert total == 15
        if "rabitq refine=64" in what:
            stop.set()

    report = quick(ids, rows, session=Session(on_progress=progress, stop=stop))
    measured = ["exact", "rabitq refine=16", "rabitq refine=32"]
    assert list(column(report, "p50 ms")) == measured
    assert report.warnings[-1].startswith("stopped after 3 of 15 settings")


def test_stopping_before_anything_is_measured(ids: Ids, rows: Any) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        quick(ids, rows, session=Session(stop=stop))


# ---- recommendation


def outcome(name: str, worst: float, ms: float, build: float) -> Outcome:
    return Outcome(
        kind=name,
        name=name,
        recall={10: np.full(4, worst)},
        worst=worst,
        ms=np.full(4, ms),
        batched=1.0,
        bytes=1,
        build_seconds=build,
    )


@pytest.mark.parametrize(
    ("exact_ms", "goal", "expected", "words"),
    [
        (
            9.0,
            0.99,
            "exact",
            "misses nothing",
        ),  # unnoticed: no reason to approximate, quick as it is
        (40.0, 0.99, "rabitq", "fastest to build"),  # unnoticed as hnsw, built in 8 s, not 246
        (40.0, 0.995, "hnsw", "recall 0.996"),  # rabitq misses the goal
        (
            40.0,
            0.999,
            "exact",
            "none of those answers 95 % of the queries within 15 ms",
        ),  # only exact meets it
    ],
)
def test_recommendation_by_hand(exact_ms: float, goal: float, expected: str, words: str) -> None:
    outcomes = [
        outcome("exact", 1.0, exact_ms, 9.0),
        outcome("rabitq", 0.993, 9.8, 8.0),
        outcome("hnsw", 0.996, 0.5, 246.0),
        outcome("lossy", 0.6, 0.1, 1.0),
    ]
    best, reason = recommend(outcomes, goal)
    assert best.name == expected and words in reason


def test_the_front_is_what_nothing_beats() -> None:
    """b is slower than a and no better; c is slower and better; d is equal to a."""
    outcomes = [
        outcome("a", 0.9, 1.0, 0),
        outcome("b", 0.9, 2.0, 0),
        outcome("c", 0.95, 3.0, 0),
        outcome("d", 0.9, 1.0, 0),
    ]
    points = scatter(outcomes, 10)["points"]
    assert [p["name"] for p in points if p["best"]] == ["a", "c", "d"]


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("lsh",)}, "unknown index kind 'lsh'; known kinds: exact, rabitq"),
        ({"kinds": ()}, "0 kinds"),
        ({"recall_goals": (99,)}, r"recall goals are \[99\]; give one or more between 0 and 1"),
        ({"ks": (0,)}, r"K \[0\]"),
        ({"query_count": 1}, "1 queries"),
        ({"queries": np.ones((2, DIM + 1), np.float32)}, r"shape \(2, 33\); \(Q, 32\) is expected"),
        ({"queries": np.full((2, DIM), np.nan, np.float32)}, "query 20 has values that are not"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, ids: Ids, rows: Any) -> None:
    with pytest.raises(InputError, match=message):
        quick(ids, rows, **options)


def test_no_vectors_and_no_usable_kind() -> None:
    with pytest.raises(InputError, match=r"shape \(0, 4\); at least one row"):
        quick(np.empty(0, np.int64), np.empty((0, 4), np.float16))
    with pytest.raises(InputError, match="none can be recommended"):
        quick(np.arange(3), np.eye(3, dtype=np.float32), kinds=("hnsw",))
