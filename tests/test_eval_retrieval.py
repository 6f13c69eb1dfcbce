"""Retrieval on pictures and captions whose every score is known."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numbered import Numbered, Told

from clipkit.errors import InputError
from eval.data import Captioned
from eval.features import FeatureCache, Stopped
from eval.reports import EvalReport
from eval.retrieval import evaluate_retrieval
from eval.session import Session

Vectors = npt.NDArray[np.floating[Any]]


def data_of(captions: Sequence[Sequence[str]], **options: Any) -> Captioned:
    """Picture i with the i-th captions."""
    given: dict[str, Any] = {
        "name": "numbered",
        "split": None,
        "pictures": Numbered([(1, i) for i in range(len(captions))]),
        "captions": tuple(text for texts in captions for text in texts),
        "owner": np.repeat(np.arange(len(captions)), [len(texts) for texts in captions]),
        "tags": ((),) * len(captions),
    }
    return Captioned(**{**given, **options})


def numbered(pictures: int, each: int = 2) -> Captioned:
    """Picture i with captions "i/0", "i/1" ..."""
    return data_of([[f"{i}/{j}" for j in range(each)] for i in range(pictures)])


def model(pictures: Vectors, texts: Vectors, captions: Sequence[str], name: str = "told") -> Told:
    """Picture i has row i of `pictures`, a caption its row of `texts`."""
    place = {text: row for row, text in reversed(list(enumerate(captions)))}
    seen, read = pictures.astype(np.float32), texts.astype(np.float32)
    return Told(lambda _, i: seen[i], lambda text: read[place.get(text, 0)], name=name)


def oracle(data: Captioned) -> Told:
    eye = np.eye(len(data.pictures), dtype=np.float32)
    return model(eye, eye[data.owner], data.captions)


def values(report: EvalReport) -> dict[str, float]:
    return {name: interval.value for name, interval in report.metrics.items()}


# ---- the four that every measure must pass


@pytest.mark.parametrize("each", [1, 5])
def test_an_oracle_scores_everything(each: int) -> None:
    """Image-to-text is a hit if any caption is in the first K. Fails for a measure that asks for one
    given caption of five: a perfect model would get 20 %."""
    data = numbered(40, each)
    report = evaluate_retrieval(oracle(data), data, ks=(1, 5))
    for name, value in values(report).items():
        assert value == pytest.approx(1.0), name
    assert report.metrics["text_to_image/R@1"].low < 1  # 40 pictures are not certainty
    assert report.metrics["text_to_image/R@1"].n == report.metrics["image_to_text/R@1"].n == 40
    assert report.n == {"pictures": 40, "captions": 40 * each}
    assert "mistakes" not in report.details
    assert report.warnings == ()


def test_a_collapsed_model_scores_exactly_chance() -> None:
    """All vectors equal: every order is as likely. Text-to-image R@K = K / 20; image-to-text misses
    with C(60 - 3, K) / C(60, K); the median place is (20 + 1) / 2, and of the first of 3 among 60
    (60 + 1) / (3 + 1). Fails for counting only scores above the own (100 %)."""
    data = numbered(20, 3)
    told = model(np.ones((20, 4)), np.ones((60, 4)), data.captions)
    report = evaluate_retrieval(told, data)
    found = values(report)
    for k in (1, 5, 10):
        assert found[f"text_to_image/R@{k}"] == pytest.approx(k / 20, abs=1e-12)
        miss = math.comb(57, k) / math.comb(60, k)
        assert found[f"image_to_text/R@{k}"] == pytest.approx(1 - miss, abs=1e-12)
    assert found["text_to_image/median_rank"] == found["text_to_image/mean_rank"] == 10.5
    assert found["image_to_text/median_rank"] == pytest.approx(61 / 4)
    harmonic = sum(1 / x for x in range(1, 21)) / 20
    assert found["text_to_image/MRR"] == pytest.approx(harmonic)
    assert found["text_to_image/mAP"] == pytest.approx(harmonic)
    said = " ".join(report.warnings)
    assert "all pictures nearly the same vector" in said and "all texts nearly" in said
    assert "text to image: the model is no better than chance" in said
    assert "image to text: the model is no better than chance" in said


def test_a_shuffled_model_scores_chance_within_its_interval() -> None:
    """Good vectors given to the wrong captions: no better than guessing, and said to be."""
    data = numbered(300, 2)
    random = np.random.default_rng(1)
    seen = random.standard_normal((300, 32))
    read = seen[data.owner] + 0.1 * random.standard_normal((600, 32))
    good = evaluate_retrieval(model(seen, read, data.captions), data)
    assert values(good)["text_to_image/R@1"] == pytest.approx(1)
    told = model(seen, random.permutation(read), data.captions)
    report = evaluate_retrieval(told, data)
    for k in (1, 5, 10):
        first, second = (report.metrics[f"{way}/R@{k}"] for way in WAYS)
        assert first.low <= k / 300 <= first.high
        miss = math.comb(598, k) / math.comb(600, k)
        assert second.low <= 1 - miss <= second.high
    assert sum("no better than chance" in warning for warning in report.warnings) == 2


WAYS = ("text_to_image", "image_to_text")


@pytest.mark.parametrize("side", ["pictures", "texts"])
def test_nan_is_an_error(side: str) -> None:
    """A NaN is below nothing, so "scores above the own" would count none and report 100 %."""
    data = numbered(4)
    eye = np.eye(4)
    seen, read = eye.copy(), eye[data.owner]
    (seen if side == "pictures" else read)[2] = np.nan
    with pytest.raises(InputError, match="no finite vector"):
        evaluate_retrieval(model(seen, read, data.captions), data)


# ---- by hand


def test_a_worked_example() -> None:
    """Pictures at 0, 40 and 90 degrees; captions: of picture 0 at 0 and 50, of 1 at 40, of 2 at 30.

    Text-to-image, angles to pictures (0, 40, 90):
        0 -> 0, 40, 90: own first.             50 -> 50, 10, 40: own third.
        40 -> 40, 0, 50: own first.            30 -> 30, 10, 60: own third.
    R@1 = 2/4, R@2 = 2/4, mean rank = 8/4, median (1 + 3) / 2, MRR = mAP = (1 + 1/3 + 1 + 1/3) / 4,
    nDCG@10 = (1 + 1/2 + 1 + 1/2) / 4, for 1 / log2(3 + 1) = 1/2.
    Image-to-text, angles to captions (0, 50, 40, 30):
        0: 0 50 40 30 -> own at places 1, 4.   40: 40 10 0 10 -> place 1.   90: 90 40 50 60 -> place 3.
    R@1 = 2/3, R@2 = 2/3, mean rank 5/3, median 1, MRR = (1 + 1 + 1/3) / 3,
    mAP = ((1/1 + 2/4) / 2 + 1 + 1/3) / 3; picture 0's nDCG is as below.
    """
    dcg = (1 + 1 / math.log2(4 + 1)) / (1 + 1 / math.log2(2 + 1))

    def at(*degrees: float) -> Vectors:
        radians = np.radians(degrees)
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)

    data = data_of([["a", "b"], ["c"], ["d"]])
    told = model(at(0, 40, 90), at(0, 50, 40, 30), data.captions)
    report = evaluate_retrieval(told, data, ks=(2, 1))
    assert values(report) == pytest.approx(
        {
            "text_to_image/R@1": 2 / 4,
            "text_to_image/R@2": 2 / 4,
            "text_to_image/mean_rank": 2,
            "text_to_image/median_rank": 2,
            "text_to_image/MRR": 2 / 3,
            "text_to_image/mAP": 2 / 3,
            "text_to_image/nDCG@10": 3 / 4,
            "image_to_text/R@1": 2 / 3,
            "image_to_text/R@2": 2 / 3,
            "image_to_text/mean_rank": 5 / 3,
            "image_to_text/median_rank": 1,
            "image_to_text/MRR": 7 / 9,
            "image_to_text/mAP": (3 / 4 + 1 + 1 / 3) / 3,
            "image_to_text/nDCG@10": (dcg + 1 + 1 / 2) / 3,
        }
    )
    # Each picture's sum over 4/3 captions on average: their mean is the metric, captions uneven.
    assert np.allclose(report.samples["text_to_image/R@1"], [3 / 4, 3 / 4, 0])
    first, second = report.details["mistakes"]
    # Furthest down first: "b" and "d" both at place 3, and behind "b" is picture 0, behind "d" 2.
    assert [(item["name"], item["expected"]) for item in first["items"]] == [
        ("0.png", "“b”, at place 3"),
        ("2.png", "“d”, at place 3"),
    ]
    assert [item["got"] for item in first["items"]] == ["1.png “c”", "1.png “c”"]
    assert first["items"][0]["score"] == pytest.approx(math.cos(math.radians(10)))
    assert [(item["name"], item["expected"], item["got"]) for item in second["items"]] == [
        ("2.png", "“d”, at place 3", "b")
    ]
    assert first["items"][0]["thumbnail"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_sorting_the_whole_matrix(seed: int) -> None:
    """Random vectors, uneven captions: every figure again, from the sorted matrix, ties aside."""
    random = np.random.default_rng(seed)
    n, d = int(random.integers(12, 60)), int(random.integers(2, 20))
    data = data_of([[f"{i}/{j}" for j in range(random.integers(1, 6))] for i in range(n)])
    seen, read = random.standard_normal((n, d)), random.standard_normal((len(data.captions), d))
    found = values(evaluate_retrieval(model(seen, read, data.captions), data, ks=(1, 3, 10)))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (seen, read)]
    scores = unit[1] @ unit[0].T  # (M, N)
    to_image = np.argsort(-scores, axis=1) == data.owner[:, None]  # (M, N), where the own stands
    to_text = np.arange(n)[:, None] == data.owner[np.argsort(-scores, axis=0)].T  # (N, M)
    for way, hits in zip(WAYS, (to_image, to_text), strict=True):
        rank = hits.argmax(axis=1) + 1
        assert found[f"{way}/mean_rank"] == pytest.approx(rank.mean())
        assert found[f"{way}/median_rank"] == pytest.approx(np.median(rank))
        assert found[f"{way}/MRR"] == pytest.approx((1 / rank).mean())
        for k in (1, 3, 10):
            assert found[f"{way}/R@{k}"] == pytest.approx(hits[:, :k].any(axis=1).mean())
        places = np.arange(1, hits.shape[1] + 1)
        precision = (np.cumsum(hits, axis=1) / places * hits).sum(axis=1) / hits.sum(axis=1)
        assert found[f"{way}/mAP"] == pytest.approx(precision.mean())


# ---- tags


def tagged() -> tuple[Captioned, Told]:
    """Four pictures at 0, 30, 60, 90 degrees; tags "near" at 0 on pictures 0 and 2, "far" at 90 on 0."""
    angles = np.radians([0, 30, 60, 90])
    seen = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    data = data_of([[]] * 4, tags=(("near", "far"), (), ("near",), ()))
    return data, model(seen, np.array([[0.0, 1.0], [1.0, 0.0]]), ["far", "near"])


def test_tags_as_queries() -> None:
    """ "near" finds 0, 1, 2, 3 of which 0 and 2 bear it: hit@1 = 1, AP = (1/1 + 2/3) / 2.
    "far" finds 3, 2, 1, 0 of which 0 bears it: hit@1 = 0, rank 4, AP = 1/4. Guessing hits at K = 1
    with (2/4 + 1/4) / 2."""
    data, told = tagged()
    report = evaluate_retrieval(told, data, ks=(1, 3), queries="tags")
    found = values(report)
    assert found["tag_to_image/hit@1"] == found["tag_to_image/hit@3"] == 0.5
    assert found["tag_to_image/mAP"] == pytest.approx((5 / 6 + 1 / 4) / 2)
    assert found["tag_to_image/MRR"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["tag_to_image/mean_rank"] == 2.5
    assert report.n == {"pictures": 4, "tags": 2}
    assert report.metrics["tag_to_image/mAP"].n == 2
    assert report.samples["tag_to_image/hit@1"].tolist() == [0, 1]  # "far", "near"
    (row, _) = report.details["tables"][0]["rows"]
    assert row == ["tag to image", 1, "50.0 %", "37.5 %", "1.3"]
    (group,) = report.details["mistakes"]
    (item,) = group["items"]
    assert (item["name"], item["expected"], item["got"]) == ("0.png", "“far”, at place 4", "3.png")


def test_a_collapsed_model_finds_tags_by_chance() -> None:
    data, _ = tagged()
    told = model(np.ones((4, 2)), np.ones((2, 2)), ["far", "near"])
    found = values(evaluate_retrieval(told, data, ks=(1, 2), queries="tags"))
    assert found["tag_to_image/hit@1"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    # Two of four drawn: both miss two pictures with 1/6, one picture with 1/2.
    assert found["tag_to_image/hit@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)


# ---- intervals, samples, identity


def test_what_is_resampled_is_pictures_not_captions() -> None:
    """Five captions that always agree say no more than one: the interval must not shrink by root 5."""
    random = np.random.default_rng(3)
    seen = random.standard_normal((80, 3))
    read = seen + 0.7 * random.standard_normal((80, 3))
    one, five = numbered(80, 1), numbered(80, 5)
    narrow = evaluate_retrieval(model(seen, read, one.captions), one).metrics
    wide = evaluate_retrieval(model(seen, read[five.owner], five.captions), five).metrics
    for name in ("text_to_image/R@5", "text_to_image/mean_rank", "text_to_image/median_rank"):
        first, second = narrow[name], wide[name]
        assert (first.value, first.n) == (second.value, second.n)
        assert second.high - second.low == pytest.approx(first.high - first.low, rel=0.15)
        assert second.low < second.value < second.high


def test_samples_average_to_the_metric() -> None:
    random = np.random.default_rng(0)
    data = data_of([[f"{i}/{j}" for j in range(1 + i % 4)] for i in range(30)])
    told = model(random.standard_normal((30, 4)), random.standard_normal((74, 4)), data.captions)
    report = evaluate_retrieval(told, data)
    assert set(report.samples) == {name for name in report.metrics if "median" not in name}
    for name, samples in report.samples.items():
        assert samples.shape == (30,)
        assert samples.mean() == pytest.approx(report.metrics[name].value), name


def test_the_fingerprint_is_of_the_data_alone() -> None:
    data = numbered(6)
    same = evaluate_retrieval(oracle(data), data, ks=(1, 2))
    other = evaluate_retrieval(model(np.eye(6), np.ones((12, 6)), data.captions), data, ks=(1,))
    assert same.fingerprint == other.fingerprint
    changed = [
        replace(data, captions=(*data.captions[:-1], "x")),
        replace(data, owner=np.array([0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5])),
        replace(data, pictures=Numbered([(1, i) for i in (0, 1, 2, 3, 4, 9)])),
        data.select([1, 0, 2, 3, 4, 5]),
    ]
    prints = {same.fingerprint}
    for variant in changed:
        told = model(np.eye(10), np.ones((1, 10)), [])
        prints.add(evaluate_retrieval(told, variant, ks=(1,)).fingerprint)
    assert len(prints) == 5


def test_the_second_evaluation_loads_no_towers(tmp_path: Path) -> None:
    data, cache = numbered(10), FeatureCache(tmp_path)
    first = evaluate_retrieval(oracle(data), data, session=Session(cache))
    again = oracle(data)
    assert values(evaluate_retrieval(again, data, session=Session(cache))) == values(first)
    assert again.loads == 0


# ---- what is left out


def test_a_k_beyond_the_candidates_is_left_out_with_a_warning() -> None:
    """R@10 of 4 pictures would be 100 % whatever the model."""
    data = numbered(4, 3)  # 4 pictures, 12 captions
    report = evaluate_retrieval(oracle(data), data, ks=(1, 10, 20))
    names = {name for name in report.metrics if "/R@" in name}
    assert names == {"text_to_image/R@1", "image_to_text/R@1", "image_to_text/R@10"}
    assert report.warnings[:2] == (
        "text to image: K = 10, 20 left out, there are only 4 candidates",
        "image to text: K = 20 left out, there are only 12 candidates",
    )
    with pytest.raises(InputError, match="smallest K is 5, but there are 4 candidates"):
        evaluate_retrieval(oracle(data), data, ks=(5, 10))
    for ks in ((0, 1), ()):
        with pytest.raises(InputError, match="it must be 1 or more"):
            evaluate_retrieval(oracle(data), data, ks=ks)


def test_unreadable_pictures_go_with_their_captions() -> None:
    data = replace(numbered(4), pictures=Numbered([(1, 0), None, (1, 2), (1, 3)]))
    report = evaluate_retrieval(oracle(data), data, ks=(1,))
    assert report.n == {"pictures": 3, "captions": 6, "skipped": 1}
    assert values(report)["text_to_image/R@1"] == 1
    assert report.samples["text_to_image/R@1"].shape == (3,)
    assert "left out 1 of 4 pictures, the first 1.png" in report.warnings[0]


def test_pictures_without_captions_are_left_out_and_said() -> None:
    data = data_of([["a"], [], ["b"]])
    report = evaluate_retrieval(oracle(data), data, ks=(1,))
    assert report.n == {"pictures": 2, "captions": 2}
    assert "left out 1 picture without a caption" in report.warnings
    with pytest.raises(InputError, match="has a caption; add --queries tags"):
        evaluate_retrieval(oracle(data), data_of([[], []]))
    with pytest.raises(InputError, match="has a tag"):
        evaluate_retrieval(oracle(data), data, queries="tags")


def test_captions_that_several_pictures_share_are_warned_of() -> None:
    data = data_of([["a dog", "x"], ["a dog", "a dog"], ["y", "y"]])
    report = evaluate_retrieval(oracle(data), data, ks=(1,))
    assert any("of 6 captions, 3 belong to several pictures" in text for text in report.warnings)


# ---- the report


def test_the_report_says_it_in_words_curves_and_settings() -> None:
    data = replace(numbered(30), subset="30 of 60 pictures", warnings=("from the data",))
    report = evaluate_retrieval(oracle(data), data, session=Session(seed=7))
    first, second = report.details["words"]
    assert first.startswith(
        "The right picture is ranked first for 100.0 % of 60 captions (95 % int"
    )
    assert "interval 88.6 to" in first and "its median rank is 1 of 30" in first
    assert first.endswith("Chance: 3.3 % first.")
    assert second.startswith("A caption of the picture is ranked first")
    (curve,) = report.details["curves"]
    assert curve["log_x"] is True
    found, guessing = curve["series"][:2]
    assert found["x"][0] == 1 and found["x"][-1] == 30
    assert all(
        low <= y <= high
        for low, y, high in zip(found["low"], found["y"], found["high"], strict=True)
    )
    assert guessing["y"] == pytest.approx([k / 30 for k in guessing["x"]])
    assert report.settings["ties"] == "expected rank under a random order of equal scores"
    assert report.settings["subset"] == "30 of 60 pictures"
    assert report.settings["seed"] == 7
    assert "from the data" in report.warnings
    assert set(report.seconds) == {"pictures", "texts", "figures"}
    json.dumps(report.details, allow_nan=False)


def test_one_picture_is_an_evaluation_without_intervals() -> None:
    data = numbered(1)
    report = evaluate_retrieval(oracle(data), data, ks=(1,))
    assert report.metrics["text_to_image/R@1"].value == 1
    assert math.isnan(report.metrics["text_to_image/R@1"].low)
    assert "interval" not in report.details["words"][0]
    json.dumps(report.details, allow_nan=False)


def test_stopping() -> None:
    stop = threading.Event()
    stop.set()
    data = numbered(4)
    with pytest.raises(Stopped):
        evaluate_retrieval(oracle(data), data, session=Session(stop=stop))
