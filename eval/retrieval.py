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
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval.data import Captioned
from eval.directions import Asked, Way, ask_captions, ask_tags, percent, ranked
from eval.features import (
    Encoder,
    FeatureCache,
    OnProgress,
    fingerprint,
    picture_features,
    text_features,
    thumbnail_if_there,
)
from eval.report import EvalReport

__all__ = ["evaluate_retrieval"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

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
