"""clipkit.index: what search guarantees, for every kind, and where Faiss alone would not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bench.bench_index import clustered, make_queries
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.index import KINDS, Kind, VectorIndex, kinds, vector_index
from clipkit.index.kinds import Ids, Store
from clipkit.picture_set import PictureSet

Floats = npt.NDArray[np.float32]
Hits = tuple[Ids, Floats]
N, DIM = 12_000, 64  # small enough to be quick, large enough that candidates are worth using
GOAL = 0.97
ALL_KINDS = pytest.mark.parametrize("kind", list(KINDS))
APPROXIMATE = pytest.mark.parametrize("kind", [k for k, way in KINDS.items() if way])


@pytest.fixture(scope="module")
def rows() -> npt.NDArray[np.float16]:
    return clustered(N, DIM, per_cluster=100)


@pytest.fixture(scope="module")
def ids() -> Ids:
    """Not row numbers, not in order: 7, 10, 13, ... shuffled (trap 25)."""
    return np.random.default_rng(5).permutation(np.arange(N) * 3 + 7)


@pytest.fixture(scope="module")
def indexes(ids: Ids, rows: npt.NDArray[np.float16]) -> dict[str, VectorIndex]:
    return {kind: VectorIndex.build(ids, rows, kind=kind, recall_goal=GOAL) for kind in KINDS}


@pytest.fixture(scope="module")
def queries(rows: npt.NDArray[np.float16]) -> Floats:
    return make_queries(rows, 40)


def brute(
    ids: Ids, rows: npt.NDArray[Any], queries: Floats, k: int, allowed: Ids | None = None
) -> list[Hits]:
    """The definition: all cosines in float64, per query the k best by (-score, id)."""
    if allowed is not None:
        passed = np.isin(ids, allowed)
        ids, rows = ids[passed], rows[passed]
    table = queries.astype(np.float64) @ rows.astype(np.float64).T
    orders = [np.lexsort((ids, -scores))[:k] for scores in table]
    return [(ids[o], scores[o].astype(np.float32)) for o, scores in zip(orders, table, strict=True)]


def mean_recall(found: list[Hits], truth: list[Hits]) -> float:
    """Hits whose score reaches the true last one's, so that ties are no misses."""
    pairs = zip(found, truth, strict=True)
    return float(np.mean([np.mean(f[1] >= t[1][-1] - 1e-6) if len(f[1]) else 1 for f, t in pairs]))


def pictures(ids: Ids | None) -> PictureSet | None:
    return None if ids is None else PictureSet(ids)


def corner() -> VectorIndex:
    """Four vectors in the plane: east, 3-4-5, north, west."""
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    return VectorIndex.build(np.array([40, 30, 20, 10]), vectors)


# ---- what search returns


def test_four_vectors_by_hand() -> None:
    """East asks: cosines 1, 0.6, 0, -1; half precision holds 0.6 as 0.60009765625 (1229 / 2048)."""
    (ids, scores), (up_ids, up_scores) = corner().search(np.array([[1, 0], [0, 1]], np.float32), 4)
    assert ids.tolist() == [40, 30, 20, 10] and ids.dtype == np.int64
    assert scores.tolist() == [1.0, 1229 / 2048, 0.0, -1.0] and scores.dtype == np.float32
    assert up_ids.tolist() == [20, 30, 10, 40], "10 and 40 tie at 0: the smaller id first"
    assert up_scores.tolist() == [
        1.0,
        1638 / 2048,
        0.0,
        0.0,
    ]  # 0.8 is 0.7998046875 in half precision


@ALL_KINDS
def test_hits_are_sorted_exact_and_the_same_however_asked(
    kind: str, ids: Ids, rows: Any, indexes: dict[str, VectorIndex], queries: Floats
) -> None:
    """A score is the cosine of the stored vector, bit for bit the same for every kind and batch."""
    index = indexes[kind]
    row_of = {int(i): row for i, row in zip(ids, rows, strict=True)}
    exact = {}
    for query, (found, scores) in zip(queries, indexes["exact"].search(queries, 50), strict=True):
        exact.update({(query.tobytes(), int(i)): s for i, s in zip(found, scores, strict=True)})
    batch = index.search(queries, 10)
    for i, (found, scores) in enumerate(batch):
        assert len(found) == len(set(found.tolist())) == 10
        assert np.lexsort((found, -scores)).tolist() == list(range(10))
        true = [row_of[int(f)].astype(np.float64) @ queries[i] for f in found]
        np.testing.assert_allclose(scores, true, atol=2e-6)
        for f, s in zip(found, scores, strict=True):
            assert exact.get((queries[i].tobytes(), int(f)), s) == s
        ((alone, alone_scores),) = index.search(queries[i : i + 1], 10)
        assert np.array_equal(alone, found) and np.array_equal(alone_scores, scores)


