"""Probes of frozen picture embeddings: k nearest neighbours and a linear classifier.

k-NN votes as DINO's does (Caron et al. 2021, after Wu et al. 2018): a neighbour counts
exp(cosine / 0.07), found by the project's own index. The linear probe is scikit-learn's logistic
regression; its C is chosen on a fifth of the training pictures. Few-shot curves are over several
draws of the training pictures, their mean and spread.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64, Floats, Int64
from clipkit.errors import InputError
from clipkit.index import VectorIndex
from clipkit.metrics import Interval
from clipkit.wording import percent
from eval import classification
from eval.data import Labelled
from eval.features import Encoder, fingerprint
from eval.reports.report import EvalReport, curve, interval_series
from eval.reports.wording import percent_interval
from eval.session import Results, Session

KINDS = ("knn", "linear")
TEMPERATURE = 0.07
MAX_ITERATIONS = 1000
_DRAWS = 5
_COARSE = (-2, 0, 2, 4)  # powers of ten of C, which unit rows want large
_FINER = (1.0, 0.5)


def evaluate_probe(
    encoder: Encoder,
    train: Labelled,
    test: Labelled,
    *,
    kinds: Sequence[str] = KINDS,
    knn_ks: Sequence[int] = (1, 5, 10, 20),
    shots: Sequence[int] = (),
    session: Session | None = None,
) -> EvalReport:
    """Measure acc@1 and mean per-class recall on `test` of probes fitted on `train`.

    The classes are train's; test's are matched to them by name. Raises InputError for several labels
    per picture, different classes, an unknown kind or an impossible k.
    """
    session = session or Session()
    test = _in_classes_of(train, test)
    _check(kinds, knn_ks, shots, len(train.pictures))
    results = Results("probe")
    train_features = session.picture_features(encoder, train.pictures)
    test_features = session.picture_features(encoder, test.pictures)
    results.lap("pictures")
    results.warnings += [*train.warnings, *train_features.warnings]
    assert train.labels is not None and test.labels is not None
    task = _Task(
        train_features.vectors,
        train.labels[train_features.rows],
        test_features.vectors,
        test.labels[test_features.rows],
        train.classes,
        session,
    )
    results.settings |= {
        "train": f"{train.name}, split {train.split}" if train.split else train.name,
        "kinds": list(kinds),
        "knn_vote": f"exp(cosine / {TEMPERATURE:g})",
    }
    scores: dict[str, Floats] = {}
    if "knn" in kinds:
        session.step("k nearest neighbours")
        possible = [k for k in knn_ks if k <= len(task.labels)]
        if left_out := [str(k) for k in knn_ks if k not in possible]:
            results.warnings.append(
                f"k = {', '.join(left_out)} left out, there are only {len(task.labels)} training "
                "pictures"
            )
        if possible:
            votes = knn_scores(task.vectors, task.labels, task.queries, len(task.classes), possible)
            scores |= {f"knn@{k}": rows for k, rows in votes.items()}
    if "linear" in kinds:
        scores["linear"] = _linear(task, results)
    if scores:
        _measure(task, scores, results)
    if shots:
        _few_shots(task, shots, results)
    results.settings["ties"] = "expected hits"
    prints = [
        classification.data_fingerprint(features.fingerprint, data, features.rows)
        for features, data in ((test_features, test), (train_features, train))
    ]
    return results.report_on(
        session,
        encoder,
        test,
        test_features,
        n={"training_pictures": len(task.labels), "classes": len(task.classes)},
        fingerprint=fingerprint(prints[0], prints[1:]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Training and test rows of the probes."""

    vectors: Float32  # (N, D), unit rows, of the training pictures
    labels: Int64  # (N,)
    queries: Float32  # (Q, D), unit rows, of the test pictures
    truth: Int64  # (Q,)
    classes: tuple[str, ...]
    session: Session


def _in_classes_of(train: Labelled, test: Labelled) -> Labelled:
    """Return `test` with its labels numbered as train's classes."""
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


# ---- k nearest neighbours


def knn_scores(
    vectors: Float32, labels: Int64, queries: Float32, classes: int, ks: Sequence[int]
) -> dict[int, Float64]:
    """Return per k the votes (Q, C) of the k nearest of `vectors` (N, D), unit rows, labels (N,)."""
    index = VectorIndex.build(np.arange(len(vectors)), vectors, kind="exact")
    hits = index.search(queries, max(ks))
    near = np.stack([ids for ids, _ in hits])  # (Q, K)
    cosines = np.stack([scores for _, scores in hits])
    return {
        k: metrics.knn_predict(labels[near], cosines, classes, k=k, temperature=TEMPERATURE)
        for k in ks
    }


# ---- the linear probe


def fit_linear(
    vectors: Float32, labels: Int64, fitted_on: Int64, validation: Int64, refit_on: Int64
) -> tuple[Any, float, bool]:
    """Return (logistic regression on rows `refit_on`, its C, whether it converged).

    C is the one that, fitted on `fitted_on`, is most accurate on `validation`, the smallest of equals;
    1 without validation rows. Raises InputError if the rows are all of one class.
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
    """Fit a logistic regression, starting from `warm`, one that was fitted on the same rows."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = warm or LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(vectors, labels)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def linear_scores(model: Any, vectors: Float32, classes: int) -> Float32:
    """Return logits, float32 (N, C); a class that was not trained is below all others."""
    logits = model.decision_function(vectors)
    if logits.ndim == 1:  # scikit-learn gives two classes one column
        logits = np.stack([-logits, logits], axis=1)
    scores = np.full((len(vectors), classes), logits.min() - 1, np.float32)
    scores[:, model.classes_] = logits
    return scores


