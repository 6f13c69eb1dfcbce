"""What each recipe trains, at which rates, with which decay; and the adapters of recipe `lora`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from clipkit.errors import InputError, ModelError
from clipkit.training.config import TrainConfig
from clipkit.training.frozen_towers import Head, find_heads
from clipkit.training.towers import BLOCK, Towers, trained_batch_norms

if TYPE_CHECKING:
    from clipkit.training.methods.method import Method

# Parameters before the first block. (A projection or a last norm comes after the last block.)
_STEM = re.compile(
    r"embed|stem|_token|ln_pre|norm_pre|^visual\.(trunk\.)?(conv1|bn1|conv[23]|bn[23])\."
)
_TRUNK_TOP = re.compile(r"^visual\.trunk\.bn2\.")  # timm's EfficientNet: after its last block


# ---- what is trained


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The parameters that a run trains, by name."""

    towers: Mapping[str, torch.nn.Parameter]
    shared: Mapping[str, torch.nn.Parameter]  # used by the loss: complete in every process
    heads: frozenset[str]  # names among `towers`
    own: frozenset[str]  # names of the method's own
    sides: frozenset[str]  # the towers of which any parameter is trained: "image", "text"
    total: int  # parameters of the model
    # Running statistics of BatchNorms that change with the weights; they belong to them.
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, torch.nn.Parameter]:
        return {**self.towers, **self.shared}

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.named.values())

    @property
    def averaged(self) -> dict[str, torch.Tensor]:
        """Return the parameters and statistics that a running mean of the weights consists of."""
        means = {n: value for n, value in self.statistics.items() if value.is_floating_point()}
        return {**self.named, **means}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self._values.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._values.items():
            value.copy_(state[name])

    def copy(self) -> dict[str, torch.Tensor]:
        """Copy the values to the CPU."""
        return {name: value.cpu().clone() for name, value in self.state_dict().items()}

    @property
    def _values(self) -> dict[str, torch.Tensor]:
        return {**self.named, **self.statistics}


def choose_parameters(towers: Towers, config: TrainConfig, method: Method) -> Trained:
    """Set `requires_grad` as the recipe says, for lora after adding adapters; return what is trained:
    parameters of the method's sides, and its own.

    Raises InputError if nothing of either tower would be trained, ModelError if a tower has no place
    for adapters or, in recipe heads, no tower has a projection.
    """
    model = towers.model
    total = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    heads = _heads(model, required=config.recipe == "heads")
    head_ids = {id(p) for head in heads for p in head.parameters()}
    if config.recipe == "heads":
        chosen = head_ids
    elif config.recipe == "lora":
        modules = [getattr(head.owner, head.name) for head in heads]
        skip = [module for module in modules if isinstance(module, torch.nn.Module)]
        add_adapters(
            model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, skip=skip
        )
        chosen = {id(p) for p in adapter_parameters(model)} | head_ids
    else:
        chosen = _last_layers(model, config)
    apart = {"logit_scale", "logit_bias"}
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and name not in apart and _side(name) in method.sides
    }
    if not trained:
        raise InputError(f"recipe {config.recipe} leaves nothing to train; train more layers")
    sides = frozenset(_side(name) for name in trained)
    head_names = frozenset(n for n, p in trained.items() if id(p) in head_ids)
    own = {**method.towers, **method.shared}
    result = Trained(
        {**trained, **method.towers}, method.shared, head_names, frozenset(own), sides, total
    )
    for parameter in result.named.values():
        parameter.requires_grad_(True)
    if config.batch_norm == "batch":
        norms = trained_batch_norms(model).items()
        values = {f"{n}.{part}": v for n, norm in norms for part, v in norm.named_buffers()}
        result = replace(result, statistics=values)
    return result


def _heads(model: torch.nn.Module, *, required: bool) -> list[Head]:
    """Return the towers' projections. A tower may end without one; only recipe heads needs one."""
    try:
        return [head for head in find_heads(model) if head is not None]
    except ModelError:
        if required:
            raise
        return []


def _last_layers(model: torch.nn.Module, config: TrainConfig) -> set[int]:
    """Return the ids of the parameters in the layers that recipe `full` or `lit` trains."""
    named = dict(model.named_parameters())
    limits = {"text": config.train_text_layers}
    if config.recipe != "lit":
        limits["image"] = config.train_image_layers
    depths = {side: _depth(named, side) for side in limits}
    lowest = {side: depths[side] + 1 - n if n >= 0 else 0 for side, n in limits.items()}
    return {
        id(parameter)
        for name, parameter in named.items()
        if (side := _side(name)) in limits and _layer(name, depths[side]) >= lowest[side]
    }


def _side(name: str) -> str:
    return "image" if name.startswith("visual.") else "text"


def _depth(names: Iterable[str], side: str) -> int:
    """Return how many blocks a tower has."""
    matches = (BLOCK.search(name) for name in names if _side(name) == side)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _layer(name: str, depth: int) -> int:
    """Return 0 for what precedes the first block, 1 to depth for a block, depth + 1 for the rest."""
    if match := BLOCK.search(name):
        return int(match[1]) + 1
    return 0 if _STEM.search(name) and not _TRUNK_TOP.search(name) else depth + 1


