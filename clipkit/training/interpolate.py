"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): weights between the start and the fine-tuned.

(1 - alpha) start + alpha tuned often knows the domain nearly as well as the tuned model and what it
knew before better than either. alpha is chosen on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from clipkit.training.evaluation import Scores, exceeds

__all__ = ["ALPHAS", "Mixture", "choose_alpha", "mix"]

ALPHAS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # a few hundred captions bear but a small step


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
    alphas: Sequence[float] = ALPHAS,
) -> Mixture:
    """Try each of `alphas` and leave the model at the best.

    Recall decides as far as it can tell (see `Scores.beats`), among the rest the loss, and of those
    that neither tells from the best, the least changed: the one-standard-error rule (Breiman
    et al. 1984). The start itself, if it is the best of all.
    """
    tried = {0.0: at_start}
    for alpha in alphas:
        mix(model, start, tuned, alpha)
        tried[alpha] = evaluate()
    most = max(tried.values(), key=lambda scores: scores.mean_recall)
    level = {alpha: s for alpha, s in tried.items() if not exceeds(most.hits, s.hits)}
    chosen = min(level, key=lambda alpha: level[alpha].loss)
    if chosen > 0:
        lowest = level[chosen].losses
        chosen = min(a for a, s in level.items() if a > 0 and not exceeds(s.losses, lowest))
    mix(model, start, tuned, chosen)
    return Mixture(chosen, tried)
