"""Pictures and their captions: each caption's own picture against all others of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clipkit.training.data import Plan, mine, together
from clipkit.training.distributed import gather_uneven
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs, even_share
from clipkit.training.methods.method import Method, Setup
from clipkit.training.validation import embed_captions, embed_pictures

_BLOCK_BYTES = 2**23  # of scores at a time, in the loss, which makes a dozen arrays of this size


class Pairs(Method):
    """Learn from pairs of picture and caption, with hard negatives if asked for."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.loss is not None
        self._loss = setup.loss
        self._look_alikes: torch.Tensor | None = None  # int64 (N, K): hard negatives; see `mine`
        self._searched = -1  # the epoch of the last search for them
        # CLIP, section 2.5: the scale stays within [1, 100]. A checkpoint that starts above keeps
        # its own limit, or the first step would change the model. SigLIP's has no limit.
        scale = setup.towers.logit_scale
        self._highest_scale = max(math.log(100.0), float(scale.detach().max()))

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        towers = self.setup.towers
        scale = {"logit_scale": towers.logit_scale}
        return scale if towers.logit_bias is None else {**scale, "logit_bias": towers.logit_bias}

    def plans(
        self, inputs: Inputs, *, epoch: int, batch: int, searching: Callable[[], None]
    ) -> Sequence[Plan]:
        options, seed = self.setup.options, self.setup.config.seed
        order = inputs.data.order(epoch, seed)
        if options.hard_negatives:
            due = epoch % options.hard_negatives_every == 0 or self._look_alikes is None
            if due and self._searched != epoch:
                searching()
                rows = mine(
                    embed_pictures(self.setup.towers, inputs),
                    embed_captions(self.setup.towers, inputs),
                    inputs.data,
                    count=options.hard_negatives,
                    margin=options.hard_negatives_margin,
                    share=even_share(len(inputs.data)),
                    device=self.setup.towers.device,
                )
                self._look_alikes = gather_uneven(torch.from_numpy(rows))
                self._searched = epoch
            assert self._look_alikes is not None
            order = together(order, self._look_alikes.numpy())
        return inputs.data.plans(epoch=epoch, batch=batch, seed=seed, order=order)

    def views(self, batch: Batch) -> Sequence[View]:
        towers = self.setup.towers
        return (
            View(towers.images, batch.pictures[0], side="image"),
            View(towers.texts, batch.texts[0], side="text", order=batch.text_orders[0]),
        )

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        images, texts = rows
        same = batch.same
        return self._loss(
            images,
            texts,
            *self.shared.values(),
            same=None if same is None else same.to(images.device),
            duplicates=self.setup.options.duplicates,
            block_rows=max(1, _BLOCK_BYTES // (4 * len(images))),
            **self.setup.loss_options,
        )

    @torch.no_grad()
    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:  # noqa: ARG002
        if self._loss.clamps_scale:
            self.setup.towers.logit_scale.clamp_(0.0, self._highest_scale)

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": float(self.setup.towers.logit_scale.detach().exp().mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"look_alikes": self._look_alikes, "searched": self._searched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._look_alikes, self._searched = state["look_alikes"], state["searched"]