# ---- rates and decay


def make_optimizer(trained: Trained, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW with the rate of each tower, layer and projection; the method's own have the full."""
    depths = {side: _depth(trained.towers, side) for side in ("image", "text")}
    factors = {"image": config.image_rate, "text": config.text_rate}

    def rates() -> Iterator[tuple[str, torch.nn.Parameter, float]]:
        for name, parameter in trained.named.items():
            rate = config.learning_rate
            if name not in trained.own:
                side = _side(name)
                rate *= factors[side]
                rate *= config.layer_decay ** (depths[side] + 1 - _layer(name, depths[side]))
            if name in trained.heads:
                rate *= config.head_rate
            yield name, parameter, rate

    return adamw(rates(), weight_decay=config.weight_decay, beta2=config.beta2)


def adamw(
    rates: Iterable[tuple[str, torch.nn.Parameter, float]], *, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Make AdamW from (name, parameter, rate), with a group for each rate and decay.

    Only matrices decay: gains, biases, norms, embeddings, logit_scale and logit_bias do not. A norm's
    gain means nothing near zero, and the embedding of a word that no caption uses would only fade.
    A group's `names` are its parameters' names, its `base_lr` the rate before scheduling.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, rate in rates:
        decay = weight_decay if is_matrix(name, parameter) else 0.0
        settings = {"lr": rate, "base_lr": rate, "weight_decay": decay}
        group = groups.setdefault((rate, decay), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, beta2))


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return whether this is a layer's matrix or kernel, which decays and has limited drift."""
    return parameter.ndim >= 2 and not re.search(r"embed|_token|bias$|logit_", name)


def rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the factor of the rates at `step` of 0..total-1: a linear rise over the first `warmup`
    of the run, then a cosine towards zero."""
    warm = max(1, round(warmup * total)) if warmup else 0
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


# ---- adapters

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # torch's, of several widths


class LowRank(torch.nn.Module):
    """A low-rank update of a weight: W + (alpha / rank) B A (LoRA; Hu et al. 2021, arXiv 2106.09685).

    parts: how many matrices share the weight, such as q, k and v; each gets its own update.
    """

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
        # Root mean square of B where B A is as large as W: each entry of B A sums `rank` products of
        # random sign.
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
    """Add adapters to the attention, linear and pointwise convolution weights of both towers.

    skip: modules that are trained in full (the projections), with their submodules.
    Returns the number of adapters. Raises ModelError, naming the tower, if a tower has no such
    weight, since it would stay untrained, or the module of a weight that adapters do not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    text = getattr(model, "text", None) or model.transformer
    count = 0
    for tower, side in ((model.visual, "image"), (text, "text")):
        assert isinstance(tower, torch.nn.Module)
        weights = list(_adaptable(tower, skip))
        if not weights:
            raise ModelError(
                f"the {side} tower ({type(tower).__name__}) has no attention, linear or 1x1 "
                "convolution weights for adapters; use recipe full"
            )
        for module, attribute, parts in weights:
            adapter = LowRank(
                getattr(module, attribute), rank=rank, alpha=alpha, parts=parts, generator=generator
            )
            parametrize.register_parametrization(module, attribute, adapter)
        count += len(weights)
    return count


def adapter_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters of all adapters, in the order of the modules."""
    return [p for m in model.modules() if isinstance(m, LowRank) for p in m.parameters()]


def adapter_sizes(model: torch.nn.Module) -> dict[int, float]:
    """Return, by the id of each adapter's B, its root mean square where the update is as large as the
    weight. B starts at zero and has no size of its own."""
    return {id(m.up): m.size for m in model.modules() if isinstance(m, LowRank)}


def merge_adapters(model: torch.nn.Module) -> None:
    """Add every adapter's update to its weight and remove it: the architecture is the original one."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for attribute in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def _adaptable(
    tower: torch.nn.Module, skip: Collection[torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, str, int]]:
    """Yield (module, name of its weight, number of matrices stacked in the weight).

    Kernels of several pixels and embeddings get no adapters. Raises ModelError for a module with
    another weight matrix, which would stay as it is without a word.
    """
    skipped = {id(below) for module in skip for below in module.modules()}
    for name, module in tower.named_modules():
        if id(module) in skipped or isinstance(module, torch.nn.Embedding):
            continue
        if isinstance(module, torch.nn.Linear):
            fused = name.rpartition(".")[2] == "qkv" and module.out_features % 3 == 0
            yield module, "weight", 3 if fused else 1
        elif isinstance(module, _ConvNd):
            if math.prod(module.kernel_size) == 1 and module.groups == 1:
                yield module, "weight", 1  # a linear layer over channels
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if own == "in_proj_weight":  # q, k and v, by torch and by OpenCLIP
                    yield module, own, 3
                elif own in _SEPARATE:
                    yield module, own, 1
                elif parameter.ndim >= 2 and "weight" in own:
                    raise ModelError(
                        f"recipe lora has no adapter for {own} {tuple(parameter.shape)} of {name} "
                        f"({type(module).__name__}); use recipe full"
                    )
