"""The momentum towers: running means of the trained weights, which encode what is compared with.

    mean <- m mean + (1 - m) weights, after every step (MoCo; He et al. 2020, arXiv 1911.05722)

They change slowly, so that rows which they computed some steps ago can still be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.training.gradient_cache import Encode
from clipkit.training.towers import Towers


class Momentum:
    """The running mean of the parameters that a run trains.

    Make it in `Method.prepare`, when the recipe has chosen the parameters: the mean starts as their
    values. There is no copy of the model: while `applied` is open the parameters hold the mean.

    sides: the towers that it averages, "image" and "text".
    momentum: m above.
    own: modules of the method, such as a projection head, to average as well.
    rise: steps over which m rises to 1 along a cosine (BYOL, arXiv 2006.07733, section 3.1); 0: none.
    """

    def __init__(
        self,
        towers: Towers,
        sides: Collection[str],
        momentum: float,
        *,
        own: Mapping[str, torch.nn.Module] | None = None,
        rise: int = 0,
    ) -> None:
        self._towers, self._own = towers, own or {}
        self._momentum, self._rise = momentum, rise
        self._tensors = _averaged(towers.model, sides)
        for name, module in self._own.items():
            tensors = {**dict(module.named_parameters()), **_statistics(module)}
            self._tensors.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
        self._mean = {n: tensor.detach().clone() for n, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step`, from 1. Call it in `Method.after_step`."""
        share = 1 - self._momentum
        if self._rise:
            share *= (1 + math.cos(math.pi * min(step, self._rise) / self._rise)) / 2
        for name, mean in self._mean.items():
            mean.lerp_(self._tensors[name].detach(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean into the parameters, for a training step's forward pass without a graph.

        Dropout is off, and norms use their running statistics, which are averaged as well (EMAN; Cai
        et al. 2021, arXiv 2101.08482): a row depends on no other row of its batch. Parameters and
        training mode are restored, the parameters bit for bit.
        """
        training = [m for module in self._own.values() for m in module.modules() if m.training]
        self._towers.mode(False)
        for module in training:
            module.training = False
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()
            for module in training:
                module.training = True
            self._towers.mode(True)

    def encoder(self, encode: Encode) -> Encode:
        """Return a function that encodes as `encode`, with the mean; for a `View` without a side."""

        def encoded(inputs: torch.Tensor) -> torch.Tensor:
            with self.applied():
                return encode(inputs)

        return encoded

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._mean)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    def _swap(self) -> None:
        for name, mean in self._mean.items():
            tensor = self._tensors[name]
            self._mean[name], tensor.data = tensor.data, mean


def _averaged(model: torch.nn.Module, sides: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the trained parameters of the sides' towers, and the statistics of their norms."""
    result: dict[str, torch.Tensor] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in {**trained, **_statistics(model)}.items():
        side = "image" if name.startswith("visual.") else "text"
        if side in sides and name not in ("logit_scale", "logit_bias"):
            result[name] = tensor
    return result


def _statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the running means and variances of all BatchNorms by name."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm)
        for key, buffer in norm.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
