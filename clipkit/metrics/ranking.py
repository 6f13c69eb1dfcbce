"""Ranks of the relevant candidates: recall@K, MRR, mAP, nDCG, from streamed scores.

A score is the dot product, rounded once, to float32. Matrix products in float32 give equal vectors
unequal scores, depending on their place in the matrix (OpenBLAS: some columns of a tile sum
in another order), and then a collapsed model's "ties" are broken by the kernel. Here rows are
rounded to a grid of 2^-26 of their length and multiplied in float64, where every sum is then exact,
in any order, on any machine: equal vectors tie exactly, and an own score equals itself.

Ties are ranked by their expectation under random order, so a collapsed model gets exactly chance.
The whole matrix is never in memory: blocks of scores are compared with the relevant ones and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Float64, Floats, Int64
from clipkit.errors import InputError

_BLOCK_BYTES = 32 << 20  # of float64 scores
_STRIP = 128  # rows compared at once, in the processor's cache; at most 255, to count in a byte
_CROWDED = 16  # relevant candidates of a query from which sorting beats comparing
_CHUNK = 4096  # rows checked at a time


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Positions of the relevant candidates: one row per (query, relevant candidate).

    Rows are sorted by query, a query's best first; every query has at least one. The metrics give
    one value per query, float64 (Q,), each the expectation under a random order of equal scores.
    """

    query: Int64  # (P,)
    greater: Int64  # (P,) candidates that score strictly higher
    tied: Int64  # (P,) other candidates that score the same
    queries: int
    candidates: int

    def hit_at(self, k: int) -> Float64:
        """Return recall@K as the field counts it: is any relevant candidate among the first k?"""
        greater, tie, relevant = self._best()
        return _any_drawn(tie, relevant, np.clip(k - greater, 0, tie))

    def chance_hit_at(self, k: int) -> Float64:
        """Return the expectation of `hit_at(k)` under a random order."""
        everyone = np.full(self.queries, self.candidates)
        return _any_drawn(everyone, self._relevant(), np.minimum(k, everyone))

    def best_rank(self) -> Float64:
        """Return the position, from 1, of the first relevant candidate."""
        greater, tie, relevant = self._best()
        return np.asarray(greater + (tie + 1) / (relevant + 1))

    def reciprocal_rank(self) -> Float64:
        """Return 1 / position of the first relevant candidate; its mean is the MRR."""
        greater, tie, relevant = self._best()
        result = np.asarray(1.0 / (greater + 1), np.float64)
        unsure = np.flatnonzero(tie > relevant)
        cases = np.stack([greater[unsure], tie[unsure], relevant[unsure]], axis=1)
        distinct, which = np.unique(cases, axis=0, return_inverse=True)
        values = [_expected_reciprocal(int(g), int(n), int(r)) for g, n, r in distinct]
        result[unsure] = np.array(values)[which.reshape(-1)]
        return result

    def average_precision(self) -> Float64:
        """Return the mean precision at the relevant candidates' positions; its mean is the mAP."""
        tie, first, relevant = self._ties()
        ahead = first - self._start()[self.query]  # relevant ones above the tie
        # At slot x of a tie of n, r of them relevant, (r - 1) (x - 1) / (n - 1) of these stand
        # before it on average. With h the sum of 1 / (greater + x) over the slots:
        h = _sums(1.0 / np.arange(1, self.candidates + 1), self.greater, self.greater + tie)
        others = (relevant - 1) / np.maximum(tie - 1, 1)
        return self._mean(((ahead + 1) * h + others * (tie - (self.greater + 1) * h)) / tie)

    def ndcg(self, k: int | None = None) -> Float64:
        """Return nDCG, the normalised discounted cumulative gain, of the first k (None: all)."""
        cut = self.candidates if k is None else min(k, self.candidates)
        discounts = 1.0 / np.log2(np.arange(2, self.candidates + 2))
        tie = self.tied + 1
        low, high = np.minimum(self.greater, cut), np.minimum(self.greater + tie, cut)
        gain = np.bincount(self.query, _sums(discounts, low, high) / tie, self.queries)
        best = np.cumsum(discounts)[np.minimum(self._relevant(), cut) - 1]
        return np.asarray(np.minimum(gain / best, 1.0), np.float64)

    def _relevant(self) -> Int64:
        return np.bincount(self.query, minlength=self.queries)

    def _start(self) -> Int64:
        return np.searchsorted(self.query, np.arange(self.queries))

    def _mean(self, values: Float64) -> Float64:
        """Return the mean of values (P,) per query, float64 (Q,)."""
        return np.asarray(np.bincount(self.query, values, self.queries) / self._relevant())

    def _ties(self) -> tuple[Int64, Int64, Int64]:
        """Return each row's tie: its size, its first row here, its number of relevant candidates."""
        key = self.query * (self.candidates + 1) + self.greater  # ascending
        return (
            self.tied + 1,
            np.searchsorted(key, key),
            np.searchsorted(key, key, "right") - np.searchsorted(key, key),
        )

    def _best(self) -> tuple[Int64, Int64, Int64]:
        """Return, of each query's best tie, the candidates above, in it, and the relevant in it."""
        tie, _, relevant = self._ties()
        start = self._start()
        return self.greater[start], tie[start], relevant[start]


