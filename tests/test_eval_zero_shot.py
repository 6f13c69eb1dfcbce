"""Zero-shot classification on pictures whose every score is known."""

from __future__ import annotations

import base64
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import Numbered, Told, collapsed, labelled, number_in, one_hot, oracle
from reference_metrics import expected_calibration_error
from scipy.special import softmax

from clipkit.errors import InputError
from eval.classification import stratified_halves
from eval.features import FeatureCache, Stopped
from eval.prompts import Templates
from eval.reports import save
from eval.session import Results, Session
from eval.zero_shot import add_calibration, class_vectors, classify, cosines, evaluate_zero_shot

PLAIN = Templates("plain", ("a photo of {}",))
TEN = list(range(10)) * 12  # labels of 120 pictures in ten classes


def test_an_oracle_scores_everything() -> None:
    report = evaluate_zero_shot(oracle(10), labelled(TEN, 10), templates=PLAIN)
    for name in ("acc@1", "acc@5", "mean_per_class_recall"):
        assert report.metrics[name].value == 1
    assert report.metrics["acc@1"].n == 120
    assert report.n == {"pictures": 120, "classes": 10}
    assert report.metrics["NLL"].value < 1e-6
    assert "mistakes" not in report.details
    assert np.array_equal(report.details["confusion"]["counts"], 12 * np.eye(10))


def test_a_collapsed_model_scores_chance() -> None:
    """Equal scores are ties, and a tie is worth its expectation: 1 of 10 at once, 5 of 10 in five.

    Fails for an argmax (all in class 0 would be right for an unbalanced set) and for counting only
    the classes that score above the own (100 %).
    """
    labels = [0] * 90 + [1] * 30  # unbalanced: argmax alone would get 75 %
    report = evaluate_zero_shot(collapsed(10), labelled(labels, 10), templates=PLAIN)
    assert report.metrics["acc@1"].value == pytest.approx(0.1, abs=1e-12)
    assert report.metrics["acc@5"].value == pytest.approx(0.5, abs=1e-12)
    assert report.metrics["mean_per_class_recall"].value == pytest.approx(0.1, abs=1e-12)


def test_a_collapsed_picture_tower_scores_chance() -> None:
    """All pictures go to one class, which is right for one class in ten."""
    model = Told(lambda *_: one_hot(3, 10), lambda text: one_hot(number_in(text), 10))
    report = evaluate_zero_shot(model, labelled(TEN, 10), templates=PLAIN)
    assert report.metrics["acc@1"].value == pytest.approx(0.1)


def test_shuffled_labels_score_chance_within_the_interval() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 200)
    data = replace(labelled(np.arange(200) % 10, 10), labels=labels)
    report = evaluate_zero_shot(oracle(10), data, templates=PLAIN)
    for name, chance in (("acc@1", 0.1), ("mean_per_class_recall", 0.1)):
        assert report.metrics[name].low <= chance <= report.metrics[name].high
        assert report.metrics[name].high < 0.2
    assert any("not clearly better than chance" in text for text in report.details["words"])


@pytest.mark.parametrize("tower", ["pictures", "texts"])
def test_nan_is_an_error(tower: str) -> None:
    bad = np.full(10, np.nan)
    model = Told(
        lambda c, _: bad if tower == "pictures" and c == 4 else one_hot(c, 10),
        lambda text: bad if tower == "texts" and "4" in text else one_hot(number_in(text), 10),
    )
    with pytest.raises(InputError, match="no finite vector for"):
        evaluate_zero_shot(model, labelled(TEN, 10), templates=PLAIN)
    with pytest.raises(InputError, match="picture 1 has scores that are not finite"):
        cosines(np.array([[1, 0], [np.nan, 1]], np.float32), np.eye(2, dtype=np.float32))


# ---- class vectors


def disagreeing(text: str) -> list[float]:
    """Class 0's prompts point 75 degrees to either side of x; class 1's all lie 60 degrees off it."""
    angle = np.deg2rad(60)
    if "kind0" in text:
        angle = np.deg2rad(75 if "drawing" in text else -75)
    return [float(np.cos(angle)), float(np.sin(angle))]


