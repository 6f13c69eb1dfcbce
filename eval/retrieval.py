"""Retrieval: rank pictures for captions or tags, and captions for pictures.

Text-to-image: every caption is a query, its picture the one relevant candidate. Image-to-text: every
picture is a query, all of its captions are relevant, and one of them among the first K is a hit. With
`queries="tags"` every distinct tag is a query and all pictures that have it are relevant. These are
the field's definitions (Karpathy & Fei-Fei 2015; clip-benchmark), but ties get their expected rank
under a random order: a model whose vectors are all equal scores exactly what chance does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64, Int64
from clipkit.errors import InputError
from clipkit.metrics import Interval, Ranking
from clipkit.wording import count, percent
from eval.data import Captioned
from eval.features import Encoder, fingerprint
from eval.reports.report import EvalReport, curve, exhibit, interval_series
from eval.reports.wording import percent_interval
from eval.session import Results, Session

Intervals = Mapping[str, Interval]

TIES = "expected rank under a random order of equal scores"
SHOWN_MISTAKES = 12
CURVE_POINTS, CURVE_END = 25, 1000
COLLAPSED = 0.99  # mean cosine between vectors; trained towers have 0 to 0.8


def evaluate_retrieval(
    encoder: Encoder,
    data: Captioned,
    *,
    ks: Sequence[int] = (1, 5, 10),
    queries: Literal["captions", "tags"] = "captions",
    session: Session | None = None,
) -> EvalReport:
    """Measure recall@K, ranks, MRR, mAP and nDCG@10 on pictures with captions or tags.

    Metrics are "text_to_image/R@5", "image_to_text/median_rank" and so on, or "tag_to_image/hit@5";
    `samples` hold one value per picture, or per tag, whose mean is the metric. A K beyond the number
    of candidates is left out with a warning. Raises InputError if there are no queries, no K is left,
    no picture can be read, or vectors are not finite.
    """
    session = session or Session()
    if not ks or min(ks) < 1:
        raise InputError(f"K is {', '.join(map(str, ks)) or 'missing'}; it must be 1 or more")
    results = Results("retrieval")
    data = _with_queries(data, queries, results)
    pictures = session.picture_features(encoder, data.pictures)
    results.lap("pictures")
    if pictures.skipped:
        data = data.select(pictures.rows)
    texts = caption_queries(data, results) if queries == "captions" else tag_queries(data)
    vectors = session.text_features(encoder, texts.texts)
    results.lap("texts")
    directions = rank(texts, pictures.vectors, vectors)
    _measure(directions, sorted(set(ks)), session.seed, results)
    _warn_of_collapse(pictures.vectors, vectors, results)
    results.warnings += [text for d in directions if (text := d.chance_warning(results.metrics))]
    results.settings |= {
        "queries": queries,
        "ks": sorted(set(ks)),
        "ties": TIES,
        "intervals": f"95 %, over {'pictures' if queries == 'captions' else 'tags'}",
    }
    results.sentences = [direction.sentence(results.metrics) for direction in directions]
    results.tables = [_chance_table(directions, results.metrics)]
    results.curves = [_curve(directions)]
    results.mistakes = _mistakes(directions, texts, data, pictures.vectors, vectors)
    return results.report_on(
        session,
        encoder,
        data,
        pictures,
        n={queries: len(texts.texts)},
        fingerprint=fingerprint(
            pictures.fingerprint + queries, [*texts.texts, texts.pairs.tobytes()]
        ),
    )


# ---- queries


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Texts, and pairs (P, 2) of text and picture: which pictures are relevant to each text."""

    texts: tuple[str, ...]
    pairs: Int64
    both_ways: bool  # also rank the texts for each picture


def caption_queries(data: Captioned, results: Results) -> Queries:
    """Make a query of every caption, its own picture relevant; both ways."""
    owners: dict[str, set[int]] = {}
    for text, owner in zip(data.captions, data.owner.tolist(), strict=True):
        owners.setdefault(text, set()).add(owner)
    if shared := sum(len(owners[text]) > 1 for text in data.captions):
        results.warnings.append(
            f"of {count(len(data.captions), 'caption')}, {shared:,} belong to several pictures, only "
            "one of which counts as correct"
        )
    pairs = np.stack([np.arange(len(data.owner)), data.owner], axis=1)
    return Queries(data.captions, pairs, both_ways=True)


def tag_queries(data: Captioned) -> Queries:
    """Make a query of every distinct tag, all pictures that have it relevant."""
    texts = tuple(sorted({tag for tags in data.tags for tag in tags}))
    number = {tag: at for at, tag in enumerate(texts)}
    pairs = [(number[tag], row) for row, tags in enumerate(data.tags) for tag in tags]
    return Queries(texts, np.array(sorted(set(pairs)), np.int64), both_ways=False)


