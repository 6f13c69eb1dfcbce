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

PLAIN = Calibration("fake-1", constant=-4, cosine=8)


def test_probability_is_logistic_in_the_cosine() -> None:
    """Log odds 8 c - 4: at 0.5 they are 0, at 0.75 they are 2."""
    probabilities = PLAIN.probabilities([0.5, 0.75], 1_000_000)
    assert probabilities == pytest.approx([0.5, 1 / (1 + exp(-2))])
    assert PLAIN.probabilities(np.empty(0, np.float32), 9).shape == (0,)


def test_a_larger_library_asks_for_a_higher_cosine() -> None:
    """With size 0.5, ten times the pictures divide the odds by sqrt(10). Below 1,000 none are won."""
    calibration = replace(PLAIN, constant=log(1_000) / 2 - 4, size=0.5)
    assert calibration.probabilities([0.5], 1_000) == pytest.approx([0.5])
    assert calibration.probabilities([0.5], 10_000) == pytest.approx([1 / (1 + 10**0.5)])
    assert calibration.probabilities([0.5, 0.5], [5, 100_000]) == pytest.approx([0.5, 1 / 11])


def test_bands() -> None:
    assert [band(p) for p in (0.5, 0.4999, 0.3, 0.2999)] == ["strong", "fair", "fair", "weak"]


def test_fit_finds_the_odds() -> None:
    """At cosine 0 one pair of ten is right, at 1 nine of ten: log odds -log 9 and log 9. The same
    cosines in a library of 1,000 with size 1 given: it must be made up for, by log(1000)."""
    cosines, right = np.array([0.0, 0, 1, 1]), np.array([True, False, True, False])
    weights = np.array([1.0, 9, 9, 1])
    calibration = fit(cosines, np.full(4, 1_000), right, weights, encoder_id="e", size=1)
    assert calibration.constant == pytest.approx(log(1_000) - log(9), abs=0.02)
    assert calibration.cosine == pytest.approx(2 * log(9), abs=0.03)
    assert calibration.size == 1


def test_fit_finds_what_a_larger_library_costs() -> None:
    """Odds at cosines 0 and 1: 1 and 9 in a library of 1,000, 1/2 and 9/2 in one of 16,000. So size is
    log 2 / log 16 = 1/4, and the constant at cosine 0 is log(1000) / 4."""
    cosines = np.repeat([0.0, 1.0, 0.0, 1.0], 2)
    pictures = np.repeat([1_000, 16_000], 4)
    right = np.tile([True, False], 4)
    weights = np.array([1.0, 1, 9, 1, 1, 2, 9, 2])
    calibration = fit(cosines, pictures, right, weights, encoder_id="e")
    assert calibration.size == pytest.approx(0.25, abs=0.005)
    assert calibration.cosine == pytest.approx(log(9), abs=0.02)
    assert calibration.constant == pytest.approx(log(1_000) / 4, abs=0.04)


def test_captions_are_right_for_their_own_picture() -> None:
    """100 pictures along 100 axes. A caption has 0.8 of its own picture and 0.6 of another direction:
    cosines are 0.8 and 0. With one right in a hundred both are told apart."""
    pictures = np.eye(100, 101, dtype=np.float32)
    captions = 0.8 * pictures
    captions[:, 100] = 0.6
    owner = np.arange(100)
    calibration = fit_captions(pictures, captions, owner, encoder_id="e")
    assert calibration is not None
    high, low = calibration.probabilities([0.8, 0.0], 100)
    assert high > 0.9 and low < 0.01
    assert calibration.size == strength.USUAL_SIZE
    larger = fit_captions(pictures, captions, owner, encoder_id="e", size=2)
    assert larger is not None and larger.size == 2  # of the same meaning in a library of this size
    assert larger.probabilities([0.8, 0.0], 100) == pytest.approx([high, low], abs=1e-3)
    assert fit_captions(pictures, captions[:99], owner[:99], encoder_id="e") is None


def test_a_file_is_of_one_encoder(tmp_path: Path) -> None:
    PLAIN.write(tmp_path)
    assert strength.read(str(tmp_path), "fake-1") == PLAIN
    assert strength.read(str(tmp_path), "fake-2") is None
    assert strength.read("ViT-B-32/openai", "fake-1") is None
    content = json.loads((tmp_path / strength.FILE).read_text())
    old = {key: value for key, value in content.items() if key != "size"}
    (tmp_path / strength.FILE).write_text(json.dumps(old))
    assert strength.read(str(tmp_path), "fake-1") == PLAIN  # whose size is 0
    for broken in ("{", json.dumps({"cosine": 1}), json.dumps({**content, "cosine": "x"})):
        (tmp_path / strength.FILE).write_text(broken)
        with pytest.raises(ModelError, match=r"strength.json is not a calibration of strengths"):
            strength.read(str(tmp_path), "fake-1")


def test_the_builtin_model_is_calibrated() -> None:
    """By the shipped weights' identity. A cosine of 0.7 is strong in any library, 0.2 weak; one of 0.4
    is strong among 300 pictures, fair among 100,000. Models without a calibration to start
    from get the same size."""
    identity = checkpoint.identify("builtin")
    assert identity is not None
    calibration = strength.read("builtin", identity.encoder_id)
    assert calibration is not None
    bands = {
        pictures: [band(p) for p in calibration.probabilities([0.7, 0.4, 0.2], pictures)]
        for pictures in (300, 100_000)
    }
    assert bands == {300: ["strong", "strong", "weak"], 100_000: ["strong", "fair", "weak"]}
    assert calibration.size == pytest.approx(strength.USUAL_SIZE, abs=0.05)


def test_words_that_the_builtin_model_cannot_read() -> None:
    texts = ["пицца with a dog", "犬 😀", "café naïve hund", "3€ – “quoted”"]
    assert unreadable_words("builtin", texts) == ["пицца", "犬", "😀"]
    assert unreadable_words("ViT-B-32/openai", texts) == []
