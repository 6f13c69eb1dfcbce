"""What each recipe trains, how fast, and what decays."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from clipkit.errors import InputError, ModelError
from clipkit.training.config import TrainConfig
from clipkit.training.frozen_towers import Head, find_heads
from clipkit.training.towers import Towers


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


# A block's number, as OpenCLIP, timm and Hugging Face towers name it; the outermost comes first.
_BLOCK = re.compile(r"(?:resblocks|blocks|layers?|stages)\.?(\d+)\.")
# What comes before the first block. (A projection or a last norm comes behind the last.)
_STEM = re.compile(
    r"embed|stem|_token|ln_pre|norm_pre|^visual\.(trunk\.)?(conv1|bn1|conv[23]|bn[23])\."
)
_TRUNK_TOP = re.compile(r"^visual\.trunk\.bn2\.")  # timm's EfficientNet: behind its last block


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The parameters that a run trains, by name, and what of the model they are."""

    towers: Mapping[str, torch.nn.Parameter]
    scalars: Mapping[str, torch.nn.Parameter]  # logit_scale, logit_bias: whole in every process
    heads: frozenset[str]  # names among `towers`
    image: bool  # whether anything of the image tower is trained
    text: bool
    total: int  # parameters of the model

    @property
    def named(self) -> dict[str, torch.nn.Parameter]:
        return {**self.towers, **self.scalars}

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.named.values())


def choose_parameters(towers: Towers, config: TrainConfig) -> Trained:
    """Set `requires_grad` as the recipe says (for lora: put adapters on) and name what is trained.

    InputError if a tower keeps nothing to train although the recipe trains it.
    """
    model = towers.model
    total = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    # A tower may end without a projection; only recipe heads needs one.
    heads: list[Head] = []
    if config.recipe == "heads" or _has_heads(model):
        heads = [head for head in find_heads(model) if head is not None]
    of_heads = {id(p) for head in heads for p in head.parameters()}
    if config.recipe == "heads":
        chosen = set(of_heads)
    elif config.recipe == "lora":
        modules = [getattr(head.owner, head.name) for head in heads]
        skip = [module for module in modules if isinstance(module, torch.nn.Module)]
        add_adapters(
            model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, skip=skip
        )
        chosen = {id(p) for p in adapter_parameters(model)} | of_heads
    else:
        chosen = _of_layers(model, config)
    scalars = {"logit_scale": towers.logit_scale}
    if towers.logit_bias is not None:
        scalars["logit_bias"] = towers.logit_bias
    apart = {"logit_scale", "logit_bias"}
    trained = {n: p for n, p in model.named_parameters() if id(p) in chosen and n not in apart}
    for parameter in (*trained.values(), *scalars.values()):
        parameter.requires_grad_(True)
    image = any(name.startswith("visual.") for name in trained)
    text = any(not name.startswith("visual.") for name in trained)
    if not (image or text):
        raise InputError(f"recipe {config.recipe} leaves nothing to train; train more layers")
    of_heads_names = frozenset(n for n, p in trained.items() if id(p) in of_heads)
    return Trained(trained, scalars, of_heads_names, image, text, total)


def make_optimizer(trained: Trained, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for each rate and decay; a group's `base_lr` is its rate at the top.

    Gains, biases, norms, embeddings, logit_scale and logit_bias do not decay: a norm's gain means
    nothing near zero, and the embedding of a word that no caption uses would only fade.
    """
    depths = {tower: _depth(trained.towers, tower) for tower in ("image", "text")}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained.named.items():
        rate = config.learning_rate
        if name not in trained.scalars:
            tower = "image" if name.startswith("visual.") else "text"
            rate *= config.image_rate if tower == "image" else config.text_rate
            rate *= config.layer_decay ** (depths[tower] + 1 - _layer(name, depths[tower]))
        if name in trained.heads:
            rate *= config.head_rate
        decay = config.weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(
        [
            {**group, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay), group in groups.items()
        ],
        betas=(0.9, config.beta2),
    )


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay is for this parameter: matrices and kernels of layers only."""
    return parameter.ndim >= 2 and not re.search(r"embed|_token|bias$|logit_", name)


def rate_factor(step: int, total: int, warmup: float) -> float:
    """What the rates are multiplied by at `step` of 0..total-1: a straight rise over the first
    `warmup` of the run, then a cosine towards zero."""
    warm = max(1, round(warmup * total)) if warmup else 0
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


def _has_heads(model: torch.nn.Module) -> bool:
    try:
        find_heads(model)
    except InputError:
        return False
    return True


def _of_layers(model: torch.nn.Module, config: TrainConfig) -> set[int]:
    """The ids of the parameters in the layers that recipe `full` or `lit` trains."""
    named = dict(model.named_parameters())
    chosen: set[int] = set()
    asked = {
        "image": 0 if config.recipe == "lit" else config.train_image_layers,
        "text": config.train_text_layers,
    }
    for tower, layers in asked.items():
        if tower == "image" and config.recipe == "lit":
            continue
        depth = _depth(named, tower)
        lowest = 0 if layers < 0 else depth + 1 - layers
        for name, parameter in named.items():
            if name.startswith("visual.") == (tower == "image") and _layer(name, depth) >= lowest:
                chosen.add(id(parameter))
    return chosen


def _depth(named: Mapping[str, Any], tower: str) -> int:
    """How many blocks a tower has."""
    numbers = [
        int(found[1]) + 1
        for name in named
        if name.startswith("visual.") == (tower == "image") and (found := _BLOCK.search(name))
    ]
    return max(numbers, default=0)


def _layer(name: str, depth: int) -> int:
    """0 for what comes before the first block, then 1 to depth, then depth + 1 for what follows."""
    if found := _BLOCK.search(name):
        return int(found[1]) + 1
    if _STEM.search(name) and not _TRUNK_TOP.search(name):
        return 0
    return depth + 1