def _linear(task: _Task, results: Results) -> Float32:
    """Return the scores (Q, C) of a linear probe fitted on all training pictures."""
    task.session.step("linear probe")
    fitted_on, validation = classification.stratified_halves(
        task.labels, share=0.8, seed=task.session.seed
    )
    every = np.arange(len(task.labels))
    model, c, converged = fit_linear(task.vectors, task.labels, fitted_on, validation, every)
    results.settings["linear_C"] = c
    if not converged:
        results.warnings.append(f"the linear probe did not converge in {MAX_ITERATIONS} iterations")
    return linear_scores(model, task.queries, len(task.classes))


def _measure(task: _Task, scores: Mapping[str, Floats], results: Results) -> None:
    """Add the metrics of every probe, and the classes and confusions of the last one."""
    for name, rows in scores.items():
        intervals, samples = classification.label_metrics(
            rows, task.truth, ks=(1,), seed=task.session.seed
        )
        results.metrics |= {f"{name}/{metric}": value for metric, value in intervals.items()}
        results.samples |= {f"{name}/{metric}": value for metric, value in samples.items()}
    results.sentences.append(_sentence(results.metrics, len(task.classes)))
    last, rows = list(scores.items())[-1]
    classification.add_classes(results, task.classes, task.truth, rows, f", {last}")
    ks = sorted(int(name.removeprefix("knn@")) for name in scores if name.startswith("knn@"))
    if ks:
        points = [results.metrics[f"knn@{k}/acc@1"] for k in ks]
        series = interval_series("95 % interval", ks, points)
        results.curves.append(curve("k nearest neighbours", "k", "acc@1", [series], log_x=True))


# ---- few shots


def few_shot_rows(
    labels: Int64, shots: Sequence[int], *, seed: int = 0, draws: int = 5
) -> tuple[dict[int, list[tuple[Int64, Int64]]], list[str]]:
    """Draw training rows: return ({shots: [(rows to fit, rows to validate)] * draws}, warnings).

    s shots are s rows per class to fit, min(s, 4) more per class to validate. Shots for which a class
    is too small are left out with a warning. The draws of more shots contain those of fewer.
    """
    present, counts = np.unique(labels, return_counts=True)
    messages: list[str] = []
    chosen: dict[int, list[tuple[Int64, Int64]]] = {}
    for count in sorted(set(shots)):
        needed = count + min(count, 4)
        if counts.min() < needed:
            messages.append(
                f"{count} shots are left out: they need {needed} training pictures per class, and the "
                f"smallest class has {counts.min()}"
            )
            continue
        chosen[count] = []
        for draw in range(draws):
            rng = np.random.default_rng((seed, draw))
            shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in present]
            fit = np.concatenate([rows[:count] for rows in shuffled])
            held_out = np.concatenate([rows[count:needed] for rows in shuffled])
            chosen[count].append((np.sort(fit), np.sort(held_out)))
    return chosen, messages


def _few_shots(task: _Task, shots: Sequence[int], results: Results) -> None:
    """Add the accuracy for every number of shots: per picture the mean over the draws."""
    chosen, messages = few_shot_rows(task.labels, shots, draws=_DRAWS, seed=task.session.seed)
    results.warnings += messages
    if not chosen:
        return
    results.settings["few_shot_draws"] = _DRAWS
    rows: list[list[Any]] = []
    mean, spread = [], []
    for count, draws in chosen.items():
        hits = np.empty((len(draws), len(task.truth)))
        for i, (fitted_on, validation) in enumerate(draws):
            task.session.step(f"linear probe, {count} shots", i, len(draws))
            model, _, _ = fit_linear(task.vectors, task.labels, fitted_on, validation, fitted_on)
            scores = linear_scores(model, task.queries, len(task.classes))
            hits[i] = metrics.topk_hits(scores, task.truth, 1)
        name, accuracy = f"linear@{count}shot/acc@1", hits.mean(axis=1)
        results.samples[name] = hits.mean(axis=0)
        results.metrics[name] = metrics.mean_interval(results.samples[name], seed=task.session.seed)
        mean.append(float(accuracy.mean()))
        spread.append(float(accuracy.std(ddof=1)))
        shares = (mean[-1], spread[-1], float(accuracy.min()), float(accuracy.max()))
        rows.append([count, *map(percent, shares)])
    intervals = [Interval(m, m - s, m + s, 1) for m, s in zip(mean, spread, strict=True)]
    series_name = f"mean and standard deviation of {_DRAWS} draws"
    series = interval_series(series_name, list(chosen), intervals)
    x_label = "training pictures per class"
    results.curves.append(curve("Few-shot linear probe", x_label, "acc@1", [series], log_x=True))
    results.tables.append(
        {
            "title": "Few-shot linear probe",
            "columns": ["pictures per class", "acc@1", "standard deviation", "lowest", "highest"],
            "rows": rows,
            "note": f"Over {_DRAWS} draws of the training pictures; the interval of the metric of the "
            "same name is over the test pictures.",
        }
    )
    more = f", on {rows[-1][0]} per class {rows[-1][1]}" if len(rows) > 1 else ""
    results.sentences.append(
        f"Trained on {rows[0][0]} per class, the linear probe classifies {rows[0][1]} correctly{more}."
    )


def _sentence(intervals: Mapping[str, Interval], classes: int) -> str:
    accuracy = {name: i for name, i in intervals.items() if name.endswith("/acc@1")}
    name, best = max(accuracy.items(), key=lambda item: item[1].value)
    probe = name.removesuffix("/acc@1")
    kind = "A linear classifier" if probe == "linear" else f"A vote of nearest neighbours ({probe})"
    return (
        f"{kind} on the frozen embeddings classifies {percent(best.value)} of {best.n:,} pictures "
        f"correctly ({percent_interval(best)}); chance among {classes:,} classes is "
        f"{percent(1 / classes)}."
    )
