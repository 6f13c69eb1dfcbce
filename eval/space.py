"""Health of an embedding space: is it used, do captions lie with their pictures, are there hubs?

The measures are the field's (clipkit.metrics.space names the papers). What they mean for a search is
said in words, with warnings where a space is far from what trained towers give (`_NARROW` and so on,
each with its reason). An interval is over pictures, by bootstrap, where a figure is a mean over them;
effective rank, uniformity and hubness have none: drawing a picture twice makes a space that is
narrower and has closer neighbours than any honest sample.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval, mean_interval
from eval.data import Captioned, Labelled, Pictures
from eval.features import (
    Encoder,
    FeatureCache,
    OnProgress,
    fingerprint,
    picture_features,
    text_features,
)
from eval.features.neighbours import LOOKED_AT, check_unit, nearest_known, neighbours
from eval.reports.exhibits import exhibit
from eval.reports.report import EvalReport

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_SAME = 1e-6  # variance of rows that differ by rounding only
# Variance of unit rows, which is 1 minus the mean cosine of two: random towers had up to 0.015 in
# our tests, the built-in model has 0.97 on photos.
_NARROW = 0.1
# Effective rank as a share of what it could be: the built-in model has 0.15 on 1,000 photos.
_FLAT = 0.05
# Skewness of the k-occurrence: below 1 for the built-in model and for random directions. About 3,
# some picture is among the 10 nearest of ten times as many as it should.
_HUBBY = 3.0
_SHOWN_HUBS = 12
_BINS = np.linspace(-1, 1, 101)


def evaluate_space(
    encoder: Encoder,
    data: Captioned | Labelled,
    *,
    k: int = 10,
    sample: int = LOOKED_AT,
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """The space that a model makes of these pictures, and of their captions where they have some.

    Raises as `picture_features` and `space_of_vectors` do.
    """
    started = time.perf_counter()
    cache = cache or FeatureCache(None)
    options: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    features = picture_features(encoder, data.pictures, cache=cache, **options)
    read = data.select(features.kept)
    captions: Sequence[str] = read.captions if isinstance(read, Captioned) else ()
    texts = text_features(encoder, captions, cache=cache, **options) if captions else None
    encoded = time.perf_counter()
    report = space_of_vectors(
        features.vectors,
        texts,
        read.owner if isinstance(read, Captioned) and captions else None,
        pictures=read.pictures,
        k=k,
        sample=sample,
        seed=seed,
        dataset=data.name,
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        **options,
    )
    return replace(
        report,
        split=data.split,
        settings={**report.settings, "precision": encoder.precision}
        | ({"subset": data.subset} if data.subset else {}),
        fingerprint=fingerprint(features.fingerprint, captions),
        warnings=(*data.warnings, *features.warnings, *report.warnings),
        seconds={"encoding": encoded - started, **report.seconds},
    )


def space_of_vectors(
    vectors: Float32,
    texts: Float32 | None = None,
    owner: Int64 | None = None,
    *,
    pictures: Pictures | None = None,
    k: int = 10,
    sample: int = LOOKED_AT,
    dataset: str = "vectors",
    model: str = "",
    encoder_id: str = "",
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """The same of picture vectors (N, D) and, if given, texts (M, D) whose pictures are `owner` (M,).

    All are unit rows; `pictures` are shown where given. Neighbours are looked for among at most
    `sample` pictures, drawn at random. InputError: fewer than 3 pictures, shapes that do not fit,
    values that are not finite, rows that are not of unit length.
    """
    started = time.perf_counter()
    vectors, texts, owner = _checked(vectors, texts, owner)
    parts = [_side("pictures", vectors, seed)]
    if texts is not None and owner is not None:
        parts += [_side("texts", texts, seed), _pairs(vectors, texts, owner, seed)]
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(len(vectors))[:sample])
    k = min(k, len(rows) - 1)
    looked: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    if parts[0].metrics["pictures/variance"].value > _SAME:  # else who is near whom is chance
        found = neighbours(vectors[rows], k, **looked)[0]
        parts.append(_hubs("pictures", "pictures", found, rows, pictures))
        if texts is not None:
            asking = np.sort(random.permutation(len(texts))[:sample])
            found = nearest_known(texts[asking], vectors[rows], k, **looked)[0]
            parts.append(_hubs("searches", "captions", found, rows, pictures))
    return EvalReport(
        task="space",
        dataset=dataset,
        split=None,
        model=model,
        encoder_id=encoder_id,
        n={"pictures": len(vectors)} | ({} if texts is None else {"captions": len(texts)}),
        metrics={name: value for part in parts for name, value in part.metrics.items()},
        settings={"k": k, "neighbours_among": len(rows), "seed": seed},
        fingerprint=fingerprint("", (v.tobytes() for v in (vectors, texts) if v is not None)),
        warnings=tuple(warning for part in parts for warning in part.warnings),
        details={
            "words": [sentence for part in parts for sentence in part.words],
            "tables": [
                {
                    "title": "Variance per dimension",
                    "columns": [
                        "",
                        "dimensions",
                        "least",
                        "median",
                        "most",
                        "under 1 % of the mean",
                    ],
                    "rows": [part.row for part in parts if part.row],
                }
            ],
            "curves": [_spectra(parts), _histograms(parts)],
            "mistakes": [group for part in parts for group in part.shown],
        },
        seconds={"figures": time.perf_counter() - started},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples={name: values for part in parts for name, values in part.samples.items()},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one measure adds to the report."""

    metrics: dict[str, Interval]
    words: list[str]
    warnings: list[str] = field(default_factory=list)
    samples: dict[str, Float64] = field(default_factory=dict)
    cosines: dict[str, Float64] = field(default_factory=dict)  # what the histogram shows
    spectrum: dict[str, Float64] = field(default_factory=dict)  # shares of the variance, descending
    row: list[Any] = field(default_factory=list)  # of the table of dimensions
    shown: list[dict[str, Any]] = field(default_factory=list)


