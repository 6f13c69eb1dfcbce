"""The calibration of cosines, derived by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from clipkit import checkpoint, strength
from clipkit.errors import ModelError
from clipkit.strength import Calibration, band, fit, fit_captions
from clipkit.text_towers import unreadable_words

PLAIN = Calibration("fake-1", constant=-4, cosine=8, above_mean=0, usual_mean=0.1)


def test_probability_is_logistic_in_the_cosine() -> None:
    """Log odds 8 c - 4: at 0.5 they are 0, at 0.75 they are 2."""
    cosines = np.array([0.5, 0.75], np.float32)
    probabilities = PLAIN.probabilities(cosines, np.zeros(100, np.float32))
    assert probabilities == pytest.approx([0.5, 1 / (1 + exp(-2))])
    assert PLAIN.probabilities(np.empty(0, np.float32), np.empty(0, np.float32)).shape == (0,)


def test_a_small_sample_counts_beside_the_usual_mean() -> None:
    """30 cosines of 0.3 and the usual mean 0.1, which counts as 30: m = 0.2. Without a sample 0.1."""
    calibration = replace(PLAIN, cosine=0, above_mean=10)
    at = np.array([0.6], np.float32)
    sample = np.full(30, 0.3, np.float32)
    assert calibration.probabilities(at, sample) == pytest.approx(0.5)  # 10 (0.6 - 0.2) - 4 = 0
    assert calibration.probabilities(at, sample[:0]) == pytest.approx(1 / (1 + exp(-1)))


def test_bands() -> None:
    assert [band(p) for p in (0.5, 0.4999, 0.3, 0.2999)] == ["strong", "fair", "fair", "weak"]


def test_fit_finds_the_odds() -> None:
    """At cosine 0 one pair of ten is right, at 1 nine of ten: log odds -log 9 and log 9."""
    cosines, right = np.array([0.0, 0, 1, 1]), np.array([True, False, True, False])
    weights = np.array([1.0, 9, 9, 1])
    calibration = fit(cosines, np.zeros(4), right, weights, encoder_id="e")
    slope = calibration.cosine + calibration.above_mean
    assert calibration.constant == pytest.approx(-log(9), abs=0.02)
    assert slope == pytest.approx(2 * log(9), abs=0.03)


def test_a_higher_cosine_is_never_less_probable() -> None:
    """Only the text's mean tells: where it is high, all are right. The cosine above the mean would
    then speak against a pair, so it is left out."""
    rng = np.random.default_rng(0)
    means = rng.choice([0.0, 0.5], 400)
    calibration = fit(means + 0.2 * rng.random(400), means, means > 0, np.ones(400), encoder_id="e")
    assert calibration.above_mean == 0 and calibration.cosine > 0


def test_captions_are_right_for_their_own_picture() -> None:
    """100 pictures along 100 axes. A caption has 0.8 of its own picture and 0.6 of another direction:
    cosines are 0.8 and 0. With one right in a hundred both are told apart."""
    pictures = np.eye(100, 101, dtype=np.float32)
    captions = 0.8 * pictures
    captions[:, 100] = 0.6
    owner = np.arange(100)
    calibration = fit_captions(pictures, captions, owner, encoder_id="e")
    assert calibration is not None
    sample = (pictures @ captions[0]).astype(np.float32)
    high, low = calibration.probabilities(np.array([0.8, 0.0], np.float32), sample)
    assert high > 0.9 and low < 0.01
    assert fit_captions(pictures, captions[:99], owner[:99], encoder_id="e") is None


def test_a_file_is_of_one_encoder(tmp_path: Path) -> None:
    PLAIN.write(tmp_path)
    assert strength.read(str(tmp_path), "fake-1") == PLAIN
    assert strength.read(str(tmp_path), "fake-2") is None
    assert strength.read("ViT-B-32/openai", "fake-1") is None
    content = json.loads((tmp_path / strength.FILE).read_text())
    for broken in ("{", json.dumps({"cosine": 1}), json.dumps({**content, "cosine": "x"})):
        (tmp_path / strength.FILE).write_text(broken)
        with pytest.raises(ModelError, match=r"strength.json is not a calibration of strengths"):
            strength.read(str(tmp_path), "fake-1")


def test_the_builtin_model_is_calibrated() -> None:
    """By the shipped weights' identity. A cosine of 0.7 is strong, 0.2 weak."""
    encoder_id = checkpoint.identify("builtin")
    assert encoder_id is not None
    calibration = strength.read("builtin", encoder_id)
    assert calibration is not None
    cosines, sample = np.array([0.7, 0.2], np.float32), np.zeros(100, np.float32)
    assert [band(p) for p in calibration.probabilities(cosines, sample)] == ["strong", "weak"]


def test_words_that_the_builtin_model_cannot_read() -> None:
    texts = ["пицца with a dog", "犬 😀", "café naïve hund", "3€ – “quoted”"]
    assert unreadable_words("builtin", texts) == ["пицца", "犬", "😀"]
    assert unreadable_words("ViT-B-32/openai", texts) == []
