"""The loss over two texts of the same things: each query's passage against all others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError


def in_batch(
    queries: torch.Tensor,
    passages: torch.Tensor,
    *,
    temperature: float = 0.05,
    left_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute -log of the softmax share of each query's own passage (DPR; Karpukhin et al. 2020, arXiv
    2004.04906; SimCSE; Gao et al. 2021, arXiv 2104.08821), averaged over the queries.

    queries: unit rows (B, D).
    passages: unit rows (N, D), N >= B. The first B are the queries' own, in their order; the others are
        hard negatives. Every passage is a candidate of every query.
    left_out: int64 (P, 2), pairs (query, passage) that are no negatives.
    Raises InputError for mismatched shapes.
    """
    if queries.ndim != 2 or queries.shape[1:] != passages.shape[1:] or not len(queries):
        raise InputError(
            f"queries {tuple(queries.shape)} and passages {tuple(passages.shape)} must be (B, D) and "
            "(N, D), with at least one query"
        )
    if len(passages) < len(queries):
        raise InputError(
            f"{len(queries)} queries have {len(passages)} passages; each needs its own"
        )
    logits = queries @ passages.T / temperature
    if left_out is not None and len(left_out):
        marked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        marked[left_out[:, 0], left_out[:, 1]] = True
        logits = logits.masked_fill(marked, -math.inf)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))