def test_class_vectors_are_normalised_averaged_and_normalised_again() -> None:
    """Without the second normalisation the class whose prompts disagree loses everywhere.

    The mean of class 0's prompts is (cos 75, 0) = (0.26, 0). A picture at x has cosine 1 with that
    direction and cos 60 = 0.5 with class 1; unnormalised, 0.26 against 0.5 would choose class 1.
    """
    templates = Templates("two", ("a photo of {}", "a drawing of {}"))
    model = Told(lambda *_: [1, 0], disagreeing)
    rows = class_vectors(model, ["kind0", "kind1"], templates)
    np.testing.assert_allclose(rows, [[1, 0], [0.5, np.sqrt(0.75)]], atol=1e-6)
    report = evaluate_zero_shot(model, labelled([0] * 20, 2), templates=templates)
    assert report.metrics["acc@1"].value == 1


def test_prompts_that_cancel_out_are_an_error() -> None:
    model = Told(lambda *_: [1, 0], lambda text: [1, 0] if "photo" in text else [-1, 0])
    templates = Templates("two", ("a photo of {}", "a drawing of {}"))
    with pytest.raises(InputError, match="gives class 'cat' no direction"):
        class_vectors(model, ["cat"], templates)


def test_prompts_per_class() -> None:
    """CuPL's kind: the prompts need not name the class, and their numbers differ."""
    model = Told(lambda c, _: one_hot(c, 3), lambda text: one_hot(number_in(text), 3))
    prompts = Templates(
        "own", per_class={"cat": ("1",), "dog": ("2", "2 again"), "owl": ("0", "1")}
    )
    rows = class_vectors(model, ["cat", "dog", "owl"], prompts)
    np.testing.assert_allclose(rows, [[0, 1, 0], [0, 0, 1], [0.5**0.5, 0.5**0.5, 0]], atol=1e-6)


def test_no_classes_have_no_vectors() -> None:
    assert class_vectors(oracle(4), [], PLAIN).shape == (0, 4)


# ---- scores


def test_scores_are_float32_whatever_the_vectors_are() -> None:
    """Two classes at cosines 0.9000 and 0.9002: half precision has steps of 0.0005 there (bfloat16
    0.004) and would call it a tie."""
    angles = np.arccos([0.9, 0.9002])
    classes = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    picture = np.array([[1, 0]], np.float16)
    scores = cosines(picture, classes)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0.9, 0.9002]], atol=1e-6)
    probabilities = classify(picture, classes, logit_scale=100)
    assert probabilities.dtype == np.float32
    # softmax of a difference of 100 x 0.0002 = 0.02: 1 / (1 + e^-0.02)
    assert probabilities[0, 1] == pytest.approx(1 / (1 + np.exp(-0.02)), abs=1e-4)


@given(
    st.integers(1, 40).flatmap(
        lambda c: st.lists(st.integers(0, 3), min_size=c, max_size=c).map(np.array)
    ),
    st.integers(1, 97),
)
@settings(max_examples=40)
def test_equal_classes_have_equal_scores(which: np.ndarray, dim: int) -> None:
    """A matrix product alone may sum its last columns in another order."""
    rng = np.random.default_rng(dim)
    four = rng.normal(size=(4, dim)).astype(np.float32)
    pictures = rng.normal(size=(3, dim)).astype(np.float32)
    scores = cosines(pictures, four[which])
    assert scores.shape == (3, len(which))
    for kind in range(4):
        assert (np.ptp(scores[:, which == kind], axis=1) == 0).all() if kind in which else True
    np.testing.assert_allclose(scores, pictures @ four[which].T, atol=1e-4)


def test_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    rows = classify(rng.normal(size=(5, 8)), rng.normal(size=(3, 8)), logit_scale=1000.0)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


# ---- classes


def test_one_name_for_two_classes_is_a_tie() -> None:
    """ "kind1" stands for classes 1 and 2, which no score can tell apart: each is right half the
    time; class 0 always. (1 + 0.5 + 0.5) / 3."""
    data = labelled([0, 1, 2] * 8, 3, classes=("kind0", "kind1", "kind1"))
    model = Told(lambda c, _: one_hot(min(c, 1), 2), lambda text: one_hot(number_in(text), 2))
    report = evaluate_zero_shot(model, data, templates=PLAIN)
    assert report.metrics["acc@1"].value == pytest.approx(2 / 3)


