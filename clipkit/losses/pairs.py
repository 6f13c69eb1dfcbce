"""Contrastive losses over a batch of picture-caption pairs.

Each takes unit rows `images` and `texts` (B, D), where row i of one belongs to row i of the other,
and returns a scalar. `same` says which other pictures and captions belong together, such as equal
captions of two pictures, so that they are not taken for negatives. With `block_rows` the (B, B) scores
are computed that many rows at a time, and again for the gradient, so that memory grows with B and not
with its square; value and gradients stay the same.
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


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """Which pictures and captions of a batch of B pairs belong together, beside the pairs themselves.

    They lie in groups, such as captions of one meaning: a picture may be in several, a caption is in
    one. So a batch of 32,768 takes a megabyte where a matrix of marks takes a gigabyte. A pair's own
    picture and caption may share a group or not.
    """

    captions: torch.Tensor  # int64 (B,): the group of each caption
    pictures: torch.Tensor  # int64 (E,): picture pictures[e] is in group groups[e]; no pair twice
    groups: torch.Tensor  # int64 (E,)

    @classmethod
    def of_marks(cls, marks: torch.Tensor) -> Same:
        """Make one of a matrix: bool (B, B), picture i and caption j."""
        pictures, captions = marks.nonzero(as_tuple=True)
        return cls(torch.arange(len(marks), device=marks.device), pictures, captions)

    def to(self, device: torch.device) -> Same:
        return Same(self.captions.to(device), self.pictures.to(device), self.groups.to(device))

    def of_pictures(self, start: int, stop: int) -> torch.Tensor:
        """Mark the captions of pictures start to stop: bool (stop - start, B)."""
        inside = (self.pictures >= start) & (self.pictures < stop)
        equal = self.groups[inside, None] == self.captions
        return _added(equal, 0, self.pictures[inside] - start, stop - start)

    def of_captions(self, start: int, stop: int) -> torch.Tensor:
        """Mark the pictures of captions start to stop: bool (stop - start, B)."""
        equal = self.captions[start:stop, None] == self.groups
        return _added(equal, 1, self.pictures, len(self.captions))


def _added(marks: torch.Tensor, dim: int, places: torch.Tensor, count: int) -> torch.Tensor:
    """Join marks that have one place along `dim`, of `count` places. At most one of them is set."""
    shape = list(marks.shape)
    shape[dim] = count
    joined = torch.zeros(shape, dtype=torch.uint8, device=marks.device)
    return joined.index_add_(dim, places, marks.to(torch.uint8)).bool()


def info_nce(
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    same: Same | None = None,
    duplicates: Duplicates = "mask",
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    debias: float = 0.0,
    block_rows: int | None = None,
) -> torch.Tensor:
    """Compute symmetric InfoNCE (CLIP, arXiv 2103.00020): -log softmax of the own pair, averaged over
    all rows and both directions. `logit_scale` is the logarithm of the inverse temperature.

    duplicates: leave pairs of `same` out ("mask"), or share the target evenly among them
        ("positive"; L_out of Khosla et al. 2020, arXiv 2004.11362).
    label_smoothing: spread this share of the target evenly over all candidates.
    hardness: beta of Robinson et al. 2021 (arXiv 2010.04592): weigh a negative by
        exp(beta * logit), with weights of mean 1. 0 weighs all alike.
    debias: tau+ of Chuang et al. 2020 (arXiv 2007.00224): the share of negatives that are in fact
        positive; their expected part is subtracted from the denominator.
    Raises InputError for mismatched shapes and for options outside their range.
    """
    _check(images, texts, same)
    _check_share("label_smoothing", label_smoothing)
    _check_share("debias", debias)
    if hardness < 0:
        raise InputError(f"hardness is {hardness}; it must be 0 (off) or positive, such as 0.5")

    share = duplicates == "positive" and same is not None
    plain = not (share or label_smoothing or hardness or debias)
    if plain and (block_rows is None or block_rows >= len(images)):  # both ways from one product
        logits = logit_scale.exp() * images @ texts.T
        marks = None if same is None else same.of_pictures(0, len(images))
        other_way = _cross_entropy(logits.T, 0, None if marks is None else marks.T)
        return (_cross_entropy(logits, 0, marks) + other_way) / (2 * len(images))

    def one_way(
        start: int, rows: torch.Tensor, others: torch.Tensor, marks: torch.Tensor | None
    ) -> torch.Tensor:
        scale = logit_scale.exp()
        logits = scale * rows @ others.T
        if plain:
            return _cross_entropy(logits, start, marks)
        own = _own_pairs(logits, start)
        true = own if marks is None else marks | own
        positive = true if duplicates == "positive" else own
        target = _mean(logits, positive)
        if label_smoothing:
            spread = _mean(logits, positive | ~true)
            target = (1 - label_smoothing) * target + label_smoothing * spread
        log_positive = _log_sum(logits, positive)
        log_negative = _log_negative(logits, ~true, hardness)
        if debias:
            log_negative = _debiased(
                log_negative, log_positive - positive.sum(1).log(), ~true, scale, debias
            )
        return (torch.logaddexp(log_positive, log_negative) - target).sum()

    ways = (None, None) if same is None else (same.of_pictures, same.of_captions)
    image_to_text = _over_rows(one_way, images, texts, ways[0], block_rows)
    text_to_image = _over_rows(one_way, texts, images, ways[1], block_rows)
    return (image_to_text + text_to_image) / (2 * len(images))


def siglip(
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    same: Same | None = None,
    duplicates: Duplicates = "mask",
    block_rows: int | None = None,
) -> torch.Tensor:
    """Compute the sigmoid loss (SigLIP, arXiv 2303.15343): binary cross-entropy of every pair, summed
    over all pairs and divided by B. Pairs of `same` are left out ("mask") or positive ("positive").
    """
    _check(images, texts, same)

    def block(
        start: int, rows: torch.Tensor, others: torch.Tensor, marks: torch.Tensor | None
    ) -> torch.Tensor:
        logits = logit_scale.exp() * rows @ others.T + logit_bias
        own = _own_pairs(logits, start)
        true = own if marks is None else marks | own
        positive = true if duplicates == "positive" else own
        counted = positive | ~true
        return -F.logsigmoid(torch.where(positive, logits, -logits)).mul(counted).sum()

    marks = None if same is None else same.of_pictures
    return _over_rows(block, images, texts, marks, block_rows) / len(images)


@torch.no_grad()
def fit_bias(
    images: torch.Tensor,
    texts: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    batch: int,
    same: Same | None = None,
) -> float:
    """Return the bias at which the sigmoid loss of batches of `batch` pairs is least, with this scale.

    images and texts (n, D), unit rows, are a sample of pairs. The loss is convex in the bias, with the
    derivative sum of sigmoids - number of true pairs, so that at its minimum one pair of a row is
    expected to be true. Pairs of `same` are left out. The result depends on the rows alone: float64, on
    the CPU, by bisection.
    """
    _check(images, texts, same)
    images, texts = images.double().cpu(), texts.double().cpu()
    scale = logit_scale.double().exp().cpu()
    logits = scale * images @ texts.T
    own = torch.eye(len(logits), dtype=torch.bool)
    false = ~own if same is None else ~(own | same.to(own.device).of_pictures(0, len(own)))
    # Of `batch` pairs a row has one true and batch - 1 others, however many are in the sample.
    weights = own.double() / len(own) + (batch - 1) * false.double() / false.sum().clamp(min=1)
    low, high = -float(scale) - 40.0, float(scale) + 40.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = (weights * torch.sigmoid(logits + middle)).sum().item()
        low, high = (low, middle) if expected > 1 else (middle, high)
    return (low + high) / 2


_Block = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _over_rows(
    block: _Block,
    rows: torch.Tensor,
    others: torch.Tensor,
    marks: Callable[[int, int], torch.Tensor] | None,
    block_rows: int | None,
) -> torch.Tensor:
    """Sum `block(first row, rows, others, marks)` over blocks of rows."""

    def part(start: int, own: torch.Tensor) -> torch.Tensor:
        return block(start, own, others, None if marks is None else marks(start, start + len(own)))

    if block_rows is None or block_rows >= len(rows):
        return part(0, rows)
    total = rows.new_zeros(())
    for start in range(0, len(rows), block_rows):
        own = rows[start : start + block_rows]
        total = total + checkpoint(part, start, own, use_reentrant=False)
    return total


def _cross_entropy(logits: torch.Tensor, start: int, marks: torch.Tensor | None) -> torch.Tensor:
    """Sum -log softmax of each row's own pair, column start + r of row r, without others of `marks`."""
    if marks is not None:
        logits = logits.masked_fill(marks & ~_own_pairs(logits, start), -math.inf)
    own = torch.arange(start, start + len(logits), device=logits.device)
    return F.cross_entropy(logits, own, reduction="sum")


