"""Drift between two batches of pictures over time; between two models: `eval.model_drift`.

`eval.two_samples` tests whether both batches come from one distribution, as a model sees them. The
pictures that are farthest from every known one are shown: they are what drives it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval, mean_interval
from eval.data import Captioned, Labelled, Pictures
from eval.features import Encoder, FeatureCache, Features, OnProgress, fingerprint, picture_features
from eval.features.neighbours import LOOKED_AT, check_unit, nearest_known, neighbours
from eval.reports.exhibits import exhibit
from eval.reports.report import EvalReport
from eval.two_sample_test import Verdict, compare_batches

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_SHOWN = 12
_ALIKE, _OTHERWISE = 0.9, 0.5  # neighbours in common: hardly noticed; most of a result is another


def drift_between_encoders(
    encoder_a: Encoder,
    encoder_b: Encoder,
    data: Captioned | Labelled,
    *,
    ks: Sequence[int] = (1, 10, 50),
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """How two models, such as two checkpoints of one, differ in the pictures' embeddings.

    Raises as `picture_features` and `drift_of_embeddings` do.
    """
    started = time.perf_counter()
    cache = cache or FeatureCache(None)
    options: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    a = picture_features(encoder_a, data.pictures, cache=cache, **options)
    b = picture_features(encoder_b, data.pictures, cache=cache, **options)
    kept, in_a, in_b = np.intersect1d(a.kept, b.kept, return_indices=True)
    encoded = time.perf_counter()
    report = drift_of_embeddings(
        a.vectors[in_a],
        b.vectors[in_b],
        pictures=data.select(kept).pictures,
        ks=ks,
        seed=seed,
        **options,
    )
    words = list(report.details["words"])
    if encoder_a.encoder_id != encoder_b.encoder_id:
        words.append("An index made with one model must be made anew before the other searches it.")
    return replace(
        report,
        dataset=data.name,
        split=data.split,
        model=f"{encoder_a.spec} → {encoder_b.spec}",
        encoder_id=encoder_b.encoder_id,
        settings={
            **report.settings,
            "encoder_before": encoder_a.encoder_id,
            "encoder_after": encoder_b.encoder_id,
            "precision": f"{encoder_a.precision} → {encoder_b.precision}",
        },
        fingerprint=fingerprint("", [a.fingerprint, b.fingerprint]),
        warnings=(*data.warnings, *a.warnings, *report.warnings),
        details={**report.details, "words": words},
        seconds={"encoding": encoded - started, **report.seconds},
    )


def drift_of_embeddings(
    a: Float32,
    b: Float32,
    *,
    pictures: Pictures | None = None,
    ks: Sequence[int] = (1, 10, 50),
    dataset: str = "vectors",
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """The same of unit rows a (N, Da) and b (N, Db), row by row of the same pictures.

    InputError: shapes that do not fit, fewer than 4 pictures, rows that are not unit vectors.
    """
    started = time.perf_counter()
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4:
        raise InputError(
            f"embeddings have shapes {a.shape} and {b.shape}; the same pictures, at least 4, are "
            "expected in both"
        )
    if not ks or min(ks) < 1:
        raise InputError(f"K is {list(ks)}; ask for at least 1 neighbour")
    check_unit("vector", a)
    check_unit("vector", b)
    n, random = len(a), np.random.default_rng(seed)
    rows = np.sort(random.permutation(n)[:LOOKED_AT])
    ks = sorted({min(k, n - 1) for k in ks})
    looked: dict[str, Any] = {"rows": rows, "on_progress": on_progress, "stop": stop}
    near_a = neighbours(a, ks[-1], seed=seed, **looked)[0]
    near_b = neighbours(b, ks[-1], seed=seed + 1, **looked)[0]
    samples = {
        f"neighbour_overlap@{k}": metrics.neighbour_overlap(near_a[:, :k], near_b[:, :k])
        for k in ks
    }
    found = {name: mean_interval(values, seed=seed) for name, values in samples.items()}
    found["linear_cka"] = Interval(linear_cka(a, b), math.nan, math.nan, n)
    told = 10 if 10 in ks else ks[-1]
    overlap = found[f"neighbour_overlap@{told}"]
    stay = [told * x for x in (overlap.value, overlap.low, overlap.high, told / (n - 1))]
    words = [
        f"Of a picture's {told} nearest, {stay[0]:.1f} are the same in both "
        f"(95 %: {stay[1]:.1f} to {stay[2]:.1f}; by chance {stay[3]:.2f}).",
        f"Linear CKA is {found['linear_cka'].value:.3f}: 1 is the same space but for rotation and "
        "scale, 0 an unrelated one.",
    ]
    if a.shape[1] == b.shape[1]:
        samples["cosine"] = np.einsum("ij,ij->i", a, b, dtype=np.float64)
        found["cosine"] = mean_interval(samples["cosine"], fraction=False, seed=seed)
        words.append(
            f"The vectors themselves have a mean cosine of {found['cosine'].value:.3f}, which a "
            "rotation alone would change too."
        )
    if overlap.value >= _ALIKE:
        words.insert(0, "The two models search alike.")
    elif overlap.value < _OTHERWISE:
        words.insert(
            0, "The two models search differently: most of what one finds near, the other does not."
        )
    least = samples[f"neighbour_overlap@{told}"]
    items = [
        exhibit(
            pictures,
            int(rows[place]),
            expected=f"{told} neighbours",
            got=f"{round(told * least[place])} of them stay",
        )
        for place in np.argsort(least, kind="stable")[:_SHOWN]
    ]
    collapsed = [name for name, v in (("first", a), ("second", b)) if metrics.variance(v) < 1e-6]
    return EvalReport(
        task="drift",
        dataset=dataset,
        split=None,
        model="",
        encoder_id="",
        n={"pictures": n},
        metrics=found,
        settings={"ks": ks, "neighbours_of": len(rows), "seed": seed, "ties": "at random"},
        fingerprint=fingerprint("", (a.tobytes(), b.tobytes())),
        warnings=tuple(
            f"the {name} model gives all pictures the same vector" for name in collapsed
        ),
        details={
            "words": words,
            "mistakes": [{"title": "Most changed neighbours", "items": items}] if pictures else [],
        },
        seconds={"figures": time.perf_counter() - started},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples if len(rows) == n else {},
    )


def linear_cka(a: Float32, b: Float32) -> float:
    """Likeness of two embeddings (N, Da) and (N, Db) of the same things, whatever their rotation.

    With the unbiased estimator of HSIC (Song et al. 2012; Kornblith et al. 2019, whose plain one is
    near 1 for anything when N is not far above D), so slightly below 0 at times. NaN if one is
    constant. N at least 4.
    """
    n = len(a)
    if n < 4:
        raise InputError(f"CKA of {n} pictures; at least 4 are needed")
    x, y = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in (a, b))

    def hsic(left: Float64, right: Float64) -> float:
        ours, theirs = ((v**2).sum(axis=1) for v in (left, right))
        own = float(((left.T @ right) ** 2).sum()) - n / (n - 2) * float(ours @ theirs)
        return own + float(ours.sum() * theirs.sum()) / ((n - 1) * (n - 2))

    scale = hsic(x, x) * hsic(y, y)
    return hsic(x, y) / math.sqrt(scale) if scale > 1e-24 else math.nan


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
