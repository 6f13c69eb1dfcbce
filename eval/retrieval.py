"""Does a caption find its picture, and a picture its captions?

Text-to-image: every caption is a query, its picture the one relevant candidate. Image-to-text: every
picture is a query, all of its captions are relevant, and one of them among the first K is a hit. With
`queries="tags"` every distinct tag is a query and all pictures that bear it are relevant. These are the
field's definitions (Karpathy & Fei-Fei 2015; clip-benchmark), but ties get their expected rank under a
random order: a model whose vectors are all equal scores exactly what guessing does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval, Ranking
from eval.data import Captioned
from eval.features import (
    Encoder,
    FeatureCache,
    OnProgress,
    fingerprint,
    picture_features,
    text_features,
    thumbnail_if_there,
)
from eval.reports.report import EvalReport

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def percent(share: float) -> str:
    """ "37.3 %"; small shares keep two digits."""
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The texts, and which pictures each is true of: pairs (P, 2) of text and picture."""

    texts: tuple[str, ...]
    pairs: Int64
    both_ways: bool
    warnings: tuple[str, ...] = ()

    def parts(self) -> Iterator[str | bytes]:
        """All that a fingerprint must cover."""
        yield from self.texts
        yield self.pairs.tobytes()


def ask_captions(data: Captioned) -> Asked:
    """Every caption, its own picture relevant; and the same the other way round."""
    owners: dict[str, set[int]] = {}
    for text, owner in zip(data.captions, data.owner.tolist(), strict=True):
        owners.setdefault(text, set()).add(owner)
    shared = sum(len(owners[text]) > 1 for text in data.captions)
    warning = (
        f"{shared:,} of {len(data.captions):,} captions stand at several pictures, "
        "and only one of these counts as found"
    )
    pairs = np.stack([np.arange(len(data.owner)), data.owner], axis=1)
    return Asked(data.captions, pairs, both_ways=True, warnings=(warning,) if shared else ())


