"""Classification, calibration and kNN figures: by hand, by property, and as scikit-learn's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_metrics import expected_calibration_error, negative_log_likelihood
from scipy.special import softmax

from clipkit.errors import InputError
from clipkit.metrics import (
    ReliabilityBin,
    average_precision,
    confusion,
    fit_temperature,
    knn_predict,
    per_class_recall,
    predictions,
    reliability,
    topk_hits,
)

Float64 = npt.NDArray[np.float64]
SCORES = np.array([[3.0, 1, 2], [1, 2, 2], [0, 0, 0], [1, 3, 2]])
LABELS = np.array([0, 2, 1, 2])


def test_topk_by_hand() -> None:
    """Labels stand 1st, 1st or 2nd, anywhere of three, and 2nd."""
    assert topk_hits(SCORES, LABELS, 1).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert topk_hits(SCORES, LABELS, 2).tolist() == pytest.approx([1, 1, 2 / 3, 1])
    assert topk_hits(SCORES, LABELS, 3).tolist() == [1, 1, 1, 1]
    assert topk_hits(SCORES, LABELS, 9).tolist() == [1, 1, 1, 1]


def test_a_constant_classifier_gets_chance_and_an_oracle_everything() -> None:
    labels = np.arange(20) % 10
    assert topk_hits(np.full((20, 10), 0.3), labels, 3).tolist() == pytest.approx([0.3] * 20)
    assert topk_hits(np.eye(10)[labels], labels, 1).tolist() == [1.0] * 20
    assert average_precision(np.full((20, 2), 0.3), np.arange(40).reshape(20, 2) < 10).tolist() == [
        0.25,
        0.25,
    ]


def test_confusion_and_recall_by_hand() -> None:
    """Predictions 0, 1 (the first of two equal), 0, 1 for labels 0, 2, 1, 2."""
    said = predictions(SCORES)
    assert said.tolist() == [0, 1, 0, 1]
    assert confusion(LABELS, said, 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 2, 0]]
    recall = per_class_recall(LABELS, topk_hits(SCORES, LABELS, 1), 4)
    assert recall[:3].tolist() == pytest.approx([1, 1 / 3, 1 / 4])
    assert math.isnan(recall[3])


def test_average_precision_by_hand() -> None:
    """Found at 1 and 3 of 4: (1 + 2/3) / 2. Two equal scores, one of them right: 1/2."""
    found = average_precision(
        np.array([[0.9, 0.5], [0.8, 0.5], [0.7, 0.1], [0.6, 0.0]]),
        np.array([[1, 1], [0, 0], [1, 0], [0, 0]], bool),
    )
    assert found.tolist() == pytest.approx([5 / 6, 1 / 2])
    assert np.isnan(average_precision(np.zeros((2, 1)), np.zeros((2, 1), bool))).all()


def test_what_cannot_be_classified_is_said() -> None:
    """Trap: NaN compares as neither above nor equal, and so would count as a hit."""
    broken = SCORES.copy()
    broken[1, 0] = math.nan
    for call in (
        lambda: topk_hits(broken, LABELS, 1),
        lambda: predictions(broken),
        lambda: average_precision(broken, np.ones((4, 3), bool)),
        lambda: reliability(broken, LABELS),
        lambda: fit_temperature(broken, LABELS),
    ):
        with pytest.raises(InputError, match="row 1 of the scores is not finite"):
            call()
    with pytest.raises(InputError, match="label 3 of row 2 is none of the 3 classes"):
        topk_hits(SCORES, [0, 1, 3, 0], 1)
    with pytest.raises(InputError, match="4 rows need one each"):
        topk_hits(SCORES, [0], 1)
    with pytest.raises(InputError, match="none 0"):
        predictions(np.zeros((0, 3)))


def test_reliability_by_hand() -> None:
    """Four bins; confidences .5 and .4 right once, .9 and 1 right twice; an edge goes down.

    ECE = (2 |.45 - .5| + 2 |.95 - 1|) / 4 = .05.
    """
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.05, 0.9, 0.05], [0, 0, 1]])
    labels = [0, 1, 1, 2]
    assert reliability(probabilities, labels, 4) == [
        ReliabilityBin(0.25, 0.5, pytest.approx(0.45), 0.5, 2),
        ReliabilityBin(0.75, 1.0, pytest.approx(0.95), 1.0, 2),
    ]
    assert expected_calibration_error(probabilities, labels, 4) == pytest.approx(0.05)


def test_the_temperature_by_hand() -> None:
    """Two logits one apart, the upper one right 3 times in 4: sigmoid(1/T) = 3/4, T = 1 / ln 3."""
    logits = np.tile([1.0, 0.0], (4, 1))
    assert fit_temperature(logits, [0, 0, 0, 1]) == pytest.approx(1 / math.log(3), rel=1e-9)
    assert fit_temperature(50 * logits, [0, 0, 0, 1]) == pytest.approx(50 / math.log(3), rel=1e-9)


def test_a_temperature_without_a_minimum_runs_to_its_limit() -> None:
    assert fit_temperature(np.eye(3), [0, 1, 2]) < 0.01
    assert fit_temperature(-np.eye(3), [0, 1, 2]) == pytest.approx(1e4)
    assert fit_temperature(np.zeros((3, 3)), [0, 1, 2]) == 1.0


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.floats(-50, 50)
    ),
    st.integers(0, 1000),
)
def test_no_temperature_within_the_limits_is_better(logits: Float64, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, logits.shape[1], len(logits))
    best = fit_temperature(logits, labels)
    least = negative_log_likelihood(logits, labels, temperature=best)
    for other in (1.0, max(best * 0.9, 1e-4), min(best * 1.1, 1e4), 0.01, 100.0):
        assert least <= negative_log_likelihood(logits, labels, temperature=other) + 1e-9


def test_neighbours_vote_by_weight() -> None:
    """exp(0.07 ln 2 / 0.07) = 2: the nearest counts twice what each of the other two does."""
    nearer = 0.5 + 0.07 * math.log(2)
    votes = knn_predict([[2, 0, 0, 1]], [[nearer, 0.5, 0.5, 0.1]], 3, k=3)
    assert votes.tolist() == [pytest.approx([0.5, 0, 0.5])]
    assert knn_predict([[2, 0, 0, 1]], [[nearer, 0.5, 0.5, 0.1]], 3, k=1).tolist() == [[0, 0, 1]]
    assert knn_predict([[0, 1]], [[1.0, -1.0]], 2, k=2, temperature=1e-3).tolist() == [[1, 0]]
    with pytest.raises(InputError, match="k is 3"):
        knn_predict([[0, 1]], [[1.0, 0.5]], 2, k=3)
    with pytest.raises(InputError, match="-1 to 1; there are 2 classes"):
        knn_predict([[-1, 1]], [[1.0, 0.5]], 2, k=2)
    with pytest.raises(InputError, match="not finite"):
        knn_predict([[0, 1]], [[1.0, math.nan]], 2, k=2)


@pytest.mark.parity
def test_figures_are_scikit_learns() -> None:
    """25 random cases: AP with ties, balanced accuracy, top-2 accuracy, log loss, confusion."""
    ours = pytest.importorskip("sklearn.metrics")
    for seed in range(25):
        rng = np.random.default_rng(seed)
        n, c = int(rng.integers(20, 200)), int(rng.integers(3, 8))
        scores, labels = rng.standard_normal((n, c)), rng.integers(0, c, n)
        labels[:c] = np.arange(c)
        ties, targets = np.round(scores, int(rng.integers(0, 3))), rng.random((n, c)) < 0.3
        targets[0] = True
        expected = [ours.average_precision_score(targets[:, i], ties[:, i]) for i in range(c)]
        np.testing.assert_allclose(average_precision(ties, targets), expected, rtol=1e-12)
        hits, said = topk_hits(scores, labels, 1), predictions(scores)
        recall = per_class_recall(labels, hits, c).mean()
        assert recall == pytest.approx(ours.balanced_accuracy_score(labels, said))
        top2 = ours.top_k_accuracy_score(labels, scores, k=2, labels=np.arange(c))
        assert topk_hits(scores, labels, 2).mean() == pytest.approx(top2)
        loss = ours.log_loss(labels, softmax(scores, axis=1), labels=np.arange(c))
        assert negative_log_likelihood(scores, labels) == pytest.approx(loss)
        assert (confusion(labels, said, c) == ours.confusion_matrix(labels, said)).all()


@pytest.mark.parity
def test_reliability_is_scikit_learns_calibration_curve() -> None:
    """Confidence in the top class as the probability of being right, edges included."""
    calibration = pytest.importorskip("sklearn.calibration")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        probabilities = softmax(3 * rng.standard_normal((300, 4)), axis=1)
        probabilities[:40] = np.round(probabilities[:40], 1)  # onto the edges of ten bins
        labels = rng.integers(0, 4, 300)
        right = predictions(probabilities) == labels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accuracy, confidence = calibration.calibration_curve(
                right, np.clip(probabilities.max(axis=1), 0, 1), n_bins=10
            )
        found = reliability(probabilities, labels, 10)
        assert [b.accuracy for b in found] == pytest.approx(accuracy.tolist())
        assert [b.confidence for b in found] == pytest.approx(confidence.tolist())
