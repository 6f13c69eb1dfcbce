"""Robustness: accuracy or recall on corrupted pictures, and on each domain.

Every picture is measured clean and under each corruption and severity (`eval.corruptions`), with the
same texts. "relative" is the mean under all corruptions divided by the clean figure: a ratio, which is
above 1 where corruptions help, and is not clipped.
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
from eval.reports.wording import interval_text, percent_interval, value_text
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
            results.headline += [f"{way}/{metric}" for way in ("clean", "corrupted", "relative")]
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
    """Add a metric's table by corruption and severity, their means as a curve, and a sentence."""
    clean, corrupted, relative = (
        results.metrics[f"{way}/{metric}"] for way in ("clean", "corrupted", "relative")
    )
    samples = [[results.samples[f"{name}@{s}/{metric}"] for s in severities] for name in names]
    values = np.array([[each.mean() for each in row] for row in samples])  # (names, severities)
    mean = dict(zip(names, values.mean(axis=1), strict=True))
    matrix = np.vstack([values, values.mean(axis=0)]) if len(names) > 1 else values
    matrix = np.column_stack([matrix, matrix.mean(axis=1)]) if len(severities) > 1 else matrix
    rows = zip([*names, "mean"], matrix.tolist(), strict=False)
    columns = ["corruption", *(f"severity {s}" for s in severities), "mean"]
    results.tables.append(
        {
            "title": f"{metric} under corruption",
            "columns": columns[: matrix.shape[1] + 1],
            "rows": [[_spoken(name), *map(percent, row)] for name, row in rows],
            "heat": np.minimum(matrix / (clean.value or 1), 1).tolist(),
            "note": f"On clean pictures: {percent(clean.value)}. The redder a cell, the more of that is "
            f"lost. Severities as in ImageNet-C, at {SIDE} pixels.",
            "first": True,
        }
    )
    per_severity = [
        metrics.mean_interval(np.mean(each, axis=0)) for each in zip(*samples, strict=True)
    ]
    series = interval_series("mean of all corruptions", [0, *severities], [clean, *per_severity])
    results.curves.append(curve(f"{metric} by severity", "severity (0 is clean)", metric, [series]))
    if clean.value == 0:
        results.sentences.append(
            f"{metric} is 0 on clean pictures, so corruptions cannot lower it."
        )
        return
    kinds = f"{len(names)} kinds of corruption" if len(names) > 1 else _spoken(names[0])
    sentence = (
        f"{metric} is {percent(clean.value)} on clean pictures and {percent(corrupted.value)} under "
        f"{kinds} on average ({percent_interval(corrupted)}). The ratio is the relative robustness, "
        f"{value_text('relative', relative.value)} ({interval_text('relative', relative)}); at 1 "
        "nothing is lost."
    )
    if len(names) > 1:
        worst, best = min(names, key=mean.__getitem__), max(names, key=mean.__getitem__)
        sentence += f" Worst is {_spoken(worst)} ({percent(mean[worst])}), best {_spoken(best)} "
        sentence += f"({percent(mean[best])})."
    results.sentences.append(sentence)


def _spoken(name: str) -> str:
    """Return "gaussian noise" for "gaussian_noise"."""
    return name.replace("_", " ")


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
