"""Contrastive losses over a batch of picture-caption pairs: pure functions, one dictionary.

All take unit rows `images` and `texts` (B, D), where row i of one belongs to row i of the other, and
give a scalar. `same` bool (B, B) tells which other pairs belong together (see `matches`): an equal
caption on another picture is no negative. With `block_rows` the (B, B) scores are made that many
rows at a time and made again for the gradient, so that memory grows with B and not with its square;
the value and the gradients are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  the field's own name for it
from torch.utils.checkpoint import checkpoint

from clipkit.errors import InputError

Duplicates = Literal["mask", "positive"]


def matches(image_ids: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """bool (B, B): pairs (picture i, caption j) that share their picture or their caption.

    image_ids, text_ids: int64 (B,), equal where the content is.
    """
    return (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)


def info_nce(
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    same: torch.Tensor | None = None,
    duplicates: Duplicates = "mask",
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    debias: float = 0.0,
    block_rows: int | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): the mean over both directions of
    -log softmax of the own pair. `logit_scale` is the logarithm of the inverse temperature.

    duplicates: pairs of `same` are left out ("mask") or share the target evenly ("positive";
        Khosla et al. 2020, arXiv 2004.11362, its L_out).
    label_smoothing: this share of the target is spread evenly over all candidates.
    hardness: beta of Robinson et al. 2021, arXiv 2010.04592: a negative weighs as
        exp(beta * logit), the weights' mean being 1. 0 weighs all alike.
    debias: tau+ of Chuang et al. 2020, arXiv 2007.00224: the share of the negatives that are
        positives unknown; their expected part is taken out of the denominator.
    """
    _check(images, texts, same)
    _check_share("label_smoothing", label_smoothing)
    _check_share("debias", debias)
    if hardness < 0:
        raise InputError(f"hardness is {hardness}; it must be 0 (off) or positive, such as 0.5")

    def one_way(
        start: int, rows: torch.Tensor, others: torch.Tensor, known: torch.Tensor | None
    ) -> torch.Tensor:
        scale = logit_scale.exp()
        logits = scale * rows @ others.T
        own = _own_pairs(logits, start)
        known = own if known is None else known | own
        positive = known if duplicates == "positive" else own
        target = _mean(logits, positive)
        if label_smoothing:
            spread = _mean(logits, positive | ~known)
            target = (1 - label_smoothing) * target + label_smoothing * spread
        log_positive = _log_sum(logits, positive)
        log_negative = _log_negative(logits, ~known, hardness)
        if debias:
            log_negative = _debiased(
                log_negative, log_positive - positive.sum(1).log(), ~known, scale, debias
            )
        return (torch.logaddexp(log_positive, log_negative) - target).sum()

    transposed = None if same is None else same.T
    image_to_text = _over_rows(one_way, images, texts, same, block_rows)
    text_to_image = _over_rows(one_way, texts, images, transposed, block_rows)
    return (image_to_text + text_to_image) / (2 * len(images))


def siglip(
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    same: torch.Tensor | None = None,
    duplicates: Duplicates = "mask",
    block_rows: int | None = None,
) -> torch.Tensor:
    """Sigmoid loss (SigLIP, arXiv 2303.15343): every pair is one binary question; the sum over all
    pairs, divided by B. Pairs of `same` are left out ("mask") or count as true ("positive")."""
    _check(images, texts, same)

    def block(
        start: int, rows: torch.Tensor, others: torch.Tensor, known: torch.Tensor | None
    ) -> torch.Tensor:
        logits = logit_scale.exp() * rows @ others.T + logit_bias
        own = _own_pairs(logits, start)
        known = own if known is None else known | own
        positive = known if duplicates == "positive" else own
        asked = positive | ~known
        return -F.logsigmoid(torch.where(positive, logits, -logits)).mul(asked).sum()

    return _over_rows(block, images, texts, same, block_rows) / len(images)


