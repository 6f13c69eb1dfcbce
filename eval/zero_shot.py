"""Zero-shot classification: pictures against class names (CLIP, arXiv 2103.00020, section 3.1).

A class is the mean of its prompts' unit vectors, brought to unit length again: without the second
normalisation a class whose prompts disagree has a shorter vector and loses to its neighbours. Scores
are cosines, computed in float32 whatever the towers compute in; probabilities are a softmax of
logit_scale x cosine. The temperature that makes these honest (Guo et al. 2017) is fitted on half of
the pictures, and what is said of it is measured on the other half.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval import classification
from eval.classification import percent, stratified_halves
from eval.data import Labelled
from eval.features import (
    Encoder,
    FeatureCache,
    OnProgress,
    logit_scale,
    picture_features,
    text_features,
)
from eval.prompts import Templates, load_templates
from eval.reports.report import EvalReport

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_BINS = 15


def calibration(
    logits: Float32, labels: Int64, *, seed: int = 0
) -> tuple[dict[str, Interval], list[dict[str, Any]], str]:
    """Of logits (N, C), N >= 2, and labels (N,): (metrics, reliability diagrams, a sentence)."""
    fitted_on, measured_on = stratified_halves(labels, seed=seed)
    temperature = metrics.fit_temperature(logits[fitted_on], labels[fitted_on])
    found = {"temperature": Interval(temperature, math.nan, math.nan, len(fitted_on))}
    diagrams = []
    held_out, truth = logits[measured_on].astype(np.float64), labels[measured_on]
    for title, prefix, divisor in (
        ("As the model says it", "", 1.0),
        (f"After temperature {temperature:.2f}", "calibrated/", temperature),
    ):
        scaled = held_out / divisor
        probabilities = metrics.softmax(scaled)
        found[f"{prefix}ECE"] = _ece_interval(probabilities, truth, seed)
        # From logits, so that it is finite where a probability is too small for a number.
        loss = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
        found[f"{prefix}NLL"] = metrics.mean_interval(loss, seed=seed, fraction=False)
        bins = metrics.reliability(probabilities, truth, bins=_BINS)
        names = ("low", "high", "confidence", "accuracy", "n")
        diagrams.append({"title": title, "bins": [{k: getattr(b, k) for k in names} for b in bins]})
    right = float((held_out.argmax(axis=1) == truth).mean())
    sure = float(metrics.softmax(held_out).max(axis=1).mean())
    return found, diagrams, _words(found, sure, right)


def _ece_interval(probabilities: Float64, labels: Int64, seed: int) -> Interval:
    """`metrics.expected_calibration_error`, reduced to what a resampled row adds to its bin."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bin_of = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    return metrics.statistic_interval(
        lambda rows: float(np.abs(np.bincount(bin_of[rows], gap[rows])).sum() / len(rows)),
        len(labels),
        seed=seed,
    )


def _words(found: Mapping[str, Interval], sure: float, right: float) -> str:
    said = f"Its probabilities promise {percent(sure)} right answers and {percent(right)} are right"
    if found["ECE"].low <= found["calibrated/ECE"].high:
        return f"{said}: they can be believed about as well as a temperature could make them."
    way = "too sure of itself" if sure > right else "too unsure of itself"
    return (
        f"{said}: it is {way}. Divide its logits by {found['temperature'].value:.2f}, and the mean gap "
        f"between promise and truth falls from {percent(found['ECE'].value)} to "
        f"{percent(found['calibrated/ECE'].value)}."
    )


