"""Views of pictures against what the tower made of others before: MoCo's queue, and a memory bank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.losses.views import queued
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.methods.method import Setup
from clipkit.training.methods.momentum import KeyQueue, Momentum
from clipkit.training.methods.views import PictureViews

_DRAWN = 4  # the purpose of a random stream, beside those of `data` and `inputs`


class Moco(PictureViews):
    """Learn that a view of a picture is nearest the key of another, of all keys in a queue.

    MoCo v2 (Chen et al. 2020, arXiv 2003.04297): momentum tower and momentum head encode the keys. A
    picture's own keys of earlier epochs are left out. Rows are not shuffled among processes as in the
    paper: a key depends on no other row of its batch, so norms cannot give away which belong together.
    """

    norm = False  # as in the paper

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        # A longer queue would hold pictures twice.
        size = min(setup.options.queue_size, len(setup.data) - setup.batch)
        width, device = self.projection.width, setup.towers.device
        self._queue = KeyQueue(size, [width], numbers=1, device=device)
        self._momentum: Momentum | None = None
        self._queries = 2 if setup.options.symmetric else 1
        self._keys = torch.empty(0, width)  # of the last batch
        self._of = torch.empty(1, 0, dtype=torch.int64)  # their pictures
        self._metrics: dict[str, float] = {}

    def prepare(
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        super().prepare(inputs, on_progress, stop)
        self._momentum = Momentum(
            self.setup.towers,
            self.sides,
            self.setup.options.momentum,
            own={"projection": self.projection},
        )

    def views(self, batch: Batch) -> Sequence[View]:
        encode = self._averages.encoder(self.features)
        # The keys are of the other view: the second, and the first if both are queries.
        keys = [View(encode, pixels) for pixels in batch.pictures[::-1][: self._queries]]
        return [*super().views(batch)[: self._queries], *keys]

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        own, others = rows[: self._queries], rows[self._queries :]
        pictures = torch.from_numpy(batch.plan.pictures)
        queries = self.unit_rows(self.projection(torch.cat(list(own))))
        with self._averages.applied():
            keys = F.normalize(self.projection(torch.cat(list(others))), dim=1)
        self._keys, self._of = keys, pictures.repeat(self._queries)[None]
        (queue,) = self._queue.rows
        same = (self._queue.of == self._of.T).to(queue.device)
        temperature = self.setup.options.temperature
        loss = queued(queries, keys, queue, temperature=temperature, same=same)
        self._metrics = {"positive_cosine": float((queries.detach() * keys).sum(1).mean())}
        return loss + self.kept_space(own, batch)

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:  # noqa: ARG002
        self._averages.update(step)
        self._queue.add([self._keys], self._of, step=step)
        self._metrics |= self._queue.metrics(step)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        own = {"momentum": self._averages.state_dict(), "queue": self._queue.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._averages.load_state_dict(state["momentum"])
        self._queue.load_state_dict(state["queue"])

    @property
    def _averages(self) -> Momentum:
        assert self._momentum is not None, "prepare was not called"
        return self._momentum


class MemoryBank(PictureViews):
    """Learn that a view of a picture is nearest the picture's row in a memory bank.

    Instance discrimination (Wu et al. 2018, arXiv 1805.01978), with a softmax over the own row and rows
    drawn for the batch in place of the paper's binary noise-contrastive estimate. A row is the running
    mean of its picture's views, refreshed once an epoch, and has unit length.
    """

    picture_views = 1
    norm = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        generator = torch.Generator().manual_seed(setup.config.seed)
        rows = torch.randn(len(setup.data), self.projection.width, generator=generator)
        self._bank = F.normalize(rows, dim=1).to(setup.towers.device)
        self._refreshed = torch.zeros(len(rows), dtype=torch.int64)  # the step; 0: not yet
        self._vectors = torch.empty(0, self.projection.width)  # of the last batch
        self._pictures = torch.empty(0, dtype=torch.int64)
        self._metrics: dict[str, float] = {}

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        options, plan = self.setup.options, batch.plan
        vectors = self.unit_rows(self.projection(rows[0]))
        count, device = len(self._bank), vectors.device
        rng = np.random.default_rng([self.setup.config.seed, _DRAWN, plan.epoch, plan.number])
        drawn = rng.choice(count, min(options.bank_negatives, count), replace=False)
        self._vectors, self._pictures = vectors.detach(), torch.from_numpy(plan.pictures)
        own = self._bank[self._pictures.to(device)]
        same = torch.from_numpy(plan.pictures[:, None] == drawn).to(device)
        others = self._bank[torch.from_numpy(drawn).to(device)]
        loss = queued(vectors, own, others, temperature=options.temperature, same=same)
        self._metrics = {"positive_cosine": float((self._vectors * own).sum(1).mean())}
        return loss + self.kept_space(rows, batch)

    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:  # noqa: ARG002
        places = self._pictures.to(self._bank.device)
        mean = torch.lerp(self._vectors, self._bank[places], self.setup.options.bank_momentum)
        self._bank[places] = F.normalize(mean, dim=1)
        self._refreshed[self._pictures] = step
        known = self._refreshed[self._refreshed > 0]
        self._metrics |= {
            "bank_fill": len(known) / len(self._bank),
            "bank_age": float(step - int(known.min())),
        }

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bank": self._bank, "refreshed": self._refreshed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._bank.copy_(state["bank"])
        self._refreshed.copy_(state["refreshed"])
