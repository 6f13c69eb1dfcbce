"""Pictures and their labels: those of one label close, others apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from clipkit.errors import InputError
from clipkit.training.data import Ints, Plan
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.methods.method import Method, Setup
from clipkit.training.validation import Scores, of_labels

_GROUPS = 4  # the purpose of a random stream, beside seed and epoch; data and inputs have 0 to 3


class Labels(Method):
    """Learn from labelled pictures. A batch has several pictures of each of its labels.

    Raises InputError for a training split of one label.
    """

    sides = frozenset(("image",))
    text_views = 0

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.loss is not None
        self._loss = setup.loss
        self._proxies: dict[str, torch.nn.Parameter] = {}
        classes, towers = setup.data.classes, setup.towers
        if len(classes) < 2:
            raise InputError(
                f"all training pictures of {setup.data.folder} have the label {classes[0]!r}; learning "
                "from labels needs two or more"
            )
        if self._loss.has_proxies:
            generator = torch.Generator().manual_seed(setup.config.seed)
            start = torch.randn(len(classes), towers.encoder.dim, generator=generator)
            # Called embeddings, as a vocabulary's: they neither decay nor have limited drift.
            self._proxies["class_embeddings"] = torch.nn.Parameter(start.to(towers.logit_scale))

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        return self._proxies

    def plans(
        self,
        inputs: Inputs,
        *,
        epoch: int,
        batch: int,
        searching: Callable[[], None],  # noqa: ARG002
    ) -> Sequence[Plan]:
        data, seed = inputs.data, self.setup.config.seed
        assert data.labels is not None
        rng = np.random.default_rng([seed, _GROUPS, epoch])
        order = grouped(data.labels, self.setup.options.per_class, rng)
        return data.plans(epoch=epoch, batch=batch, seed=seed, order=order, texts=self.text_views)

    def views(self, batch: Batch) -> Sequence[View]:
        return (View(self.setup.towers.images, batch.pictures[0], side="image"),)

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        (pictures,) = rows
        labels = batch.labels.to(pictures.device)
        return self._loss(pictures, labels, *self._proxies.values(), **self.setup.loss_options)

    def evaluate(self, inputs: Inputs) -> Scores:
        return of_labels(self.setup.towers, inputs)


def grouped(labels: Ints, each: int, rng: np.random.Generator) -> Ints:
    """Return an epoch's order of all pictures, int64 (N,), in groups of one label.

    labels, int64 (N,), are the pictures'. A group has `each` pictures to twice as many less one; a label
    with fewer is one group. A label's groups are spread evenly, from a random first place. So a batch,
    which is a run of the order, has labels in about their shares of the data, with at least `each`
    pictures of every label but the two that its ends may cut; if all labels' counts and the batch are
    multiples of `each`, nothing is cut.
    """
    groups: list[Ints] = []
    places: list[float] = []
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts = np.unique(labels[order], return_index=True)
    for pictures in np.split(order, starts[1:]):
        own = np.array_split(pictures, max(1, len(pictures) // each))
        first = rng.random()
        groups += own
        places += [(number + first) / len(own) for number in range(len(own))]
    return np.concatenate([groups[i] for i in np.argsort(places, kind="stable")])
