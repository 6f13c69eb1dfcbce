"""Drift: between two models on the same pictures, and between two batches of pictures.

Two models are compared by their neighbours, cosines and linear CKA. Two batches are compared by a
two-sample test (`clipkit.metrics.compare_batches`) on one model's vectors; the pictures farthest from
every known one are shown, since they are what drives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64
from clipkit.errors import InputError
from clipkit.metrics import Interval, TwoSampleTest, mean_interval
from clipkit.wording import percent
from eval.data import Captioned, Labelled, Pictures
from eval.features import Encoder, fingerprint
from eval.reports.report import EvalReport, curve, exhibit, histogram_series
from eval.reports.wording import p_text, percent_interval
from eval.session import Results, Session
from eval.space import LOOKED_AT, check_unit, nearest_known, neighbours

_SHOWN = 12
_ALIKE, _DIFFERENT = 0.9, 0.5  # share of neighbours in common
_FAR = 0.05  # share of the known pictures that count as far from the others


# ---- between two models


def drift_between_encoders(
    encoder_a: Encoder,
    encoder_b: Encoder,
    data: Captioned | Labelled,
    *,
    ks: Sequence[int] = (1, 10, 50),
    session: Session | None = None,
) -> EvalReport:
    """Measure how two models, such as two checkpoints, differ in the pictures' embeddings.

    Raises what `picture_features` and `add_model_drift` raise.
    """
    session, results = session or Session(), Results("drift")
    a = session.picture_features(encoder_a, data.pictures)
    b = session.picture_features(encoder_b, data.pictures)
    results.lap("encoding")
    both, in_a, in_b = np.intersect1d(a.rows, b.rows, return_indices=True)
    results.warnings += [*data.warnings, *a.warnings]
    pictures = data.select(both).pictures
    add_model_drift(
        results, a.vectors[in_a], b.vectors[in_b], pictures=pictures, ks=ks, session=session
    )
    if encoder_a.encoder_id != encoder_b.encoder_id:
        results.sentences.append(
            "An index built with one model must be rebuilt before the other can search it."
        )
    results.settings |= {
        "encoder_before": encoder_a.encoder_id,
        "encoder_after": encoder_b.encoder_id,
        "precision": _both(encoder_a.precision, encoder_b.precision),
        "device": _both(a.device, b.device),
    }
    return results.report(
        session,
        n={"pictures": len(both)},
        fingerprint=fingerprint("", [a.fingerprint, b.fingerprint]),
        dataset=data.name,
        split=data.split,
        model=f"{encoder_a.spec} → {encoder_b.spec}",
        encoder_id=encoder_b.encoder_id,
    )


def _both(first: str, second: str) -> str:
    return first if first == second else f"{first} → {second}"


def add_model_drift(
    results: Results,
    a: Float32,
    b: Float32,
    *,
    pictures: Pictures | None = None,
    ks: Sequence[int] = (1, 10, 50),
    session: Session,
) -> None:
    """Add the comparison of unit rows a (N, Da) and b (N, Db), row by row of the same pictures.

    Raises InputError for shapes that do not match, fewer than 4 pictures, or rows of another length.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4:
        raise InputError(
            f"embeddings have shapes {a.shape} and {b.shape}; the same pictures, at least 4, are "
            "expected in both"
        )
    if not ks or min(ks) < 1:
        raise InputError(f"K is {list(ks)}; ask for at least 1 neighbour")
    check_unit("vector", a)
    check_unit("vector", b)
    n, seed = len(a), session.seed
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:LOOKED_AT])
    ks = sorted({min(k, n - 1) for k in ks})
    near_a = neighbours(a, ks[-1], rows=rows, seed=seed, session=session)[0]
    near_b = neighbours(b, ks[-1], rows=rows, seed=seed + 1, session=session)[0]
    samples = {
        f"neighbour_overlap@{k}": metrics.neighbour_overlap(near_a[:, :k], near_b[:, :k])
        for k in ks
    }
    results.metrics = {name: mean_interval(values, seed=seed) for name, values in samples.items()}
    cka = linear_cka(a, b)
    results.metrics["linear_cka"] = Interval.without_bounds(cka, n)
    k = 10 if 10 in ks else ks[-1]
    overlap = results.metrics[f"neighbour_overlap@{k}"]
    same = [k * x for x in (overlap.value, overlap.low, overlap.high, k / (n - 1))]
    if overlap.value >= _ALIKE:
        results.sentences.append("The two models find nearly the same pictures.")
    elif overlap.value < _DIFFERENT:
        results.sentences.append(
            "The two models find different pictures: they share less than half of the neighbours."
        )
    results.sentences += [
        f"Of a picture's {k} nearest neighbours, {same[0]:.1f} are the same in both models on average "
        f"(95 % interval {same[1]:.1f} to {same[2]:.1f}; chance is {same[3]:.2f}).",
        f"Linear CKA is {cka:.3f}: 1 means the same space up to rotation and scale, 0 an unrelated one.",
    ]
    if a.shape[1] == b.shape[1]:
        samples["cosine"] = np.einsum("ij,ij->i", a, b, dtype=np.float64)
        results.metrics["cosine"] = mean_interval(samples["cosine"], fraction=False, seed=seed)
        results.sentences.append(
            f"The mean cosine between a picture's two vectors is {results.metrics['cosine'].value:.3f}; "
            "a rotation alone would change it too."
        )
    for name, vectors in (("first", a), ("second", b)):
        if metrics.variance(vectors) < 1e-6:
            results.warnings.append(f"the {name} model gives all pictures the same vector")
    if pictures is not None:
        shares = samples[f"neighbour_overlap@{k}"]
        items = [
            exhibit(pictures, int(rows[at]), expected=str(k), got=f"{round(k * shares[at])} of {k}")
            for at in np.argsort(shares, kind="stable")[:_SHOWN]
        ]
        labels = ("Neighbours", "In common")
        title = "Most changed neighbours"
        results.mistakes.append({"title": title, "items": items, "labels": labels})
    if len(rows) == n:
        results.samples = samples
    results.settings |= {"ks": ks, "neighbours_of": len(rows), "ties": "at random"}


