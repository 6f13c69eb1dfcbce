"""Losses over two views of the same things: row i of `first` and of `second` show the same one.

Each takes unit rows (B, D) and returns a scalar.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError


def nt_xent(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    temperature: float = 0.5,
    decoupled: bool = False,
) -> torch.Tensor:
    """Compute NT-Xent (SimCLR; Chen et al. 2020, arXiv 2002.05709): each of the 2B rows should find its
    other view among the 2B - 1 others.

    decoupled: leave the other view out of the denominator (DCL; Yeh et al. 2022, arXiv 2110.06848).
    """
    _check(first, second)
    rows = torch.cat([first, second])
    count = len(first)
    places = torch.arange(2 * count, device=rows.device)
    partner = (places + count) % (2 * count)
    logits = rows @ rows.T / temperature
    positive = logits[places, partner]
    left_out = places[:, None] == places
    if decoupled:
        if count < 2:
            return 0 * rows.sum()
        left_out = left_out | (partner[:, None] == places)
    return (logits.masked_fill(left_out, -math.inf).logsumexp(1) - positive).mean()


def queued(
    queries: torch.Tensor,
    keys: torch.Tensor,
    queue: torch.Tensor,
    *,
    temperature: float = 0.2,
) -> torch.Tensor:
    """Compute InfoNCE against a queue of earlier keys (K, D) as the negatives (MoCo; He et al. 2020,
    arXiv 1911.05722). Keys and queue get no gradient."""
    _check(queries, keys)
    positive = (queries * keys.detach()).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.detach().T], 1) / temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target)


def cosine_regression(
    predictions: torch.Tensor, targets: torch.Tensor, *, stop_gradient: bool = True
) -> torch.Tensor:
    """Compute the mean squared distance of unit rows, 2 - 2 cosine (BYOL; Grill et al. 2020, arXiv
    2006.07733). Targets get no gradient, unless `stop_gradient` is off, to study the collapse."""
    _check(predictions, targets)
    targets = targets.detach() if stop_gradient else targets
    return (2 - 2 * (predictions * targets).sum(1)).mean()


def relational(students: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """Compute the distance-wise relational distillation loss (RKD; Park et al. 2019, arXiv 1904.05068):
    Huber loss of all pairs' distances, each set divided by its mean. The widths may differ."""
    if students.ndim != 2 or teachers.ndim != 2 or len(students) != len(teachers):
        raise InputError(
            f"students {tuple(students.shape)} and teachers {tuple(teachers.shape)} must have as many "
            "rows"
        )
    if len(students) < 2:
        return 0 * students.sum()
    return F.smooth_l1_loss(_relative(students), _relative(teachers.detach()))


def _relative(rows: torch.Tensor) -> torch.Tensor:
    """Return the distances of all pairs, (B (B - 1) / 2,), divided by their mean."""
    distance: torch.Tensor = F.pdist(rows)
    return distance / distance.mean().clamp(min=1e-12)


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise InputError(
            f"the views {tuple(first.shape)} and {tuple(second.shape)} must both be (B, D) with at "
            "least one row"
        )
