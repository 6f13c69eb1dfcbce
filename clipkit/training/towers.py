"""The towers as training sees them: uint8 pictures and tokens in, unit rows with gradients out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from clipkit.losses import LOSSES
from clipkit.towers import DualEncoder
from clipkit.training.gradient_cache import freeze_batch_norms

_BLOCK = re.compile(r"(?:resblocks|blocks|layers?|stages)\.?\d+$")

# What SigLIP starts from (arXiv 2303.15343, section 3.2), for a model that was made without a bias.
_SIGLIP_BIAS = -10.0


class Towers(Protocol):
    """What a training step needs; `TrainableTowers`, or heads over frozen features."""

    logit_scale: torch.nn.Parameter
    logit_bias: torch.nn.Parameter | None
    device: torch.device
    model: torch.nn.Module

    def mode(self, training: bool) -> int: ...

    def images(self, inputs: torch.Tensor) -> torch.Tensor: ...

    def texts(self, inputs: torch.Tensor) -> torch.Tensor: ...


def loss_of(encoder: DualEncoder, asked: str) -> str:
    """The name of the loss: "auto" is what the model was made with."""
    if asked in LOSSES:
        return asked
    return "siglip" if getattr(encoder.model, "logit_bias", None) is not None else "infonce"


def checkpoint_activations(model: torch.nn.Module) -> int:
    """Let every block keep its input only, and compute the rest again on the way back (Chen et al.
    2016, arXiv 1604.06174); how many blocks. Less memory for a third more time, the same numbers.

    Not by the libraries' own switches: Hugging Face's acts in training mode only.
    """
    found = ""
    count = 0
    for name, module in model.named_modules():
        inside = found and name.startswith(f"{found}.")
        if _BLOCK.search(name) and not inside:
            found = name
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            count += 1
    return count


class TrainableTowers:
    """A DualEncoder's towers with gradients. `mode(True)` before a step, `mode(False)` to evaluate.

    compute: the dtype that the towers' arithmetic is brought to (autocast); the weights, the
    normalisation and the loss stay in the weights' own.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        loss: str,
        compute: torch.dtype = torch.float32,
        dropout: bool = False,
    ) -> None:
        self.encoder = encoder
        self.model = encoder.model
        self.device = encoder.device
        self.logit_scale: torch.nn.Parameter = self.model.logit_scale  # type: ignore[assignment]
        bias = getattr(self.model, "logit_bias", None)
        if bias is None and LOSSES[loss].has_bias:
            # Belongs to this training only: embeddings do not depend on it, no checkpoint holds it.
            bias = torch.nn.Parameter(torch.full_like(self.logit_scale, _SIGLIP_BIAS))
        self.logit_bias: torch.nn.Parameter | None = bias if LOSSES[loss].has_bias else None
        self.compute, self._dropout = compute, dropout
        mean, std = torch.tensor(encoder.config.mean), torch.tensor(encoder.config.std)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1).to(self.device)
        self._shift = (-mean / std).view(1, 3, 1, 1).to(self.device)
        self.frozen_norms = self.mode(False)

    def mode(self, training: bool) -> int:
        """Dropout on or off; BatchNorm always uses its statistics. How many BatchNorms there are."""
        self.model.train(training and self._dropout)
        return freeze_batch_norms(self.model)

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> unit rows (B, D)."""
        return self._unit(self.raw_images(inputs))

    def texts(self, inputs: torch.Tensor) -> torch.Tensor:
        """Tokens int64 (B, L) -> unit rows (B, D)."""
        return self._unit(self.raw_texts(inputs))

    def raw_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """As `images`, before it is normalised."""
        pixels = inputs.to(self.device, non_blocking=True)
        pixels = torch.addcmul(self._shift, pixels.float(), self._scale)
        pixels = pixels.to(self.logit_scale.dtype, memory_format=torch.channels_last)
        with self._autocast():
            features: torch.Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return features

    def raw_texts(self, inputs: torch.Tensor) -> torch.Tensor:
        """As `texts`, before it is normalised."""
        with self._autocast():
            return self.encoder.text_features(inputs.to(self.device, non_blocking=True))

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 (N, context length), as the encoder's own; any thread may call it."""
        return self.encoder.tokenize(texts)

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.to(self.logit_scale.dtype), dim=-1)

    def _autocast(self) -> AbstractContextManager[object]:
        # A context for each chunk: weights cast in a pass without graph must not be used with one.
        if self.compute == self.logit_scale.dtype or self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)
