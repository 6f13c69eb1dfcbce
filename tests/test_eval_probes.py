"""Probes of frozen embeddings: against scikit-learn, and where the answer is known."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from numbered import Numbered, Told, collapsed, labelled, oracle

from clipkit.errors import InputError
from eval.features import Stopped
from eval.probes import (
    TEMPERATURE,
    evaluate_probe,
    few_shot_rows,
    fit_linear,
    knn_scores,
    linear_scores,
)
from eval.session import Session


def blobs(
    n: int, classes: int, *, spread: float, dim: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 (n, dim) around a random centre per class, and their labels."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    vectors = centres[labels] + spread * rng.normal(size=(n, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def seeing(vectors: np.ndarray) -> Told:
    """An encoder that gives picture number i row i of `vectors`."""
    return Told(lambda _, i: vectors[i], lambda _: vectors[0])


def numbered(labels: np.ndarray, classes: int, start: int = 0) -> object:
    pictures = Numbered([(int(c), start + i) for i, c in enumerate(labels)])
    return labelled(labels, classes, pictures=pictures)


# ---- against scikit-learn


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_votes_are_sklearns(k: int) -> None:
    """KNeighborsClassifier with the same weights: distance^2 = 2 - 2 cosine between unit vectors."""
    from sklearn.neighbors import KNeighborsClassifier

    vectors, labels = blobs(300, 6, spread=1.5)
    queries, _ = blobs(100, 6, spread=1.5, seed=1)
    reference = KNeighborsClassifier(
        k, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / TEMPERATURE)
    ).fit(vectors, labels)
    ours = knn_scores(vectors, labels, queries, 6, [k])[k]
    # The index keeps vectors in half precision: cosines to 1e-3, of which exp(x / 0.07) makes 1.5 %.
    np.testing.assert_allclose(ours, reference.predict_proba(queries), atol=0.02)
    clear = np.diff(np.sort(ours, axis=1)[:, -2:], axis=1)[:, 0] > 0.04
    assert clear.mean() > 0.8
    assert np.array_equal(ours.argmax(axis=1)[clear], reference.predict(queries)[clear])


@pytest.mark.parametrize("classes", [2, 5])
def test_the_linear_probe_is_sklearns(classes: int) -> None:
    """At the C it chose, the refitted model is LogisticRegression's, to the decision value."""
    from sklearn.linear_model import LogisticRegression

    vectors, labels = blobs(240, classes, spread=1.2)
    rows = np.arange(240)
    model, c, converged = fit_linear(vectors, labels, rows[:180], rows[180:], rows)
    reference = LogisticRegression(C=c, max_iter=1000).fit(vectors, labels)
    queries, truth = blobs(120, classes, spread=1.2, seed=1)
    scores = linear_scores(model, queries, classes)
    assert converged
    assert scores.shape == (120, classes)
    assert np.array_equal(scores.argmax(axis=1), reference.predict(queries))
    assert (scores.argmax(axis=1) == truth).mean() > 0.6


def test_regularisation_is_chosen_on_the_validation_rows() -> None:
    """Of the coarse and the finer Cs none does better on them than the chosen one."""
    from sklearn.linear_model import LogisticRegression

    vectors, labels = blobs(200, 4, spread=2.0)
    fit, held_out = np.arange(120), np.arange(120, 200)
    _, c, _ = fit_linear(vectors, labels, fit, held_out, np.arange(200))

    def right(value: float) -> float:
        model = LogisticRegression(C=value, max_iter=1000).fit(vectors[fit], labels[fit])
        return float(model.score(vectors[held_out], labels[held_out]))

    assert 1e-3 <= c <= 1e7
    assert right(c) >= max(right(10.0**power) for power in (-2, 0, 2, 4)) - 1e-9