def _checked(
    vectors: Float32, texts: Float32 | None, owner: Int64 | None
) -> tuple[Float32, Float32 | None, Int64 | None]:
    if vectors.ndim != 2 or len(vectors) < 3:
        raise InputError(f"vectors have shape {vectors.shape}; a space needs (N, D), N at least 3")
    check_unit("picture", vectors)
    if texts is None or owner is None or len(texts) == 0:
        return vectors, None, None
    if texts.shape[1:] != vectors.shape[1:] or owner.shape != texts.shape[:1]:
        raise InputError(
            f"texts have shape {texts.shape}, owners {owner.shape}; (M, {vectors.shape[1]}) and "
            "(M,) are expected"
        )
    if owner.min() < 0 or owner.max() >= len(vectors):
        raise InputError(f"a text belongs to picture {owner.max()} of {len(vectors)}")
    check_unit("text", texts)
    return vectors, texts, owner


def _bare(value: float, n: int) -> Interval:
    return Interval(value, math.nan, math.nan, n)


def _cosines(left: Float32, right: Float32) -> Float64:
    """float64 (N,) of matching rows."""
    found: Float64 = np.einsum("ij,ij->i", left, right, dtype=np.float64)
    return found


def _side(name: str, vectors: Float32, seed: int) -> _Part:
    """How far pictures, or texts, spread."""
    n, dim = vectors.shape
    spectrum = metrics.covariance_spectrum(vectors)
    total, rank, most = float(spectrum.sum()), metrics.effective_rank(spectrum), min(dim, n - 1)
    shares = spectrum / (total or 1.0)
    half, nearly = (int(np.searchsorted(np.cumsum(shares), part)) + 1 for part in (0.5, 0.9))
    order = np.random.default_rng(seed).permutation(n)
    cosines = _cosines(vectors[order[: n // 2]], vectors[order[n // 2 : n // 2 * 2]])
    cosine = mean_interval(cosines, fraction=False, seed=seed)
    each = vectors.var(axis=0, dtype=np.float64)
    distances = ((vectors - vectors.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=1)
    words = (
        f"Two random {name} have cosine {cosine.value:.2f}; {n:,} {name} fill {rank:.0f} of at most "
        f"{most} dimensions effectively, half of their variance lies in {half}, 90 % in {nearly}."
    )
    warnings = []
    if total < _SAME:
        words = f"All {n:,} {name} have the same vector."
        warnings = [f"the {name} have collapsed into one vector: nothing can be told apart"]
    elif total < _NARROW:
        warnings = [
            f"the {name} lie in a narrow cone: two random ones have cosine {cosine.value:.3f} "
            f"(variance {total:.3f}, of 1); the model is collapsing, or was never trained"
        ]
    elif rank < _FLAT * most:
        warnings = [
            f"the {name} use few directions: effective rank {rank:.1f} of at most {most}; "
            "the model is collapsing, or they are much alike"
        ]
    return _Part(
        metrics={
            f"{name}/variance": mean_interval(distances, fraction=False, seed=seed),
            f"{name}/random_cosine": cosine,
            f"{name}/effective_rank": _bare(rank, n),
            f"{name}/uniformity": _bare(metrics.uniformity(vectors, seed=seed), n),
        },
        words=[words],
        warnings=warnings,
        cosines={f"two {name}": cosines},
        spectrum={name: shares},
        row=[name, dim, *(float(np.quantile(each, q)) for q in (0, 0.5, 1)),
             int((each < 0.01 * each.mean()).sum())],
    )  # fmt: skip


def _pairs(vectors: Float32, texts: Float32, owner: Int64, seed: int) -> _Part:
    """Captions and their pictures; all figures are means over pictures of means over captions."""
    captioned = np.unique(owner)
    counts = np.bincount(owner)[captioned]

    def per_picture(values: Float64) -> Float64:
        return np.asarray(np.bincount(owner, values)[captioned] / counts, np.float64)

    # a caption of one picture, another picture: the next one after a random turn
    turn = np.random.default_rng(seed).integers(1, len(vectors), len(owner))
    own = _cosines(texts, vectors[owner])
    other = _cosines(texts, vectors[(owner + turn) % len(vectors)])
    samples = {
        "pairs/matched_cosine": per_picture(own),
        "pairs/random_cosine": per_picture(other),
        "pairs/alignment": per_picture(2 - 2 * own),
        "pairs/accuracy": per_picture((own > other) + 0.5 * (own == other)),
    }
    found = {
        name: mean_interval(values, fraction=name == "pairs/accuracy", seed=seed)
        for name, values in samples.items()
    }
    order, starts = np.argsort(owner, kind="stable"), np.cumsum([0, *counts[:-1]])
    means = np.add.reduceat(texts[order].astype(np.float64), starts) / counts[:, None]
    gap = metrics.modality_gap(vectors[captioned], means)
    # along the gap's direction the gap is a mean over pictures, which can be resampled
    apart = vectors[captioned] - means
    along = apart @ (apart.mean(axis=0) / (gap or 1.0))
    found["pairs/modality_gap"] = mean_interval(along, fraction=False, seed=seed)
    right = found["pairs/accuracy"]
    words = [
        f"A caption lies closer to its own picture than to another in {100 * right.value:.1f} % of "
        f"the cases (95 %: {100 * right.low:.1f} to {100 * right.high:.1f}; chance 50): cosine "
        f"{found['pairs/matched_cosine'].value:.3f} against {found['pairs/random_cosine'].value:.3f}.",
        f"Pictures and captions lie {gap:.2f} apart (CLIP's about 0.8, Liang et al. 2022), which "
        "matters only where both are ranked in one list.",
    ]
    blind = not right.low > 0.5
    return _Part(
        metrics=found,
        words=words,
        warnings=["captions are no closer to their own picture than to another"] if blind else [],
        samples=samples if len(captioned) == len(vectors) else {},
        cosines={"a caption and its picture": own, "a caption and another picture": other},
    )


def _hubs(name: str, asking: str, found: Int64, rows: Int64, pictures: Pictures | None) -> _Part:
    """Pictures that are among the nearest of too many; found (Q, K) are places in `rows` (N,)."""
    (asked, k), n = found.shape, len(rows)
    skewness = metrics.hubness(found, n)
    counts = np.bincount(found.ravel(), minlength=n)
    worst = np.argsort(-counts, kind="stable")[:_SHOWN_HUBS]
    usual, most, never = asked * k / n, int(counts[worst[0]]), float((counts == 0).mean())
    words = (
        f"One picture is among the {k} nearest of {most:,} of {asked:,} {asking} ({usual:.1f} would "
        f"be even); {100 * never:.0f} % of the pictures are among those of none."
    )
    warning = (
        f"a few pictures come up for very many {asking} (hubness {skewness:.1f}, one is among the {k} "
        f"nearest of {most:,}): others are crowded out"
    )
    items = [
        exhibit(
            pictures,
            int(rows[place]),
            expected=f"among the nearest of {usual:.0f}",
            got=f"of {counts[place]:,}",
        )
        for place in worst
    ]
    return _Part(
        metrics={
            f"{name}/hubness@{k}": _bare(skewness, asked),
            f"{name}/never_found@{k}": _bare(never, n),
        },
        words=[words],
        warnings=[warning] if skewness > _HUBBY else [],
        shown=[{"title": f"Hubs among {asking}", "items": items}] if pictures is not None else [],
    )


def _spectra(parts: Sequence[_Part]) -> dict[str, Any]:
    return {
        "title": "Covariance spectrum",
        "x_label": "direction, by variance",
        "y_label": "share of the variance",
        "log_x": True,
        "series": [
            {"name": name, "x": list(range(1, len(shares) + 1)), "y": shares.tolist()}
            for part in parts
            for name, shares in part.spectrum.items()
        ],
    }


def _histograms(parts: Sequence[_Part]) -> dict[str, Any]:
    series = [
        {
            "name": name,
            "x": ((_BINS[1:] + _BINS[:-1]) / 2).round(4).tolist(),
            "y": (np.histogram(cosines, _BINS)[0] / len(cosines)).tolist(),
        }
        for part in parts
        for name, cosines in part.cosines.items()
    ]
    return {
        "title": "Cosines of pairs",
        "x_label": "cosine",
        "y_label": "share of the pairs",
        "series": series,
    }
