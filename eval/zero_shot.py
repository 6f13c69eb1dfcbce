"""Zero-shot classification: pictures against class names (CLIP, arXiv 2103.00020, section 3.1).

A class vector is the mean of its prompts' unit vectors, brought to unit length again: without the
second normalisation a class whose prompts disagree has a shorter vector and loses to its neighbours.
Scores are cosines, computed in float32 whatever the towers compute in; probabilities are a softmax of
logit_scale x cosine.

Calibration (Guo et al. 2017, arXiv 1706.04599): a temperature is fitted on half of the pictures, and
reliability, ECE and NLL are measured on the other half, before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64, Floats, Int64
from clipkit.errors import InputError
from clipkit.metrics import Interval
from clipkit.wording import percent
from eval import classification
from eval.data import Labelled
from eval.features import Encoder
from eval.prompts import Templates, load_templates
from eval.reports.report import EvalReport
from eval.reports.wording import percent_interval
from eval.session import Results, Session

_BINS = 15


def evaluate_zero_shot(
    encoder: Encoder,
    data: Labelled,
    *,
    templates: Templates | None = None,
    ks: Sequence[int] = (1, 5),
    calibrate: bool = True,
    session: Session | None = None,
) -> EvalReport:
    """Measure acc@k, mean per-class recall and calibration, or mAP of pictures with several labels.

    `templates` default to "simple". Raises InputError if labels and class names do not match, no
    picture can be read, or the model gives NaN; `eval.features.Stopped` if the session is stopped.
    """
    session, templates = session or Session(), templates or load_templates("simple")
    classification.check_labels(data)
    results = Results("zeroshot")
    features = session.picture_features(encoder, data.pictures)
    results.lap("pictures")
    rows = class_vectors(encoder, data.classes, templates, session)
    results.lap("prompts")
    results.warnings += classification.emptied_classes(data, features.rows)
    scores, scale = cosines(features.vectors, rows), session.logit_scale(encoder)
    if data.targets is not None:
        results.metrics, table = classification.multi_label_metrics(
            scores, data.targets[features.rows], data.classes, seed=session.seed
        )
        results.tables = [table]
        results.sentences = _multi_label_sentences(results.metrics["mAP"], table["rows"])
    else:
        assert data.labels is not None
        labels = data.labels[features.rows]
        results.metrics, results.samples = classification.label_metrics(
            scores, labels, ks=ks, seed=session.seed
        )
        _describe_classes(data, features.rows, scores, labels, scale, results)
        if calibrate and len(labels) >= 2:
            add_calibration(results, scale * scores, labels, seed=session.seed)
    results.settings |= {
        "templates": templates.name,
        "prompts_per_class": len(templates.texts) or "per class",
        "class_vector": "mean of unit vectors, to unit length",
        "ties": "expected hits",
        "logit_scale": scale,
    }
    return results.report_on(
        session,
        encoder,
        data,
        features,
        n={"classes": len(data.classes)},
        fingerprint=classification.data_fingerprint(features.fingerprint, data, features.rows),
    )


# ---- class vectors and scores


def class_vectors(
    encoder: Encoder, classes: Sequence[str], templates: Templates, session: Session | None = None
) -> Float32:
    """Return one vector per class, float32 (C, D), unit rows: normalise, average, normalise.

    Raises InputError for a class without prompts, or whose prompts cancel out or are not finite.
    """
    prompts = [templates.prompts(name) for name in classes]
    starts = np.cumsum([0, *map(len, prompts)])[:-1]
    texts = [text for several in prompts for text in several]
    unit = (session or Session()).text_features(encoder, texts)
    means: Float32 = np.add.reduceat(unit, starts, axis=0) if classes else unit
    lengths = np.linalg.norm(means, axis=1)
    for row in np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))):
        raise InputError(
            f"model {encoder.spec} gives class {classes[int(row)]!r} no direction: its prompts' "
            f"vectors sum to length {lengths[row]}; try another model or other templates"
        )
    means /= lengths[:, None]
    return means


def cosines(vectors: Float32, class_rows: Float32) -> Float32:
    """Return float32 (N, C) of unit rows (N, D) and (C, D). Raises InputError, naming the row, for NaN.

    Equal classes get exactly equal scores, which a matrix product alone does not guarantee.
    """
    vectors, class_rows = np.asarray(vectors, np.float32), np.asarray(class_rows, np.float32)
    distinct, inverse = np.unique(class_rows, axis=0, return_inverse=True)
    scores: Float32 = vectors @ distinct.T
    for row in np.flatnonzero(~np.isfinite(scores).all(axis=1)):
        raise InputError(
            f"picture {row} has scores that are not finite; the model gives NaN: use another "
            "precision or another model"
        )
    return scores[:, inverse.reshape(-1)]


def classify(vectors: Float32, class_vectors: Float32, *, logit_scale: float = 100.0) -> Float32:
    """Return probabilities, float32 (N, C), rows summing to 1, of pictures (N, D) and classes (C, D)."""
    return _softmax(logit_scale * cosines(vectors, class_vectors)).astype(np.float32)


def _softmax(logits: Floats) -> Float64:
    from scipy.special import softmax

    return np.asarray(softmax(logits.astype(np.float64), axis=1))


# ---- calibration


def add_calibration(results: Results, logits: Float32, labels: Int64, *, seed: int = 0) -> None:
    """Add temperature, ECE, NLL and reliability diagrams of logits (N, C), N >= 2, labels (N,)."""
    fitted_on, measured_on = classification.stratified_halves(labels, seed=seed)
    temperature = metrics.fit_temperature(logits[fitted_on], labels[fitted_on])
    results.metrics["temperature"] = Interval.without_bounds(temperature, len(fitted_on))
    held_out, truth = logits[measured_on].astype(np.float64), labels[measured_on]
    for title, prefix, divisor in (
        ("As the model gives it", "", 1.0),
        (f"After temperature {temperature:.2f}", "calibrated/", temperature),
    ):
        scaled = held_out / divisor
        probabilities = _softmax(scaled)
        results.metrics[f"{prefix}ECE"] = _ece_interval(probabilities, truth, seed)
        # From logits, so that it is finite where a probability rounds to 0.
        loss = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
        results.metrics[f"{prefix}NLL"] = metrics.mean_interval(loss, seed=seed, fraction=False)
        bins = metrics.reliability(probabilities, truth, bins=_BINS)
        results.reliability.append({"title": title, "bins": [asdict(b) for b in bins]})
    accuracy = float((held_out.argmax(axis=1) == truth).mean())
    confidence = float(_softmax(held_out).max(axis=1).mean())
    results.sentences.append(_calibration_sentence(results.metrics, confidence, accuracy))


def _ece_interval(probabilities: Float64, labels: Int64, seed: int) -> Interval:
    """Return the ECE, mean |confidence - accuracy| over equal-width bins, with a bootstrap interval.

    A resample needs only the sum per bin of what each row adds.
    """
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bin_of = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    return metrics.statistic_interval(
        lambda rows: float(np.abs(np.bincount(bin_of[rows], gap[rows])).sum() / len(rows)),
        len(labels),
        seed=seed,
    )


def _calibration_sentence(
    intervals: Mapping[str, Interval], confidence: float, accuracy: float
) -> str:
    ece, calibrated = intervals["ECE"], intervals["calibrated/ECE"]
    lowered = ece.low > calibrated.high
    way = "neither over- nor underconfident on average"
    if ece.value <= 0.05 and not lowered:
        way = "well calibrated"
    elif abs(confidence - accuracy) > 0.01:
        way = "overconfident" if confidence > accuracy else "underconfident"
    change = (
        f"Dividing its logits by {intervals['temperature'].value:.2f} lowers the calibration error "
        f"(ECE) from {percent(ece.value)} to {percent(calibrated.value)}."
        if lowered
        else f"Its calibration error (ECE) is {percent(ece.value)}; a temperature does not clearly "
        "lower it."
    )
    return (
        f"Mean confidence is {percent(confidence)}, accuracy {percent(accuracy)}: the model is {way}. "
        + change
    )


# ---- tables and sentences


def _describe_classes(
    data: Labelled, rows: Int64, scores: Float32, labels: Int64, scale: float, results: Results
) -> None:
    """Add confusion, tables of classes and pairs, mistakes, and sentences about them."""
    pairs, classes = classification.add_classes(results, data.classes, labels, scores)
    probabilities = _softmax(scale * scores).astype(np.float32)
    results.mistakes += classification.mistakes(data, rows, probabilities, labels)
    results.sentences.append(_accuracy_sentence(results.metrics.get("acc@1"), len(data.classes)))
    if len(classes["rows"]) > 1:
        worst, best = classes["rows"][0], classes["rows"][-1]
        results.sentences.append(
            f"Recall is highest for “{best[0]}” ({best[2]}) and lowest for “{worst[0]}” ({worst[2]})."
        )
    if pairs["rows"]:
        true, predicted, n, share = pairs["rows"][0]
        results.sentences.append(
            f"The most frequent mistake is “{true}” classified as “{predicted}”: {n:,} pictures, "
            f"{share} of the class."
        )


def _accuracy_sentence(accuracy: Interval | None, classes: int) -> str:
    chance = 1 / classes
    if accuracy is None:
        return f"Chance among {classes:,} classes is {percent(chance)}."
    sentence = (
        f"The model classifies {percent(accuracy.value)} of {accuracy.n:,} pictures correctly "
        f"({percent_interval(accuracy)}) among {classes:,} classes; chance is {percent(chance)}."
    )
    return (
        sentence if accuracy.low > chance else f"{sentence} It is not clearly better than chance."
    )


def _multi_label_sentences(mean: Interval, rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        f"The mean average precision over {len(rows)} classes is {percent(mean.value)} "
        f"({percent_interval(mean)}, {mean.n:,} pictures).",
        f"It is highest for “{rows[-1][0]}” ({rows[-1][2]}) and lowest for “{rows[0][0]}” "
        f"({rows[0][2]}).",
    ]