def test_a_class_that_was_never_seen_is_last() -> None:
    vectors, labels = blobs(60, 3, spread=0.5)
    seen = np.flatnonzero(labels != 1)
    model, _, _ = fit_linear(vectors, labels, seen, seen[:0], seen)
    scores = linear_scores(model, vectors, 3)
    assert (scores[:, 1] < scores[:, [0, 2]].min(axis=1)).all()
    assert np.isfinite(scores).all()


def test_one_class_cannot_be_fitted() -> None:
    vectors, labels = blobs(10, 2, spread=0.5)
    with pytest.raises(InputError, match="all of one class; a probe needs at least 2"):
        fit_linear(vectors, labels * 0, np.arange(10), np.arange(0), np.arange(10))


# ---- the evaluation


def test_probes_of_separable_embeddings() -> None:
    """An oracle's embeddings are one point per class: every probe is right, at every k up to the
    number of training pictures of a class."""
    train, test = labelled([0, 1, 2, 3] * 10, 4), labelled([3, 2, 1, 0] * 5, 4)
    report = evaluate_probe(oracle(4), train, test, knn_ks=(1, 10))
    for name in ("knn@1", "knn@10", "linear"):
        assert report.metrics[f"{name}/acc@1"].value == 1
        assert report.metrics[f"{name}/mean_per_class_recall"].value == 1
    assert report.n == {"pictures": 20, "training_pictures": 40, "classes": 4}
    assert report.settings["linear_C"] > 0
    assert [curve["title"] for curve in report.details["curves"]] == ["k nearest neighbours"]


def test_a_collapsed_model_scores_chance() -> None:
    train, test = labelled([0, 1, 2, 3] * 10, 4), labelled([3, 2, 1, 0] * 5, 4)
    report = evaluate_probe(collapsed(4), train, test, knn_ks=(1, 20))
    for name in ("knn@1", "knn@20", "linear"):
        assert report.metrics[f"{name}/acc@1"].value == pytest.approx(0.25)


def test_shuffled_labels_score_chance_within_the_interval() -> None:
    vectors, labels = blobs(400, 4, spread=0.3)
    shuffled = np.random.default_rng(0).permutation(labels[:200])
    train = replace(numbered(labels[:200], 4), labels=shuffled)
    test = numbered(labels[200:], 4, start=200)
    report = evaluate_probe(seeing(vectors), train, test, knn_ks=(1, 20))
    near_chance = [report.metrics[f"{name}/acc@1"] for name in ("knn@1", "linear")]
    # Half of the test classes may get a neighbour's wrong label together: allow for that clumping.
    assert all(i.low - 0.15 <= 0.25 <= i.high + 0.15 for i in near_chance)


def test_few_shot_curve() -> None:
    """More shots, better: means over the draws in metric, table and curve alike."""
    vectors, labels = blobs(300, 4, spread=1.0)
    train, test = numbered(labels[:200], 4), numbered(labels[200:], 4, start=200)
    report = evaluate_probe(seeing(vectors), train, test, kinds=(), shots=(16, 1, 4))
    values = [report.metrics[f"linear@{shots}shot/acc@1"].value for shots in (1, 4, 16)]
    assert values[0] < values[1] < values[2]
    (curve,) = report.details["curves"]
    (series,) = curve["series"]
    assert series["x"] == [1, 4, 16]
    assert series["y"] == pytest.approx(values)
    assert all(
        lo < y < hi for lo, y, hi in zip(series["low"], series["y"], series["high"], strict=True)
    )
    sample = report.samples["linear@4shot/acc@1"]
    assert sample.shape == (100,) and sample.mean() == pytest.approx(values[1])
    (table,) = report.details["tables"]
    assert [row[0] for row in table["rows"]] == [1, 4, 16]


