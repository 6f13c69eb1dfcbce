"""Ranking against hand-worked examples and against every order that ties allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipkit.errors import InputError
from clipkit.metrics import Ranking, mean_interval, rank_captions, rank_pairs

Float32 = npt.NDArray[np.float32]

# texts x pictures: texts 0 and 1 belong to picture 0, 2 and 3 to picture 1, and so on. With one-hot
# pictures a text's vector is its row of scores.
SCORES = np.array(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.4, 0.8, 0.1, 0.2],
        [0.1, 0.7, 0.3, 0.2],
        [0.6, 0.5, 0.7, 0.1],
        [0.2, 0.3, 0.8, 0.1],
        [0.5, 0.5, 0.5, 0.5],
        [0.3, 0.2, 0.1, 0.0],
        [0.1, 0.2, 0.3, 0.9],
    ],
    np.float32,
)
OWNER = np.repeat(np.arange(4), 2)


def unit(vectors: npt.NDArray[np.floating]) -> Float32:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def hand_worked() -> tuple[Ranking, Ranking]:
    return rank_captions(np.eye(4, dtype=np.float32), SCORES, OWNER)


def test_texts_find_their_picture_as_worked_by_hand() -> None:
    """Own scores .9 .4 .7 .5 .8 .5 .0 .9 stand at 1, 2, 1, 3, 1, (1 to 4), 4, 1 in their rows."""
    ranking, _ = hand_worked()
    assert ranking.query.tolist() == list(range(8))
    assert ranking.greater.tolist() == [0, 1, 0, 2, 0, 0, 3, 0]
    assert ranking.tied.tolist() == [0, 0, 0, 0, 0, 3, 0, 0]
    assert ranking.hit_at(1).tolist() == [1, 0, 1, 0, 1, 0.25, 0, 1]
    assert ranking.hit_at(2).tolist() == [1, 1, 1, 0, 1, 0.5, 0, 1]
    assert ranking.best_rank().tolist() == [1, 2, 1, 3, 1, 2.5, 4, 1]
    reciprocal = [1, 1 / 2, 1, 1 / 3, 1, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, 1 / 4, 1]
    assert ranking.reciprocal_rank().tolist() == pytest.approx(reciprocal)
    assert ranking.average_precision().tolist() == pytest.approx(reciprocal)  # one relevant each


def test_pictures_find_their_texts_as_worked_by_hand() -> None:
    """Down the columns, the relevant texts stand at (1, 4), (2, 3 or 4), (1, 3), (1, 8).

    A hit is any of them. Picture 1: its .5 ties with text 5's, so AP = (1/2 + (2/3 + 2/4) / 2) / 2.
    """
    _, ranking = hand_worked()
    assert ranking.query.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ranking.greater.tolist() == [0, 3, 1, 2, 0, 2, 0, 7]
    assert ranking.tied.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert ranking.hit_at(1).tolist() == [1, 0, 1, 1]
    assert ranking.hit_at(2).tolist() == [1, 1, 1, 1]
    assert ranking.best_rank().tolist() == [1, 2, 1, 1]
    assert ranking.reciprocal_rank().tolist() == [1, 0.5, 1, 1]
    ap = [(1 + 2 / 4) / 2, (1 / 2 + 7 / 12) / 2, (1 + 2 / 3) / 2, (1 + 2 / 8) / 2]
    assert ranking.average_precision().tolist() == pytest.approx(ap)
    ideal = 1 + 1 / math.log2(3)
    gains = [1 + 1 / math.log2(5), 1 / math.log2(3) + (1 / 2 + 1 / math.log2(5)) / 2, 1.5]
    gains.append(1 + 1 / math.log2(9))
    assert ranking.ndcg().tolist() == pytest.approx([g / ideal for g in gains])
    assert ranking.ndcg(1).tolist() == [1, 0, 1, 1]  # the ideal of one place is one


def every_order(scores: Sequence[float]) -> list[tuple[int, ...]]:
    orders = itertools.permutations(range(len(scores)))
    return [o for o in orders if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]


def measured(order: tuple[int, ...], relevant: set[int], k: int) -> list[float]:
    """[hit, best rank, reciprocal rank, AP, nDCG@k, nDCG] of one order, as defined."""
    places = [place for place, item in enumerate(order, 1) if item in relevant]
    precision = [found / place for found, place in enumerate(places, 1)]

    def dcg(ranks: Sequence[int], cut: int) -> float:
        return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= cut)

    ideal = range(1, len(relevant) + 1)
    return [
        float(places[0] <= k),
        places[0],
        1 / places[0],
        sum(precision) / len(precision),
        dcg(places, k) / dcg(ideal, k),
        dcg(places, 9) / dcg(ideal, 9),
    ]


@settings(max_examples=60)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=st.integers(0, 2)
    ),
    st.data(),
)
def test_ties_count_by_the_mean_over_every_order(scores: Float32, data: st.DataObject) -> None:
    """Traps: ties broken for or against the model; several relevant candidates in one tie."""
    queries, candidates = scores.shape
    numbers = st.sets(st.integers(0, candidates - 1), min_size=1)
    relevant = [data.draw(numbers) for _ in range(queries)]
    k = data.draw(st.integers(1, candidates))
    pairs = [(q, c) for q, some in enumerate(relevant) for c in some]
    ranking = rank_pairs(scores, np.eye(candidates, dtype=np.float32), pairs)
    found = np.stack(
        [
            ranking.hit_at(k),
            ranking.best_rank(),
            ranking.reciprocal_rank(),
            ranking.average_precision(),
            ranking.ndcg(k),
            ranking.ndcg(),
        ],
        axis=1,
    )
    for q in range(queries):
        orders = every_order(scores[q].tolist())
        expected = np.mean([measured(order, relevant[q], k) for order in orders], axis=0)
        np.testing.assert_allclose(found[q], expected, rtol=1e-9, atol=1e-12)
    anyhow = [measured(o, relevant[0], k)[0] for o in itertools.permutations(range(candidates))]
    assert ranking.chance_hit_at(k)[0] == pytest.approx(np.mean(anyhow))


@pytest.mark.parametrize(("n", "per", "dim"), [(97, 3, 33), (130, 1, 7), (257, 5, 65)])
def test_blocks_do_not_matter(n: int, per: int, dim: int) -> None:
    """Small blocks, one block, and a plain float64 comparison count the same."""
    rng = np.random.default_rng(n)
    pictures = unit(rng.standard_normal((n, dim)))
    owner = rng.permutation(np.repeat(np.arange(n), per))
    texts = unit(pictures[owner] + 0.5 * rng.standard_normal((n * per, dim)))
    scores = texts.astype(np.float64) @ pictures.T.astype(np.float64)
    own = scores[np.arange(len(owner)), owner]
    for size in (8192, 100_000, 1 << 25):
        to_image, to_text = rank_captions(pictures, texts, owner, block_bytes=size)
        assert to_image.greater.tolist() == (scores > own[:, None]).sum(axis=1).tolist()
        above = (scores[:, owner] > own).sum(axis=0)
        expected = [sorted(above[owner == picture].tolist()) for picture in range(n)]
        assert to_text.greater.reshape(n, per).tolist() == expected
        assert not to_image.tied.any()
        assert not to_text.tied.any()


def test_a_query_with_many_relevant_candidates_counts_as_any_other() -> None:
    """Queries with 1, 16, 17 and 90 relevant of 300, ties among them, over several blocks."""
    rng = np.random.default_rng(0)
    queries, candidates = np.eye(4), rng.integers(-9, 9, (300, 4)).astype(np.float64)
    relevant = [rng.choice(300, n, replace=False) for n in (1, 16, 17, 90)]
    pairs = [(q, int(c)) for q, some in enumerate(relevant) for c in some]
    ranking = rank_pairs(queries, candidates, pairs, block_bytes=5000)
    for q, some in enumerate(relevant):
        scores = candidates[:, q]
        own = -np.sort(-scores[some])
        of = ranking.query == q
        assert ranking.greater[of].tolist() == [int((scores > s).sum()) for s in own]
        assert ranking.tied[of].tolist() == [int((scores == s).sum()) - 1 for s in own]


@pytest.mark.parametrize(("n", "m", "dim"), [(129, 643, 511), (1025, 1025, 33), (65, 300, 16)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_collapsed_model_gets_exactly_chance(
    n: int, m: int, dim: int, dtype: type[np.floating]
) -> None:
    """Trap: a count of scores above the own one gives a collapsed model 100 %.

    Float32 matrix products also fail here: some tiles sum in another order, so equal vectors get
    unequal scores. Chance: k / N for a text; 1 - C(M - c, k) / C(M, k) for a picture of c texts.
    """
    one = unit(np.random.default_rng(0).standard_normal((1, dim))).astype(dtype)
    owner = np.concatenate([np.arange(n), np.random.default_rng(1).integers(0, n, m - n)])
    pictures, texts = np.repeat(one, n, axis=0), np.repeat(one, m, axis=0)
    to_image, to_text = rank_captions(pictures, texts, owner, block_bytes=100_000)
    assert (to_image.greater == 0).all()
    assert (to_image.tied == n - 1).all()
    assert (to_text.tied == m - 1).all()
    count = np.bincount(owner)
    for k in (1, 5, 10):
        np.testing.assert_allclose(to_image.hit_at(k), k / n, rtol=1e-9)
        chance = [1 - math.comb(m - c, k) / math.comb(m, k) for c in count.tolist()]
        np.testing.assert_allclose(to_text.hit_at(k), chance, rtol=1e-9)
        np.testing.assert_allclose(to_text.chance_hit_at(k), chance, rtol=1e-9)


def test_equal_pictures_tie_wherever_they_stand() -> None:
    """The same picture at 40 places among 300, over block edges: each ties with the other 39."""
    rng = np.random.default_rng(0)
    pictures = unit(rng.standard_normal((300, 257)))
    copies = np.sort(rng.choice(300, 40, replace=False))
    pictures[copies] = pictures[copies[0]]
    texts = unit(pictures + 0.3 * rng.standard_normal((300, 257)))
    texts[copies] = texts[copies[0]]
    to_image, to_text = rank_captions(pictures, texts, np.arange(300), block_bytes=50_000)
    for ranking in (to_image, to_text):
        assert (ranking.tied[copies] == 39).all()
        assert ranking.tied.sum() == 40 * 39
        np.testing.assert_allclose(ranking.hit_at(1)[copies], ranking.hit_at(1)[copies[0]])


def test_a_perfect_model_gets_everything() -> None:
    """Trap: a picture's five captions must not push each other down."""
    pictures = unit(np.random.default_rng(0).standard_normal((50, 40)))
    owner = np.repeat(np.arange(50), 5)
    for ranking in rank_captions(pictures, pictures[owner], owner):
        perfect = np.ones(ranking.queries)
        assert ranking.hit_at(1).tolist() == perfect.tolist()
        assert ranking.best_rank().tolist() == perfect.tolist()
        for figure in (ranking.reciprocal_rank(), ranking.average_precision(), ranking.ndcg()):
            np.testing.assert_allclose(figure, perfect, rtol=1e-12)