def _with_queries(data: Captioned, queries: str, results: Results) -> Captioned:
    """Drop pictures that have no caption. Those without a tag stay, as candidates."""
    if queries == "tags":
        if not any(data.tags):
            raise InputError(
                f"no picture of {data.name} has a tag; tags are read from `tags` or `keywords`; "
                "leave out --queries tags to search by captions"
            )
        return data
    captioned = np.unique(data.owner)
    if not len(captioned):
        raise InputError(
            f"no picture of {data.name} has a caption; add --queries tags to search by tags"
        )
    without = len(data.pictures) - len(captioned)
    if not without:
        return data
    results.warnings.append(f"left out {count(without)} without a caption")
    return data.select(captioned)


# ---- rankings


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One direction of retrieval. `unit` is what each query is resampled with: its number or its
    picture's."""

    name: str
    ranking: Ranking
    unit: Int64  # (Q,)
    queries: str  # plural noun
    target: str  # what a query should find
    hit: str = "R"

    @property
    def title(self) -> str:
        """Return the name with spaces."""
        return self.name.replace("_", " ")

    def values(self, ks: Sequence[int]) -> dict[str, Float64]:
        """Return each metric's value per query, float64 (Q,)."""
        ranking = self.ranking
        return {
            **{f"{self.hit}@{k}": ranking.hit_at(k) for k in ks},
            "mean_rank": ranking.best_rank(),
            "MRR": ranking.reciprocal_rank(),
            "mAP": ranking.average_precision(),
            "nDCG@10": ranking.ndcg(10),
        }

    def samples(self, values: Float64) -> Float64:
        """Return one value per unit of values (Q,), with the same mean: a unit's mean times
        `unit_weights`, so above 1 for a picture with more captions than others."""
        sums = np.asarray(np.bincount(self.unit, values), np.float64)
        return sums * (len(sums) / len(values))

    def median_rank(self, seed: int) -> Interval:
        """Return the median of the best ranks, resampled by unit."""
        best = self.ranking.best_rank()
        order = np.argsort(best)
        ascending, unit = best[order], self.unit[order]
        units = int(unit.max()) + 1

        def median(rows: Int64) -> float:
            passed = np.cumsum(np.bincount(rows, minlength=units)[unit])  # queries up to each
            middle = ((passed[-1] - 1) // 2, passed[-1] // 2)
            return float(ascending[np.searchsorted(passed, middle, side="right")].mean())

        resamples = 1000 if len(best) < 50_000 else 200
        return metrics.statistic_interval(median, units, resamples=resamples, seed=seed)

    def cuts(self, intervals: Intervals) -> list[tuple[int, Interval, float]]:
        """Return (K, recall at K, recall of chance) for each K that was measured."""
        start = f"{self.name}/{self.hit}@"
        ks = [int(name.removeprefix(start)) for name in intervals if name.startswith(start)]
        chance = [float(self.ranking.chance_hit_at(k).mean()) for k in ks]
        return [(k, intervals[f"{start}{k}"], c) for k, c in zip(ks, chance, strict=True)]

    def chance_warning(self, intervals: Intervals) -> str:
        """Return a warning if the model is not above chance at any K."""
        cuts = [cut for cut in self.cuts(intervals) if cut[2] < 1]
        if not cuts or not all(i.low <= chance + 1e-9 for _, i, chance in cuts):
            return ""
        return f"{self.title}: the model is no better than chance"

    def sentence(self, intervals: Intervals) -> str:
        """Return the result as a sentence."""
        cuts = self.cuts(intervals)
        (k, first, chance), (last, most, _) = cuts[0], cuts[-1]
        place = "first" if k == 1 else f"among the first {k}"
        more = f" and among the first {last} for {percent(most.value)}" if last != k else ""
        interval = f" ({percent_interval(first)})" if first.n > 1 else ""
        median = intervals[f"{self.name}/median_rank"].value
        return (
            f"{self.target} is ranked {place} for {percent(first.value)} of "
            f"{self.ranking.queries:,} {self.queries}{interval}{more}; its median rank is "
            f"{median:,.10g} of {self.ranking.candidates:,}. Chance: {percent(chance)} {place}."
        )


def unit_weights(owner: Int64) -> Float64:
    """Return how much more than an average picture each picture, by its captions (M,), weighs in the
    mean over captions: float64 (N,), their mean 1. See `Direction.samples`."""
    counts = np.bincount(owner)
    return np.asarray(counts * (len(counts) / len(owner)), np.float64)


def rank(queries: Queries, pictures: Float32, texts: Float32) -> list[Direction]:
    """Rank pictures (N, D) and texts (M, D) for each other, in one direction or both."""
    if not queries.both_ways:
        ranking = metrics.rank_pairs(texts, pictures, queries.pairs)
        unit = np.arange(len(texts))
        return [Direction("tag_to_image", ranking, unit, "tags", "A picture with the tag", "hit")]
    owner = queries.pairs[:, 1]
    to_image, to_text = metrics.rank_captions(pictures, texts, owner)
    unit = np.arange(len(pictures))
    return [
        Direction("text_to_image", to_image, owner, "captions", "The right picture"),
        Direction("image_to_text", to_text, unit, "pictures", "A caption of the picture"),
    ]


def _measure(
    directions: Sequence[Direction], ks: Sequence[int], seed: int, results: Results
) -> None:
    """Add every metric's interval and its value per unit."""
    for direction in directions:
        candidates = direction.ranking.candidates
        cuts = [k for k in ks if k <= candidates]
        if not cuts:
            raise InputError(
                f"the smallest K is {ks[0]}, but there are {candidates} candidates; "
                "take a smaller K or more pictures"
            )
        if left_out := [str(k) for k in ks if k not in cuts]:
            results.warnings.append(
                f"{direction.title}: K = {', '.join(left_out)} left out, "
                f"there are only {candidates:,} candidates"
            )
        for name, values in direction.values(cuts).items():
            key, fraction = f"{direction.name}/{name}", not name.endswith("rank")
            results.metrics[key] = metrics.mean_interval(
                values, groups=direction.unit, seed=seed, fraction=fraction
            )
            results.samples[key] = direction.samples(values)
        results.metrics[f"{direction.name}/median_rank"] = direction.median_rank(seed)


def _warn_of_collapse(pictures: Float32, texts: Float32, results: Results) -> None:
    for name, vectors in (("pictures", pictures), ("texts", texts)):
        n = len(vectors)
        total = vectors.sum(axis=0, dtype=np.float64)
        cosine = (float(total @ total) - n) / (n * (n - 1)) if n > 1 else 0.0
        if cosine > COLLAPSED:
            results.warnings.append(
                f"the model gives all {name} nearly the same vector (mean cosine {cosine:.4f}): "
                "it has collapsed, or its precision is too low"
            )


# ---- tables, curves, examples


def _chance_table(directions: Sequence[Direction], intervals: Intervals) -> dict[str, Any]:
    rows = [
        [d.title, k, percent(i.value), percent(chance), f"{i.value / chance:,.1f}"]
        for d in directions
        for k, i, chance in d.cuts(intervals)
    ]
    columns = ["Direction", "K", "Recall", "Chance", "Ratio"]
    return {"title": "Compared with chance", "columns": columns, "rows": rows}


def _curve(directions: Sequence[Direction]) -> dict[str, Any]:
    """Draw recall over K, with its interval, and chance."""
    series = []
    for direction in directions:
        ranking = direction.ranking
        end = min(ranking.candidates, CURVE_END)
        ks = np.unique(np.geomspace(1, end, CURVE_POINTS).round().astype(int)).tolist()
        points = [metrics.mean_interval(ranking.hit_at(k), groups=direction.unit) for k in ks]
        series += [
            interval_series(direction.title, ks, points),
            {
                "name": f"{direction.title}, chance",
                "x": ks,
                "y": [float(ranking.chance_hit_at(k).mean()) for k in ks],
            },
        ]
    return curve("Recall by K", "K", "recall at K", series, log_x=True)


def _mistakes(
    directions: Sequence[Direction],
    queries: Queries,
    data: Captioned,
    pictures: Float32,
    texts: Float32,
) -> list[Mapping[str, Any]]:
    """Return, per direction, the queries whose best relevant candidate is ranked last."""
    groups: list[Mapping[str, Any]] = []
    for direction in directions:
        from_picture = direction.name == "image_to_text"
        query_rows, answers = (pictures, texts) if from_picture else (texts, pictures)
        best = direction.ranking.best_rank()
        items: list[dict[str, Any]] = []
        listed: set[int] = set()
        for query in np.argsort(-best, kind="stable").tolist():
            if best[query] <= 1 or len(items) == SHOWN_MISTAKES:
                break
            pairs = queries.pairs[queries.pairs[:, 1 if from_picture else 0] == query]
            scores = answers @ query_rows[query]
            relevant = pairs[:, 0 if from_picture else 1]
            own = int(relevant[scores[relevant].argmax()])
            scores[relevant] = -np.inf
            first = int(scores.argmax())
            picture = query if from_picture else own
            if picture in listed:  # five captions of one picture are one mistake
                continue
            listed.add(picture)
            text = queries.texts[own if from_picture else query]
            if from_picture:
                got = queries.texts[first]
            else:
                caption = _first_text(queries, first)
                got = data.pictures.name(first) + (f" “{caption}”" if caption else "")
            expected = f"“{text}”, at place {best[query]:,.10g}"
            score = float(scores[first])
            items.append(exhibit(data.pictures, picture, expected=expected, got=got, score=score))
        if items:
            title = f"Lowest ranks, {direction.title}"
            groups.append({"title": title, "items": items, "labels": ("Text", "Ranked first")})
    return groups


def _first_text(queries: Queries, picture: int) -> str:
    """Return the first text that a picture is relevant to, or ""."""
    at = np.flatnonzero(queries.pairs[:, 1] == picture)
    return queries.texts[int(queries.pairs[at[0], 0])] if len(at) else ""
