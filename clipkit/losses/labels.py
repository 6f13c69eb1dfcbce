"""Losses over labelled rows: those of one label belong together, all others apart.

Each takes unit rows (B, D) and labels, int64 (B,), and returns a scalar. Those that compare rows with
each other return 0, with a graph, for a batch that has no two rows of one label or none of another.
Distances are Euclidean, sqrt(2 - 2 cosine).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError

_LEAST = 1e-12  # of a squared distance, whose root has no gradient at 0

Mining = Literal["all", "semihard", "hard"]


def contrastive(rows: torch.Tensor, labels: torch.Tensor, *, margin: float = 1.0) -> torch.Tensor:
    """Compute the pairwise contrastive loss (Chopra et al. 2005; Hadsell et al. 2006): squared distance
    of pairs of one label, averaged, plus max(0, margin - distance) squared of the others, averaged."""
    same, other = _pairs(rows, labels)
    distance = distances(rows)
    apart = (margin - distance).clamp(min=0).square()
    return _mean(distance.square(), same) + _mean(apart, other)


def triplet(
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: float = 0.2,
    mining: Mining = "semihard",
) -> torch.Tensor:
    """Compute the triplet loss max(0, d(anchor, positive) - d(anchor, negative) + margin).

    mining: which triplets of the batch count. "all" with a loss above 0 (batch all; Hermans et al.
        2017, arXiv 1703.07737), averaged; "semihard", of these the ones with a negative farther than
        the positive (FaceNet; Schroff et al. 2015, arXiv 1503.03832); "hard", of each anchor that with
        the farthest positive and the nearest negative (batch hard; Hermans et al.).
    """
    same, other = _pairs(rows, labels)
    distance = distances(rows)
    if mining == "hard":
        anchors = same.any(1) & other.any(1)
        farthest = distance.masked_fill(~same, -math.inf).amax(1)[anchors]
        nearest = distance.masked_fill(~other, math.inf).amin(1)[anchors]
        loss = (farthest - nearest + margin).clamp(min=0)
        return loss.mean() if len(loss) else _nothing(rows)
    anchors, positives = torch.nonzero(same, as_tuple=True)
    near, far = distance[anchors, positives, None], distance[anchors]  # (P, 1), (P, B)
    loss = (near - far + margin).clamp(min=0)
    counted = other[anchors] & (loss > 0)
    if mining == "semihard":
        counted &= far > near
    return _mean(loss, counted)


def n_pair(rows: torch.Tensor, labels: torch.Tensor, *, scale: float = 16.0) -> torch.Tensor:
    """Compute the multi-class N-pair loss (Sohn 2016): of each label with two rows or more, the first
    is the anchor and the second the positive, and all labels' positives are the candidates.

    scale: factor of the cosines. The paper's rows have no unit length, and no factor.
    """
    anchors, positives = _first_two(labels)
    if len(anchors) < 2:
        return _nothing(rows)
    logits = scale * rows[anchors] @ rows[positives].T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=rows.device))


def sup_con(
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.1,
    inside: bool = False,
) -> torch.Tensor:
    """Compute the supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362), averaged over the
    anchors that have a positive.

    inside: the mean over positives inside of the logarithm (L_in) instead of outside (L_out).
    """
    same, _ = _pairs(rows, labels)
    anchors = same.any(1)
    if not bool(anchors.any()):
        return _nothing(rows)
    same = same[anchors]
    logits = _without_self(rows @ rows.T / temperature)[anchors]
    share = logits - logits.logsumexp(1, keepdim=True)  # log of the share of all others
    count = same.sum(1)
    if inside:
        return (count.log() - share.masked_fill(~same, -math.inf).logsumexp(1)).mean()
    return (-share.masked_fill(~same, 0).sum(1) / count).mean()


def lifted_structure(
    rows: torch.Tensor, labels: torch.Tensor, *, margin: float = 1.0
) -> torch.Tensor:
    """Compute the lifted structured loss (Oh Song et al. 2016, arXiv 1511.06452): half of the mean, over
    pairs i, j of one label, of max(0, d_ij + log of the sum of exp(margin - d) over the negatives
    of both) squared."""
    same, other = _pairs(rows, labels)
    distance = distances(rows)
    first, second = torch.nonzero(same.triu(), as_tuple=True)
    has = other[first].any(1) & other[second].any(1)
    first, second = first[has], second[has]
    if not len(first):
        return _nothing(rows)
    negatives = (margin - distance).masked_fill(~other, -math.inf).logsumexp(1)
    value = torch.logaddexp(negatives[first], negatives[second]) + distance[first, second]
    return value.clamp(min=0).square().mean() / 2


def soft_nearest_neighbour(
    rows: torch.Tensor, labels: torch.Tensor, *, temperature: float = 0.1
) -> torch.Tensor:
    """Compute the soft nearest neighbour loss (Frosst et al. 2019, arXiv 1902.01889): -log of the chance
    to draw a row of the own label, if rows are drawn by exp(-squared distance / temperature); averaged
    over the rows that have one."""
    same, _ = _pairs(rows, labels)
    anchors = same.any(1)
    if not bool(anchors.any()):
        return _nothing(rows)
    logits = _without_self((2 * rows @ rows.T - 2) / temperature)[anchors]
    own = logits.masked_fill(~same[anchors], -math.inf).logsumexp(1)
    return (logits.logsumexp(1) - own).mean()


def norm_softmax(
    rows: torch.Tensor,
    labels: torch.Tensor,
    proxies: torch.Tensor,
    *,
    temperature: float = 0.05,
) -> torch.Tensor:
    """Compute the normalised softmax (Zhai & Wu 2019, arXiv 1811.12649): cross-entropy of the cosines of
    each row and a vector of each class, divided by the temperature. It classifies, so that a batch
    needs no two rows of one label.

    proxies: (C, D), a learned vector of any length for each class; labels are its rows' numbers.
    """
    _pairs(rows, labels)
    if proxies.ndim != 2 or proxies.shape[1] != rows.shape[1]:
        raise InputError(
            f"proxies {tuple(proxies.shape)} must be (C, D) for rows {tuple(rows.shape)}"
        )
    logits = rows @ F.normalize(proxies, dim=1).T / temperature
    return F.cross_entropy(logits, labels)


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances of unit rows (B, D): (B, B), at least 1e-6."""
    return (2 - 2 * rows @ rows.T).clamp(min=_LEAST).sqrt()


def _pairs(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark ordered pairs of one label, without a row and itself, and of two labels: bool (B, B)."""
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not len(rows):
        raise InputError(
            f"rows {tuple(rows.shape)} must be (B, D) and labels {tuple(labels.shape)} (B,), with at "
            "least one row"
        )
    equal = labels[:, None] == labels
    return equal & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device), ~equal


def _first_two(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the first and of the second row of each label that has two."""
    earlier = (labels[:, None] == labels).tril(-1).sum(1)  # rows of the same label before each
    second = torch.nonzero(earlier == 1).flatten()
    equal = labels[second, None] == labels
    return equal.int().argmax(1), second  # argmax: the first of several


def _without_self(logits: torch.Tensor) -> torch.Tensor:
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(own, -math.inf)


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Average the counted values; 0 if there are none."""
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def _nothing(rows: torch.Tensor) -> torch.Tensor:
    return 0 * rows.sum()
