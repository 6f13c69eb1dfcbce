"""The losses against values derived by hand, torch's own cross-entropy, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.losses import losses_of
from clipkit.losses.pairs import Same, fit_bias, info_nce, siglip
from clipkit.options import option_fields


def unit_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def matches(image_ids: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """Mark pairs (picture i, caption j) that share their picture or their caption: bool (B, B)."""
    return (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)


IMAGES, TEXTS = unit_rows(6, 4, 1), unit_rows(6, 4, 2)
SCALE = torch.tensor(math.log(5.0), dtype=torch.float64)
BIAS = torch.tensor(-2.0, dtype=torch.float64)


def grouped(matrix: torch.Tensor) -> Same:
    """The pairs (picture i, caption j) that a bool (B, B) marks, each caption a group of its own."""
    return Same(torch.arange(len(matrix)), *torch.nonzero(matrix).T)


MARKS = torch.zeros(6, 6, dtype=torch.bool)
MARKS[0, 3] = MARKS[3, 0] = MARKS[2, 5] = True
SAME = grouped(MARKS)


def test_identical_embeddings_cost_the_logarithm_of_the_batch() -> None:
    """All B scores of a row are equal, so each has probability 1/B: the loss is ln B."""
    same_rows = F.normalize(torch.ones(7, 3), dim=1)
    assert info_nce(same_rows, same_rows, torch.tensor(2.0)).item() == pytest.approx(math.log(7))


def test_one_pair_alone_costs_nothing() -> None:
    """The only candidate has probability 1; with no negatives, weighting them changes nothing."""
    row = unit_rows(1, 4, 0)
    for options in ({}, {"hardness": 1.0}, {"debias": 0.1}, {"label_smoothing": 0.2}):
        assert info_nce(row, row, SCALE, **options).item() == pytest.approx(0.0, abs=1e-12)


def test_orthogonal_pairs() -> None:
    """Own score s = scale, others 0, B = 2: -log(e^s / (e^s + 1)) = ln(1 + e^-s), both ways."""
    eye = torch.eye(2, dtype=torch.float64)
    value = info_nce(eye, eye, torch.tensor(math.log(3.0), dtype=torch.float64))
    assert value.item() == pytest.approx(math.log1p(math.exp(-3)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy_both_ways(smoothing: float) -> None:
    logits, target = 5 * IMAGES @ TEXTS.T, torch.arange(6)
    ways = (F.cross_entropy(way, target, label_smoothing=smoothing) for way in (logits, logits.T))
    expected = sum(ways) / 2
    value = info_nce(IMAGES, TEXTS, SCALE, label_smoothing=smoothing)
    assert value.item() == pytest.approx(float(expected))


def test_it_is_symmetric() -> None:
    options = {"hardness": 0.7, "debias": 0.1, "label_smoothing": 0.1}
    there = info_nce(IMAGES, TEXTS, SCALE, same=SAME, **options)
    back = info_nce(TEXTS, IMAGES, SCALE, same=grouped(MARKS.T), **options)
    assert there.item() == pytest.approx(back.item())
    assert siglip(IMAGES, TEXTS, SCALE, BIAS).item() == pytest.approx(
        siglip(TEXTS, IMAGES, SCALE, BIAS).item()
    )


def test_an_equal_caption_is_no_negative() -> None:
    """Fails for the version that takes the diagonal for the only truth: equal captions on two
    pictures are then pushed apart.

    Four identical rows, of which 0 and 1 share their caption. Masked: rows 0 and 1 see three
    candidates each, 2 and 3 see four: (2 ln 3 + 2 ln 4) / 4. As positives: all see four.
    """
    rows = F.normalize(torch.ones(4, 3, dtype=torch.float64), dim=1)
    same = matches(torch.arange(4), torch.tensor([8, 8, 2, 3]))
    assert same.tolist()[0] == [True, True, False, False]
    same = grouped(same)
    masked = info_nce(rows, rows, SCALE, same=same)
    assert masked.item() == pytest.approx((2 * math.log(3) + 2 * math.log(4)) / 4)
    positive = info_nce(rows, rows, SCALE, same=same, duplicates="positive")
    assert positive.item() == pytest.approx(math.log(4))
    assert info_nce(rows, rows, SCALE).item() == pytest.approx(math.log(4))


def test_positives_share_the_target_evenly() -> None:
    """B = 2, both pictures and both captions the same, scores (s, 0; 0, s): each row's target is
    the mean of its two log-probabilities: ln(e^s + 1) - s / 2."""
    eye = torch.eye(2, dtype=torch.float64)
    everything = grouped(torch.ones(2, 2, dtype=torch.bool))
    value = info_nce(eye, eye, SCALE, same=everything, duplicates="positive")
    assert value.item() == pytest.approx(math.log(math.exp(5) + 1) - 2.5)


def test_hardness_weighs_as_in_the_paper() -> None:
    """Robinson et al.'s code: imp = neg^beta; Ng = sum(imp * neg) / mean(imp)."""
    beta, total = 0.5, 0.0
    for logits in (5 * IMAGES @ TEXTS.T, 5 * TEXTS @ IMAGES.T):
        for i, row in enumerate(logits.exp()):
            negatives = torch.cat([row[:i], row[i + 1 :]])
            weights = negatives**beta
            hard = (weights * negatives).sum() / weights.mean()
            total -= torch.log(row[i] / (row[i] + hard)).item()
    assert info_nce(IMAGES, TEXTS, SCALE, hardness=beta).item() == pytest.approx(total / 12)