def class_vectors(
    encoder: Encoder,
    classes: Sequence[str],
    templates: Templates,
    *,
    cache: FeatureCache | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> Float32:
    """float32 (C, D), unit rows: per class normalise, mean, normalise. InputError for a class
    without prompts, or whose prompts have no finite vector or cancel out."""
    prompts = [templates.prompts(name) for name in classes]
    starts = np.cumsum([0, *map(len, prompts)])[:-1]
    texts = [text for several in prompts for text in several]
    unit = text_features(
        encoder, texts, cache=cache or FeatureCache(None), on_progress=on_progress, stop=stop
    )
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
    """float32 (N, C) of unit rows (N, D) and (C, D). InputError, naming the row, for NaN.

    Equal classes get exactly equal scores, which a matrix product alone does not promise.
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
    """Probabilities float32 (N, C), rows that sum to 1, of pictures (N, D) and classes (C, D)."""
    return _softmax(logit_scale * cosines(vectors, class_vectors))


def _softmax(logits: Float32) -> Float32:
    return metrics.softmax(logits).astype(np.float32)


def evaluate_zero_shot(
    encoder: Encoder,
    data: Labelled,
    *,
    templates: Templates | None = None,
    ks: Sequence[int] = (1, 5),
    calibrate: bool = True,
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """acc@k and mean per-class recall with calibration, or mAP where pictures have several labels.

    `templates` are "simple" unless given. InputError: labels and class names do not fit, no picture
    can be read, or the model gives NaN; `eval.features.Stopped` if `stop` is set.
    """
    started = time.perf_counter()
    templates, cache = templates or load_templates("simple"), cache or FeatureCache(None)
    classification.check_labels(data)
    features = picture_features(
        encoder, data.pictures, cache=cache, on_progress=on_progress, stop=stop
    )
    encoded = time.perf_counter()
    rows = class_vectors(
        encoder, data.classes, templates, cache=cache, on_progress=on_progress, stop=stop
    )
    prompted = time.perf_counter()
    kept = features.kept
    warnings = (*data.warnings, *features.warnings, *classification.emptied_classes(data, kept))
    scores = cosines(features.vectors, rows)
    scale = logit_scale(encoder, cache)
    if data.targets is not None:
        found, table = classification.multi_label_metrics(
            scores, data.targets[kept], data.classes, seed=seed
        )
        samples: dict[str, Float64] = {}
        details: dict[str, Any] = {"tables": [table], "words": _multi_label_words(found, table)}
    else:
        assert data.labels is not None
        labels = data.labels[kept]
        found, samples = classification.label_metrics(scores, labels, ks=ks, seed=seed)
        details = _label_details(data, kept, scores, labels, scale)
        words = [_accuracy_words(found, len(data.classes)), *_class_words(details["tables"])]
        if calibrate and len(labels) >= 2:
            more, bins, said = calibration(scale * scores, labels, seed=seed)
            found |= more
            details["reliability"] = bins
            words.append(said)
        details["words"] = words
    return EvalReport(
        task="zeroshot",
        dataset=data.name,
        split=data.split,
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        n={
            "pictures": len(kept),
            "classes": len(data.classes),
            **({"skipped": len(features.skipped)} if features.skipped else {}),
        },
        metrics=found,
        settings={
            "templates": templates.name,
            "prompts_per_class": len(templates.texts) or "per class",
            "class_vector": "mean of unit vectors, to unit length",
            "ties": "expected hits",
            "logit_scale": scale,
            "precision": encoder.precision,
            "seed": seed,
            **({"subset": data.subset} if data.subset else {}),
        },
        fingerprint=classification.data_fingerprint(features.fingerprint, data, kept),
        warnings=warnings,
        details=details,
        seconds={
            "pictures": encoded - started,
            "prompts": prompted - encoded,
            "figures": time.perf_counter() - prompted,
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples,
    )


def _label_details(
    data: Labelled, kept: Int64, scores: Float32, labels: Int64, scale: float
) -> dict[str, Any]:
    counts = metrics.confusion(labels, metrics.predictions(scores), len(data.classes))
    hits = metrics.topk_hits(scores, labels, 1)
    return {
        "tables": [
            classification.confused_table(data.classes, counts),
            classification.class_table(data.classes, labels, hits, counts),
        ],
        **classification.confusion_detail(data.classes, counts),
        "mistakes": classification.mistakes(data, kept, _softmax(scale * scores), labels),
    }


def _accuracy_words(found: Mapping[str, Interval], classes: int) -> str:
    right, chance = found.get("acc@1"), 1 / classes
    if right is None:
        return f"Guessing among {classes:,} classes would name {percent(chance)} rightly."
    text = (
        f"Of {right.n:,} pictures the model names {percent(right.value)} rightly "
        f"(95 % interval {percent(right.low)} to {percent(right.high)}) among {classes:,} classes, "
        f"where guessing would name {percent(chance)}."
    )
    return text if right.low > chance else f"{text} That is not clearly better than guessing."


def _class_words(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    pairs, classes = (table["rows"] for table in tables)
    words = []
    if len(classes) > 1:
        worst, best = classes[0], classes[-1]
        words.append(
            f"It knows “{best[0]}” best ({best[2]} of them found) and “{worst[0]}” least ({worst[2]})."
        )
    if pairs:
        true, said, n, share = pairs[0]
        words.append(
            f"Its commonest mistake is to take “{true}” for “{said}”: {n:,} times, {share} of the class."
        )
    return words


def _multi_label_words(found: Mapping[str, Interval], table: Mapping[str, Any]) -> list[str]:
    value, rows = found["mAP"], table["rows"]
    return [
        f"Sorted by each of {len(rows)} classes in turn, the pictures that have it come first with an "
        f"average precision of {percent(value.value)} (95 % interval {percent(value.low)} to "
        f"{percent(value.high)}, {value.n:,} pictures).",
        f"“{rows[-1][0]}” goes best ({rows[-1][2]}), “{rows[0][0]}” least ({rows[0][2]}).",
    ]
