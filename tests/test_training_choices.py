"""Scores of an evaluation, the mixture with the start, hard negatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import DatasetError, InputError
from clipkit.index import VectorIndex
from clipkit.training import data as data_module
from clipkit.training.data import CaptionedPictures, mine
from clipkit.training.validation import (
    Scores,
    exceeds,
    of_labels,
    of_pairs,
    of_texts,
    of_views,
    picture_losses,
)
from clipkit.training.weights import ALPHAS, choose_alpha, mix


def captioned(captions: list[list[str]]) -> CaptionedPictures:
    """Pictures that exist by name only."""
    texts = list(dict.fromkeys(text for own in captions for text in own))
    return CaptionedPictures(
        Path("nowhere"),
        tuple(f"{i:04}" for i in range(len(captions))),
        tuple(f"train/{i}.png" for i in range(len(captions))),
        tuple(texts),
        tuple(np.array([texts.index(text) for text in own], np.int64) for own in captions),
        np.arange(len(texts)),
        0,
    )


class Fixed:
    """Inputs that are embeddings already, and towers that pass them on."""

    def __init__(self, data: CaptionedPictures, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.data, self._images, self._texts = data, images, texts
        self.logit_scale = torch.zeros(())

    def pictures(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self._images, 2))

    def captions(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self._texts, 3))

    def stream(self, plans: object) -> Iterator[object]:
        raise NotImplementedError

    def mode(self, training: bool) -> None:
        assert not training

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    texts = images


def scores_of(images: torch.Tensor, texts: torch.Tensor, captions: list[list[str]]) -> Scores:
    fixed = Fixed(captioned(captions), images, texts)
    return of_pairs(fixed, fixed)  # type: ignore[arg-type]


TWO_EACH = [[f"{i}a", f"{i}b"] for i in range(12)]
EYE = torch.eye(12)


def test_a_perfect_model_scores_one_hundred_percent() -> None:
    scores = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert set(scores.metrics.values()) == {1.0} and scores.mean == 1.0
    assert len(scores.hits) == len(scores.losses) == 12
    assert scores.space["alignment"] == 0.0
    assert scores.space["effective_rank"] == pytest.approx(
        11
    )  # twelve points, their mean taken out


def test_a_collapsed_model_scores_chance_and_gets_a_warning() -> None:
    """All vectors equal, ties by their expectation: R@1 of 1/12 text-to-image, 2/24 the other way.
    Fails for the version that counts only strictly greater scores: 100 %."""
    same = F.normalize(torch.ones(12, 12), dim=1)
    collapsed = scores_of(same, same.repeat_interleave(2, 0), TWO_EACH)
    assert collapsed.metrics["text_to_image/R@1"] == pytest.approx(1 / 12)
    assert collapsed.metrics["image_to_text/R@1"] == pytest.approx(2 / 24)
    start = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert "collapsing: variance fell from 0.917 to 0" in (collapsed.collapse_warning(start) or "")
    assert start.collapse_warning(start) is None and collapsed.collapse_warning(None) is None


def test_a_view_finds_the_other_view_of_its_picture() -> None:
    """Three of twelve second views lie where the next picture's first one is: eight pictures find their
    own, picture 3 ties with the one that came, 0 with all twelve, 1 and 2 find another's."""
    second = EYE.clone()
    second[:3] = EYE[1:4]
    fixed = Fixed(captioned(TWO_EACH), EYE, EYE)
    scores = of_views(fixed, fixed, [[EYE], torch.split(second, 5)])  # type: ignore[arg-type]
    assert scores.metrics["view_to_view/R@1"] == pytest.approx((8 + 1 / 2 + 1 / 12) / 12)
    assert scores.space["positive_cosine"] == pytest.approx(9 / 12)
    assert scores.space["alignment"] == pytest.approx(2 - 2 * 9 / 12)
    assert scores.spectrum == sorted(scores.spectrum, reverse=True)


