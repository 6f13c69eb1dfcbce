"""Weights that stay near where they began: decay towards the start instead of towards zero.

L2-SP (Li, Grandvalet & Davoine 2018, arXiv 1802.01483), decoupled from the gradient as AdamW's decay is
(Loshchilov & Hutter 2019, arXiv 1711.05101). A few hundred captions cannot say where a million weights
should go; what they do not speak of stays as the start knew it.
"""

from __future__ import annotations

import torch

from clipkit.training.parameters import decays

__all__ = ["Leash"]


class Leash:
    """Pulls matrices towards what they are when this is made, after each step of the optimizer.

    drift: how far a weight moves at most, about, as a share of its matrix's root mean square; 0 lets
    go. AdamW moves a weight by at most its rate a step; a pull of rate / limit of the way back balances
    that at the limit, whatever the rate is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, drift: float) -> None:
        self._optimizer = optimizer
        self._starts: dict[str, tuple[torch.Tensor, float]] = {}
        for group in optimizer.param_groups if drift else ():
            for name, parameter in zip(group["names"], group["params"], strict=True):
                start = parameter.detach().clone()
                limit = drift * start.square().mean().sqrt().item()
                if decays(name, start) and limit > 0:
                    self._starts[name] = start, limit

    @torch.no_grad()
    def pull(self) -> None:
        for group in self._optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if name in self._starts:
                    start, limit = self._starts[name]
                    parameter.lerp_(start, min(1.0, group["lr"] / limit))
