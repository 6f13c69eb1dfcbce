"""Drift between two batches of pictures over time; between two models: `eval.model_drift`.

`eval.two_samples` tests whether both batches come from one distribution, as a model sees them. The
pictures that are farthest from every known one are shown: they are what drives it.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.metrics import Interval, mean_interval
from eval.data import Captioned, Labelled
from eval.exhibits import exhibit
from eval.features import Encoder, FeatureCache, Features, OnProgress, fingerprint, picture_features
from eval.model_drift import drift_between_encoders, drift_of_embeddings, linear_cka
from eval.neighbours import LOOKED_AT, check_unit, nearest_known, neighbours
from eval.report import EvalReport
from eval.source import Pictures
from eval.two_samples import Verdict, compare_batches

__all__ = [
    "drift_between_batches",
    "drift_between_encoders",
    "drift_of_embeddings",
    "drift_of_vectors",
    "linear_cka",
]

Float32 = npt.NDArray[np.float32]

_SHOWN = 12
_USUAL = 0.05  # share of the known pictures that are as far from the others as a novel one


def drift_between_batches(
    encoder: Encoder,
    before: Captioned | Labelled,
    after: Captioned | Labelled,
    *,
    level: float = 0.05,
    permutations: int = 499,
    sample: int = 2000,
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """Whether the pictures of `after` are like those of `before`, as the model sees them.

    Raises as `picture_features` and `drift_of_vectors` do.
    """
    started = time.perf_counter()
    cache = cache or FeatureCache(None)
    options: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    features: list[Features] = [
        picture_features(encoder, data.pictures, cache=cache, **options) for data in (before, after)
    ]
    encoded = time.perf_counter()
    old, new = (
        data.select(f.kept).pictures for data, f in zip((before, after), features, strict=True)
    )
    report = drift_of_vectors(
        features[0].vectors,
        features[1].vectors,
        known=old,
        pictures=new,
        level=level,
        permutations=permutations,
        sample=sample,
        seed=seed,
        **options,
    )
    return replace(
        report,
        dataset=f"{before.name} → {after.name}",
        split=None if before.split == after.split is None else f"{before.split} → {after.split}",
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        settings={**report.settings, "precision": encoder.precision},
        fingerprint=fingerprint("", [f.fingerprint for f in features]),
        warnings=(
            *before.warnings,
            *after.warnings,
            *(warning for f in features for warning in f.warnings),
            *report.warnings,
        ),
        seconds={"encoding": encoded - started, **report.seconds},
    )


def drift_of_vectors(
    before: Float32,
    after: Float32,
    *,
    known: Pictures | None = None,
    pictures: Pictures | None = None,
    level: float = 0.05,
    permutations: int = 499,
    sample: int = 2000,
    dataset: str = "vectors",
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """The same of unit rows before (N, D) and after (M, D); `known` and `pictures` are theirs.

    InputError: rows that are not unit vectors, and what `compare_batches` refuses.
    """
    started = time.perf_counter()
    verdict = compare_batches(
        before, after, level=level, permutations=permutations, sample=sample, seed=seed
    )
    check_unit("vector before", before)
    check_unit("vector after", after)
    random = np.random.default_rng(seed)
    old, new = (np.sort(random.permutation(len(v))[:LOOKED_AT]) for v in (before, after))
    looked: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    usual = neighbours(before, 1, rows=old, **looked)[1][:, 0]
    found, scores = nearest_known(after[new], before, 1, **looked)
    nearest, cosines = found[:, 0], scores[:, 0]
    novel = mean_interval(cosines < np.quantile(usual, _USUAL), seed=seed)
    spread = math.sqrt(metrics.variance(np.concatenate([before, after])))
    rarest = np.argsort(cosines, kind="stable")[:_SHOWN]
    items = [
        exhibit(
            pictures,
            int(new[place]),
            expected="like a known picture",
            got=f"nearest is {_known(known, int(nearest[place]))}",
            score=float(cosines[place]),
        )
        for place in rarest
    ]
    smaller = min(verdict.sizes)
    return EvalReport(
        task="drift",
        dataset=dataset,
        split=None,
        model="",
        encoder_id="",
        n={"pictures_before": len(before), "pictures_after": len(after)},
        metrics={
            "p_value": Interval(verdict.p_value, math.nan, math.nan, smaller),
            **{
                name: Interval(tested.value, math.nan, math.nan, smaller)
                for name, tested in verdict.tests.items()
            },
            "novel_share": novel,
        },
        settings={
            "level": level,
            "permutations": permutations,
            "compared": list(verdict.sizes),
            "seed": seed,
        },
        fingerprint=fingerprint("", (before.tobytes(), after.tobytes())),
        details={
            "words": _batch_words(verdict, level, spread, novel),
            "tables": [_test_table(verdict), _dimension_table(before, after)],
            "curves": [_nearest_curve(usual, cosines)],
            "mistakes": [{"title": "Most novel pictures", "items": items}] if pictures else [],
        },
        seconds={"figures": time.perf_counter() - started},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _batch_words(verdict: Verdict, level: float, spread: float, novel: Interval) -> list[str]:
    shift = verdict.tests["mean_shift"]
    p = f"p = {verdict.p_value:.2g}"
    relative = f"{100 * shift.value / (spread or 1):.0f} % of the pictures' own spread"
    if verdict.p_value <= level:
        first = (
            f"Drift: the batches differ more than chance explains ({p}); the mean moved by "
            f"{shift.value:.3f}, {relative} (chance alone: up to {shift.bound:.3f})."
        )
    else:
        first = (
            f"No drift detected ({p}): the mean moved by {shift.value:.3f} (chance alone: up to "
            f"{shift.bound:.3f}); a real shift of {verdict.detectable:.3f} on top would have been seen "
            "nine times in ten."
        )
    return [
        first,
        f"{100 * novel.value:.1f} % of the new pictures (95 %: {100 * novel.low:.1f} to "
        f"{100 * novel.high:.1f}) are farther from every known one than {100 * (1 - _USUAL):.0f} % of "
        f"the known ones are from their nearest ({100 * _USUAL:.0f} % would be usual).",
    ]


def _test_table(verdict: Verdict) -> dict[str, Any]:
    rows = [
        [name.replace("_", " "), t.value, t.usual, t.bound, t.p_value]
        for name, t in verdict.tests.items()
    ]
    return {
        "title": "Tests",
        "columns": ["", "value", "shuffled, median", "shuffled, 95 %", "p"],
        "rows": [*rows, ["all three", None, None, None, verdict.p_value]],
        "note": "Shuffled: the same pictures dealt into two batches at random. The last p decides: it "
        "allows for asking three times.",
    }


def _dimension_table(before: Float32, after: Float32) -> dict[str, Any]:
    """The dimensions whose mean moved most, in standard deviations."""
    means = [v.mean(axis=0, dtype=np.float64) for v in (before, after)]
    deviation = np.sqrt((before.var(axis=0) + after.var(axis=0)) / 2)
    moved = (means[1] - means[0]) / np.where(deviation > 1e-9, deviation, np.inf)
    first = np.argsort(-np.abs(moved), kind="stable")[:10]
    rows = [[int(d), float(means[0][d]), float(means[1][d]), float(moved[d])] for d in first]
    columns = ["dimension", "mean before", "mean after", "difference, standard deviations"]
    return {"title": "Dimensions that moved most", "columns": columns, "rows": rows}


def _nearest_curve(usual: Float32, cosines: Float32) -> dict[str, Any]:
    bins = np.linspace(min(usual.min(), cosines.min()) - 1e-3, 1.0, 41)
    named = (("known pictures, among themselves", usual), ("new pictures", cosines))
    return {
        "title": "Cosine to the nearest known picture",
        "x_label": "cosine",
        "y_label": "share of the pictures",
        "series": [
            {
                "name": name,
                "x": ((bins[1:] + bins[:-1]) / 2).tolist(),
                "y": (np.histogram(np.minimum(values, 1), bins)[0] / len(values)).tolist(),
            }
            for name, values in named
        ],
    }


def _known(pictures: Pictures | None, row: int) -> str:
    return f"picture {row}" if pictures is None else pictures.name(row)