def test_acc_at_5_needs_five_classes() -> None:
    report = evaluate_zero_shot(oracle(4), labelled([0, 1, 2, 3] * 4, 4), templates=PLAIN)
    assert "acc@5" not in report.metrics
    five = evaluate_zero_shot(oracle(5), labelled([0, 1, 2, 3, 4] * 4, 5), templates=PLAIN)
    assert five.metrics["acc@5"].value == 1


def test_mean_per_class_recall_is_sklearns_balanced_accuracy() -> None:
    """Over the classes that have pictures: class 5 has none, and is not counted as 0."""
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(1)
    labels = rng.choice([0, 1, 2, 3, 4], 150, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    seen = np.where(rng.random(150) < 0.4, rng.integers(0, 6, 150), labels)
    pictures = Numbered([(int(c), i) for i, c in enumerate(seen)])
    report = evaluate_zero_shot(
        oracle(6), labelled(labels, 6, pictures=pictures), templates=PLAIN, calibrate=False
    )
    with pytest.warns(UserWarning, match="classes not in y_true"):
        expected = balanced_accuracy_score(labels, seen)
    assert report.metrics["mean_per_class_recall"].value == pytest.approx(expected)
    assert report.metrics["acc@1"].value == pytest.approx((seen == labels).mean())
    interval = report.metrics["mean_per_class_recall"]
    assert interval.low < expected < interval.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a", "b")}, "takes 4 class names, but 2 are given"),
        ({"classes": ("a",)}, "has 1 class; choosing between classes needs 2"),
        ({"labels": np.array([0, -1])}, "run from -1 to 0"),
        ({"labels": None}, "either one label per picture or targets"),
        ({"labels": None, "targets": np.ones((4, 3), bool)}, "targets for 3 classes, but 4 class"),
    ],
)
def test_labels_and_classes_that_do_not_fit(change: dict[str, object], message: str) -> None:
    model = oracle(4)
    with pytest.raises(InputError, match=message):
        evaluate_zero_shot(model, labelled([0, 1, 2, 3], 4, **change), templates=PLAIN)
    assert model.loads == 0, "said before any work is done"


def test_pictures_that_cannot_be_read() -> None:
    """The last of class 2 is lost: the others count, and the report says so."""
    pictures = Numbered([(0, 0), (1, 1), None, (0, 3)])
    data = labelled([0, 1, 2, 0], 3, pictures=pictures)
    report = evaluate_zero_shot(oracle(3), data, templates=PLAIN, calibrate=False)
    assert report.n == {"pictures": 3, "classes": 3, "skipped": 1}
    assert report.metrics["acc@1"].value == report.metrics["mean_per_class_recall"].value == 1
    assert any("left out 1 of 4 pictures" in text for text in report.warnings)
    assert any("no picture of 'kind2' can be read" in text for text in report.warnings)


# ---- several labels per picture


def test_multi_label_map_is_sklearns() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(60, 6))
    targets = rng.random((60, 6)) < 0.3
    targets[0] = True
    data = labelled([0] * 60, 6, labels=None, targets=targets)
    model = Told(lambda _, i: vectors[i], lambda text: one_hot(number_in(text), 6))
    report = evaluate_zero_shot(model, data, templates=PLAIN)
    scores = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = average_precision_score(targets, scores, average="macro")
    assert report.metrics["mAP"].value == pytest.approx(expected, abs=1e-6)
    assert report.metrics["mAP"].low < expected < report.metrics["mAP"].high
    assert set(report.metrics) == {"mAP"}
    assert len(report.details["tables"][0]["rows"]) == 6


