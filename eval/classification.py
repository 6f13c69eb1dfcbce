"""Figures, tables and examples from scores of pictures against classes, for zero-shot and probes.

Ties count by expectation: of m classes that share the best score, each is a hit in 1/m of the cases,
so a model that has collapsed to one vector gets chance, not 0 or 100 %. Accuracy and mean per-class
recall are otherwise those of scikit-learn (`accuracy_score`, `balanced_accuracy_score`), mAP the mean
of its `average_precision_score` over the classes that have pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit import metrics
from clipkit.arrays import Bool, Float32, Float64, Floats, Int64
from clipkit.errors import InputError
from clipkit.metrics import Interval
from clipkit.wording import list_text, percent
from eval.data import Labelled, deeper_classes
from eval.features import fingerprint
from eval.reports.html import MOST_CLASSES
from eval.reports.report import exhibit
from eval.session import Results

_SHOWN_PAIRS = 20
_SHOWN_MISTAKES = 24


# ---- data


def check_labels(data: Labelled) -> None:
    """Raise InputError if class names and labels do not match."""
    classes = len(data.classes)
    if (data.labels is None) == (data.targets is None):
        raise InputError(f"{data.name} must have either one label per picture or targets, not both")
    if classes < 2:
        hint = "".join(
            f"; {Path(data.name, folder)} has {len(names)}: give that"
            for folder, names in list(deeper_classes(data.pictures).items())[:1]
        )
        raise InputError(
            f"{data.name} has {classes} class{'es' * (not classes)}; choosing between classes needs "
            f"2{hint}"
        )
    if data.targets is not None and data.targets.shape[1] != classes:
        raise InputError(
            f"{data.name} has targets for {data.targets.shape[1]} classes, but {classes} class names "
            "are given; give one per class, in the order of the targets"
        )
    if data.labels is not None and len(data.labels):
        low, high = int(data.labels.min()), int(data.labels.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"the labels of {data.name} run from {low} to {high}, which takes {high + 1} class "
                f"names, but {classes} are given; give one per class"
            )


def emptied_classes(data: Labelled, rows: Int64) -> tuple[str, ...]:
    """Return a warning if a class has lost all its pictures; `rows` (N,) are the rows left."""
    before, after = data.pictures_per_class(), data.select(rows).pictures_per_class()
    names = [name for name, a, b in zip(data.classes, before, after, strict=True) if a and not b]
    if not names:
        return ()
    lost = list_text([repr(name) for name in names], 5)
    return (f"no picture of {lost} can be read; means per class are over the others",)


def data_fingerprint(features: str, data: Labelled, rows: Int64) -> str:
    """Return a hash of the pictures (the fingerprint of their features), class names and labels."""
    labels = data.labels if data.labels is not None else data.targets
    assert labels is not None
    return fingerprint(features, [*data.classes, labels[rows].tobytes()])


def stratified_halves(labels: Int64, *, share: float = 0.5, seed: int = 0) -> tuple[Int64, Int64]:
    """Split rows into two sorted sets, every class by `share`; classes of one picture in turn."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(labels)), labels))  # by class, shuffled inside it
    # Continuing where the last class stopped, not starting each at 0, splits classes of one too.
    first = np.diff(np.floor(np.arange(len(labels) + 1) * share)) > 0
    return np.sort(order[first]), np.sort(order[~first])


# ---- one label per picture


def label_metrics(
    scores: Float32, labels: Int64, *, ks: Sequence[int], seed: int = 0
) -> tuple[dict[str, Interval], dict[str, Float64]]:
    """Return (metrics, samples) of scores (N, C) and labels (N,): acc@k for every k up to C, and mean
    per-class recall. The mean of each sample (N,) is its metric."""
    intervals: dict[str, Interval] = {}
    samples: dict[str, Float64] = {}
    for k in ks:
        if k <= scores.shape[1]:
            samples[f"acc@{k}"] = metrics.topk_hits(scores, labels, k)
            intervals[f"acc@{k}"] = metrics.mean_interval(samples[f"acc@{k}"], seed=seed)
    hits = samples["acc@1"] if "acc@1" in samples else metrics.topk_hits(scores, labels, 1)
    classes = scores.shape[1]
    intervals["mean_per_class_recall"] = metrics.statistic_interval(
        lambda rows: float(np.nanmean(metrics.per_class_recall(labels[rows], hits[rows], classes))),
        len(labels),
        seed=seed,
    )
    counts = np.bincount(labels)
    weight = len(labels) / (counts[labels] * np.count_nonzero(counts))
    samples["mean_per_class_recall"] = hits * weight
    return intervals, samples


