"""How much accuracy or recall survives corrupted pictures, and how it differs between domains.

Every picture is measured clean and under each corruption and severity (`eval.corruptions`), the texts
staying the same. "relative" is the mean under all corruptions divided by the clean figure.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval import classification
from eval.classification import percent
from eval.corruptions import CORRUPTIONS, SIDE, corruption
from eval.data import Captioned, Labelled
from eval.features import (
    Encoder,
    FeatureCache,
    Features,
    OnProgress,
    fingerprint,
    picture_features,
    text_features,
)
from eval.prompts import Templates, load_templates
from eval.reports.report import EvalReport
from eval.zero_shot import class_vectors, cosines

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Samples = Mapping[str, Float64]  # metric -> (N,) per picture, their mean the metric


def evaluate_robustness(
    encoder: Encoder,
    data: Labelled | Captioned,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = (1, 3, 5),
    templates: Templates | None = None,
    k: int = 1,
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """acc@k of labelled pictures, R@k both ways of captioned ones: clean, corrupted, by domain.

    No corruptions measure the domains alone. InputError: an unknown corruption or severity, pictures
    with several labels, or no captions.
    """
    started = time.perf_counter()
    cache, templates = cache or FeatureCache(None), templates or load_templates("simple")
    asked = [(name, s, corruption(name, s)) for name in corruptions for s in severities]
    watch: dict[str, Any] = {"cache": cache, "on_progress": on_progress, "stop": stop}
    data = _usable(data)
    clean = picture_features(encoder, data.pictures, **watch)
    data = data.select(clean.kept)
    measure, of_data = _measure(encoder, data, templates, k, watch)
    samples = {f"clean/{name}": values for name, values in measure(clean.vectors).items()}
    names = [name.removeprefix("clean/") for name in samples]
    for name, severity, transform in asked:
        features = picture_features(encoder, data.pictures, transform=transform, **watch)
        _same_pictures(clean, features)
        for metric, values in measure(features.vectors).items():
            samples[f"{name}@{severity}/{metric}"] = values
    found = {name: _interval(values, seed) for name, values in samples.items()}
    tables, curves, words = [], [], []
    for metric in names:
        if asked:
            found |= _summary(samples, metric, asked, seed)
            curves.append(_curve(found, metric, corruptions, severities))
            tables.append(_table(found, metric, corruptions, severities))
            words.append(_words(found, metric, corruptions, severities))
        if isinstance(data, Labelled) and data.domains is not None:
            by_domain = _domains(samples[f"clean/{metric}"], data.domains, metric, seed)
            found |= by_domain
            tables.append(_domain_table(by_domain, metric))
            words.append(_domain_words(by_domain, metric))
    pictures = {"pictures": len(clean.kept)}
    return EvalReport(
        task="robustness",
        dataset=data.name,
        split=data.split,
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        n=pictures | ({"skipped": len(clean.skipped)} if clean.skipped else {}),
        metrics=found,
        settings={
            "corruptions": list(corruptions),
            "severities": list(severities),
            "corrupted_at": f"{SIDE} pixels",
            **({"templates": templates.name} if isinstance(data, Labelled) else {}),
            "ties": "expected hits",
            "precision": encoder.precision,
            "seed": seed,
            **({"subset": data.subset} if data.subset else {}),
        },
        fingerprint=fingerprint(clean.fingerprint, of_data),
        warnings=(*data.warnings, *clean.warnings),
        details={"words": words, "tables": tables, "curves": curves},
        seconds={"all": time.perf_counter() - started},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples,
    )


def _usable(data: Labelled | Captioned) -> Labelled | Captioned:
    if isinstance(data, Labelled):
        classification.check_labels(data)
        if data.labels is None:
            raise InputError(
                f"{data.name} has several labels per picture; robustness needs one each, or captions"
            )
        return data
    if len(data.captions) == 0:
        raise InputError(f"{data.name} has no captions; robustness needs captions or classes")
    return data.select(np.unique(data.owner))  # a picture without a caption has no recall


def _measure(
    encoder: Encoder,
    data: Labelled | Captioned,
    templates: Templates,
    k: int,
    watch: Mapping[str, Any],
) -> tuple[Callable[[Float32], Samples], list[str | bytes]]:
    """(what is measured of the pictures' vectors (N, D), what else the data's fingerprint covers)."""
    if isinstance(data, Labelled):
        rows = class_vectors(encoder, data.classes, templates, **watch)
        labels = data.labels
        assert labels is not None

        def accuracy(vectors: Float32) -> Samples:
            return {f"acc@{k}": metrics.topk_hits(cosines(vectors, rows), labels, k)}

        return accuracy, [*data.classes, labels.tobytes()]
    texts = text_features(encoder, data.captions, **watch)
    owner, per_picture = data.owner, len(data.pictures) / len(data.captions)

    def recall(vectors: Float32) -> Samples:
        to_image, to_text = metrics.rank_captions(vectors, texts, owner)
        # Hits of a picture's captions, weighted so that the mean over pictures is that over captions.
        found: Float64 = np.bincount(owner, to_image.hit_at(k)).astype(np.float64)
        return {
            f"text_to_image/R@{k}": found * per_picture,
            f"image_to_text/R@{k}": to_text.hit_at(k),
        }

    return recall, [*data.captions, owner.tobytes()]


def _same_pictures(clean: Features, features: Features) -> None:
    if len(features.kept) != len(clean.kept) or features.fingerprint != clean.fingerprint:
        raise InputError("the pictures changed while they were measured; start again")


def _interval(values: Float64, seed: int) -> Interval:
    return metrics.mean_interval(values, seed=seed)


def _summary(
    samples: Samples, metric: str, asked: Sequence[tuple[str, int, Any]], seed: int
) -> dict[str, Interval]:
    """Mean under all corruptions, per picture, and its ratio to the clean figure."""
    clean = samples[f"clean/{metric}"]
    corrupted = np.mean([samples[f"{name}@{s}/{metric}"] for name, s, _ in asked], axis=0)
    found = {f"corrupted/{metric}": _interval(corrupted, seed)}
    ratio = metrics.statistic_interval(
        # No clean hit among the rows drawn: nothing that could be lost.
        lambda rows: float(corrupted[rows].sum() / (clean[rows].sum() or math.inf)),
        len(clean),
        seed=seed,
    )
    return found | {f"relative/{metric}": ratio}


def _curve(
    found: Mapping[str, Interval], metric: str, names: Sequence[str], severities: Sequence[int]
) -> dict[str, Any]:
    series = []
    for name in names:
        points = [found[f"clean/{metric}"], *(found[f"{name}@{s}/{metric}"] for s in severities)]
        series.append(
            {
                "name": name,
                "x": [0, *severities],
                "y": [point.value for point in points],
                "low": [point.low for point in points],
                "high": [point.high for point in points],
            }
        )
    return {
        "title": f"{metric} by severity",
        "x_label": "severity (0 is clean)",
        "y_label": metric,
        "series": series,
    }


def _table(
    found: Mapping[str, Interval], metric: str, names: Sequence[str], severities: Sequence[int]
) -> dict[str, Any]:
    clean = percent(found[f"clean/{metric}"].value)
    return {
        "title": f"{metric} under corruption",
        "columns": ["corruption", "clean", *(f"severity {s}" for s in severities)],
        "rows": [
            [name, clean, *(percent(found[f"{name}@{s}/{metric}"].value) for s in severities)]
            for name in names
        ],
        "note": f"Severities as in ImageNet-C, at {SIDE} pixels.",
    }


def _words(
    found: Mapping[str, Interval], metric: str, names: Sequence[str], severities: Sequence[int]
) -> str:
    def left(name: str) -> float:
        return float(np.mean([found[f"{name}@{s}/{metric}"].value for s in severities]))

    clean, relative = found[f"clean/{metric}"], found[f"relative/{metric}"]
    if clean.value == 0:
        return (
            f"{metric} is 0 on clean pictures: there is nothing that a corruption could take away."
        )
    worst, best = min(names, key=left), max(names, key=left)
    return (
        f"{metric}: {percent(clean.value)} on clean pictures; under {len(names)} kinds of corruption "
        f"{percent(relative.value)} of that is left on average (95 % interval {percent(relative.low)} "
        f"to {percent(relative.high)}). {worst} harms most ({percent(left(worst))}), {best} least "
        f"({percent(left(best))})."
    )


def _domains(hits: Float64, domains: Sequence[str], metric: str, seed: int) -> dict[str, Interval]:
    of = np.array(domains)
    return {f"domain {d}/{metric}": _interval(hits[of == d], seed) for d in sorted(set(domains))}


def _domain_table(found: Mapping[str, Interval], metric: str) -> dict[str, Any]:
    rows = [
        [name.removeprefix("domain ").removesuffix(f"/{metric}"), i.n, percent(i.value)]
        for name, i in found.items()
    ]
    return {"title": f"{metric} by domain", "columns": ["domain", "pictures", metric], "rows": rows}


def _domain_words(found: Mapping[str, Interval], metric: str) -> str:
    names = sorted(found, key=lambda name: found[name].value)
    worst, best = (
        f"“{name.removeprefix('domain ').removesuffix(f'/{metric}')}” ({percent(found[name].value)})"
        for name in (names[0], names[-1])
    )
    return f"By domain, {metric} is least on {worst} and best on {best}."
