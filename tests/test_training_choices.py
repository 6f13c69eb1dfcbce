"""What training judges by: scores, the mixture with the start, hard negatives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.training.data import CaptionedPictures
from clipkit.training.evaluation import Scores, evaluate
from clipkit.training.interpolate import choose_alpha, mix
from clipkit.training.negatives import mine


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

    def pictures(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self._images, 2))

    def captions(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self._texts, 3))

    def stream(self, plans: object) -> Iterator[object]:
        raise NotImplementedError

    def mode(self, training: bool) -> int:
        assert not training
        return 0

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    texts = images


def scores_of(images: torch.Tensor, texts: torch.Tensor, captions: list[list[str]]) -> Scores:
    fixed = Fixed(captioned(captions), images, texts)
    return evaluate(fixed, fixed)  # type: ignore[arg-type]


TWO_EACH = [[f"{i}a", f"{i}b"] for i in range(12)]
EYE = torch.eye(12)


def test_a_perfect_model_scores_one_hundred_percent() -> None:
    scores = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert set(scores.recall.values()) == {1.0} and scores.mean_recall == 1.0
    assert (scores.pictures, scores.captions) == (12, 24)
    assert scores.space["alignment"] == 0.0
    assert scores.space["effective_rank"] == pytest.approx(
        11
    )  # twelve points, their mean taken out


def test_a_collapsed_model_scores_chance_and_is_worried_about() -> None:
    """All vectors equal, ties by their expectation: R@1 of 1/12 text-to-image, 2/24 the other way.
    Fails for the version that counts only strictly greater scores: 100 %."""
    same = F.normalize(torch.ones(12, 12), dim=1)
    collapsed = scores_of(same, same.repeat_interleave(2, 0), TWO_EACH)
    assert collapsed.recall["text_to_image/R@1"] == pytest.approx(1 / 12)
    assert collapsed.recall["image_to_text/R@1"] == pytest.approx(2 / 24)
    start = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert "collapsing: their variance is" in (collapsed.worry(start) or "")
    assert start.worry(start) is None and collapsed.worry(None) is None


def test_a_lower_rank_is_worried_about_too() -> None:
    line = F.normalize(torch.tensor([[1.0, 0.0]]) * torch.linspace(-1, 1, 12)[:, None], dim=1)
    flat = scores_of(line, line.repeat_interleave(2, 0), TWO_EACH)
    start = scores_of(EYE, EYE.repeat_interleave(2, 0), TWO_EACH)
    assert "effective rank is 1, after 11" in (flat.worry(start) or "")


def test_a_model_of_nan_is_an_error() -> None:
    broken = EYE.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(InputError, match="row 3 of the pictures is not finite"):
        scores_of(broken, EYE.repeat_interleave(2, 0), TWO_EACH)


def test_a_caption_on_two_pictures_counts_for_both() -> None:
    captions = [["same", "one"], ["same", "two"]]
    texts = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    scores = scores_of(torch.eye(2), texts, captions)
    assert scores.recall["text_to_image/R@1"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert scores.recall["image_to_text/R@1"] == 1.0


# ---- mixing with the start


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tuned = torch.nn.Parameter(torch.tensor([4.0]))
        self.kept = torch.nn.Parameter(torch.tensor([7.0]))


START = {"tuned": torch.tensor([0.0]), "kept": torch.tensor([7.0])}
TUNED = {"tuned": torch.tensor([4.0])}


def recalls(value: float) -> Scores:
    return Scores({"text_to_image/R@1": value}, {}, 1, 1)


def chosen(by_weight: dict[float, float], start: float) -> tuple[float, float]:
    model = Weighted()
    mixture = choose_alpha(
        model,
        START,
        TUNED,
        lambda: recalls(by_weight[model.tuned.item()]),
        at_start=recalls(start),
    )
    assert model.kept.item() == 7.0
    assert list(mixture.scores) == [0.0, 0.25, 0.5, 0.75, 1.0]
    return mixture.alpha, model.tuned.item()


def test_the_mixture_that_validates_best_is_taken() -> None:
    assert chosen({1.0: 0.3, 2.0: 0.5, 3.0: 0.4, 4.0: 0.2}, 0.1) == (0.5, 2.0)


def test_of_equals_the_nearest_to_the_start_is_taken() -> None:
    assert chosen({1.0: 0.3, 2.0: 0.4995, 3.0: 0.5, 4.0: 0.501}, 0.1) == (0.5, 2.0)


def test_the_start_is_taken_only_if_nothing_is_better() -> None:
    assert chosen({1.0: 0.3, 2.0: 0.3, 3.0: 0.3, 4.0: 0.3}, 0.3) == (0.0, 0.0)
    assert chosen({1.0: 0.3, 2.0: 0.3, 3.0: 0.3, 4.0: 0.301}, 0.2999) == (0.25, 1.0)


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
