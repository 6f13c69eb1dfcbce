"""Do two models, such as two checkpoints of one, see the same pictures alike?

Nothing is compared that a rotation of the space would change, for a search does not feel it:
neighbours in common, and linear CKA (Kornblith et al. 2019, without its bias to small samples). The
mean cosine of the vectors themselves is given beside these where the dimensions agree.
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
from eval.data import Captioned, Labelled
from eval.exhibits import exhibit
from eval.features import Encoder, FeatureCache, OnProgress, fingerprint, picture_features
from eval.neighbours import LOOKED_AT, check_unit, neighbours
from eval.report import EvalReport
from eval.source import Pictures

__all__ = ["drift_between_encoders", "drift_of_embeddings", "linear_cka"]

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
