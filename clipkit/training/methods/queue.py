"""Pictures and their captions, with a queue of earlier keys as further negatives."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from clipkit.losses.views import queued
from clipkit.training.data import CaptionedPictures, Ints
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.methods.method import Method, Setup, Side
from clipkit.training.methods.momentum import KeyQueue, Momentum

_SIDES: tuple[Side, ...] = ("image", "text")


class QueuedPairs(Method):
    """Learn from pairs, compared with the keys of their batch and of earlier batches.

    MoCo (He et al. 2020, arXiv 1911.05722) on both sides, as in ALBEF (Li et al. 2021, arXiv
    2107.07651) without its soft targets: pictures are compared with keys of captions and captions with
    keys of pictures, which the momentum towers encode. A caption's key is no negative of a picture that
    has an equal caption, nor the other way round; so a picture's own earlier keys are none either.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        towers, data = setup.towers, setup.data
        # A longer queue would hold pictures twice.
        size = min(setup.options.queue_size, len(data) - setup.batch)
        width = towers.encoder.dim
        self._queue = KeyQueue(size, (width, width), numbers=2, device=towers.device)
        self._owners = CaptionOwners(data, towers.device)
        self._momentum: Momentum | None = None
        self._of = torch.empty(2, 0, dtype=torch.int64)  # pictures and meanings of the last batch
        self._metrics: dict[str, float] = {}
        # As in `pairs`: CLIP's limit, or that of a start above it.
        self._highest_scale = max(math.log(100.0), float(towers.logit_scale.detach().max()))

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        return {"logit_scale": self.setup.towers.logit_scale}

    def prepare(
        self,
        inputs: Inputs,  # noqa: ARG002
        on_progress: Callable[[str, int, int], None],  # noqa: ARG002
        stop: threading.Event,  # noqa: ARG002
    ) -> None:
        self._momentum = Momentum(self.setup.towers, _SIDES, self.setup.options.momentum)

    def views(self, batch: Batch) -> Sequence[View]:
        towers, momentum = self.setup.towers, self._averages
        queries = (
            View(towers.images, batch.pictures[0], side="image"),
            View(towers.texts, batch.texts[0], side="text", order=batch.text_orders[0]),
        )
        keys = [
            replace(view, encode=momentum.encoder(view.encode), side=None)
            for view in queries
            if view.side in momentum.sides
        ]
        return (*queries, *keys)

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        images, texts = rows[:2]
        pictures, meanings = batch.plan.pictures, batch.data.meanings[batch.plan.texts[0]]
        self._of = torch.from_numpy(np.stack([pictures, meanings]))
        all_pictures, all_meanings = torch.cat([self._of, self._queue.of], 1).numpy()
        keys, temperature = self._keys(rows), (-self.setup.towers.logit_scale).exp()

        def one_way(queries: torch.Tensor, kind: int, same: torch.Tensor) -> torch.Tensor:
            # The keys of the batch are among the negatives; `same` leaves out the own one.
            negatives = torch.cat([keys[kind], self._queue.rows[kind]])
            return queued(queries, keys[kind], negatives, temperature=temperature, same=same)

        image_to_text = one_way(images, 1, self._owners.of_pictures(pictures, all_meanings))
        text_to_image = one_way(texts, 0, self._owners.of_meanings(meanings, all_pictures))
        return (image_to_text + text_to_image) / 2

    @torch.no_grad()
    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:
        scale = self.setup.towers.logit_scale
        scale.clamp_(0.0, self._highest_scale)
        self._averages.update(step)
        keys = self._keys(rows)
        self._queue.add(keys, self._of, step=step)
        own = torch.stack(
            [(a * b).sum(1).mean() for a, b in zip(rows[:2], keys[::-1], strict=True)]
        )
        self._metrics = {
            "logit_scale": float(scale.exp().mean()),
            "positive_cosine": float(own.mean()),
            **self._queue.metrics(step),
        }

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self._averages.state_dict(), "queue": self._queue.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages.load_state_dict(state["momentum"])
        self._queue.load_state_dict(state["queue"])

    @property
    def _averages(self) -> Momentum:
        assert self._momentum is not None, "prepare was not called"
        return self._momentum

    def _keys(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the keys of pictures and of captions, (B, D) each; of a tower that is not trained they
        are its rows."""
        keys = iter(rows[2:])
        return [
            next(keys) if side in self._averages.sides else own.detach()
            for side, own in zip(_SIDES, rows[:2], strict=True)
        ]


class CaptionOwners:
    """Find which pictures have a caption of a meaning; see `CaptionedPictures.meanings`."""

    def __init__(self, data: CaptionedPictures, device: torch.device) -> None:
        meanings = data.meanings[data.captions]
        order = np.argsort(meanings, kind="stable")
        self._data, self._device = data, device
        self._meanings, self._pictures = meanings[order], data.owner[order]

    def of_pictures(self, pictures: Ints, meanings: Ints) -> torch.Tensor:
        """Return bool (B, n): whether picture i, of (B,), has a caption of meaning j, of (n,)."""
        owned = [self._data.meanings[self._data.owned[picture]] for picture in pictures]
        return _contains(owned, meanings, self._device)

    def of_meanings(self, meanings: Ints, pictures: Ints) -> torch.Tensor:
        """Return bool (B, n): whether meaning i, of (B,), is that of a caption of picture j, of (n,)."""
        first = np.searchsorted(self._meanings, meanings)
        end = np.searchsorted(self._meanings, meanings, side="right")
        having = [self._pictures[a:b] for a, b in zip(first, end, strict=True)]
        return _contains(having, pictures, self._device)


def _contains(sets: Sequence[Ints], values: Ints, device: torch.device) -> torch.Tensor:
    """Return bool (sets, values): whether set i contains value j, which is at least 0."""
    members = np.full((len(sets), max(map(len, sets))), -1)
    for row, own in zip(members, sets, strict=True):
        row[: len(own)] = own
    others = torch.from_numpy(values).to(device)
    result = torch.zeros(len(sets), len(values), dtype=torch.bool, device=device)
    for column in torch.from_numpy(members).to(device).T:  # one at a time, to save memory
        result |= column[:, None] == others
    return result
