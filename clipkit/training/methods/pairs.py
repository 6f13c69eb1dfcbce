"""Pictures and their captions: each caption's own picture against all others of the batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clipkit.losses.pairs import fit_bias
from clipkit.training.data import Plan, mine, together
from clipkit.training.distributed import gather_uneven
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import (
    MOST_UNREADABLE,
    Batch,
    Inputs,
    UnreadablePicturesError,
    even_share,
)
from clipkit.training.methods.method import Method, Setup
from clipkit.training.validation import embed_captions, embed_pairs, embed_pictures

_BIAS_PAIRS = 1024  # pairs that a bias is fitted to
_BLOCK_BYTES = 2**23  # of scores at a time, in the loss, which makes a dozen arrays of this size


class Pairs(Method):
    """Learn from pairs of picture and caption, with hard negatives if asked for."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.loss is not None
        self._loss = setup.loss
        self._look_alikes: torch.Tensor | None = None  # int64 (N, K): hard negatives; see `mine`
        self._searched = -1  # the epoch of the last search for them
        self._unreadable: set[int] = set()  # pictures, as a search has found
        # CLIP, section 2.5: the scale stays within [1, 100]. A checkpoint that starts above keeps
        # its own limit, or the first step would change the model. SigLIP's has no limit.
        scale = setup.towers.logit_scale
        self._highest_scale = max(math.log(100.0), float(scale.detach().max()))

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        towers = self.setup.towers
        scale = {"logit_scale": towers.logit_scale}
        return scale if towers.logit_bias is None else {**scale, "logit_bias": towers.logit_bias}

    def prepare(
        self,
        inputs: Inputs,
        on_progress: Callable[[str, int, int], None],  # noqa: ARG002
        stop: threading.Event,  # noqa: ARG002
    ) -> None:
        """Fit the bias of a model that was trained without one: by SigLIP's -10 and CLIP's scale of 100
        all pairs would be true."""
        setup, bias = self.setup, self.setup.towers.logit_bias
        if bias is None or getattr(setup.towers.model, "logit_bias", None) is not None:
            return
        plan = inputs.data.plans(epoch=0, batch=setup.batch, seed=setup.config.seed)[0]
        chunk = setup.towers.encoder.preferred_batch
        pairs = embed_pairs(setup.towers, inputs, plan, most=_BIAS_PAIRS, chunk=chunk)
        assert pairs is not None
        images, texts, batch = pairs
        scale = setup.towers.logit_scale
        fitted = fit_bias(images, texts, scale, batch=setup.batch, same=batch.same)
        with torch.no_grad():
            bias.fill_(fitted)

    def plans(
        self, inputs: Inputs, *, epoch: int, batch: int, searching: Callable[[], None]
    ) -> Sequence[Plan]:
        options, seed = self.setup.options, self.setup.config.seed
        order = inputs.data.order(epoch, seed)
        if options.hard_negatives:
            due = epoch % options.hard_negatives_every == 0 or self._look_alikes is None
            if due and self._searched != epoch:
                searching()
                self._look_alikes = self._search(inputs)
                self._searched = epoch
            assert self._look_alikes is not None
            order = together(order, self._look_alikes.numpy())
        return inputs.data.plans(epoch=epoch, batch=batch, seed=seed, order=order)

    def _search(self, inputs: Inputs) -> torch.Tensor:
        """Return int64 (N, K): each picture's hard negatives, -1 where there are fewer, as for pictures
        that cannot be read."""
        data, towers, options = inputs.data, self.setup.towers, self.setup.options
        kept = np.setdiff1d(np.arange(len(data)), list(self._unreadable))
        readable = inputs.without(self._unreadable) if self._unreadable else inputs
        try:
            pictures = embed_pictures(towers, readable)
        except UnreadablePicturesError as error:
            self._unreadable |= {int(kept[number]) for number in error.pictures}
            if len(self._unreadable) > MOST_UNREADABLE * len(data):
                raise
            return self._search(inputs)
        rows = mine(
            pictures,
            embed_captions(towers, readable),
            readable.data,
            count=options.hard_negatives,
            margin=options.hard_negatives_margin,
            share=even_share(len(readable.data)),
            device=towers.device,
        )
        found = gather_uneven(torch.from_numpy(rows)).numpy()
        result = np.full((len(data), options.hard_negatives), -1, np.int64)
        result[kept] = np.where(found < 0, -1, kept[found])
        return torch.from_numpy(result)

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
