"""Weights that stay near where they began: decay towards the start instead of towards zero.

L2-SP (Li, Grandvalet & Davoine 2018, arXiv 1802.01483), decoupled from the gradient as AdamW's decay is
(Loshchilov & Hutter 2019, arXiv 1711.05101). A few hundred captions cannot say where a million weights
should go; what they do not speak of stays as the start knew it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from clipkit.training.data import Plan
from clipkit.training.distributed import gather_uneven, world_size
from clipkit.training.inputs import Inputs
from clipkit.training.model import Towers
from clipkit.training.parameters import decays

__all__ = ["Leash", "fitted_drift"]

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