def _own_pairs(logits: torch.Tensor, start: int) -> torch.Tensor:
    """Mark each row's own pair: bool (R, B), true in column start + r of row r."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    rows = torch.arange(start, start + len(logits), device=logits.device)
    return rows[:, None] == columns


def _mean(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Average each row over the chosen columns, at least one per row: (R, B) -> (R,)."""
    return (logits * chosen).sum(1) / chosen.sum(1)


def _log_sum(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Compute logsumexp over the chosen columns, (R, B) -> (R,); hugely negative if there are none.

    Finite on purpose: the gradient of logsumexp over nothing but -inf is NaN.
    """
    nothing = torch.finfo(logits.dtype).min / 4
    return torch.logsumexp(logits.masked_fill(~chosen, nothing), dim=1)


def _log_negative(logits: torch.Tensor, negative: torch.Tensor, beta: float) -> torch.Tensor:
    """Compute the log of the negatives' summed exp, reweighted by hardness: (R, B) -> (R,)."""
    if not beta:
        return _log_sum(logits, negative)
    count = negative.sum(1).clamp(min=1).to(logits.dtype).log()
    weighted = _log_sum((1 + beta) * logits, negative) - _log_sum(beta * logits, negative)
    # Without negatives the two terms would cancel to 0 instead of log 0.
    return torch.where(negative.any(1), count + weighted, _log_sum(logits, negative))


def _debiased(
    log_negative: torch.Tensor,
    log_positive: torch.Tensor,
    negative: torch.Tensor,
    scale: torch.Tensor,
    tau: float,
) -> torch.Tensor:
    """Compute log max((sum of negatives - tau N positive) / (1 - tau), N exp(-scale)): (R,).

    In units of the greater of the two logarithms, so that a scale of 100 does not overflow.
    """
    count = negative.sum(1).to(log_negative.dtype)
    unit = torch.maximum(log_negative, log_positive).detach()
    corrected = (log_negative - unit).exp() - tau * count * (log_positive - unit).exp()
    least = (count * (-scale - unit).exp()).clamp(min=torch.finfo(unit.dtype).tiny)
    return torch.maximum(corrected / (1 - tau), least).log() + unit


def _check(images: torch.Tensor, texts: torch.Tensor, same: Same | None) -> None:
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise InputError(
            f"images {tuple(images.shape)} and texts {tuple(texts.shape)} must both be (B, D) with "
            "at least one pair"
        )
    if same is not None and len(same.captions) != len(images):
        raise InputError(f"same is of {len(same.captions)} pairs, the batch has {len(images)}")


def _check_share(name: str, value: float) -> None:
    if not (0 <= value < 1) or math.isnan(value):
        raise InputError(f"{name} is {value}; it must be at least 0 and below 1")