def test_debiasing_takes_the_expected_positives_out() -> None:
    """Chuang et al.'s code: Ng = max((sum(neg) - tau N pos) / (1 - tau), N exp(-1/t))."""
    tau, total, floored = 0.1, 0.0, 0
    texts = TEXTS.clone()
    texts[:3] = IMAGES[:3]  # three pairs that are right already, three that are not
    for logits in (5 * IMAGES @ texts.T, 5 * texts @ IMAGES.T):
        for i, row in enumerate(logits.exp()):
            corrected = ((row.sum() - row[i] - tau * 5 * row[i]) / (1 - tau)).item()
            floored += corrected < 5 * math.exp(-5)
            total -= math.log(row[i] / (row[i] + max(corrected, 5 * math.exp(-5))))
    assert 0 < floored < 12  # both branches are exercised
    assert info_nce(IMAGES, texts, SCALE, debias=tau).item() == pytest.approx(total / 12)


def test_a_scale_of_one_hundred_stays_finite_in_float32() -> None:
    images = IMAGES.float().requires_grad_()
    scale = torch.tensor(math.log(100.0), requires_grad=True)
    value = info_nce(images, TEXTS.float(), scale, hardness=1.0, debias=0.1, same=SAME)
    value.backward()
    assert images.grad is not None and scale.grad is not None
    assert torch.isfinite(value) and torch.isfinite(images.grad).all()
    assert torch.isfinite(scale.grad)


def test_siglip_by_hand() -> None:
    """B = 2, orthogonal: two true pairs with logit s + b = 3, two false ones with b = -2:
    (2 ln(1 + e^-3) + 2 ln(1 + e^-2)) / 2."""
    eye = torch.eye(2, dtype=torch.float64)
    value = siglip(eye, eye, SCALE, BIAS)
    assert value.item() == pytest.approx(math.log1p(math.exp(-3)) + math.log1p(math.exp(-2)))


def test_a_bias_by_hand() -> None:
    """All cosines are 0 in a sample of two pairs, of batches of four: one sigmoid of four is to be true,
    so the sigmoid of the bias is 1/4 and the bias ln(1/3)."""
    eye = torch.eye(4)
    assert fit_bias(eye[:2], eye[2:], SCALE, batch=4) == pytest.approx(-math.log(3))


@pytest.mark.parametrize("same", [None, SAME], ids=["alone", "same"])
def test_a_fitted_bias_has_the_least_loss(same: Same | None) -> None:
    fitted = torch.tensor(fit_bias(IMAGES, TEXTS, SCALE, batch=6, same=None), dtype=torch.float64)
    fitted.requires_grad_()
    siglip(IMAGES, TEXTS, SCALE, fitted).backward()
    assert fitted.grad is not None and abs(fitted.grad.item()) < 1e-12
    if same is not None:  # left out, so that fewer are to be true by mistake
        assert fit_bias(IMAGES, TEXTS, SCALE, batch=6, same=same) != fitted.item()