def rank_pairs(
    queries: Floats, candidates: Floats, pairs: npt.ArrayLike, *, block_bytes: int = _BLOCK_BYTES
) -> Ranking:
    """Rank candidates (N, D) for queries (Q, D); pairs (P, 2) are the relevant (query, candidate).

    Pairs are a set: their order and repetitions do not matter. Raises InputError if a row is not
    finite, shapes do not fit or a query has no relevant candidate. Rows should be of about
    equal length: precision is 2^-26 of the longest.
    """
    listed = np.asarray(pairs, np.int64).reshape(-1, 2)
    _check_numbers(listed[:, 0], len(queries), "queries")
    _check_numbers(listed[:, 1], len(candidates), "candidates")
    # The counter's columns are the queries. Unique also sorts by query.
    keys = np.unique(listed[:, 0] * len(candidates) + listed[:, 1])
    query, candidate = np.divmod(keys, max(1, len(candidates)))
    _check_all_asked(query, len(queries), "query", "relevant candidate")
    rows, columns = _Grid(candidates, "candidates"), _Grid(queries, "queries")
    count = _Count(rows, columns, candidate, query, by_row=False)
    count.run(block_bytes)
    return _ranking(query, count.column_greater, count.column_least, len(queries), len(candidates))


def rank_captions(
    pictures: Floats, texts: Floats, owner: npt.ArrayLike, *, block_bytes: int = _BLOCK_BYTES
) -> tuple[Ranking, Ranking]:
    """Rank both ways in one pass over the scores; return (text-to-image, image-to-text).

    pictures (N, D) and texts (M, D) are unit rows, float32 or float16 (converted block by block);
    owner (M,) is each text's picture. Text-to-image: every text is a query, its picture relevant.
    Image-to-text: every picture is a query, all of its texts are relevant. Raises InputError if a
    row is not finite, shapes do not fit, or a picture has no text: `rank_pairs` takes pictures that
    are candidates only. Beside its input it needs about 100 MB and 100 bytes per text.
    """
    picture_of = np.asarray(owner, np.int64)
    if picture_of.shape != (len(texts),):
        raise InputError(f"owner has shape {picture_of.shape}; {len(texts)} texts need one each")
    _check_numbers(picture_of, len(pictures), "pictures")
    _check_all_asked(picture_of, len(pictures), "picture", "text")
    text = np.argsort(picture_of, kind="stable")
    query = picture_of[text]
    count = _Count(_Grid(texts, "texts"), _Grid(pictures, "pictures"), text, query, by_row=True)
    count.run(block_bytes)
    to_image = _ranking(
        np.arange(len(texts)), count.row_greater, count.row_least, len(texts), len(pictures)
    )
    to_text = _ranking(query, count.column_greater, count.column_least, len(pictures), len(texts))
    return to_image, to_text


