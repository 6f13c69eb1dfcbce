"""What scores of pictures against classes say: the part that zero-shot and probes share.

Ties count by expectation: of m classes that share the best score, each is a hit in 1/m of the cases,
so a model that has collapsed to one vector gets chance, not 0 or 100 %. Accuracy and mean per-class
recall are otherwise those of scikit-learn (`accuracy_score`, `balanced_accuracy_score`), mAP the mean
of its `average_precision_score` over the classes that have pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval.data import Labelled
from eval.features import fingerprint, thumbnail_if_there

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_LARGEST_CONFUSION = 64  # classes; a larger matrix cannot be read, the table of pairs can
_SHOWN_PAIRS = 20
_SHOWN_MISTAKES = 24


def percent(share: float) -> str:
    """0.4534 -> 45.3 %, as text."""
    return f"{100 * share:.1f} %"


# ---- what was given


def check_labels(data: Labelled) -> None:
    """InputError where class names and labels do not fit together."""
    classes = len(data.classes)
    if (data.labels is None) == (data.targets is None):
        raise InputError(f"{data.name} must have either one label per picture or targets, not both")
    if classes < 2:
        raise InputError(f"{data.name} has {classes} class; choosing between classes needs 2")
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


def emptied_classes(data: Labelled, kept: Int64) -> tuple[str, ...]:
    """A warning if unreadable pictures were all that some classes had."""
    every, left = _pictures(data, np.arange(len(data.pictures))), _pictures(data, kept)
    names = [name for name, a, b in zip(data.classes, every, left, strict=True) if a and not b]
    if not names:
        return ()
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")
    return (f"no picture of {shown} can be read; means per class are over the others",)


def _pictures(data: Labelled, rows: Int64) -> Int64:
    """Pictures per class, int64 (C,)."""
    if data.targets is not None:
        return np.asarray(data.targets[rows].sum(axis=0), np.int64)
    assert data.labels is not None
    return np.bincount(data.labels[rows], minlength=len(data.classes)).astype(np.int64)


def data_fingerprint(features: str, data: Labelled, kept: Int64) -> str:
    """Of the pictures (the fingerprint of their features), the class names and the labels."""
    answers = data.labels if data.labels is not None else data.targets
    assert answers is not None
    return fingerprint(features, [*data.classes, answers[kept].tobytes()])


def stratified_halves(labels: Int64, *, share: float = 0.5, seed: int = 0) -> tuple[Int64, Int64]:
    """Two sorted sets of row numbers, every class divided by `share`; classes of one by turns."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(labels)), labels))  # by class, shuffled inside it
    # Going on where the last class stopped, rather than starting each at 0, divides singles too.
    first = np.diff(np.floor(np.arange(len(labels) + 1) * share)) > 0
    return np.sort(order[first]), np.sort(order[~first])


# ---- one label per picture


def label_metrics(
    scores: Float32, labels: Int64, *, ks: Sequence[int], seed: int = 0
) -> tuple[dict[str, Interval], dict[str, Float64]]:
    """Of scores (N, C) and labels (N,): acc@k for every k up to C, and mean per-class recall.

    Returns (metrics, samples); each sample (N,) has its metric as mean.
    """
    found: dict[str, Interval] = {}
    samples: dict[str, Float64] = {}
    for k in ks:
        if k <= scores.shape[1]:
            samples[f"acc@{k}"] = metrics.topk_hits(scores, labels, k)
            found[f"acc@{k}"] = metrics.mean_interval(samples[f"acc@{k}"], seed=seed)
    hits = samples["acc@1"] if "acc@1" in samples else metrics.topk_hits(scores, labels, 1)
    classes = scores.shape[1]
    found["mean_per_class_recall"] = metrics.statistic_interval(
        lambda rows: float(np.nanmean(metrics.per_class_recall(labels[rows], hits[rows], classes))),
        len(labels),
        seed=seed,
    )
    counts = np.bincount(labels)
    weight = len(labels) / (counts[labels] * np.count_nonzero(counts))
    samples["mean_per_class_recall"] = hits * weight
    return found, samples