def ask_tags(data: Captioned) -> Asked:
    """Every distinct tag, all pictures that bear it relevant."""
    texts = tuple(sorted({tag for tags in data.tags for tag in tags}))
    number = {tag: at for at, tag in enumerate(texts)}
    pairs = [(number[tag], row) for row, tags in enumerate(data.tags) for tag in tags]
    return Asked(texts, np.array(sorted(set(pairs)), np.int64), both_ways=False)


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One direction. `unit` is what each query is resampled with: its own number or its picture's."""

    name: str
    ranking: Ranking
    unit: Int64  # (Q,)
    asking: str  # in words: what asks, and what it should find
    answer: str
    hit: str = "R"

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def values(self, ks: Sequence[int]) -> dict[str, Float64]:
        """Each metric's value per query (Q,)."""
        ranking = self.ranking
        return {
            **{f"{self.hit}@{k}": ranking.hit_at(k) for k in ks},
            "mean_rank": ranking.best_rank(),
            "MRR": ranking.reciprocal_rank(),
            "mAP": ranking.average_precision(),
            "nDCG@10": ranking.ndcg(10),
        }

    def per_unit(self, values: Float64) -> Float64:
        """Values (Q,) -> one per unit, whose mean is theirs: the unit's sum, over the mean number of
        queries that a unit has."""
        units = int(self.unit.max()) + 1
        sums = np.asarray(np.bincount(self.unit, values, units), np.float64)
        return sums * (units / len(values))

    def median_rank(self, seed: int) -> Interval:
        """The median of the best ranks, resampled by unit."""
        rank = self.ranking.best_rank()
        order = np.argsort(rank)
        ascending, unit = rank[order], self.unit[order]
        units = int(unit.max()) + 1

        def median(rows: Int64) -> float:
            passed = np.cumsum(np.bincount(rows, minlength=units)[unit])  # queries up to each
            middle = ((passed[-1] - 1) // 2, passed[-1] // 2)
            return float(ascending[np.searchsorted(passed, middle, side="right")].mean())

        resamples = 1000 if len(rank) < 50_000 else 200
        return metrics.statistic_interval(median, units, resamples=resamples, seed=seed)

    def cuts(self, found: Mapping[str, Interval]) -> list[tuple[int, Interval, float]]:
        """(K, what was found, what guessing finds), for each K that was asked for."""
        start = f"{self.name}/{self.hit}@"
        ks = [int(name.removeprefix(start)) for name in found if name.startswith(start)]
        return [(k, found[f"{start}{k}"], float(self.ranking.chance_hit_at(k).mean())) for k in ks]

    def at_chance(self, found: Mapping[str, Interval]) -> str:
        """A warning, if the model is not above guessing at any K."""
        cuts = [cut for cut in self.cuts(found) if cut[2] < 1]
        if not cuts or not all(i.low <= chance + 1e-9 for _, i, chance in cuts):
            return ""
        return f"{self.title}: the model finds no more than guessing does"

    def words(self, found: Mapping[str, Interval]) -> str:
        """The result in a sentence."""
        cuts = self.cuts(found)
        (k, first, chance), (last, most, _) = cuts[0], cuts[-1]
        place = "first" if k == 1 else f"among the first {k}"
        more = f" and among the first {last} for {percent(most.value)}" if last != k else ""
        sure = (
            f" (95 % interval {percent(first.low)} to {percent(first.high)})" if first.n > 1 else ""
        )
        median = found[f"{self.name}/median_rank"].value
        return (
            f"{self.answer} comes {place} for {percent(first.value)}{sure} of "
            f"{self.ranking.queries:,} {self.asking}{more}, at place {median:,.10g} of "
            f"{self.ranking.candidates:,} in the median; guessing puts it {place} for "
            f"{percent(chance)}."
        )


def ranked(asked: Asked, pictures: Float32, texts: Float32) -> list[Way]:
    """Rank pictures (N, D) and texts (M, D) for each other, in every direction that was asked for."""
    own = np.arange(len(pictures))
    if not asked.both_ways:
        ranking = metrics.rank_pairs(texts, pictures, asked.pairs)
        own = np.arange(len(texts))
        return [Way("tag_to_image", ranking, own, "tags", "A picture that bears the tag", "hit")]
    owner = asked.pairs[:, 1]
    to_image, to_text = metrics.rank_captions(pictures, texts, owner)
    return [
        Way("text_to_image", to_image, owner, "captions", "The right picture"),
        Way("image_to_text", to_text, own, "pictures", "A caption of the picture"),
    ]


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
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """Recall@K, ranks, MRR, mAP and nDCG@10 of a model on pictures with captions or tags.

    Metrics are "text_to_image/R@5", "image_to_text/median_rank" and so on, or "tag_to_image/hit@5";
    `samples` hold one value per picture, or per tag, whose mean is the metric. A K beyond the number
    of candidates is left out with a warning. InputError: nothing to ask, no K left, no picture can
    be read, or vectors that are not finite.
    """
    cache = cache or FeatureCache(None)
    ks = _checked(ks)
    data, warnings = _askable(data, queries)
    begun = time.perf_counter()
    pictures = picture_features(
        encoder, data.pictures, cache=cache, on_progress=on_progress, stop=stop
    )
    encoded = time.perf_counter()
    if pictures.skipped:
        data = data.select(pictures.kept)
    asked = ask_captions(data) if queries == "captions" else ask_tags(data)
    texts = text_features(encoder, asked.texts, cache=cache, on_progress=on_progress, stop=stop)
    read = time.perf_counter()
    ways = ranked(asked, pictures.vectors, texts)
    found, samples, left_out = _measured(ways, ks, seed)
    warnings += [*left_out, *pictures.warnings, *asked.warnings]
    warnings += _collapse(pictures.vectors, texts)
    warnings += [text for way in ways if (text := way.at_chance(found))]
    return EvalReport(
        task="retrieval",
        dataset=data.name,
        split=data.split,
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        n={
            "pictures": len(pictures.kept),
            queries: len(asked.texts),
            **({"skipped": len(pictures.skipped)} if pictures.skipped else {}),
        },
        metrics=found,
        settings={
            "queries": queries,
            "ks": list(ks),
            "ties": TIES,
            "intervals": f"95 %, over {'pictures' if queries == 'captions' else 'tags'}",
            "precision": encoder.precision,
            "seed": seed,
            **({"subset": data.subset} if data.subset else {}),
        },
        fingerprint=fingerprint(pictures.fingerprint + queries, asked.parts()),
        warnings=(*data.warnings, *warnings),
        details={
            "words": [way.words(found) for way in ways],
            "tables": [_against_chance(ways, found)],
            "curves": [_curve(ways)],
            "mistakes": _mistakes(ways, asked, data, pictures.vectors, texts),
        },
        seconds={
            "pictures": encoded - begun,
            "texts": read - encoded,
            "figures": time.perf_counter() - read,
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples,
    )


def _checked(ks: Sequence[int]) -> tuple[int, ...]:
    if not ks or min(ks) < 1:
        raise InputError(f"K is {', '.join(map(str, ks)) or 'missing'}; it must be 1 or more")
    return tuple(sorted(set(ks)))


def _askable(data: Captioned, queries: str) -> tuple[Captioned, list[str]]:
    """Without the pictures that have no caption. Those without a tag stay: they are candidates."""
    if queries == "tags":
        if not any(data.tags):
            raise InputError(
                f"no picture of {data.name} has a tag; tags stand in `tags` or `keywords`; "
                "leave out --queries tags to ask by captions"
            )
        return data, []
    having = np.unique(data.owner)
    if not len(having):
        raise InputError(
            f"no picture of {data.name} has a caption; add --queries tags to ask by tags"
        )
    without = len(data.pictures) - len(having)
    if not without:
        return data, []
    return data.select(having), [f"{without:,} pictures without a caption were left out"]


def _measured(
    ways: Sequence[Way], ks: Sequence[int], seed: int
) -> tuple[dict[str, Interval], dict[str, Float64], list[str]]:
    """Every metric's interval, its values per unit, and which K were left out."""
    found: dict[str, Interval] = {}
    samples: dict[str, Float64] = {}
    warnings: list[str] = []
    for way in ways:
        candidates = way.ranking.candidates
        cuts = [k for k in ks if k <= candidates]
        if not cuts:
            raise InputError(
                f"the smallest K is {ks[0]}, but there are {candidates} candidates; "
                "take a smaller K or more pictures"
            )
        if left_out := [str(k) for k in ks if k not in cuts]:
            warnings.append(
                f"{way.title}: K = {', '.join(left_out)} left out, "
                f"there are only {candidates} candidates"
            )
        for name, values in way.values(cuts).items():
            key, fraction = f"{way.name}/{name}", not name.endswith("rank")
            found[key] = metrics.mean_interval(
                values, groups=way.unit, seed=seed, fraction=fraction
            )
            samples[key] = way.per_unit(values)
        found[f"{way.name}/median_rank"] = way.median_rank(seed)
    return found, samples, warnings


def _collapse(pictures: Float32, texts: Float32) -> Iterator[str]:
    for name, vectors in (("pictures", pictures), ("texts", texts)):
        n = len(vectors)
        total = vectors.sum(axis=0, dtype=np.float64)
        cosine = (float(total @ total) - n) / (n * (n - 1)) if n > 1 else 0.0
        if cosine > COLLAPSED:
            yield (
                f"the model gives all {name} nearly the same vector "
                f"(mean cosine {cosine:.4f}): it has collapsed, or its precision is unfit"
            )


# ---- how it is shown


def _against_chance(ways: Sequence[Way], found: Mapping[str, Interval]) -> dict[str, Any]:
    rows = [
        [
            way.title,
            k,
            percent(interval.value),
            percent(chance),
            f"{interval.value / chance:,.1f}",
        ]
        for way in ways
        for k, interval, chance in way.cuts(found)
    ]
    columns = ["Direction", "K", "Found", "By guessing", "Times as often"]
    return {"title": "Against guessing", "columns": columns, "rows": rows}


def _curve(ways: Sequence[Way]) -> dict[str, Any]:
    """Recall over K, with a band; guessing beside it."""
    series = []
    for way in ways:
        end = min(way.ranking.candidates, CURVE_END)
        ks = np.unique(np.geomspace(1, end, CURVE_POINTS).round().astype(int)).tolist()
        band = [metrics.mean_interval(way.ranking.hit_at(k), groups=way.unit) for k in ks]
        bounds = [(i.low, i.high) if i.n > 1 else (i.value, i.value) for i in band]
        series += [
            {
                "name": way.title,
                "x": ks,
                "y": [i.value for i in band],
                "low": [low for low, _ in bounds],
                "high": [high for _, high in bounds],
            },
            {
                "name": f"{way.title}, guessing",
                "x": ks,
                "y": [float(way.ranking.chance_hit_at(k).mean()) for k in ks],
            },
        ]
    labels = {"x_label": "K", "y_label": "found among the first K"}
    return {"title": "Recall by K", **labels, "series": series, "log_x": True}


def _mistakes(
    ways: Sequence[Way], asked: Asked, data: Captioned, pictures: Float32, texts: Float32
) -> list[dict[str, Any]]:
    """Of each direction the queries whose first relevant candidate stands furthest down."""
    groups = []
    for way in ways:
        of_pictures = way.name == "image_to_text"
        asking, answers = (pictures, texts) if of_pictures else (texts, pictures)
        rank = way.ranking.best_rank()
        items: list[dict[str, Any]] = []
        shown: set[int] = set()
        for query in np.argsort(-rank, kind="stable").tolist():
            if rank[query] <= 1 or len(items) == SHOWN_MISTAKES:
                break
            mine = asked.pairs[asked.pairs[:, 1 if of_pictures else 0] == query]
            scores = answers @ asking[query]
            relevant = mine[:, 0 if of_pictures else 1]
            own = int(relevant[scores[relevant].argmax()])
            scores[relevant] = -np.inf
            first = int(scores.argmax())
            picture = query if of_pictures else own
            if picture in shown:  # five captions of one picture are one mistake
                continue
            shown.add(picture)
            text, other = (own, first) if of_pictures else (query, _a_text(asked, first))
            got = asked.texts[other] if other is not None else ""
            if not of_pictures:
                got = f"{data.pictures.name(first)} “{got}”" if got else data.pictures.name(first)
            items.append(
                {
                    "name": data.pictures.name(picture),
                    "expected": f"“{asked.texts[text]}”, at place {rank[query]:,.10g}",
                    "got": got,
                    "score": float(scores[first]),
                    "thumbnail": thumbnail_if_there(data.pictures, picture),
                }
            )
        if items:
            groups.append({"title": f"Worst of {way.title}", "items": items})
    return groups


def _a_text(asked: Asked, picture: int) -> int | None:
    """The first text that is true of a picture."""
    at = np.flatnonzero(asked.pairs[:, 1] == picture)
    return int(asked.pairs[at[0], 0]) if len(at) else None