@ALL_KINDS
def test_recall_against_brute_force(
    kind: str, ids: Ids, rows: Any, indexes: dict[str, VectorIndex], queries: Floats
) -> None:
    index = indexes[kind]
    truth = brute(ids, rows, queries, 10)
    assert mean_recall(index.search(queries, 10), truth) >= (1 if kind == "exact" else GOAL - 0.02)
    assert index.measured.recall_at_10 >= GOAL
    used = [c is not None for c in index._candidates(queries, 10, N, None)]
    assert index.kind == kind and all(used) == (kind != "exact"), "by its own means, not exactly"


@given(
    axes=st.lists(st.integers(0, 7), max_size=80),
    query=st.tuples(*[st.integers(-3, 3)] * 4),
    k=st.integers(1, 90),
    data=st.data(),
)
@settings(max_examples=150)
def test_exact_is_brute_force_with_ties(
    axes: list[int], query: tuple[int, ...], k: int, data: st.DataObject
) -> None:
    """Rows are the 8 unit axes of 4-d space, so scores are small integers and nearly all tie."""
    vectors = np.array([[(1 if a < 4 else -1) * (a % 4 == j) for j in range(4)] for a in axes])
    vectors = vectors.reshape(-1, 4).astype(np.float32)
    ids = np.array(data.draw(st.permutations(range(100))), np.int64)[: len(axes)]
    allowed = data.draw(st.none() | st.lists(st.integers(0, 103)))
    only = None if allowed is None else np.array(allowed, np.int64)
    asked = np.array([query], np.float32)
    ((found, scores),) = VectorIndex.build(ids, vectors).search(asked, k, allowed=pictures(only))
    ((true_ids, true_scores),) = brute(ids, vectors, asked, k, only)
    assert found.tolist() == true_ids.tolist()
    assert scores.tolist() == true_scores.tolist()


