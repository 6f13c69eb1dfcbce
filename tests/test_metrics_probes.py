"""Neighbours' votes and the linear probe, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.metrics import neighbour_losses, neighbour_votes, ridge_accuracy
from clipkit.metrics.probes import TEMPERATURE

AXES = np.eye(3, dtype=np.float32)


def test_the_nearest_other_row_votes() -> None:
    """Fails if a row is its own neighbour: then each would vote for its own label."""
    rows, labels = AXES[[0, 0, 1, 1]], np.array([5, 7, 9, 9])
    assert neighbour_votes(rows, labels, 1).tolist() == [7, 5, 9, 9]


def test_near_rows_outvote_more_that_are_far() -> None:
    """One neighbour at cosine 1 counts exp(1 / 0.07) = 1.6 million times two at cosine 0."""
    rows, labels = AXES[[0, 0, 1, 1]], np.array([1, 1, 0, 0])
    assert neighbour_votes(rows, labels, 3).tolist() == [1, 1, 0, 0]


def test_a_loss_is_the_share_of_the_own_label() -> None:
    """Of row 0's others one lies at cosine 1 with its label, two at 0 with others; row 3 is alone."""
    rows, labels = AXES[[0, 0, 1, 2]], np.array([0, 0, 1, 2])
    far = math.exp(-1 / TEMPERATURE)
    expected = [math.log(1 + 2 * far)] * 2 + [0, 0]
    assert neighbour_losses(rows, labels) == pytest.approx(expected)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 1000))
def test_votes_equal_a_plain_loop(count: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rng.integers(0, 3, count)
    for at, voted in enumerate(neighbour_votes(rows, labels, k)):
        cosines = rows @ rows[at]
        others = sorted((n for n in range(count) if n != at), key=lambda n: -cosines[n])[:k]
        votes = np.zeros(3)
        for other in others:
            votes[labels[other]] += np.exp(cosines[other] / TEMPERATURE)
        assert votes[voted] == pytest.approx(votes.max(), rel=1e-3)


def test_a_line_separates_what_lies_on_its_sides() -> None:
    """Two clusters are told apart; labels drawn at random are guessed half of the time."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    rows = rng.normal(size=(400, 8)).astype(np.float32) + 4 * labels[:, None] * AXES[0, 0]
    assert ridge_accuracy(rows, labels) == 1.0
    assert 0.4 < ridge_accuracy(rows, rng.permutation(labels)) < 0.6


def test_one_row_has_no_neighbour() -> None:
    for probe in (lambda v, y: neighbour_votes(v, y, 1), neighbour_losses, ridge_accuracy):
        with pytest.raises(InputError, match="at least 2"):
            probe(AXES[:1], np.zeros(1, np.int64))
