"""Residual networks for 32-pixel pictures, registered with timm, so that OpenCLIP makes them by name.

They are timm's, with the first layer that such pictures need: one 3x3 convolution of stride 1 and no
max pooling (He et al. 2016, arXiv 1512.03385, section 4.2; SimCLR, arXiv 2002.05709, appendix B.9).
`scratch.RESNETS` lists them. A checkpoint of one loads wherever this package is installed; plain
OpenCLIP opens it once this module is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from clipkit import scratch

__all__: list[str] = []  # timm adds the names that it registers

_GROUP = 8  # channels normalised together; Wu & He 2018 (arXiv 1803.08494) have 16, of wider layers


def make(net: scratch.ResNet, **options: Any) -> ResNet:
    """Make a network with random weights; `options` are those of timm's ResNet."""
    model = ResNet(
        Bottleneck if net.bottleneck else BasicBlock,
        list(net.layers),
        channels=tuple(net.width * 2**stage for stage in range(4)),
        norm_layer=_group_norm if net.group_norm else torch.nn.BatchNorm2d,
        stem_type="deep",  # the only stem whose width can be chosen; it is replaced below
        stem_width=net.width // 2,
        **options,
    )
    model.conv1 = torch.nn.Conv2d(3, net.width, 3, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = torch.nn.Identity()
    return model


def _group_norm(channels: int, **options: Any) -> torch.nn.GroupNorm:
    return torch.nn.GroupNorm(channels // _GROUP, channels, **options)


def _register(name: str, net: scratch.ResNet) -> None:
    def entry(
        pretrained: bool = False,  # noqa: ARG001  there are no weights to fetch; timm passes it
        pretrained_cfg: object = None,  # noqa: ARG001
        pretrained_cfg_overlay: object = None,  # noqa: ARG001
        cache_dir: object = None,  # noqa: ARG001
        **options: Any,
    ) -> ResNet:
        return make(net, **options)

    entry.__name__ = name.replace("-", "_")
    register_model(entry)


for _name, _net in scratch.RESNETS.items():
    _register(_name, _net)