@pytest.mark.parametrize("copies", [2, 30, 500])
def test_ties_across_rank_k_go_to_the_smaller_ids(copies: int, rows: Any, ids: Ids) -> None:
    """Trap 22: Faiss returns ties in any order, and any of them at the cut."""
    doubled = rows.copy()
    doubled[::7][:copies] = rows[0]
    twins = np.sort(ids[::7][:copies])
    index = VectorIndex.build(ids, doubled, kind="exact")
    k = max(1, copies // 2)
    (found, scores) = index.search(rows[:1].astype(np.float32), k)[0]
    assert found.tolist() == twins[:k].tolist()
    assert len(set(scores.tolist())) == 1, "equal vectors, equal scores"


def test_scores_too_close_for_faiss_to_order_are_ordered_exactly(rows: Any, ids: Ids) -> None:
    """500 rows hold the same 64 numbers shuffled and the query is constant, so the true cosines are
    equal and only rounding orders the scores: Faiss's rounding differs from that of what is returned.
    Five hits must still be the first five of all.
    """
    random = np.random.default_rng(1)
    near = rows.copy()
    near[:500] = [random.permutation(np.abs(rows[0])) for _ in range(500)]
    index = VectorIndex.build(ids, near)
    query = np.full((1, DIM), 0.1, np.float32)
    (every, scores), (first, best) = index.search(query, N)[0], index.search(query, 5)[0]
    assert len(set(scores[:500].tolist())) > 1 and scores[0] - scores[499] < 1e-6
    assert first.tolist() == every[:5].tolist() and best.tolist() == scores[:5].tolist()


# ---- Faiss's oddities (trap 22)


@ALL_KINDS
def test_k_has_no_cap_and_nothing_is_padded(
    kind: str, ids: Ids, indexes: Any, queries: Floats
) -> None:
    for k in (N - 1, N, N + 100):
        found, scores = indexes[kind].search(queries[:1], k)[0]
        assert len(found) == len(set(found.tolist())) == min(k, N)
        assert set(found.tolist()) <= set(ids.tolist()) and scores.min() >= -1.01
        assert np.all(np.diff(scores) <= 0)


@ALL_KINDS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_query_that_is_not_finite_is_an_error(kind: str, bad: float, indexes: Any) -> None:
    queries = np.zeros((3, DIM), np.float32)
    queries[1, 5] = bad
    with pytest.raises(InputError, match="query 1 has values that are not finite"):
        indexes[kind].search(queries, 10)


@ALL_KINDS
def test_a_wrong_dimension_names_both(kind: str, indexes: dict[str, VectorIndex]) -> None:
    with pytest.raises(InputError, match=r"shape \(1, 63\).* 64 dimensions"):
        indexes[kind].search(np.ones((1, 63), np.float32), 10)
    with pytest.raises(InputError, match=r"shape \(64,\)"):
        indexes[kind].search(np.ones(64, np.float32), 10)


@pytest.mark.parametrize("k", [0, -5])
def test_k_below_one_is_an_error(k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}; ask for at least 1"):
        corner().search(np.ones((1, 2), np.float32), k)


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_empty_is_a_case(kind: str) -> None:
    index = VectorIndex.build(np.empty(0, np.int64), np.empty((0, 8), np.float16), kind=kind)
    for found, scores in index.search(np.ones((2, 8), np.float32), 5, allowed=PictureSet([1])):
        assert found.shape == scores.shape == (0,)
    assert corner().search(np.empty((0, 2), np.float32), 5) == []
    assert index.vectors_of(np.empty(0, np.int64)).shape == (0, 8)


# ---- filters (trap 24)


@ALL_KINDS
@pytest.mark.parametrize("share", [0.002, 0.01, 0.2, 0.45, 0.6, 0.97])
def test_filtered_search_is_full_and_right(
    kind: str, share: float, ids: Ids, rows: Any, indexes: Any, queries: Floats
) -> None:
    allowed = np.random.default_rng(3).choice(ids, int(share * N), replace=False)
    found = indexes[kind].search(queries, 10, allowed=PictureSet(allowed))
    assert all(np.isin(f, allowed).all() and len(f) == min(10, len(allowed)) for f, _ in found)
    truth = brute(ids, rows, queries, 10, allowed)
    least = 1.0 if kind == "exact" or share < 0.5 else GOAL - 0.02
    assert mean_recall(found, truth) >= least


@ALL_KINDS
def test_a_filter_against_the_query(kind: str, ids: Ids, rows: Any, indexes: Any) -> None:
    """Only what is far from the query is allowed: all that a quick look would propose is not."""
    query = rows[:1].astype(np.float32)
    order = np.argsort(-(rows.astype(np.float32) @ query[0]), kind="stable")
    allowed = ids[order[N // 3 :]]
    found = indexes[kind].search(query, 10, allowed=PictureSet(allowed))
    assert mean_recall(found, brute(ids, rows, query, 10, allowed)) == 1
    assert len(found[0][0]) == 10 and np.isin(found[0][0], allowed).all()


@APPROXIMATE
@pytest.mark.parametrize("hidden", [5, 9, 60, 300])
def test_a_filter_that_hides_the_nearest(
    kind: str, hidden: int, ids: Ids, rows: Any, indexes: Any, queries: Floats
) -> None:
    """Up to k hidden, the 2 k nearest hold the answer and are used. Beyond, they must not be, though of
    the candidates scored to find them (2 k times "refine") more than k are allowed.
    """
    k, missed = 10, []
    for query in queries[:20]:
        order = np.argsort(-(rows.astype(np.float32) @ query), kind="stable")
        allowed = ids[order[hidden:]]
        found = indexes[kind].search(query[None], k, allowed=PictureSet(allowed))
        missed.append(1 - mean_recall(found, brute(ids, rows, query[None], k, allowed)))
    assert np.mean(missed) <= (0.05 if hidden <= k else 0)


def test_unknown_ids_are_ignored() -> None:
    east = np.array([[1, 0]], np.float32)
    for allowed, expected in (
        ([20, 99, 20, 30], [30, 20]),
        ([99, 2**62], []),
        ([], []),
    ):
        ((found, _),) = corner().search(east, 5, allowed=PictureSet(allowed))
        assert found.tolist() == expected


# ---- approximate kinds (trap 23)


def test_inverted_lists_never_return_fewer(
    monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Any, queries: Floats
) -> None:
    """One list of about 94 vectors is probed: 400 hits are not in it, so the search is exact."""
    ivf = KINDS["ivf"]
    assert ivf is not None
    one = replace(ivf, levels=({"nprobe": 1, "refine": 1},))
    monkeypatch.setitem(KINDS, "ivf", one)
    index = VectorIndex.build(ids, rows, kind="ivf", recall_goal=0.0)
    assert index.kind == "ivf"
    assert mean_recall(index.search(queries, 10), brute(ids, rows, queries, 10)) < 1
    truth = brute(ids, rows, queries, 400)
    assert mean_recall(index.search(queries, 400), truth) == 1
    assert all(len(found) == 400 for found, _ in index.search(queries, 400))


def fake_kind(*, right_at: int) -> Kind:
    """Proposes the true best rows from level `right_at` on, before that half of them wrong."""

    def ask(store: Store, queries: Floats, count: int, level: Mapping[str, Any]) -> Ids:
        table = queries @ store.decode(slice(None)).T
        found = np.argsort(-table, axis=1, kind="stable")[:, :count]
        if level["effort"] < right_at:
            found[:, 5:] = np.arange(len(store.ids) - count, len(store.ids) - 5)
        return found

    levels = tuple({"effort": e, "refine": 1} for e in (1, 2, 3))
    return Kind(lambda store, _: store, ask, levels)


def test_settings_are_raised_until_the_recall_is_met(
    monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Any
) -> None:
    monkeypatch.setattr(vector_index, "structure_bytes", lambda _: 0)
    monkeypatch.setitem(KINDS, "fake", fake_kind(right_at=2))
    index = VectorIndex.build(ids[:3000], rows[:3000], kind="fake")
    assert index.kind == "fake" and index.settings["effort"] == 2
    assert index.measured.recall_at_10 > 0.999 and index.measured.queries == 200


def test_a_kind_that_never_finds_enough_becomes_exact_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ids: Ids,
    rows: Any,
    queries: Floats,
) -> None:
    """Half of the ten proposed are arbitrary rows: recall is 0.5 and a little luck."""
    monkeypatch.setitem(KINDS, "fake", fake_kind(right_at=9))
    with caplog.at_level(logging.WARNING):
        index = VectorIndex.build(ids[:3000], rows[:3000], kind="fake")
    assert index.kind == "exact" and index.settings["given_up"] == "fake"
    assert 0.5 <= index.settings["given_up_recall"] < 0.55
    assert "fake reaches recall@10 0.5" in caplog.text and "goal is 0.990" in caplog.text
    truth = brute(ids[:3000], rows[:3000], queries, 10)
    assert mean_recall(index.search(queries, 10), truth) == 1


def test_recall_counts_ties_as_found() -> None:
    """The true tenth scores 0.5; other ids with 0.5 are as good, 0.4 is not: 9 of 10 are found."""
    truth, found = np.full(10, 0.5, np.float32), np.array([0.5] * 9 + [0.4], np.float32)
    assert vector_index.recall([truth, found], [0.5, 0.5]) == 0.9, "the lower of both halves"


def test_auto_chooses_by_size(monkeypatch: pytest.MonkeyPatch, ids: Ids, rows: Any) -> None:
    assert (vector_index._EXACT_TO, vector_index._RABITQ_TO) == (300_000, 3_000_000)
    monkeypatch.setattr(vector_index, "_EXACT_TO", 1000)
    monkeypatch.setattr(vector_index, "_RABITQ_TO", 2000)
    chosen = [VectorIndex.build(ids[:n], rows[:n]).kind for n in (1000, 2000, 2001)]
    assert chosen == ["exact", "rabitq", "ivf"]


@APPROXIMATE
@pytest.mark.parametrize(("n", "dim"), [(256, 2), (300, 7), (1000, 100)])
def test_small_and_odd_sizes_build_quietly(
    kind: str, n: int, dim: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Faiss would write "please provide at least ... training points" to stderr."""
    rows = clustered(n, dim, per_cluster=10)
    index = VectorIndex.build(np.arange(n), rows, kind=kind)
    assert index.size == n and capfd.readouterr() == ("", "")


@APPROXIMATE
def test_the_same_input_builds_the_same_index(kind: str, ids: Ids, rows: Any) -> None:
    """On any number of threads: no BLAS is asked, which sums by threads."""
    built = []
    for threads in (1, 2):
        with kinds.threads(threads):
            index = VectorIndex.build(ids[:3000], rows[:3000], kind=kind, recall_goal=0.0)
        skip = kinds.faiss.IO_FLAG_SKIP_STORAGE
        built.append([kinds.faiss.serialize_index(part, skip) for part in index._structure])
    assert all(np.array_equal(*parts) for parts in zip(*built, strict=True))


# ---- what build takes, vectors_of


def test_order_and_precision_of_the_input_do_not_matter(
    ids: Ids, rows: Any, queries: Floats
) -> None:
    order = np.random.default_rng(1).permutation(N)
    one = VectorIndex.build(ids, rows)
    two = VectorIndex.build(ids[order], rows[order].astype(np.float32))
    for (a, s), (b, t) in zip(one.search(queries, 20), two.search(queries, 20), strict=True):
        assert np.array_equal(a, b) and np.array_equal(s, t)


def test_vectors_of_an_id_are_what_was_given(ids: Ids, rows: Any, indexes: Any) -> None:
    pick = [17, 3, 17]
    assert np.array_equal(indexes["hnsw"].vectors_of(ids[pick]), rows[pick].astype(np.float32))
    with pytest.raises(InputError, match="id 8 is not in this index of 12000"):
        indexes["exact"].vectors_of(np.array([7, 8]))


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([1, 2, 1], np.eye(3, dtype=np.float32), "id 1 occurs twice"),
        ([1, 2], np.eye(3, dtype=np.float32), r"shape \(2,\), vectors \(3, 3\)"),
        ([1], np.ones((1, 0), np.float32), r"\(N, D\) are expected"),
        ([1, 2, 3], np.eye(3), "float64; int64 and float16 or float32"),
        ([1, 2, 3], np.eye(3, dtype=np.float32) * 2, "id 1 has length 2; unit vectors"),
        ([9, 8, 7], np.diag([1, np.nan, 1]).astype(np.float16), "id 8 has length nan"),
        ([9, 8, 7], np.diag([1, 1, 1e9]).astype(np.float32), "id 7 has length inf"),
        ([4], np.zeros((1, 3), np.float16), "id 4 has length 0"),
    ],
)
def test_build_refuses(ids: list[int], vectors: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorIndex.build(np.array(ids), vectors)


def test_an_unknown_kind_names_the_known() -> None:
    with pytest.raises(
        InputError, match="unknown index kind 'lsh'; known kinds: auto, exact, rabitq"
    ):
        VectorIndex.build(np.array([1]), np.ones((1, 1), np.float32), kind="lsh")


# ---- threads


def test_the_thread_setting_is_each_threads_own() -> None:
    """What makes `threads` safe: one thread's single query must not slow another's batch."""
    faiss = kinds.faiss
    before = faiss.omp_get_max_threads()
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(10)
        seen.append(faiss.omp_get_max_threads())
        with kinds.threads(3):
            seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=other)
    thread.start()
    with kinds.threads(before + 5):
        inside.set()
        thread.join()
        assert faiss.omp_get_max_threads() == before + 5
    assert faiss.omp_get_max_threads() == before
    assert seen[1] == 3 and seen[0] != before + 5


@ALL_KINDS
def test_concurrent_searches_agree(kind: str, ids: Ids, indexes: Any, queries: Floats) -> None:
    index, half = indexes[kind], np.sort(ids)[N // 3 :]

    def ask(i: int) -> list[Hits]:
        part = queries[i % 20 : i % 20 + 1 + i % 3]
        return index.search(part, 10, allowed=PictureSet(half) if i % 2 else None)  # type: ignore[no-any-return]

    serial = [ask(i) for i in range(120)]
    with ThreadPoolExecutor(8) as pool:
        for one, two in zip(serial, pool.map(ask, range(120)), strict=True):
            for (a, s), (b, t) in zip(one, two, strict=True):
                assert np.array_equal(a, b) and np.array_equal(s, t)


def test_joined_indexes_search_as_one_built_of_their_vectors() -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((90, 16), dtype=np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    older = random.permutation(60)  # ids 0..59, of which 45..59 are in both
    newer = random.permutation(np.arange(45, 75))
    joined = VectorIndex.joined(
        VectorIndex.build(older, vectors[:60]), VectorIndex.build(newer, vectors[60:])
    )
    of_id = dict(zip(older.tolist(), range(60), strict=True))
    of_id |= dict(zip(newer.tolist(), range(60, 90), strict=True))
    ids = np.arange(75)
    whole = VectorIndex.build(ids, vectors[[of_id[num] for num in range(75)]])
    np.testing.assert_array_equal(joined.vectors_of(ids), whole.vectors_of(ids))
    queries = random.standard_normal((5, 16), dtype=np.float32)
    for (found, scores), (expected, its_scores) in zip(
        joined.search(queries, 75), whole.search(queries, 75), strict=True
    ):
        assert found.tolist() == expected.tolist()
        np.testing.assert_array_equal(scores, its_scores)
    assert joined.kind == "exact" and joined.measured.bytes == whole.measured.bytes
