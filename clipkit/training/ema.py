"""A running mean of the weights (Polyak & Juditsky 1992): smoother than any single step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["Ema"]


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
