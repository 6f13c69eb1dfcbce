"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): weights between the start and the fine-tuned.

(1 - alpha) start + alpha tuned often knows the domain nearly as well as the tuned model and what it
knew before better than either. alpha is chosen on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from clipkit.training.evaluation import Scores

__all__ = ["ALPHAS", "Mixture", "choose_alpha", "mix"]

ALPHAS = (0.25, 0.5, 0.75, 1.0)
_CLOSE = 0.002  # within this of the best is as good: the least changed model wins


@dataclass(frozen=True, slots=True)
class Mixture:
    """What was chosen: `alpha` is the weight of the tuned, in 0..1."""

    alpha: float
    scores: Mapping[float, Scores]  # of every alpha that was tried, the start's under 0


def mix(
    model: torch.nn.Module,
    start: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    alpha: float,
) -> None:
    """Give the model (1 - alpha) start + alpha tuned, for the names in `tuned`; at 0 and 1 exactly."""
    state = model.state_dict()
    with torch.no_grad():
        for name, end in tuned.items():
            state[name].copy_(end if alpha == 1 else torch.lerp(start[name].to(end), end, alpha))


def choose_alpha(
    model: torch.nn.Module,
    start: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    evaluate: Callable[[], Scores],
    *,
    at_start: Scores,
) -> Mixture:
    """Try each of ALPHAS and leave the model at the best: the smallest whose mean recall is
    within 0.002 of the highest; at the start itself if none is as good as that."""
    tried: dict[float, Scores] = {}
    for alpha in ALPHAS:
        mix(model, start, tuned, alpha)
        tried[alpha] = evaluate()
    best = max(scores.mean_recall for scores in tried.values())
    chosen = min(alpha for alpha, s in tried.items() if s.mean_recall >= best - _CLOSE)
    chosen = chosen if best > at_start.mean_recall else 0.0
    mix(model, start, tuned, chosen)
    return Mixture(chosen, {0.0: at_start, **tried})
