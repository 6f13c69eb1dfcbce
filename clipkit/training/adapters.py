"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of attention and MLP weights.

An adapter is a parametrisation: the layer goes on reading `weight` and gets W + alpha/rank * B A.
So nothing is replaced, the fused attention of `torch.nn.MultiheadAttention` (whose `in_proj_weight`
is no layer, and is skipped by tools that look for layers) takes part like any other, and merging
leaves the very numbers that were trained with, in the architecture that was there before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.nn.utils import parametrize

from clipkit.errors import ModelError

__all__ = ["adapter_parameters", "adapter_sizes", "add_adapters", "merge_adapters"]


class LowRank(torch.nn.Module):
    """W -> W + scaling * B A. `parts` matrices that share one weight (q, k and v) get one each."""

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        rank: int,
        alpha: float,
        parts: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        out, width = weight.shape[0] // parts, weight[0].numel()
        rank = min(rank, out, width)
        # B is zero, so training starts from the model as it is; A is drawn as a layer's weight.
        down = torch.randn(parts, rank, width, generator=generator) / width**0.5
        self.down = torch.nn.Parameter(down.to(weight))
        self.up = torch.nn.Parameter(torch.zeros(parts, out, rank).to(weight))
        self.scaling = alpha / rank
        # Of B, where B A is as large as W: each of its entries sums `rank` products of random sign.
        typical = self.scaling * (rank / width) ** 0.5
        self.size = weight.detach().square().mean().sqrt().item() / typical

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        update = self.scaling * (self.up @ self.down)  # (parts, out, width)
        return weight + update.reshape(weight.shape)


def add_adapters(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    seed: int = 0,
    skip: Collection[torch.nn.Module] = (),
) -> int:
    """Put adapters on attention, linear and pointwise convolution weights of both towers; how many.

    skip: modules trained otherwise (the projections), with all below them. ModelError, naming the
    tower, where nothing fits: a tower must not stay untrained in silence.
    """
    generator = torch.Generator().manual_seed(seed)
    text = getattr(model, "text", None) or model.transformer
    found = 0
    for tower, name in ((model.visual, "image"), (text, "text")):
        assert isinstance(tower, torch.nn.Module)
        places = list(_places(tower, skip))
        if not places:
            raise ModelError(
                f"the {name} tower ({type(tower).__name__}) has no attention, linear or 1x1 "
                "convolution weights for adapters; use recipe full"
            )
        for module, attribute, parts in places:
            adapter = LowRank(
                getattr(module, attribute), rank=rank, alpha=alpha, parts=parts, generator=generator
            )
            parametrize.register_parametrization(module, attribute, adapter)
        found += len(places)
    return found


def adapter_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What `add_adapters` made trainable, in the order of the modules."""
    return [p for m in model.modules() if isinstance(m, LowRank) for p in m.parameters()]


def adapter_sizes(model: torch.nn.Module) -> dict[int, float]:
    """By the id of each B, which begins at zero: its root mean square where the update is as large as
    the weight."""
    return {id(m.up): m.size for m in model.modules() if isinstance(m, LowRank)}


def merge_adapters(model: torch.nn.Module) -> None:
    """Make every adapter part of its weight: the architecture is what it was, bit for bit."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for attribute in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def _places(
    tower: torch.nn.Module, skip: Collection[torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, str, int]]:
    """(module, attribute of its weight, how many matrices that holds one above the other)."""
    skipped = {id(below) for module in skip for below in module.modules()}
    for name, module in tower.named_modules():
        if id(module) in skipped:
            continue
        if isinstance(module, torch.nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                yield module, "in_proj_weight", 3
            else:
                yield from ((module, f"{part}_proj_weight", 1) for part in "qkv")
        elif isinstance(module, torch.nn.Linear):
            fused = name.rpartition(".")[2] == "qkv" and module.out_features % 3 == 0
            yield module, "weight", 3 if fused else 1
        elif isinstance(module, torch.nn.Conv2d) and _is_pointwise(module):
            yield module, "weight", 1


def _is_pointwise(layer: torch.nn.Conv2d) -> bool:
    """A linear layer over channels: the attention-free towers' MLP."""
    return layer.kernel_size == (1, 1) and layer.groups == 1