class _Grid:
    """Rows (N, D), finite, read in blocks of whole numbers in float64, of length below 2^26.5."""

    def __init__(self, rows: Floats, name: str) -> None:
        self.rows = np.asarray(rows)
        if self.rows.ndim != 2 or 0 in self.rows.shape or self.rows.dtype.kind != "f":
            raise InputError(
                f"{name} are {self.rows.dtype} of shape {self.rows.shape};"
                " ranking needs real vectors, shape (n, dimensions), at least one"
            )
        longest = 0.0
        for start in range(0, len(self.rows), _CHUNK):
            block = self.rows[start : start + _CHUNK].astype(np.float64)
            squares = np.einsum("ij,ij->i", block, block)
            if not np.isfinite(squares).all():
                row = start + int(np.flatnonzero(~np.isfinite(squares))[0])
                raise InputError(
                    f"row {row} of the {name} is not finite (NaN or infinity);"
                    " a model that gives such vectors cannot be ranked"
                )
            longest = max(longest, float(squares.max()))
        # The longest row gets a length of 2^25.49 to 2^26.49, so that a product of two stays below
        # 2^53 throughout its sum (Cauchy-Schwarz), where float64 holds every whole number.
        exponent = 26 - math.ceil(math.log2(longest) / 2 - 0.49) if longest else 0
        self.scale = math.ldexp(1.0, exponent)

    def __getitem__(self, which: slice | Int64) -> Float64:
        block = self.rows[which].astype(np.float64)
        block *= self.scale
        return np.rint(block, out=block)


