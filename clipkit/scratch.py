"""Random starts: `scratch:NAME` or `scratch:NAME:SEED` names an architecture with random weights.

NAME is an OpenCLIP architecture, or one of `RESNETS`, which are made for pictures of 32 pixels. SEED
(default 0) draws the weights: on one version of torch a spec always names the same weights, so a
run can be resumed, and its result compared with its start. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "scratch:"


@dataclass(frozen=True, slots=True)
class ResNet:
    """A residual network for 32-pixel pictures (`towers.resnets` makes it)."""

    layers: tuple[int, ...]  # blocks of each of four stages
    width: int = 64  # channels of the first stage; each later one has twice as many
    bottleneck: bool = False
    group_norm: bool = False  # in place of BatchNorm

    @property
    def dim(self) -> int:
        """Return the length of the pooled features."""
        return self.width * 8 * (4 if self.bottleneck else 1)


_SIZES = {
    "cifar-resnet10-w16": ResNet((1, 1, 1, 1), width=16),
    "cifar-resnet10-w32": ResNet((1, 1, 1, 1), width=32),
    "cifar-resnet18": ResNet((2, 2, 2, 2)),
    "cifar-resnet50": ResNet((3, 4, 6, 3), bottleneck=True),
}
# "-gn" has GroupNorm, which treats each picture by itself: gradients are then exact in chunks and
# over processes. BatchNorm needs the whole batch at a time.
RESNETS: Mapping[str, ResNet] = {
    **_SIZES,
    **{
        f"{name}-gn": ResNet(net.layers, net.width, net.bottleneck, group_norm=True)
        for name, net in _SIZES.items()
    },
}

# Per channel, of the training pictures of CIFAR-10 in [0, 1] units.
_PREPROCESS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
# OpenCLIP needs a text tower. This one is as small as it gets, and is never trained by pictures alone.
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}


def parse(spec: str) -> tuple[str, int] | None:
    """Return the architecture and the seed that a spec names; None for a spec of another kind."""
    if not spec.startswith(PREFIX):
        return None
    named = re.fullmatch(r"(.*?)(?::(\d{1,9}))?", spec.removeprefix(PREFIX), re.DOTALL)
    assert named is not None
    return named[1], int(named[2] or 0)


def settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model_cfg and preprocess_cfg of one of `RESNETS`: OpenCLIP's two dictionaries.

    The embedding is the pooled features themselves, without a projection.
    """
    vision = {
        "image_size": 32,
        "timm_model_name": name.replace("-", "_"),
        "timm_pool": "avg",
        "timm_proj": "none",
    }
    model_cfg = {"embed_dim": RESNETS[name].dim, "vision_cfg": vision, "text_cfg": dict(_TEXT)}
    return model_cfg, {"size": 32, **_PREPROCESS}
