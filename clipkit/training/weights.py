"""A running mean of the weights (Polyak & Juditsky 1992): smoother than any single step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from clipkit.training.data import Plan
from clipkit.training.distributed import gather_uneven, world_size
from clipkit.training.inputs import Inputs
from clipkit.training.recipes import decays
from clipkit.training.towers import Towers
from clipkit.training.validation import Scores, exceeds

_LOOKED_AT = 256  # pictures, to see whether the start knows the data
_DRIFT = 0.06  # for a thousand pictures


class Leash:
    """Pulls matrices towards what they are when this is made, after each step of the optimizer.

    drift: how far a weight moves at most, about, as a share of its matrix's root mean square; 0 lets
    go. sizes: by id, of parameters that begin at zero, what to take instead; others that do are free.
    AdamW moves a weight by at most its rate a step; a pull of rate / limit of the way back balances
    that at the limit, whatever the rate is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        drift: float,
        sizes: Mapping[int, float] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._starts: dict[str, tuple[torch.Tensor, float]] = {}
        for group in optimizer.param_groups if drift else ():
            for name, parameter in zip(group["names"], group["params"], strict=True):
                start = parameter.detach().clone()
                size = (sizes or {}).get(id(parameter), start.square().mean().sqrt().item())
                if decays(name, start) and size > 0:
                    self._starts[name] = start, drift * size

    @torch.no_grad()
    def pull(self) -> None:
        """After a step, at the rates it was made with."""
        for group in self._optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if name in self._starts:
                    start, limit = self._starts[name]
                    parameter.lerp_(start, min(1.0, group["lr"] / limit))


def fitted_drift(towers: Towers, inputs: Inputs, plan: Plan, *, chunk: int) -> float:
    """The `drift` of a leash, a share: the larger, the more pictures there are. Any distance, 0, if
    the start is no better at the data than chance, since its heads are new or the domain is: there
    is nothing to keep.

    It knows nothing if, on average, more than a quarter of the other captions of `plan` are nearer to
    a picture than its own; by chance it is half of them. At most `chunk` pairs are in memory at a time.
    All processes get the same.
    """
    some = min(len(plan.pictures), _LOOKED_AT) // world_size() * world_size()
    plan = replace(plan, pictures=plan.pictures[:some], texts=plan.texts[:some])
    (batch,) = inputs.stream([plan])
    towers.mode(False)
    with torch.no_grad():
        rows = torch.split(torch.arange(some // world_size()), chunk)
        pictures = gather_uneven(torch.cat([towers.images(batch.images[part]) for part in rows]))
        texts = gather_uneven(torch.cat([towers.texts(batch.texts[part]) for part in rows]))
    scores = pictures @ texts.T
    nearer = (scores > scores.diagonal()[:, None]).float().mean().item()
    return 0.0 if nearer > 0.25 else _DRIFT * (len(inputs.data) / 1000) ** 0.5


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


class Ema:
    """mean <- d mean + (1 - d) weights after each step, d rising to `decay`.

    With 0 as decay the mean is the weights themselves, and nothing is kept.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._mean = {n: p.detach().clone() for n, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` counts from 1. The early mean is short, or it would hold on to the start."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, mean in self._mean.items():
            mean.lerp_(self._parameters[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters hold the mean; afterwards, bit for bit what they held before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._mean)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    def _swap(self) -> None:
        for name, mean in self._mean.items():
            parameter = self._parameters[name]
            self._mean[name], parameter.data = parameter.data, mean