def linear_cka(a: Float32, b: Float32) -> float:
    """Return the similarity of two embeddings (N, Da) and (N, Db) of the same pictures, whatever
    their rotation and scale.

    Uses the unbiased estimator of HSIC (Song et al. 2012), so it may fall slightly below 0; the biased
    one of Kornblith et al. 2019 is near 1 for anything unless N is far above D. NaN if one embedding
    is constant. Raises InputError for fewer than 4 pictures.
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


# ---- between two batches of pictures


def drift_between_batches(
    encoder: Encoder,
    before: Captioned | Labelled,
    after: Captioned | Labelled,
    *,
    session: Session | None = None,
) -> EvalReport:
    """Test whether the pictures of `after` are distributed like those of `before`, in one model's space.

    Raises what `picture_features` and `add_batch_drift` raise.
    """
    session, results = session or Session(), Results("drift")
    old, new = (session.picture_features(encoder, data.pictures) for data in (before, after))
    results.lap("encoding")
    results.warnings += [*before.warnings, *after.warnings, *old.warnings, *new.warnings]
    reference, pictures = before.select(old.rows).pictures, after.select(new.rows).pictures
    add_batch_drift(
        results, old.vectors, new.vectors, reference=reference, pictures=pictures, session=session
    )
    results.settings |= {"precision": encoder.precision, "device": _both(old.device, new.device)}
    return results.report(
        session,
        n={"pictures_before": len(old.vectors), "pictures_after": len(new.vectors)},
        fingerprint=fingerprint("", [old.fingerprint, new.fingerprint]),
        dataset=f"{before.name} → {after.name}",
        split=None if before.split == after.split is None else f"{before.split} → {after.split}",
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
    )


def add_batch_drift(
    results: Results,
    before: Float32,
    after: Float32,
    *,
    reference: Pictures | None = None,
    pictures: Pictures | None = None,
    level: float = 0.05,
    permutations: int = 499,
    sample: int = 2000,
    session: Session,
) -> None:
    """Add the two-sample test of unit rows before (N, D) and after (M, D), the share of novel pictures,
    the dimensions that moved and the most novel pictures; `reference` and `pictures` are the rows'.

    Raises InputError for rows of another length, and what `compare_batches` raises.
    """
    test = metrics.compare_batches(
        before, after, level=level, permutations=permutations, sample=sample, seed=session.seed
    )
    check_unit("vector before", before)
    check_unit("vector after", after)
    random = np.random.default_rng(session.seed)
    old, new = (np.sort(random.permutation(len(v))[:LOOKED_AT]) for v in (before, after))
    usual = neighbours(before, 1, rows=old, session=session)[1][:, 0]
    near, scores = nearest_known(after[new], before, 1, session=session)
    nearest, cosines = near[:, 0], scores[:, 0]
    novel = mean_interval(cosines < np.quantile(usual, _FAR), seed=session.seed)
    smaller = min(test.sizes)
    values = {"p_value": test.p_value} | {name: s.value for name, s in test.statistics.items()}
    results.metrics = {
        name: Interval.without_bounds(value, smaller) for name, value in values.items()
    }
    results.metrics["novel_share"] = novel
    results.settings |= {
        "level": level,
        "permutations": permutations,
        "compared": list(test.sizes),
    }
    spread = math.sqrt(metrics.variance(np.concatenate([before, after])))
    results.sentences += _batch_sentences(test, level, spread, novel)
    results.tables += [_test_table(test), _dimension_table(before, after)]
    results.curves.append(_nearest_curve(usual, cosines))
    if pictures is not None:
        items = [
            exhibit(
                pictures,
                int(new[at]),
                expected="",
                got=f"picture {nearest[at]}"
                if reference is None
                else reference.name(int(nearest[at])),
                score=float(cosines[at]),
            )
            for at in np.argsort(cosines, kind="stable")[:_SHOWN]
        ]
        labels = ("", "Nearest known picture")
        results.mistakes.append({"title": "Most novel pictures", "items": items, "labels": labels})


def _batch_sentences(
    test: TwoSampleTest, level: float, spread: float, novel: Interval
) -> list[str]:
    shift = test.statistics["mean_shift"]
    relative = percent(shift.value / (spread or 1))
    moved = f"The mean moved by {shift.value:.3f}"
    if test.p_value <= level:
        verdict = (
            f"Drift: the batches differ by more than chance ({p_text(test.p_value)}). {moved}, "
            f"{relative} of the pictures' own spread; chance alone moves it by up to {shift.bound:.3f}."
        )
    else:
        verdict = (
            f"No drift detected ({p_text(test.p_value)}). {moved}; chance alone moves it by up to "
            f"{shift.bound:.3f}. A shift of {test.detectable:.3f} would be detected nine times in ten."
        )
    return [
        verdict,
        f"{percent(novel.value)} of the new pictures are novel ({percent_interval(novel)}): farther "
        f"from every known picture than {100 * (1 - _FAR):.0f} % of the known ones are from their "
        f"nearest. {100 * _FAR:.0f} % is usual.",
    ]


def _test_table(test: TwoSampleTest) -> dict[str, Any]:
    rows = [
        [name.replace("_", " "), s.value, s.usual, s.bound, s.p_value]
        for name, s in test.statistics.items()
    ]
    return {
        "title": "Tests",
        "columns": ["", "value", "shuffled, median", "shuffled, 95 %", "p"],
        "rows": [*rows, ["all three", None, None, None, test.p_value]],
        "note": "Shuffled: the same pictures split into two batches at random. The last p decides: it "
        "is corrected for three tests.",
    }


def _dimension_table(before: Float32, after: Float32) -> dict[str, Any]:
    """Return the dimensions whose mean moved most, in standard deviations."""
    means = [v.mean(axis=0, dtype=np.float64) for v in (before, after)]
    deviation = np.sqrt((before.var(axis=0) + after.var(axis=0)) / 2)
    moved = (means[1] - means[0]) / np.where(deviation > 1e-9, deviation, np.inf)
    first = np.argsort(-np.abs(moved), kind="stable")[:10]
    rows = [[int(d), float(means[0][d]), float(means[1][d]), float(moved[d])] for d in first]
    columns = ["dimension", "mean before", "mean after", "difference, standard deviations"]
    return {"title": "Dimensions that moved most", "columns": columns, "rows": rows}


def _nearest_curve(usual: Float32, cosines: Float32) -> dict[str, Any]:
    bins = np.linspace(min(usual.min(), cosines.min()) - 1e-3, 1.0, 41)
    series = [
        histogram_series("known pictures, to each other", np.minimum(usual, 1), bins),
        histogram_series("new pictures", np.minimum(cosines, 1), bins),
    ]
    title, y_label = "Cosine to the nearest known picture", "share of the pictures"
    return curve(title, "cosine", y_label, series)
