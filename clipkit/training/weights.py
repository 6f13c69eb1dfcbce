"""Three ways to keep weights near others: L2-SP, the running mean, and the mixture with the start.

L2-SP (Li et al. 2018, arXiv 1802.01483) pulls weights back to the start after every step. The running
mean (EMA; Polyak & Juditsky 1992) averages the weights over steps. The mixture (WiSE-FT; Wortsman et
al. 2022, arXiv 2109.01903) interpolates between the start and the trained weights at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from clipkit.training.data import Plan
from clipkit.training.distributed import gather_uneven, world_size
from clipkit.training.inputs import Inputs, readable_batch
from clipkit.training.recipes import is_matrix
from clipkit.training.towers import Towers
from clipkit.training.validation import Scores, exceeds

_DRIFT_PAIRS = 256  # pairs that show whether the start is better than chance
_DRIFT_OF_1000 = 0.06  # `drift` for a thousand pictures

# Weights of the trained model to try; a few hundred captions allow only a small step.
ALPHAS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


class L2SP:
    """Pull matrices towards their values when this is made, after each step of the optimizer.

    L2-SP is decay towards the start instead of towards zero. Like AdamW's decay it is decoupled from
    the gradient. AdamW moves a weight by at most about its rate lr per step; pulling it back by
    lr / (limit + lr) of its distance d balances that at d = limit, whatever the rate is:
    (limit + lr) * (1 - lr / (limit + lr)) = limit.

    drift: limit of a weight's change, as a share of its matrix's root mean square; 0 for no limit.
    sizes: root mean square to use, by parameter id, for parameters that start at zero; those of size 0,
        such as a method's own, are not constrained.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        drift: float,
        sizes: Mapping[int, float] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._starts: dict[str, tuple[torch.Tensor, float]] = {}  # with the limit
        for group in optimizer.param_groups if drift else ():
            for name, parameter in zip(group["names"], group["params"], strict=True):
                start = parameter.detach().clone()
                size = (sizes or {}).get(id(parameter), start.square().mean().sqrt().item())
                if is_matrix(name, start) and size > 0:
                    self._starts[name] = start, drift * size

    @torch.no_grad()
    def pull(self) -> None:
        """Pull the weights back after a step, at the rates of that step."""
        for group in self._optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if name in self._starts:
                    start, limit = self._starts[name]
                    parameter.lerp_(start, group["lr"] / (limit + group["lr"]))


def choose_drift(towers: Towers, inputs: Inputs, plan: Plan, *, chunk: int) -> float:
    """Choose `drift`: 0.06 * sqrt(pictures / 1000), or 0 (no limit) if the start is no better than
    chance on this data, since its projections or the domain are new.

    The start counts as no better if, on average, more than a quarter of the other captions of `plan`
    score higher for a picture than its own; by chance it is half. A method without captions keeps near
    its start, unless that is untrained. At most `chunk` pairs are in memory at a time. All processes
    return the same value.
    """
    if "image" in towers.encoder.untrained:
        return 0.0
    limit: float = _DRIFT_OF_1000 * (len(inputs.data) / 1000) ** 0.5
    count = min(len(plan.pictures), _DRIFT_PAIRS) // world_size() * world_size()
    plan = replace(plan, pictures=plan.pictures[:count], texts=plan.texts[:, :count])
    batch = readable_batch(inputs, plan)
    towers.mode(False)
    with torch.no_grad():
        rows = torch.split(torch.arange(count // world_size()), chunk)
        if not batch.texts or not batch.pictures:
            return limit
        views = [towers.images(batch.pictures[0][part]) for part in rows]
        pictures = gather_uneven(torch.cat(views))
        texts = gather_uneven(torch.cat([towers.texts(batch.texts[0][part]) for part in rows]))
    scores = pictures @ texts.T
    higher = (scores > scores.diagonal()[:, None]).float().mean().item()
    return 0.0 if higher > 0.25 else limit


class Ema:
    """The running mean of the weights: mean <- d mean + (1 - d) weights, with d rising to `decay`.

    With decay 0 the mean is the weights themselves, and nothing is stored.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        """weights: parameters, and the running statistics that belong to them."""
        self._weights, self._decay = weights, decay
        self._mean = {n: w.detach().clone() for n, w in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step`, from 1. Early means are short, so that the start fades."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, mean in self._mean.items():
            mean.lerp_(self._weights[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean into the parameters while the context is open; restore them bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    def _swap(self) -> None:
        for name, mean in self._mean.items():
            weight = self._weights[name]
            self._mean[name], weight.data = weight.data, mean


@dataclass(frozen=True, slots=True)
class Mixture:
    """The chosen mixture; `alpha` in 0..1 is the weight of the trained model."""

    alpha: float
    scores: Mapping[float, Scores]  # by alpha tried; 0 is the start


def choose_alpha(
    model: torch.nn.Module,
    start: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    evaluate: Callable[[], Scores],
    *,
    at_start: Scores,
    alphas: Sequence[float] = ALPHAS,
) -> Mixture:
    """Try each of `alphas` and leave the model at the best, which may be the start itself.

    Of those whose recall does not differ by more than a standard error from the highest (see
    `Scores.beats`), take the one of lowest loss; then, of those whose loss does not differ either,
    the least changed: the one-standard-error rule (Breiman et al. 1984).
    """
    scores = {0.0: at_start}
    for alpha in alphas:
        mix(model, start, trained, alpha)
        scores[alpha] = evaluate()
    highest = max(scores.values(), key=lambda s: s.mean)
    level = {alpha: s for alpha, s in scores.items() if not exceeds(highest.hits, s.hits)}
    chosen = min(level, key=lambda alpha: level[alpha].loss)
    if chosen > 0:
        lowest = level[chosen].losses
        chosen = min(a for a, s in level.items() if a > 0 and not exceeds(s.losses, lowest))
    mix(model, start, trained, chosen)
    return Mixture(chosen, scores)


@torch.no_grad()
def mix(
    model: torch.nn.Module,
    start: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    alpha: float,
) -> None:
    """Load (1 - alpha) start + alpha trained for the names in `trained`; exact at 0 and 1.

    A count, of a BatchNorm's batches, is not mixed: it is the start's at 0, else the trained one.
    """
    state = model.state_dict()
    for name, end in trained.items():
        begin = start[name].to(end)
        if alpha in (0, 1) or not end.is_floating_point():
            state[name].copy_(end if alpha else begin)
        else:
            state[name].copy_(torch.lerp(begin, end, alpha))