def test_multi_label_extremes() -> None:
    """An oracle has AP 1; a collapsed model that of one tie: the share of pictures that have it."""
    targets = np.zeros((40, 3), bool)
    targets[np.arange(40), np.arange(40) % 2] = True
    targets[:4, 2] = True
    seen = lambda _, i: targets[i] + 1e-3  # noqa: E731
    texts = lambda text: one_hot(number_in(text), 3)  # noqa: E731
    data = labelled([0] * 40, 3, labels=None, targets=targets)
    assert evaluate_zero_shot(Told(seen, texts), data, templates=PLAIN).metrics["mAP"].value == 1
    flat = evaluate_zero_shot(collapsed(3), data, templates=PLAIN).metrics["mAP"].value
    assert flat == pytest.approx((0.5 + 0.5 + 0.1) / 3)
    with pytest.raises(InputError, match="no picture has any of the classes"):
        nothing = replace(data, targets=np.zeros((40, 3), bool))
        evaluate_zero_shot(oracle(3), nothing, templates=PLAIN)


# ---- calibration


def test_halves_are_disjoint_stratified_and_seeded() -> None:
    labels = np.array([0] * 10 + [1] * 7 + [2] * 4 + [3, 4, 5, 6])
    first, second = stratified_halves(labels, seed=1)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for c in range(7):
        assert abs((labels[first] == c).sum() - (labels[second] == c).sum()) <= 1
    assert abs(len(first) - len(second)) <= 1, "classes of one are divided, too"
    assert np.array_equal(first, stratified_halves(labels, seed=1)[0])
    assert not np.array_equal(first, stratified_halves(labels, seed=2)[0])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.sampled_from([0.2, 0.5, 0.8]))
def test_any_share_is_kept_per_class(labels: list[int], share: float) -> None:
    rows = np.array(labels)
    first, second = stratified_halves(rows, share=share)
    assert len(first) + len(second) == len(rows)
    for c in set(labels):
        assert abs((rows[first] == c).sum() - share * (rows == c).sum()) <= 1