def test_a_shuffled_model_gets_chance_within_its_interval() -> None:
    rng = np.random.default_rng(1)
    pictures, texts = (unit(rng.standard_normal((n, 16))) for n in (400, 2000))
    owner = np.repeat(np.arange(400), 5)
    to_image, to_text = rank_captions(pictures, texts, owner)
    found = mean_interval(to_image.hit_at(10), groups=owner)
    assert found.low < 10 / 400 < found.high
    found = mean_interval(to_text.hit_at(10))
    assert found.low < to_text.chance_hit_at(10).mean() < found.high


def test_half_precision_ranks_as_its_values_do() -> None:
    rng = np.random.default_rng(0)
    pictures = unit(rng.standard_normal((60, 24))).astype(np.float16)
    texts = unit(rng.standard_normal((120, 24))).astype(np.float16)
    owner = np.arange(120) % 60
    half = rank_captions(pictures, texts, owner)
    full = rank_captions(pictures.astype(np.float32), texts.astype(np.float32), owner)
    for one, other in zip(half, full, strict=True):
        assert one.greater.tolist() == other.greater.tolist()
        assert one.tied.tolist() == other.tied.tolist()


def test_length_does_not_spoil_the_grid() -> None:
    """Vectors 10^12 times or 10^-12 times as long rank the same; all zeros tie."""
    plain = rank_pairs(SCORES, np.eye(4, dtype=np.float32), [(q, q // 2) for q in range(8)])
    for scale in (1e12, 1e-12):
        scaled = rank_pairs(
            SCORES.astype(np.float64) * scale, np.eye(4), [(q, q // 2) for q in range(8)]
        )
        assert scaled.greater.tolist() == plain.greater.tolist()
        assert scaled.tied.tolist() == plain.tied.tolist()
    nothing = rank_pairs(np.zeros((2, 3)), np.zeros((5, 3)), [(0, 1), (1, 4)])
    assert nothing.hit_at(1).tolist() == pytest.approx([0.2, 0.2])


def test_pairs_are_a_set_and_agree_with_captions() -> None:
    pictures = np.eye(4, dtype=np.float32)
    pairs = [(q, t) for q in range(4) for t in (2 * q, 2 * q + 1)]
    expected = hand_worked()[1]
    for listed in (pairs, pairs[::-1], pairs + pairs[:3]):
        found = rank_pairs(pictures, SCORES, listed)
        for name in ("query", "greater", "tied"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_named(bad: float) -> None:
    """Trap: a model that gives NaN got R@1 = 100 % from a known trainer."""
    broken = SCORES.copy()
    broken[5, 2] = bad
    with pytest.raises(InputError, match="row 5 of the texts is not finite"):
        rank_captions(np.eye(4, dtype=np.float32), broken, OWNER)
    with pytest.raises(InputError, match="row 5 of the queries is not finite"):
        rank_pairs(broken, np.eye(4, dtype=np.float32), [(q, 0) for q in range(8)])


def test_what_cannot_be_ranked_is_said() -> None:
    pictures = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match=r"picture 3 has no text \(so have 1 of 4\)"):
        rank_captions(pictures, SCORES[:6], OWNER[:6])
    with pytest.raises(InputError, match="query 1 has no relevant candidate"):
        rank_pairs(pictures[:2], SCORES, [(0, 0)])
    with pytest.raises(InputError, match="number 4 is none of the 4 pictures"):
        rank_captions(pictures, SCORES, OWNER + 1)
    with pytest.raises(InputError, match="number -1 is none of the 8 candidates"):
        rank_pairs(pictures, SCORES, [(0, -1)])
    with pytest.raises(InputError, match="8 texts need one each"):
        rank_captions(pictures, SCORES, OWNER[:5])
    with pytest.raises(InputError, match="4 and 3 dimensions"):
        rank_captions(pictures[:, :3], SCORES, OWNER)
    with pytest.raises(InputError, match="at least one"):
        rank_captions(pictures[:0], SCORES[:0], OWNER[:0])