def class_table(
    classes: Sequence[str], labels: Int64, hits: Float64, counts: Int64
) -> dict[str, Any]:
    """A row per class that has pictures, the least recalled first; `counts` (C, C) is the confusion."""
    n = counts.sum(axis=1)
    recall = metrics.per_class_recall(labels, hits, len(classes))
    said = counts.sum(axis=0)
    wrong = counts - np.diag(np.diag(counts))
    rows = []
    for c in np.argsort(recall, kind="stable"):
        if n[c] == 0:
            continue
        other = int(wrong[c].argmax())
        precision = percent(counts[c, c] / said[c]) if said[c] else None
        taken = f"{classes[other]} ({wrong[c, other]})" if wrong[c, other] else None
        rows.append([classes[c], int(n[c]), percent(recall[c]), precision, taken])
    return {
        "title": "Classes",
        "columns": ["class", "pictures", "recall", "precision", "most often taken for"],
        "rows": rows,
        "note": "Recall: of the class's pictures, how many are named so. Precision: of what is named "
        "so, how much is of the class; – where nothing is.",
    }


def confused_table(classes: Sequence[str], counts: Int64) -> dict[str, Any]:
    """The pairs of classes that are confused most often."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN_PAIRS]
    rows = []
    for true, said in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if n := int(wrong[true, said]):
            share = percent(n / counts[true].sum())
            rows.append([classes[true], classes[said], n, share])
    return {
        "title": "Most confused pairs",
        "columns": ["is", "taken for", "pictures", "of the class"],
        "rows": rows,
    }


def confusion_detail(classes: Sequence[str], counts: Int64) -> dict[str, Any]:
    """{"confusion": ...} for a report's details, or nothing where it would be too large to read."""
    if len(classes) > _LARGEST_CONFUSION:
        return {}
    return {"confusion": {"classes": list(classes), "counts": counts.tolist()}}


def mistakes(
    data: Labelled, kept: Int64, probabilities: Float32, labels: Int64
) -> list[dict[str, Any]]:
    """The most confident wrong answers, with their pictures; probabilities (N, C) of the rows kept."""
    predicted = metrics.predictions(probabilities)
    confidence = probabilities[np.arange(len(labels)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_SHOWN_MISTAKES]
    items = [
        {
            "name": data.pictures.name(int(kept[row])),
            "expected": data.classes[labels[row]],
            "got": data.classes[predicted[row]],
            "score": float(confidence[row]),
            "thumbnail": thumbnail_if_there(data.pictures, int(kept[row])),
        }
        for row in worst
    ]
    return [{"title": "Surest mistakes", "items": items}] if items else []


# ---- several labels per picture


def multi_label_metrics(
    scores: Float32, targets: Bool, classes: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, Interval], Mapping[str, Any]]:
    """Of scores and targets (N, C): (metrics, a table of AP per class)."""

    if not targets.any():
        raise InputError("no picture has any of the classes, so there is no average precision")

    def mean_ap(rows: Int64) -> float:
        per_class = metrics.average_precision(scores[rows], targets[rows])
        return float(per_class[~np.isnan(per_class)].mean()) if targets[rows].any() else 0.0

    # Each resampling sorts every class anew.
    found = {"mAP": metrics.statistic_interval(mean_ap, len(targets), resamples=200, seed=seed)}
    counts = targets.sum(axis=0)
    present = np.flatnonzero(counts)
    values = metrics.average_precision(scores[:, present], targets[:, present])
    rows = [
        [classes[present[i]], int(counts[present[i]]), percent(values[i])]
        for i in np.argsort(values, kind="stable")
    ]
    table = {"title": "Classes", "columns": ["class", "pictures", "AP"], "rows": rows}
    return found, table