def test_a_caption_finds_the_other_caption_of_its_picture() -> None:
    """One picture has a single caption and does not count; without two that have two, an error."""
    captions = [["a", "b"], ["c"], ["d", "e"]]
    texts = torch.eye(3)[[0, 0, 1, 2, 2]]
    fixed = Fixed(captioned(captions), EYE[:3, :3], texts)
    scores = of_texts(fixed, fixed)  # type: ignore[arg-type]
    assert set(scores.metrics) == {f"text_to_text/R@{k}" for k in (1, 5, 10)}
    assert scores.mean == 1.0 and len(scores.hits) == 2
    few = Fixed(captioned([["a", "b"], ["c"]]), EYE[:2, :2], EYE[:3, :3])
    with pytest.raises(
        DatasetError, match="1 pictures of the validation split of nowhere have two"
    ):
        of_texts(few, few)  # type: ignore[arg-type]


def test_neighbours_vote_for_labels() -> None:
    """Two clusters of six; one picture lies in the other's. Fails if a picture votes for itself."""
    rows = EYE[[0] * 6 + [1] * 6] + 0.01 * EYE
    rows = F.normalize(rows, dim=1)
    labels = np.array([0] * 5 + [1] * 7)
    data = replace(captioned(TWO_EACH), labels=labels, classes=("a", "b"))
    fixed = Fixed(data, rows, EYE.repeat_interleave(2, 0))
    scores = of_labels(fixed, fixed)  # type: ignore[arg-type]
    assert scores.metrics["neighbours/acc@5nn"] == pytest.approx(11 / 12)
    assert scores.space["knn_accuracy"] == pytest.approx(11 / 12)
    assert 0.7 < scores.space["linear_accuracy"] <= 11 / 12
    with pytest.raises(DatasetError, match="has no labels"):
        of_labels(*[Fixed(captioned(TWO_EACH), rows, EYE)] * 2)  # type: ignore[arg-type]


def test_a_lower_rank_gets_a_warning_too() -> None:
    line = F.normalize(torch.tensor([[1.0, 0.0]]) * torch.linspace(-1, 1, 12)[:, None], dim=1)
    flat = scores_of(line, line.repeat_interleave(2, 0), TWO_EACH)
    start = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert "effective rank fell from 11 to 1" in (flat.collapse_warning(start) or "")


def test_a_model_of_nan_is_an_error() -> None:
    broken = EYE.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(InputError, match="row 3 of the pictures is not finite"):
        scores_of(broken, EYE.repeat_interleave(2, 0), TWO_EACH)


def test_the_loss_of_a_picture_both_ways_derived_by_hand() -> None:
    """Pictures (1,0) and (0,1), captions (1,0) and (0.6,0.8) of the first, (0,1) of the second; the
    scale ln 2 makes 2**cosine of each exponential.

    The first: captions 2/(2+1) and 2**0.6/(2**0.6 + 2**0.8); picture (2 + 2**0.6)/(2 + 2**0.6 + 1).
    The second: caption 2/(2+1); picture 2/(2 + 1 + 2**0.8).
    """
    texts = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    owner = np.array([0, 0, 1])
    six, eight = 2**0.6, 2**0.8
    to_image = -(np.log(2 / 3) + np.log(six / (six + eight))) / 2, -np.log(2 / 3)
    to_text = -np.log((2 + six) / (3 + six)), -np.log(2 / (3 + eight))
    losses = picture_losses(np.eye(2, dtype=np.float32), texts, owner, scale=np.log(2.0))
    expected = [(a + b) / 2 for a, b in zip(to_image, to_text, strict=True)]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_loss_does_not_depend_on_how_it_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pictures, texts = (rng.normal(size=(n, 8)).astype(np.float32) for n in (10, 25))
    owner = np.repeat(np.arange(10), [1, 4] * 5)
    whole = picture_losses(pictures, texts, owner, scale=3.0)
    monkeypatch.setattr("clipkit.training.validation._BLOCK_ROWS", 4)
    assert picture_losses(pictures, texts, owner, scale=3.0) == pytest.approx(whole, rel=1e-5)


def test_what_recall_cannot_tell_apart_the_loss_decides() -> None:
    worse, better = [2.0] * 4, [1.0] * 4
    two, one = scored([1.0, 1.0, 0.0, 0.0], worse), scored([1.0, 0.0, 0.0, 0.0], better)
    none = scored([0.0, 0.0, 0.0, 0.0], better)
    assert one.beats(two) and not two.beats(one)  # by 0.25, standard error 0.25
    assert two.beats(none) and not none.beats(two)  # by 0.5, standard error 0.29
    assert not one.beats(one)
    assert exceeds([1.0], [0.5]) and not exceeds([1.0], [1.0])


