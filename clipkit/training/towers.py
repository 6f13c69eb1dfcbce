"""The trainable towers: uint8 pictures and tokens to unit rows, with gradients."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from clipkit.errors import InputError
from clipkit.losses import LOSSES, Kind, losses_of
from clipkit.towers import DualEncoder
from clipkit.towers.folding import synchronise_batch_norms
from clipkit.training.config import BatchNorm, TrainConfig
from clipkit.training.distributed import world_size
from clipkit.training.gradient_cache import batch_norms, freeze_batch_norms

# A block and its number in a parameter's or module's name, as OpenCLIP, timm and Hugging Face name
# them. `search` finds the outermost block.
BLOCK = re.compile(r"(?:resblocks|blocks?|layers?|stages)\.?(\d+)(?:\.|$)")

_SIGLIP_BIAS = -10.0  # initial bias of a model made without one: arXiv 2303.15343, section 3.2


class Towers(Protocol):
    """What a training step needs: `TrainableTowers`, or projections over frozen features."""

    encoder: DualEncoder
    model: torch.nn.Module  # the encoder's
    device: torch.device
    logit_scale: torch.nn.Parameter
    logit_bias: torch.nn.Parameter | None

    def mode(self, training: bool) -> None: ...
    def images(self, inputs: torch.Tensor) -> torch.Tensor: ...
    def texts(self, inputs: torch.Tensor) -> torch.Tensor: ...


class TrainableTowers:
    """A DualEncoder's towers with gradients. Call `mode(True)` before a step, `mode(False)` to evaluate.

    compute: dtype of the towers' arithmetic (autocast); weights, normalisation and loss keep theirs.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        loss: str | None,
        compute: torch.dtype = torch.float32,
        dropout: bool = False,
        batch_norm: BatchNorm = "frozen",
    ) -> None:
        self.encoder, self.model, self.device = encoder, encoder.model, encoder.device
        self.logit_scale: torch.nn.Parameter = self.model.logit_scale  # type: ignore[assignment]
        bias = getattr(self.model, "logit_bias", None)
        has_bias = loss is not None and LOSSES[loss].has_bias
        if bias is None and has_bias:
            # Used in training only: embeddings do not depend on it, and no checkpoint holds it.
            bias = torch.nn.Parameter(torch.full_like(self.logit_scale, _SIGLIP_BIAS))
        self.logit_bias: torch.nn.Parameter | None = bias if has_bias else None
        self.compute, self._dropout = compute, dropout
        self._batch_norm = batch_norm
        if batch_norm == "batch" and world_size() > 1:
            synchronise_batch_norms(self.model)
        self.mode(False)

    def mode(self, training: bool) -> None:
        """Switch dropout on or off, and whether the BatchNorms that are trained use the statistics of
        the batch, if they may, and not the running ones."""
        self.model.train(training and self._dropout)
        freeze_batch_norms(self.model)
        if training and self._batch_norm == "batch":
            for norm in trained_batch_norms(self.model).values():
                norm.train()

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, H, W) as unit rows (B, D)."""
        return self._unit_rows(self.image_features(inputs))

    def texts(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode tokens, int64 (B, L), as unit rows (B, D)."""
        return self._unit_rows(self.text_features(inputs))

    def image_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode as `images`, without normalising."""
        with self._autocast():
            return self.encoder.image_features(inputs)

    def text_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode as `texts`, without normalising."""
        with self._autocast():
            return self.encoder.text_features(inputs)

    def _unit_rows(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.to(self.logit_scale.dtype), dim=-1)

    def _autocast(self) -> AbstractContextManager[object]:
        # A context per call: weights cast in a pass without graph must not be used in one with.
        if self.compute == self.logit_scale.dtype or self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)


def trained_batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the BatchNorms whose gains or biases are trained, by name."""
    return {
        name: norm
        for name, norm in batch_norms(model).items()
        if any(parameter.requires_grad for parameter in norm.parameters())
    }


def check_batch_norms(encoder: DualEncoder, config: TrainConfig, share: int) -> None:
    """Raise InputError if the run's BatchNorms cannot work as `batch_norm` says.

    share: this process's pairs of a batch.
    """
    has_any = bool(batch_norms(encoder.model))
    if config.batch_norm == "frozen":
        if has_any and config.recipe == "full" and "image" in encoder.untrained:
            raise InputError(
                f"batch_norm is frozen, but {encoder.spec} is untrained, so its BatchNorms have no "
                "statistics yet; use batch_norm batch"
            )
        return
    if not has_any:
        raise InputError(f"batch_norm is batch, but {encoder.spec} has no BatchNorm; leave it out")
    if 0 < config.chunk < share:
        raise InputError(
            f"chunk is {config.chunk}, but batch_norm batch takes its statistics over all {share} "
            "pairs at once; leave chunk out, lower batch, or use a model with GroupNorm"
        )
    if world_size() > 1 and encoder.device.type != "cuda":
        raise InputError(
            f"batch_norm batch takes its statistics over {world_size()} processes, which torch does on "
            "GPUs only; use one process, or a model with GroupNorm"
        )


def loss_of(encoder: DualEncoder, name: str, kind: Kind | None = "pairs") -> str | None:
    """Return the loss called `name`; for "auto", the first of its kind, or of pairs the one that the
    model was trained with. None if there is none of the kind."""
    if name != "auto":
        return name
    if kind == "pairs" and getattr(encoder.model, "logit_bias", None) is not None:
        return "siglip"
    return next(iter(losses_of(kind)), None)


def checkpoint_activations(model: torch.nn.Module) -> int:
    """Let every block store its input only and recompute the rest in the backward pass (Chen et al.
    2016, arXiv 1604.06174); return the number of blocks.

    The results are the same, for less memory and a third more time. The libraries' own switches are
    not used, since Hugging Face's acts in training mode only.
    """
    blocks = [
        module
        for name, module in model.named_modules()
        if (match := BLOCK.search(name)) and match.end() == len(name)
    ]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
