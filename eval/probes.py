"""What a frozen picture tower's embeddings hold: k nearest neighbours and a linear classifier.

k-NN votes as DINO's does (Caron et al. 2021, after Wu et al. 2018): a neighbour counts
exp(cosine / 0.07), found by the project's own index. The linear probe is `eval.linear`; its
regularisation is chosen on a fifth of the training pictures. Few-shot curves are over several draws
of the training pictures, their mean and spread.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.errors import InputError
from clipkit.index import VectorIndex
from clipkit.metrics import Interval
from eval import classification
from eval.classification import percent, stratified_halves
from eval.data import Labelled
from eval.features import Encoder, FeatureCache, OnProgress, Stopped, fingerprint, picture_features
from eval.reports.report import EvalReport

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

MAX_ITERATIONS = 1000
_COARSE = (-2, 0, 2, 4)  # powers of ten of C, which unit rows want large
_FINER = (1.0, 0.5)


def fit_linear(
    vectors: Float32, labels: Int64, fitted_on: Int64, validation: Int64, refit_on: Int64
) -> tuple[Any, float, bool]:
    """(logistic regression on rows `refit_on`, its C, whether it converged).

    C is the one that, fitted on `fitted_on`, is right most often on `validation`, the least of equals;
    1 if there is nothing to validate on.
    """
    for rows in (fitted_on, refit_on):
        if len(np.unique(labels[rows])) < 2:
            raise InputError("the training pictures are all of one class; a probe needs at least 2")
    accuracy: dict[float, float] = {}

    def best() -> float:
        return min(accuracy, key=lambda power: (-accuracy[power], power))

    def sweep(powers: Sequence[float]) -> None:
        model = None
        for power in sorted(powers):
            model, _ = _fit(vectors[fitted_on], labels[fitted_on], 10.0**power, model)
            right = model.predict(vectors[validation]) == labels[validation]
            accuracy[power] = float(right.mean())

    if len(validation):
        sweep(_COARSE)
        for step in _FINER:
            sweep([best() - step, best() + step])
    c = 10.0 ** best() if accuracy else 1.0
    model, converged = _fit(vectors[refit_on], labels[refit_on], c, None)
    return model, c, converged


def _fit(vectors: Float32, labels: Int64, c: float, warm: Any) -> tuple[Any, bool]:
    """One logistic regression, begun where `warm`, one on the same rows, ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = warm or LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(vectors, labels)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def linear_scores(model: Any, vectors: Float32, classes: int) -> Float32:
    """float32 (N, C): the model's logits; a class it never saw is below all others."""
    logits = model.decision_function(vectors)
    if logits.ndim == 1:  # scikit-learn gives two classes one column
        logits = np.stack([-logits, logits], axis=1)
    scores = np.full((len(vectors), classes), logits.min() - 1, np.float32)
    scores[:, model.classes_] = logits
    return scores


def few_shot_rows(
    labels: Int64, shots: Sequence[int], *, seed: int = 0, draws: int = 5
) -> tuple[dict[int, list[tuple[Int64, Int64]]], list[str]]:
    """Per number of shots s, `draws` pairs of rows (s per class, min(s, 4) more per class).

    Numbers for which a class is too small are left out, and said in the warnings returned. The draws
    of more shots contain those of fewer.
    """
    present, counts = np.unique(labels, return_counts=True)
    said, chosen = [], {}
    for count in sorted(set(shots)):
        needed = count + min(count, 4)
        if counts.min() < needed:
            said.append(
                f"{count} shots are left out: they take {needed} training pictures per class, and the "
                f"smallest class has {counts.min()}"
            )
            continue
        pairs = []
        for draw in range(draws):
            rng = np.random.default_rng((seed, draw))
            shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in present]
            fit = np.concatenate([rows[:count] for rows in shuffled])
            held_out = np.concatenate([rows[count:needed] for rows in shuffled])
            pairs.append((np.sort(fit), np.sort(held_out)))
        chosen[count] = pairs
    return chosen, said


Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

KINDS = ("knn", "linear")
TEMPERATURE = 0.07
_DRAWS = 5