def test_shots_that_a_class_cannot_give_are_left_out() -> None:
    """Class 1 has 6 pictures: 4 shots take 4 + 4, 2 take 2 + 2."""
    labels = np.array([0] * 30 + [1] * 6)
    rows, said = few_shot_rows(labels, (4, 2, 1, 2))
    assert list(rows) == [1, 2]
    assert said == [
        "4 shots are left out: they need 8 training pictures per class, and the smallest class has 6"
    ]
    for fit, held_out in rows[2]:
        assert len(set(fit) | set(held_out)) == 8, "no picture is in both"
        assert np.bincount(labels[fit]).tolist() == np.bincount(labels[held_out]).tolist() == [2, 2]
    assert not np.array_equal(rows[2][0][0], rows[2][1][0]), "draws differ"
    again = few_shot_rows(labels, (2,))[0]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(rows[2], again[2], strict=True))


def test_classes_are_matched_by_name() -> None:
    """The test set lists its classes in another order and lacks one; labels follow the names."""
    train = labelled([0, 1, 2] * 6, 3)
    pictures = Numbered([(2, 0), (0, 1), (2, 2)])
    test = labelled([0, 1, 0], 2, pictures=pictures, classes=("kind2", "kind0"))
    report = evaluate_probe(oracle(3), train, test, knn_ks=(1,))
    assert report.metrics["knn@1/acc@1"].value == report.metrics["linear/acc@1"].value == 1


def test_what_cannot_be_probed() -> None:
    train, test = labelled([0, 1] * 4, 2), labelled([0, 1], 2)
    other = labelled([0, 1], 2, classes=("kind0", "owl"))
    several = labelled([0, 1], 2, labels=None, targets=np.eye(2, dtype=bool))
    model = oracle(2)
    for arguments, options, message in (
        ((train, other), {}, "1 classes that numbered does not have, such as 'owl'"),
        ((train, several), {}, "several labels per picture; probes need one each"),
        ((train, test), {"knn_ks": (9, 10)}, "k is 9, 10; it must be from 1 to 8"),
        ((train, test), {"knn_ks": (0,)}, "k is 0"),
        ((train, test), {"kinds": ("svm",)}, "unknown probe 'svm'; known: knn, linear"),
        ((train, test), {"shots": (0,)}, "shots are 0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_probe(model, *arguments, **options)
    assert model.loads == 0


def test_a_k_beyond_the_training_pictures_is_left_out() -> None:
    train, test = labelled([0, 1] * 4, 2), labelled([0, 1], 2)
    report = evaluate_probe(oracle(2), train, test, kinds=("knn",), knn_ks=(1, 8, 9))
    assert sorted(report.metrics) == [
        f"knn@{k}/{metric}" for k in (1, 8) for metric in ("acc@1", "mean_per_class_recall")
    ]
    assert "k = 9 left out, there are only 8 training pictures" in report.warnings


def test_nan_is_an_error() -> None:
    model = Told(lambda c, i: [np.nan, 1] if i == 3 else [1, c], lambda _: [1, 0])
    with pytest.raises(InputError, match="no finite vector for"):
        evaluate_probe(model, labelled([0, 1] * 4, 2), labelled([0, 1], 2))


def test_a_probe_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.probes.MAX_ITERATIONS", 1)
    vectors, labels = blobs(60, 3, spread=1.0)
    train, test = numbered(labels[:40], 3), numbered(labels[40:], 3, start=40)
    report = evaluate_probe(seeing(vectors), train, test, kinds=("linear",))
    assert any("did not converge" in text for text in report.warnings)


def test_stopping_between_probes() -> None:
    stop = threading.Event()

    def stopping(what: str, *_: int) -> None:
        if what == "k nearest neighbours":
            stop.set()

    with pytest.raises(Stopped):
        evaluate_probe(
            oracle(2),
            labelled([0, 1] * 4, 2),
            labelled([0, 1], 2),
            knn_ks=(1,),
            session=Session(on_progress=stopping, stop=stop),
        )


def test_the_fingerprint_covers_the_training_pictures() -> None:
    train, test = labelled([0, 1] * 4, 2), labelled([0, 1], 2)
    fewer = train.select(range(6))
    prints = {
        evaluate_probe(oracle(2), each, test, kinds=("knn",), knn_ks=(1,)).fingerprint
        for each in (train, fewer)
    }
    assert len(prints) == 2