def test_a_caption_on_two_pictures_counts_for_both() -> None:
    captions = [["same", "one"], ["same", "two"]]
    texts = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    scores = scores_of(torch.eye(2), texts, captions)
    assert scores.metrics["text_to_image/R@1"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert scores.metrics["image_to_text/R@1"] == 1.0


# ---- mixing with the start


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tuned = torch.nn.Parameter(torch.tensor([4.0]))
        self.frozen = torch.nn.Parameter(torch.tensor([7.0]))


START = {"tuned": torch.tensor([0.0]), "frozen": torch.tensor([7.0])}
TUNED = {"tuned": torch.tensor([4.0])}


def scored(hits: list[float], losses: list[float]) -> Scores:
    metrics = {"text_to_image/R@1": float(np.mean(hits))}
    return Scores("mean recall", metrics, {}, hits, losses, [])


ALMOST = [1.0, 1.0, 0.0, 1.0]  # one of four pictures is not found
START_SCORES = scored(ALMOST, [1.0, 1.0, 1.0, 1.0])


def chosen(by_alpha: dict[float, Scores], start: Scores = START_SCORES) -> float:
    """The alpha that is chosen where all others but these are clearly worse than the start."""
    model = Weighted()

    def evaluate() -> Scores:
        alpha = round(model.tuned.item() / 4, 6)
        return by_alpha.get(alpha, scored([0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]))

    mixture = choose_alpha(model, START, TUNED, evaluate, at_start=start)
    assert model.frozen.item() == 7.0
    assert model.tuned.item() == pytest.approx(4 * mixture.alpha)
    assert list(mixture.scores) == [0.0, *ALPHAS]
    return mixture.alpha


def test_where_recall_tells_them_apart_it_decides_whatever_the_loss() -> None:
    """0.25 finds two pictures more of four than the start: 0.5, standard error 0.29."""
    start = scored([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert chosen({0.25: scored([1.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0])}, start) == 0.25


def test_where_recall_is_at_its_ceiling_the_loss_decides() -> None:
    """Fails for a choice by recall alone: with nothing gained it keeps the start."""
    assert chosen({0.1: scored(ALMOST, [0.5, 0.5, 0.6, 0.5])}) == 0.1


def test_one_lucky_picture_does_not_outweigh_a_worse_loss() -> None:
    """All tuned finds the fourth picture too: 0.25, standard error 0.25. Fails for the highest
    recall: the tuned weights, whose loss has doubled."""
    tuned = scored([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0])
    assert chosen({0.25: scored(ALMOST, [0.9, 0.9, 0.8, 0.9]), 1.0: tuned}) == 0.25


def test_of_equals_the_nearest_to_the_start_is_taken() -> None:
    """0.5 has the lowest loss, 0.25 one that differs by 0.01, standard error 0.014; 0.1 by 0.3."""
    by_alpha = {
        0.1: scored(ALMOST, [0.8, 0.8, 0.8, 0.8]),
        0.25: scored(ALMOST, [0.55, 0.49, 0.5, 0.5]),
        0.5: scored(ALMOST, [0.5, 0.5, 0.5, 0.5]),
    }
    assert chosen(by_alpha) == 0.25


def test_the_start_is_taken_only_if_nothing_is_better() -> None:
    assert chosen(dict.fromkeys(ALPHAS, START_SCORES)) == 0.0
    assert chosen({1.0: scored(ALMOST, [0.9, 0.9, 0.9, 0.9])}) == 1.0


def test_both_ends_are_exact() -> None:
    model = Weighted()
    third = {"tuned": torch.tensor([1 / 3])}
    mix(model, START, third, 1.0)
    assert torch.equal(model.tuned.detach(), third["tuned"])
    mix(model, START, third, 0.0)
    assert torch.equal(model.tuned.detach(), START["tuned"])


# ---- hard negatives


def directions(degrees: list[float]) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_likeliest_are_spared_and_the_next_are_taken() -> None:
    """Captions at 0 degrees, its picture at 20 (cosine 0.940). Margin 0.95: the limit is 0.893,
    26.8 degrees. Picture 1 at 10 and picture 2 at 25 match as well: spared. 3 (at 40), 4 (at 60)
    and 5 (at 120) are negatives, hardest first."""
    pictures = directions([20, 10, 25, 40, 60, 120])
    texts = directions([0, 190, 190, 190, 190, 190])
    data = captioned([[f"caption {i}"] for i in range(6)])
    mined = mine(pictures, texts, data, count=3, margin=0.95)
    assert mined.shape == (6, 3) and mined[0].tolist() == [3, 4, 5]
    assert mine(pictures, texts, data, count=1, margin=1.0)[0].tolist() == [2]
    assert mine(pictures, texts, data, count=8)[0].tolist() == [3, 4, 5, -1, -1, -1, -1, -1]


def test_a_picture_with_the_same_caption_is_no_negative() -> None:
    pictures = directions([0, 40, 60])
    data = captioned([["a dog"], ["a dog", "x"], ["y"]])
    mined = mine(pictures, directions([0, 40, 60]), data, count=2)
    assert mined[0].tolist() == [2, -1]


def test_no_candidate_is_its_own_negative() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(40, 8)).astype(np.float32)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    data = captioned([[f"c{i}"] for i in range(40)])
    mined = mine(pictures, pictures, data, count=4)
    assert not (mined == np.arange(40)[:, None]).any()
    assert ((mined >= -1) & (mined < 40)).all() and (mined >= 0).all(1).mean() > 0.9


def searched_one_by_one(
    pictures: np.ndarray, texts: np.ndarray, data: CaptionedPictures, *, count: int, margin: float
) -> np.ndarray:
    """The rule of `mine`, a picture at a time."""
    index = VectorIndex.build(np.arange(len(pictures)), pictures)
    having: dict[int, set[int]] = {}  # pictures that have a caption of this meaning
    for picture, numbers in enumerate(data.owned):
        for number in numbers:
            having.setdefault(int(data.meanings[number]), set()).add(picture)
    result = np.full((len(data), count), -1, np.int64)
    for picture, numbers in enumerate(data.owned):
        candidates: dict[int, float] = {}
        excluded = {picture}
        hits = index.search(texts[numbers], 10 * count + 1)
        for number, (ids, scores) in zip(numbers, hits, strict=True):
            own = float(texts[number] @ pictures[picture])
            excluded |= having[int(data.meanings[number])]
            excluded |= set(ids[scores > own - (1 - margin) * abs(own)].tolist())
            for candidate, score in zip(ids.tolist(), scores.tolist(), strict=True):
                candidates[candidate] = max(score, candidates.get(candidate, -2.0))
        hardest = sorted((-s, c) for c, s in candidates.items() if c not in excluded)[:count]
        result[picture, : len(hardest)] = [c for _, c in hardest]
    return result


@pytest.mark.parametrize("seed", range(12))
def test_searching_in_blocks_finds_what_searching_one_by_one_does(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty pictures in clusters, of one to three captions each, some of them shared. The vectors are
    exact in half precision, in which the index holds them. Each of two processes finds its part."""
    rng = np.random.default_rng(seed)
    said = [{f"c{rng.integers(0, 50)}" for _ in range(rng.integers(1, 4))} for _ in range(60)]
    data = captioned([sorted(own) for own in said])
    centres = rng.normal(size=(6, 8))

    def near(groups: np.ndarray) -> np.ndarray:
        rows = centres[groups] + 0.4 * rng.normal(size=(len(groups), 8))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows.astype(np.float16).astype(np.float32)

    groups = rng.integers(0, 6, 60)
    of_text = np.zeros(len(data.texts), np.int64)
    of_text[data.captions] = groups[data.owner]
    pictures, texts = near(groups), near(of_text)
    count, margin = int(rng.integers(1, 5)), float(rng.choice([0.8, 0.95, 1.0]))
    expected = searched_one_by_one(pictures, texts, data, count=count, margin=margin)
    assert (expected >= 0).mean() > 0.1
    monkeypatch.setattr(data_module, "_SCORES", 1000)  # blocks of five pictures
    mined = mine(pictures, texts, data, count=count, margin=margin)
    assert mined.tolist() == expected.tolist()
    halves = [
        mine(pictures, texts, data, count=count, margin=margin, share=share)
        for share in (slice(0, 31), slice(31, 60))
    ]
    assert np.concatenate(halves).tolist() == expected.tolist()