def calibration(logits: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> Results:
    results = Results("zeroshot")
    add_calibration(results, logits.astype(np.float32), labels, seed=seed)
    return results


def drawn(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels drawn from softmax(logits): for these logits the right temperature is 1."""
    return (softmax(logits, axis=1).cumsum(axis=1) > rng.random((len(logits), 1))).argmax(axis=1)


def test_temperature_undoes_overconfidence() -> None:
    """Logits three times too large: T = 3 makes them honest, on pictures it was not fitted on."""
    rng = np.random.default_rng(3)
    honest = rng.normal(0, 2, (4000, 5))
    labels = drawn(honest, rng)
    results = calibration(3 * honest, labels)
    found, diagrams, (sentence,) = results.metrics, results.reliability, results.sentences
    assert found["temperature"].value == pytest.approx(3, rel=0.1)
    assert found["temperature"].n == found["ECE"].n == 2000
    assert found["ECE"].value > 0.1 > 0.03 > found["calibrated/ECE"].value
    assert found["NLL"].value > found["calibrated/NLL"].value
    assert found["ECE"].low < found["ECE"].value < found["ECE"].high
    assert "the model is overconfident. Dividing its logits by 2.99 lowers" in sentence
    assert [diagram["title"] for diagram in diagrams] == [
        "As the model gives it",
        f"After temperature {found['temperature'].value:.2f}",
    ]
    assert sum(b["n"] for b in diagrams[0]["bins"]) == 2000


def test_an_honest_model_needs_no_temperature() -> None:
    rng = np.random.default_rng(4)
    honest = rng.normal(0, 2, (4000, 5))
    results = calibration(honest, drawn(honest, rng))
    assert results.metrics["temperature"].value == pytest.approx(1, rel=0.1)
    assert "well calibrated" in results.sentences[0]


def test_what_is_said_of_calibration_is_not_said_of_the_fitted_half() -> None:
    """NLL and ECE are those of the held-out rows, recomputed here from the same split."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (101, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 101)
    found = calibration(logits, labels, seed=7).metrics
    held_out = stratified_halves(labels, seed=7)[1]
    probabilities = softmax(logits[held_out], axis=1)
    own = probabilities[np.arange(len(held_out)), labels[held_out]]
    assert found["NLL"].value == pytest.approx(-np.log(own).mean())
    expected = expected_calibration_error(probabilities, labels[held_out])
    assert found["ECE"].value == pytest.approx(expected)


def test_the_models_own_scale_is_used() -> None:
    """Cosine 1 against 0 with scale ln 3 and two classes: probability 3 / (3 + 1) = 0.75."""
    model = oracle(2, logit_scale=float(np.log(3)))
    report = evaluate_zero_shot(model, labelled([0, 1] * 10, 2), templates=PLAIN)
    assert report.metrics["NLL"].value == pytest.approx(-np.log(0.75), abs=1e-6)
    assert report.metrics["ECE"].value == pytest.approx(0.25, abs=1e-6)


# ---- the report


def test_samples_have_their_metric_as_mean() -> None:
    labels = [0] * 30 + [1] * 10 + [2] * 5 + [3] * 3 + [4] * 2
    seen = [c if i % 3 else 0 for i, c in enumerate(labels)]
    pictures = Numbered([(c, i) for i, c in enumerate(seen)])
    report = evaluate_zero_shot(oracle(5), labelled(labels, 5, pictures=pictures), templates=PLAIN)
    assert set(report.samples) == {"acc@1", "acc@5", "mean_per_class_recall"}
    for name, sample in report.samples.items():
        assert sample.shape == (50,)
        assert sample.mean() == pytest.approx(report.metrics[name].value)


def test_tables_and_mistakes() -> None:
    """Classes 0 and 1 are known; every fourth of class 2 is seen as 1, the surest first."""
    labels = [0] * 12 + [1] * 12 + [2] * 12
    doubtful = {24: 0.9, 28: 0.6, 32: 0.8}  # picture -> how much of class 1 is seen in it

    def see(c: int, i: int) -> np.ndarray:
        share = doubtful.get(i, 0.0)
        return share * one_hot(1, 3) + (1 - share) * one_hot(c, 3)

    model = Told(see, lambda text: one_hot(number_in(text), 3), logit_scale=5.0)
    report = evaluate_zero_shot(model, labelled(labels, 3), templates=PLAIN)
    pairs, classes = report.details["tables"]
    assert pairs["rows"] == [["kind2", "kind1", 3, "25.0 %"]]
    assert classes["rows"][0] == ["kind2", 12, "75.0 %", "100.0 %", "kind1 (3)"]
    assert ["kind1", 12, "100.0 %", "80.0 %", None] in classes["rows"]
    items = report.details["mistakes"][0]["items"]
    assert [item["name"] for item in items] == ["24.png", "32.png", "28.png"]
    assert (items[0]["expected"], items[0]["got"]) == ("kind2", "kind1")
    assert base64.b64decode(items[0]["thumbnail"].partition(",")[2])[:2] == b"\xff\xd8"
    words = " ".join(report.details["words"])
    assert "classifies 91.7 % of 36 pictures correctly" in words and "chance is 33.3 %" in words
    assert "“kind2” classified as “kind1”: 3 pictures" in words


def test_the_fingerprint_covers_labels_and_classes() -> None:
    data = labelled([0, 1, 2, 3] * 3, 4)
    other = replace(data, labels=data.labels[::-1].copy())
    renamed = replace(data, classes=("kind0", "kind1", "kind2", "kind3!"))
    prints = {
        evaluate_zero_shot(oracle(4), each, templates=PLAIN, calibrate=False).fingerprint
        for each in (data, replace(data, name="another name"), other, renamed)
    }
    assert len(prints) == 3


def test_a_second_run_needs_no_towers(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    data = labelled(TEN, 10)
    first = evaluate_zero_shot(oracle(10), data, templates=PLAIN, session=Session(cache))
    again = oracle(10)
    second = evaluate_zero_shot(
        again, data, templates=PLAIN, session=Session(FeatureCache(tmp_path))
    )
    assert again.loads == 0
    assert dict(second.metrics) == dict(first.metrics)


def test_stopping() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        evaluate_zero_shot(
            oracle(10), labelled(TEN, 10), templates=PLAIN, session=Session(stop=stop)
        )


def test_a_report_is_saved_and_shown(tmp_path: Path) -> None:
    report = evaluate_zero_shot(oracle(10), labelled(TEN, 10), templates=PLAIN)
    save(report, tmp_path)
    assert "acc@1" in (tmp_path / "report.md").read_text()