def class_table(
    classes: Sequence[str], labels: Int64, hits: Float64, counts: Int64
) -> dict[str, Any]:
    """Return a table with a row per class that has pictures, lowest recall first.

    hits are (N,), `counts` is the confusion matrix (C, C).
    """
    n = counts.sum(axis=1)
    recall = metrics.per_class_recall(labels, hits, len(classes))
    predicted = counts.sum(axis=0)
    wrong = counts - np.diag(np.diag(counts))
    rows = []
    for c in np.argsort(recall, kind="stable"):
        if n[c] == 0:
            continue
        other = int(wrong[c].argmax())
        precision = percent(counts[c, c] / predicted[c]) if predicted[c] else None
        confused = f"{classes[other]} ({wrong[c, other]})" if wrong[c, other] else None
        rows.append([classes[c], int(n[c]), percent(recall[c]), precision, confused])
    return {
        "title": "Classes",
        "columns": ["class", "pictures", "recall", "precision", "most often confused with"],
        "rows": rows,
        "note": "Recall: the share of the class's pictures that are classified correctly. Precision: "
        "the share of the pictures classified as this class that belong to it.",
    }


def confused_table(classes: Sequence[str], counts: Int64) -> dict[str, Any]:
    """Return a table of the pairs of classes that are confused most often."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN_PAIRS]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if n := int(wrong[true, predicted]):
            share = percent(n / counts[true].sum())
            rows.append([classes[true], classes[predicted], n, share])
    return {
        "title": "Most confused pairs",
        "columns": ["class", "classified as", "pictures", "of the class"],
        "rows": rows,
    }


def add_classes(
    results: Results, classes: Sequence[str], labels: Int64, scores: Floats, title_end: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the confusion of scores (N, C) and labels (N,), unless there are too many classes to read it,
    and return the added tables of confused pairs and of classes."""
    counts = metrics.confusion(labels, metrics.predictions(scores), len(classes))
    hits = metrics.topk_hits(scores, labels, 1)
    pairs, table = confused_table(classes, counts), class_table(classes, labels, hits, counts)
    for added in (pairs, table):
        added["title"] += title_end
    results.tables += [pairs, table]
    if len(classes) <= MOST_CLASSES:
        results.confusion = {"classes": list(classes), "counts": counts.tolist()}
    return pairs, table


def mistakes(
    data: Labelled, rows: Int64, probabilities: Float32, labels: Int64
) -> list[Mapping[str, Any]]:
    """Return the wrong predictions of highest confidence; probabilities (N, C) and labels (N,) are of
    the pictures `rows` (N,)."""
    predicted = metrics.predictions(probabilities)
    confidence = probabilities[np.arange(len(labels)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_SHOWN_MISTAKES]
    items = [
        exhibit(
            data.pictures,
            int(rows[row]),
            expected=data.classes[labels[row]],
            got=data.classes[predicted[row]],
            score=float(confidence[row]),
        )
        for row in worst
    ]
    labels_shown = ("True class", "Predicted")
    title = "Most confident mistakes"
    return [{"title": title, "items": items, "labels": labels_shown}] if items else []


# ---- several labels per picture


def multi_label_metrics(
    scores: Float32, targets: Bool, classes: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, Interval], Mapping[str, Any]]:
    """Return (metrics, a table of AP per class) of scores and targets (N, C)."""
    if not targets.any():
        raise InputError("no picture has any of the classes, so there is no average precision")

    def mean_ap(rows: Int64) -> float:
        per_class = metrics.average_precision(scores[rows], targets[rows])
        return float(per_class[~np.isnan(per_class)].mean()) if targets[rows].any() else 0.0

    # 200 resamples, because each one sorts every class again
    intervals = {"mAP": metrics.statistic_interval(mean_ap, len(targets), resamples=200, seed=seed)}
    counts = targets.sum(axis=0)
    present = np.flatnonzero(counts)
    values = metrics.average_precision(scores[:, present], targets[:, present])
    rows = [
        [classes[present[i]], int(counts[present[i]]), percent(values[i])]
        for i in np.argsort(values, kind="stable")
    ]
    table = {"title": "Classes", "columns": ["class", "pictures", "AP"], "rows": rows}
    return intervals, table
