"""Robustness: accuracy or recall on corrupted pictures, and on each domain.

Every picture is measured clean and under each corruption and severity (`eval.corruptions`), with the
same texts. "relative" is the mean under all corruptions divided by the clean figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64
from clipkit.errors import InputError
from clipkit.metrics import Interval
from clipkit.wording import percent
from eval import classification
from eval.corruptions import CORRUPTIONS, SIDE, corruption
from eval.data import Captioned, Labelled
from eval.features import Encoder, fingerprint
from eval.prompts import Templates, load_templates
from eval.reports.report import EvalReport, curve, interval_series
from eval.reports.wording import percent_interval
from eval.session import Results, Session
from eval.zero_shot import class_vectors, cosines

Samples = Mapping[str, Float64]  # metric -> (N,) per picture, their mean the metric


def evaluate_robustness(
    encoder: Encoder,
    data: Labelled | Captioned,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = (1, 3, 5),
    templates: Templates | None = None,
    k: int = 1,
    session: Session | None = None,
) -> EvalReport:
    """Measure acc@k of labelled pictures, R@k both ways of captioned ones: clean, corrupted, by domain.

    Without corruptions only the domains are measured. Raises InputError for an unknown corruption or
    severity, pictures with several labels, or data without captions and classes.
    """
    session, templates = session or Session(), templates or load_templates("simple")
    conditions = [(name, s, corruption(name, s)) for name in corruptions for s in severities]
    results = Results("robustness")
    data = _usable(data)
    clean = session.picture_features(encoder, data.pictures)
    data = data.select(clean.rows)
    measure, contents = _measure(encoder, data, templates, k, session)
    samples = {f"clean/{name}": values for name, values in measure(clean.vectors).items()}
    names = [name.removeprefix("clean/") for name in samples]
    for name, severity, transform in conditions:
        features = session.picture_features(encoder, data.pictures, transform=transform)
        if features.fingerprint != clean.fingerprint:
            raise InputError("the pictures changed during the evaluation; start again")
        for metric, values in measure(features.vectors).items():
            samples[f"{name}@{severity}/{metric}"] = values
    results.lap("encoding")
    results.samples = samples
    results.metrics = {
        name: metrics.mean_interval(values, seed=session.seed) for name, values in samples.items()
    }
    for metric in names:
        if conditions:
            corrupted = [samples[f"{name}@{s}/{metric}"] for name, s, _ in conditions]
            results.metrics |= _summary(samples[f"clean/{metric}"], corrupted, metric, session.seed)
            _describe_corruptions(results, metric, corruptions, severities)
        if isinstance(data, Labelled) and data.domains is not None:
            _describe_domains(results, metric, data.domains, session.seed)
    results.settings |= {
        "corruptions": list(corruptions),
        "severities": list(severities),
        "corrupted_at": f"{SIDE} pixels",
        **({"templates": templates.name} if isinstance(data, Labelled) else {}),
        "ties": "expected hits",
    }
    return results.report_on(
        session, encoder, data, clean, fingerprint=fingerprint(clean.fingerprint, contents)
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
    session: Session,
) -> tuple[Callable[[Float32], Samples], list[str | bytes]]:
    """Return a function from the pictures' vectors (N, D) to samples, and the texts and labels that
    the data's fingerprint covers."""
    if isinstance(data, Labelled):
        rows = class_vectors(encoder, data.classes, templates, session)
        labels = data.labels
        assert labels is not None

        def accuracy(vectors: Float32) -> Samples:
            return {f"acc@{k}": metrics.topk_hits(cosines(vectors, rows), labels, k)}

        return accuracy, [*data.classes, labels.tobytes()]
    texts = session.text_features(encoder, data.captions)
    owner, per_picture = data.owner, len(data.pictures) / len(data.captions)

    def recall(vectors: Float32) -> Samples:
        to_image, to_text = metrics.rank_captions(vectors, texts, owner)
        # Sums of a picture's captions, weighted so that the mean over pictures is that over captions.
        hits = np.bincount(owner, to_image.hit_at(k)).astype(np.float64)
        return {
            f"text_to_image/R@{k}": hits * per_picture,
            f"image_to_text/R@{k}": to_text.hit_at(k),
        }

    return recall, [*data.captions, owner.tobytes()]


def _summary(
    clean: Float64, corrupted: Sequence[Float64], metric: str, seed: int
) -> dict[str, Interval]:
    """Return the mean under all corruptions, per picture, and its ratio to the clean figure."""
    mean = np.mean(corrupted, axis=0)
    ratio = metrics.statistic_interval(
        # Without a clean hit among the rows drawn there is nothing to lose.
        lambda rows: float(mean[rows].sum() / (clean[rows].sum() or math.inf)),
        len(clean),
        seed=seed,
    )
    corrupted_mean = metrics.mean_interval(mean, seed=seed)
    return {f"corrupted/{metric}": corrupted_mean, f"relative/{metric}": ratio}


def _describe_corruptions(
    results: Results, metric: str, names: Sequence[str], severities: Sequence[int]
) -> None:
    """Add a metric's curve, table and sentence, by corruption and severity."""
    clean = results.metrics[f"clean/{metric}"]
    points = {name: [results.metrics[f"{name}@{s}/{metric}"] for s in severities] for name in names}
    series = [interval_series(name, [0, *severities], [clean, *points[name]]) for name in names]
    results.curves.append(curve(f"{metric} by severity", "severity (0 is clean)", metric, series))
    results.tables.append(
        {
            "title": f"{metric} under corruption",
            "columns": ["corruption", "clean", *(f"severity {s}" for s in severities)],
            "rows": [[name, *(percent(i.value) for i in (clean, *points[name]))] for name in names],
            "note": f"Severities as in ImageNet-C, at {SIDE} pixels.",
        }
    )
    if clean.value == 0:
        results.sentences.append(
            f"{metric} is 0 on clean pictures, so corruptions cannot lower it."
        )
        return
    mean = {name: float(np.mean([i.value for i in points[name]])) for name in names}
    worst, best = min(names, key=mean.__getitem__), max(names, key=mean.__getitem__)
    kinds = f"{len(names)} kinds of corruption" if len(names) > 1 else names[0]
    relative = results.metrics[f"relative/{metric}"]
    sentence = (
        f"{metric} is {percent(clean.value)} on clean pictures. Under {kinds} it keeps "
        f"{percent(relative.value)} of that on average ({percent_interval(relative)})."
    )
    if len(names) > 1:
        sentence += f" {worst} lowers it most (to {percent(mean[worst])}), "
        sentence += f"{best} least ({percent(mean[best])})."
    results.sentences.append(sentence)


def _describe_domains(results: Results, metric: str, domains: Sequence[str], seed: int) -> None:
    """Add a metric's interval in each domain, their table and a sentence."""
    hits, of = results.samples[f"clean/{metric}"], np.array(domains)
    intervals = {
        domain: metrics.mean_interval(hits[of == domain], seed=seed)
        for domain in sorted(set(domains))
    }
    results.metrics |= {f"domain {d}/{metric}": i for d, i in intervals.items()}
    results.tables.append(
        {
            "title": f"{metric} by domain",
            "columns": ["domain", "pictures", metric],
            "rows": [[domain, i.n, percent(i.value)] for domain, i in intervals.items()],
        }
    )
    names = sorted(intervals, key=lambda name: intervals[name].value)
    worst, best = (f"“{name}” ({percent(intervals[name].value)})" for name in (names[0], names[-1]))
    results.sentences.append(f"By domain, {metric} is lowest on {worst} and highest on {best}.")