class _Count:
    """Count the scores above each pair's own, for pairs (row, column) sorted by column, both ways.

    `*_greater` counts scores > the own one and `*_least` scores >= it, itself included: `column_*`
    over the rows of the pair's column, `row_*` over the columns of its row, indexed by row (each
    row is then in exactly one pair).
    """

    def __init__(
        self, rows: _Grid, columns: _Grid, row: Int64, column: Int64, *, by_row: bool
    ) -> None:
        if rows.rows.shape[1] != columns.rows.shape[1]:
            raise InputError(
                f"vectors have {rows.rows.shape[1]} and {columns.rows.shape[1]} dimensions;"
                " both sides must come from one model"
            )
        self.rows, self.columns, self.by_row = rows, columns, by_row
        self.own = np.empty(len(row), np.float32)
        for start in range(0, len(row), _CHUNK):
            some = slice(start, start + _CHUNK)
            own = np.einsum("ij,ij->i", rows[row[some]], columns[column[some]])
            self.own[some] = own.astype(np.float32)
        self.start = np.searchsorted(column, np.arange(len(columns.rows) + 1))
        self.row_own = np.empty(len(rows.rows), np.float32)
        self.row_own[row] = self.own
        self.column_greater, self.column_least = np.zeros((2, len(row)), np.int64)
        self.row_greater, self.row_least = np.zeros((2, len(rows.rows)), np.int64)

    def run(self, block_bytes: int) -> None:
        """Compute every score once. Columns change slowest: they are converted once, in wide blocks."""
        height = max(_STRIP, math.isqrt(block_bytes // 32))
        width = max(1, block_bytes // (8 * height))
        n_rows, n_columns = len(self.rows.rows), len(self.columns.rows)
        for left in range(0, n_columns, width):
            right = min(left + width, n_columns)
            columns = self.columns[left:right]
            slots = self._slots(left, right)
            crowded = left + np.flatnonzero(np.diff(self.start[left : right + 1]) > _CROWDED)
            for top in range(0, n_rows, height):
                scores = self.rows[top : top + height] @ columns.T
                for column in crowded.tolist():
                    self._count_sorted(scores[:, column - left].astype(np.float32), column)
                for offset in range(0, len(scores), _STRIP):
                    strip = scores[offset : offset + _STRIP].astype(np.float32)
                    self._count_down(strip, slots)
                    if self.by_row:
                        self._count_across(strip, top + offset)

    def _slots(self, left: int, right: int) -> list[tuple[slice | Int64, Int64]]:
        """Return the first pair of each uncrowded column, the second, ...: [(columns, pairs)]."""
        start, pairs = self.start[left:right], np.diff(self.start[left : right + 1])
        pairs = np.where(pairs > _CROWDED, 0, pairs)
        slots: list[tuple[slice | Int64, Int64]] = []
        for nth in range(int(pairs.max())):
            having = np.flatnonzero(pairs > nth)
            all_have = len(having) == right - left
            slots.append((slice(None) if all_have else having, start[having] + nth))
        return slots

    def _count_down(self, strip: Float32, slots: list[tuple[slice | Int64, Int64]]) -> None:
        for columns, pair in slots:
            scores, own = strip[:, columns], self.own[pair]
            # A strip has at most 255 rows, so bytes suffice; adding bytes is what makes it fast.
            self.column_greater[pair] += (scores > own).sum(axis=0, dtype=np.uint8)
            self.column_least[pair] += (scores >= own).sum(axis=0, dtype=np.uint8)

    def _count_sorted(self, scores: Float32, column: int) -> None:
        pairs = slice(self.start[column], self.start[column + 1])
        scores, own = np.sort(scores), self.own[pairs]
        self.column_greater[pairs] += len(scores) - np.searchsorted(scores, own, "right")
        self.column_least[pairs] += len(scores) - np.searchsorted(scores, own, "left")

    def _count_across(self, strip: Float32, top: int) -> None:
        rows = slice(top, top + len(strip))
        own = self.row_own[rows, None]
        self.row_greater[rows] += (strip > own).sum(axis=1)
        self.row_least[rows] += (strip >= own).sum(axis=1)


def _ranking(query: Int64, greater: Int64, least: Int64, queries: int, candidates: int) -> Ranking:
    order = np.lexsort((greater, query))
    greater, tied = greater[order], (least - greater - 1)[order]
    return Ranking(query[order], greater, tied, queries, candidates)


def _check_numbers(numbers: Int64, n: int, name: str) -> None:
    wrong = np.flatnonzero((numbers < 0) | (numbers >= n))
    if len(wrong):
        raise InputError(f"number {numbers[wrong[0]]} is none of the {n} {name} (0 to {n - 1})")


def _check_all_asked(numbers: Int64, n: int, name: str, relevant: str) -> None:
    empty = np.flatnonzero(np.bincount(numbers, minlength=n) == 0)
    if len(empty):
        raise InputError(
            f"{name} {empty[0]} has no {relevant} (so have {len(empty)} of {n});"
            " leave it out of the queries"
        )


def _any_drawn(tie: Int64, relevant: Int64, drawn: Int64) -> Float64:
    """Return P(at least one of `relevant` among `drawn` of `tie`, without replacement), each (Q,)."""
    # C(tie - relevant, drawn) / C(tie, drawn) is symmetric in relevant and drawn: the shorter loop.
    fewer, more = np.minimum(relevant, drawn), np.maximum(relevant, drawn)
    miss = np.ones(len(tie))
    for i in range(int(fewer.max(initial=0))):
        on = i < fewer
        miss[on] *= np.maximum(tie[on] - more[on] - i, 0) / (tie[on] - i)
    return 1.0 - miss


def _expected_reciprocal(greater: int, tie: int, relevant: int) -> float:
    """Return E[1 / (greater + X)], X the first of `relevant` places drawn from 1..tie."""
    x = np.arange(1, tie - relevant + 2)
    before = np.concatenate([[1.0], np.cumprod(1 - relevant / (tie - x[:-1] + 1))])  # P(X >= x)
    return float((before * relevant / (tie - x + 1) / (greater + x)).sum())


def _sums(terms: Float64, low: Int64, high: Int64) -> Float64:
    """Return sums of terms[low:high], each (P,); a single term exactly, not as a difference."""
    sums = np.concatenate([[0.0], np.cumsum(terms)])
    single = terms[np.minimum(low, len(terms) - 1)]
    return np.where(high - low == 1, single, sums[high] - sums[low])