def test_a_fitted_bias_makes_the_first_loss_of_clips_weights_sane() -> None:
    """Cosines as CLIP's, 0.3 +- 0.03 of a pair and 0.15 +- 0.05 of others, at its scale of 100. With
    SigLIP's bias of -10 almost every pair is taken for true: a loss of over 500 from 128 pairs."""
    rows = F.normalize(torch.randn(128, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = F.normalize(torch.randn(128, 512, generator=torch.Generator().manual_seed(1)), dim=1)
    common = F.normalize(torch.randn(512, generator=torch.Generator().manual_seed(2)), dim=0)
    images = F.normalize(rows + 0.45 * common, dim=1)
    texts = F.normalize(0.22 * rows + noise + 0.42 * common, dim=1)
    cosines = images @ texts.T
    assert 0.25 < cosines.diagonal().mean() < 0.35 and 0.1 < cosines.mean() < 0.2
    scale = torch.tensor(math.log(100.0))
    bias = fit_bias(images, texts, scale, batch=128)
    assert siglip(images, texts, scale, torch.tensor(-10.0)).item() > 500
    assert siglip(images, texts, scale, torch.tensor(bias)).item() < math.log(128) + 1


def test_siglip_with_an_equal_caption() -> None:
    """As above, but the false pair (0, 1) is marked as true: left out, or counted with its sign
    turned: ln(1 + e^2) in place of ln(1 + e^-2)."""
    eye = torch.eye(2, dtype=torch.float64)
    same = grouped(torch.tensor([[False, True], [False, False]]))
    true, false = math.log1p(math.exp(-3)), math.log1p(math.exp(-2))
    masked = siglip(eye, eye, SCALE, BIAS, same=same)
    assert masked.item() == pytest.approx((2 * true + false) / 2)
    positive = siglip(eye, eye, SCALE, BIAS, same=same, duplicates="positive")
    assert positive.item() == pytest.approx((2 * true + false + math.log1p(math.exp(2))) / 2)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"same": SAME},
    {"same": SAME, "block_rows": 4},
    {"same": SAME, "label_smoothing": 0.1},
    {"same": SAME, "duplicates": "positive", "hardness": 0.5},
    {"hardness": 0.5, "debias": 0.05, "block_rows": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_gradients_of_info_nce(options: dict[str, Any]) -> None:
    check_gradients(lambda i, t, s, b: info_nce(i, t, s, **options) + 0 * b)


@pytest.mark.parametrize("options", [{}, {"same": SAME, "block_rows": 4}], ids=["plain", "same"])
def test_gradients_of_siglip(options: dict[str, Any]) -> None:
    check_gradients(lambda i, t, s, b: siglip(i, t, s, b, **options))


def check_gradients(function: Callable[..., torch.Tensor]) -> None:
    inputs = [t.clone().requires_grad_() for t in (IMAGES, TEXTS, SCALE, BIAS)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("block_rows", [1, 4, 6, 100])
def test_blocks_of_rows_change_nothing(block_rows: int) -> None:
    options: dict[str, Any] = {"same": SAME, "hardness": 0.3, "label_smoothing": 0.1}
    whole = info_nce(IMAGES, TEXTS, SCALE, **options)
    assert info_nce(IMAGES, TEXTS, SCALE, block_rows=block_rows, **options).item() == pytest.approx(
        whole.item(), rel=1e-12
    )
    blocks = siglip(IMAGES, TEXTS, SCALE, BIAS, same=SAME, block_rows=block_rows)
    assert blocks.item() == pytest.approx(siglip(IMAGES, TEXTS, SCALE, BIAS, same=SAME).item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(IMAGES, TEXTS[:5], SCALE), r"images \(6, 4\) and texts \(5, 4\)"),
        (lambda: info_nce(IMAGES[:0], TEXTS[:0], SCALE), "at least one pair"),
        (
            lambda: siglip(IMAGES[:2], TEXTS[:2], SCALE, BIAS, same=SAME),
            "same is of 6 pairs, .* has 2",
        ),
        (lambda: info_nce(IMAGES, TEXTS, SCALE, label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: info_nce(IMAGES, TEXTS, SCALE, debias=-0.1), "debias is -0.1"),
        (lambda: info_nce(IMAGES, TEXTS, SCALE, hardness=-1), "hardness is -1"),
    ],
)
def test_invalid_arguments_are_refused(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_every_registered_loss_is_called_as_it_says() -> None:
    for loss in losses_of("pairs").values():
        scalars = (SCALE, BIAS) if loss.has_bias else (SCALE,)
        options = dict.fromkeys(option_fields(loss.options), 0.1)
        assert torch.isfinite(loss(IMAGES, TEXTS, *scalars, same=SAME, **options))


def test_groups_mark_what_a_matrix_marks() -> None:
    """Captions 0 and 2 are of group 7, caption 1 of group 8. Picture 0 is in 7 and 8, picture 2 in 8."""
    groups = Same(torch.tensor([7, 8, 7]), torch.tensor([0, 0, 2]), torch.tensor([7, 8, 8]))
    matrix = torch.tensor([[True, True, True], [False, False, False], [False, True, False]])
    assert torch.equal(groups.of_pictures(0, 3), matrix)
    assert torch.equal(groups.of_captions(0, 3), matrix.T)
    assert torch.equal(groups.of_pictures(1, 3), matrix[1:])
    assert torch.equal(groups.of_captions(1, 2), matrix.T[1:2])


@pytest.mark.parametrize("same", [None, SAME], ids=["alone", "same"])
def test_the_short_way_of_plain_info_nce_is_the_long_one(same: Same | None) -> None:
    """A hardness of 1e-12 takes the long way, and weighs all negatives alike."""
    rows = [t.clone().requires_grad_() for t in (IMAGES, TEXTS, SCALE)]
    short, long = (info_nce(*rows, same=same, hardness=h) for h in (0.0, 1e-12))
    assert short.item() == pytest.approx(long.item(), abs=1e-9)
    for one, other in zip(
        torch.autograd.grad(short, rows), torch.autograd.grad(long, rows), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_marks_are_kept_as_they_are() -> None:
    """A matrix of any form, not only of groups, gives itself back."""
    marks = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    same = Same.of_marks(marks)
    assert torch.equal(same.of_pictures(0, 7), marks)
    assert torch.equal(same.of_captions(2, 5), marks.T[2:5])