def evaluate_probe(
    encoder: Encoder,
    train: Labelled,
    test: Labelled,
    *,
    kinds: Sequence[str] = KINDS,
    knn_ks: Sequence[int] = (1, 5, 10, 20),
    shots: Sequence[int] = (),
    cache: FeatureCache | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> EvalReport:
    """acc@1 and mean per-class recall on `test` of probes fitted on `train`.

    The classes are train's; test's are matched to them by name. InputError: several labels per
    picture, classes that differ, a kind or k that cannot be.
    """
    started = time.perf_counter()
    test = _in_classes_of(train, test)
    _check(kinds, knn_ks, shots, len(train.pictures))
    watch: dict[str, Any] = {"on_progress": on_progress, "stop": stop}
    cache = cache or FeatureCache(None)
    known = picture_features(encoder, train.pictures, cache=cache, **watch)
    asked = picture_features(encoder, test.pictures, cache=cache, **watch)
    encoded = time.perf_counter()
    assert train.labels is not None and test.labels is not None
    job = _Job(
        known.vectors,
        train.labels[known.kept],
        asked.vectors,
        test.labels[asked.kept],
        train.classes,
        seed,
        **watch,
    )
    found = _Found()
    scores: dict[str, Floats] = {}
    if "knn" in kinds:
        job.step("k nearest neighbours")
        able = [k for k in knn_ks if k <= len(job.labels)]
        if left_out := [k for k in knn_ks if k not in able]:
            found.warnings.append(
                f"k = {', '.join(map(str, left_out))} left out, there are only {len(job.labels)} "
                "training pictures"
            )
        votes = (
            {}
            if not able
            else knn_scores(job.vectors, job.labels, job.queries, len(job.classes), able)
        )
        scores |= {f"knn@{k}": rows for k, rows in votes.items()}
    if "linear" in kinds:
        scores["linear"] = _linear(job, found)
    if scores:
        _judge(job, scores, found)
    if shots:
        _few_shots(job, shots, found)
    told = dict.fromkeys((*train.warnings, *known.warnings, *test.warnings, *asked.warnings))
    return EvalReport(
        task="probe",
        dataset=test.name,
        split=test.split,
        model=encoder.spec,
        encoder_id=encoder.encoder_id,
        n={
            "pictures": len(job.truth),
            "training_pictures": len(job.labels),
            "classes": len(job.classes),
        },
        metrics=found.metrics,
        settings={
            "train": f"{train.name}, split {train.split}" if train.split else train.name,
            "kinds": list(kinds),
            "knn_vote": f"exp(cosine / {TEMPERATURE:g})",
            **found.settings,
            "ties": "expected hits",
            "precision": encoder.precision,
            "seed": seed,
            **({"subset": test.subset} if test.subset else {}),
        },
        fingerprint=fingerprint(
            classification.data_fingerprint(asked.fingerprint, test, asked.kept),
            [classification.data_fingerprint(known.fingerprint, train, known.kept)],
        ),
        warnings=(*told, *found.warnings),
        details={
            "words": found.words,
            "tables": found.tables,
            "curves": found.curves,
            **found.details,
        },
        seconds={"pictures": encoded - started, "probes": time.perf_counter() - encoded},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=found.samples,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What the probes are given."""

    vectors: Float32  # (N, D), unit rows, of the training pictures
    labels: Int64  # (N,)
    queries: Float32  # (Q, D), unit rows, of the test pictures
    truth: Int64  # (Q,)
    classes: tuple[str, ...]
    seed: int
    on_progress: OnProgress | None
    stop: threading.Event | None

    def step(self, what: str, done: int = 0, total: int = 1) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped(f"stopped before {what}; the features are kept")
        if self.on_progress is not None:
            self.on_progress(what, done, total)


@dataclass(slots=True, eq=False)
class _Found:
    """The report's parts as they come in."""

    metrics: dict[str, Interval] = field(default_factory=dict)
    samples: dict[str, Float64] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def _in_classes_of(train: Labelled, test: Labelled) -> Labelled:
    """`test` with its labels numbered as train's classes."""
    for data in (train, test):
        classification.check_labels(data)
        if data.labels is None:
            raise InputError(f"{data.name} has several labels per picture; probes need one each")
    assert test.labels is not None
    if test.classes == train.classes:
        return test
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [test.classes[c] for c in np.unique(test.labels) if test.classes[c] not in number]
    if unknown:
        raise InputError(
            f"{test.name} has pictures of {len(unknown)} classes that {train.name} does not have, "
            f"such as {unknown[0]!r}; train and test need the same class names"
        )
    table = np.array([number.get(name, -1) for name in test.classes])
    return replace(test, classes=train.classes, labels=table[test.labels])


def _check(kinds: Sequence[str], ks: Sequence[int], shots: Sequence[int], pictures: int) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown probe {kind!r}; known: {', '.join(KINDS)}")
    if "knn" in kinds and (not ks or min(ks) < 1 or min(ks) > pictures):
        raise InputError(
            f"k is {', '.join(map(str, ks)) or 'missing'}; it must be from 1 to {pictures}, the number "
            "of training pictures"
        )
    for count in shots:
        if count < 1:
            raise InputError(f"shots are {count}; give at least 1 picture per class")


# ---- the probes


def knn_scores(
    vectors: Float32, labels: Int64, queries: Float32, classes: int, ks: Sequence[int]
) -> dict[int, Float64]:
    """Per k the votes (Q, C) of the k nearest of `vectors` (N, D), unit rows, with `labels` (N,)."""
    index = VectorIndex.build(np.arange(len(vectors)), vectors, kind="exact")
    hits = index.search(queries, max(ks))
    near = np.stack([ids for ids, _ in hits])  # (Q, K)
    cosines = np.stack([scores for _, scores in hits])
    return {
        k: metrics.knn_predict(labels[near], cosines, classes, k=k, temperature=TEMPERATURE)
        for k in ks
    }


def _linear(job: _Job, found: _Found) -> Float32:
    """The linear probe's scores (Q, C), fitted on all training pictures."""
    job.step("linear probe")
    fitted_on, validation = stratified_halves(job.labels, share=0.8, seed=job.seed)
    every = np.arange(len(job.labels))
    model, c, converged = fit_linear(job.vectors, job.labels, fitted_on, validation, every)
    found.settings["linear_C"] = c
    if not converged:
        found.warnings.append(f"the linear probe did not converge in {MAX_ITERATIONS} iterations")
    return linear_scores(model, job.queries, len(job.classes))


def _judge(job: _Job, scores: Mapping[str, Floats], found: _Found) -> None:
    """Figures of every probe; classes and confusions of the last, the linear one if it is there."""
    for name, rows in scores.items():
        values, samples = classification.label_metrics(rows, job.truth, ks=(1,), seed=job.seed)
        found.metrics |= {f"{name}/{metric}": value for metric, value in values.items()}
        found.samples |= {f"{name}/{metric}": value for metric, value in samples.items()}
    found.words.append(_words(found.metrics, len(job.classes)))
    last, rows = list(scores.items())[-1]
    counts = metrics.confusion(job.truth, metrics.predictions(rows), len(job.classes))
    hits = found.samples[f"{last}/acc@1"]
    for table in (
        classification.confused_table(job.classes, counts),
        classification.class_table(job.classes, job.truth, hits, counts),
    ):
        found.tables.append({**table, "title": f"{table['title']}, {last}"})
    found.details |= classification.confusion_detail(job.classes, counts)
    ks = sorted(int(name.removeprefix("knn@")) for name in scores if name.startswith("knn@"))
    if ks:
        points = [found.metrics[f"knn@{k}/acc@1"] for k in ks]
        series = {
            "name": "95 % interval",
            "x": ks,
            "y": [point.value for point in points],
            "low": [point.low for point in points],
            "high": [point.high for point in points],
        }
        found.curves.append(_curve("k nearest neighbours", "k", series))


def _few_shots(job: _Job, shots: Sequence[int], found: _Found) -> None:
    """The accuracy for every number of shots: per picture the mean over the draws."""
    chosen, left_out = few_shot_rows(job.labels, shots, draws=_DRAWS, seed=job.seed)
    found.warnings += left_out
    if not chosen:
        return
    found.settings["few_shot_draws"] = _DRAWS
    rows, mean, spread = [], [], []
    for count, draws in chosen.items():
        hits = np.empty((len(draws), len(job.truth)))
        for i, (fitted_on, validation) in enumerate(draws):
            job.step(f"linear probe, {count} shots", i, len(draws))
            model, _, _ = fit_linear(job.vectors, job.labels, fitted_on, validation, fitted_on)
            scores = linear_scores(model, job.queries, len(job.classes))
            hits[i] = metrics.topk_hits(scores, job.truth, 1)
        name, accuracy = f"linear@{count}shot/acc@1", hits.mean(axis=1)
        found.samples[name] = hits.mean(axis=0)
        found.metrics[name] = metrics.mean_interval(found.samples[name], seed=job.seed)
        mean.append(float(accuracy.mean()))
        spread.append(float(accuracy.std(ddof=1)))
        shares = (mean[-1], spread[-1], accuracy.min(), accuracy.max())
        rows.append([count, *map(percent, shares)])
    series = {
        "name": f"mean and standard deviation of {_DRAWS} draws",
        "x": list(chosen),
        "y": mean,
        "low": [m - s for m, s in zip(mean, spread, strict=True)],
        "high": [m + s for m, s in zip(mean, spread, strict=True)],
    }
    found.curves.append(_curve("Few-shot linear probe", "training pictures per class", series))
    found.tables.append(
        {
            "title": "Few-shot linear probe",
            "columns": ["pictures per class", "acc@1", "standard deviation", "least", "most"],
            "rows": rows,
            "note": f"Over {_DRAWS} draws of the training pictures; the interval of the metric of the "
            "same name is over the test pictures.",
        }
    )
    said = f"From {rows[0][0]} per class the linear probe learns to name {rows[0][1]} rightly"
    found.words.append(said + (f", from {rows[-1][0]} {rows[-1][1]}." if len(rows) > 1 else "."))


def _curve(title: str, x_label: str, series: Mapping[str, Any]) -> dict[str, Any]:
    shape = {"title": title, "x_label": x_label, "y_label": "acc@1", "log_x": True}
    return {**shape, "series": [series]}


def _words(found: Mapping[str, Interval], classes: int) -> str:
    accuracy = {name: i for name, i in found.items() if name.endswith("/acc@1")}
    name, best = max(accuracy.items(), key=lambda item: item[1].value)
    probe = name.removesuffix("/acc@1")
    kind = "A linear classifier" if probe == "linear" else f"The vote of neighbours ({probe})"
    return (
        f"{kind} on the frozen embeddings names {percent(best.value)} of {best.n:,} pictures rightly "
        f"(95 % interval {percent(best.low)} to {percent(best.high)}); guessing among {classes:,} "
        f"classes would name {percent(1 / classes)}."
    )