@dataclass(frozen=True, slots=True)
class Loss:
    """A registered loss: how to call it, and what training must know about it."""

    function: Callable[..., torch.Tensor]
    has_bias: bool  # takes logit_bias behind logit_scale
    clamps_scale: bool  # the scale is kept within [1, 100]: CLIP, section 2.5
    options: frozenset[str]  # keyword options beside same, duplicates and block_rows


LOSSES: dict[str, Loss] = {
    "infonce": Loss(
        info_nce,
        has_bias=False,
        clamps_scale=True,
        options=frozenset({"label_smoothing", "hardness", "debias"}),
    ),
    "siglip": Loss(siglip, has_bias=True, clamps_scale=False, options=frozenset()),
}

_Block = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _over_rows(
    block: _Block,
    rows: torch.Tensor,
    others: torch.Tensor,
    same: torch.Tensor | None,
    block_rows: int | None,
) -> torch.Tensor:
    """The sum of `block(first row, rows, others, same)` over blocks of rows."""
    if block_rows is None or block_rows >= len(rows):
        return block(0, rows, others, same)
    total = rows.new_zeros(())
    for start in range(0, len(rows), block_rows):
        end = start + block_rows
        known = None if same is None else same[start:end]
        total = total + checkpoint(
            block, start, rows[start:end], others, known, use_reentrant=False
        )
    return total


def _own_pairs(logits: torch.Tensor, start: int) -> torch.Tensor:
    """bool (R, B): row r's own pair stands in column start + r."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    rows = torch.arange(start, start + len(logits), device=logits.device)
    return rows[:, None] == columns


def _mean(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(R,): each row's mean over the chosen columns, of which there is at least one."""
    return (logits * chosen).sum(1) / chosen.sum(1)


def _log_sum(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(R,): log of the sum of exp over the chosen columns; hugely negative where there are none.

    Finite on purpose: the gradient of logsumexp over nothing but -inf is NaN.
    """
    nothing = torch.finfo(logits.dtype).min / 4
    return torch.logsumexp(logits.masked_fill(~chosen, nothing), dim=1)


def _log_negative(logits: torch.Tensor, negative: torch.Tensor, beta: float) -> torch.Tensor:
    """(R,): log of the negatives' summed exp, reweighted by hardness."""
    if not beta:
        return _log_sum(logits, negative)
    count = negative.sum(1).clamp(min=1).to(logits.dtype).log()
    weighted = _log_sum((1 + beta) * logits, negative) - _log_sum(beta * logits, negative)
    # Where there are no negatives the two cancel: nothing must stay nothing.
    return torch.where(negative.any(1), count + weighted, _log_sum(logits, negative))


def _debiased(
    log_negative: torch.Tensor,
    log_positive: torch.Tensor,
    negative: torch.Tensor,
    scale: torch.Tensor,
    tau: float,
) -> torch.Tensor:
    """(R,): log max((sum of negatives - tau N positive) / (1 - tau), N exp(-scale)).

    In units of the greater of the two, so that a scale of 100 does not overflow.
    """
    count = negative.sum(1).to(log_negative.dtype)
    unit = torch.maximum(log_negative, log_positive).detach()
    taken_out = (log_negative - unit).exp() - tau * count * (log_positive - unit).exp()
    least = (count * (-scale - unit).exp()).clamp(min=torch.finfo(unit.dtype).tiny)
    return torch.maximum(taken_out / (1 - tau), least).log() + unit


def _check(images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor | None) -> None:
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise InputError(
            f"images {tuple(images.shape)} and texts {tuple(texts.shape)} must both be (B, D) with "
            "at least one pair"
        )
    if same is not None and (same.dtype != torch.bool or same.shape != (len(images),) * 2):
        raise InputError(
            f"same must be bool {(len(images),) * 2}, got {same.dtype} {tuple(same.shape)}"
        )


def _check_share(name: str, value: float) -> None:
    if not (0 <= value < 1) or math.isnan(value):
        raise InputError(f"{name} is {value}; it must be at least 0 and below 1")
