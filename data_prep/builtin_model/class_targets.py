"""A training method: pictures and their captions, and what the photo classifier sees in the pictures.

Fine-tuning on a few thousand captions makes a tower forget things that no caption names. Here the
classifier that the image tower came from stays its teacher (distillation; Hinton et al. 2015, arXiv
1503.02531), by names: beside the batch's captions stand names of things in prompts, and the softmax
over the scores of a picture with all names learns how likely the classifier thinks each, beside how
often it does; and the other way round, which of the pictures show a name.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipkit.arrays import Float32
from clipkit.errors import InputError
from clipkit.options import option
from clipkit.training.augment import Augment
from clipkit.training.distributed import own_slice, world_size
from clipkit.training.gradient_cache import View
from clipkit.training.inputs import Batch, Inputs
from clipkit.training.methods.method import Method, Setup
from clipkit.training.methods.pairs import Pairs
from clipkit.training.registry import MethodEntry, PairOptions
from data_prep.builtin_model import vocabulary

NAMES_FILE, CLASSES_FILE = "names.npz", "classes.npz"
_POWER = 0.7  # of the classifier's probabilities: what comes second counts more
_TINY = 1e-12
SCALE = 20.0  # of the scores with names, at first


def softened(shown: torch.Tensor) -> torch.Tensor:
    """Raise how likely things show, of any shape, to the power that is learnt from."""
    return shown**_POWER


def class_loss(
    images: torch.Tensor,
    names: torch.Tensor,
    log_scale: torch.Tensor,
    shown: torch.Tensor,
    often: torch.Tensor,
) -> torch.Tensor:
    """Compute the cross-entropy of scores against a teacher's, both ways (arXiv 1503.02531): a scalar.

    images, names: unit rows (N, D), (M, D). shown: (N, M), 0 or more, how likely each picture
    shows each name. often: (M,), above 0, the mean of `softened(shown)` over all pictures (or ones); its
    logarithm is added to a picture's scores, so that what shows often in training is not what an
    unclear picture is taken for (logit adjustment; Menon et al. 2021, arXiv 2007.07314). A picture
    counts as much as the names show of it, a name as much as is seen of it in the batch: what shows in
    none of them has nothing to teach.
    """
    scores = log_scale.exp() * images @ names.T
    soft = softened(shown)
    by_picture = -(soft * (scores + often.log()).log_softmax(1)).sum(1)
    by_picture = by_picture / soft.sum(1).clamp(min=_TINY)
    by_name = -(soft * scores.log_softmax(0)).sum(0) / soft.sum(0).clamp(min=_TINY)
    by_picture = by_picture @ shown.sum(1) / shown.sum().clamp(min=_TINY)
    by_name = by_name @ soft.sum(0) / soft.sum().clamp(min=_TINY)
    return (by_picture + by_name) / 2


def how_often(
    seen: torch.Tensor, lists: Sequence[vocabulary.Names], *, adjust: bool = True
) -> list[torch.Tensor]:
    """Compute the mean over pictures of how much they show each thing, softened, for each list: (M,),
    above 0; or ones, unless `class_loss` is to `adjust`.

    seen: (T, C), each picture's probabilities.
    """
    means = [softened(seen @ torch.from_numpy(each.classes).T).mean(0) for each in lists]
    return [mean.clamp(min=_TINY) if adjust else torch.ones_like(mean) for mean in means]


@dataclass(frozen=True, slots=True, eq=False)
class Thumbnails:
    """A view of the picture, or of a thumbnail of it: libraries hold small pictures, too."""

    view: Augment
    share: float
    sides: tuple[int, int] = (28, 64)  # least and most of the longer side, in pixels

    def draw(self, image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, Float32]:
        if rng.random() < self.share:
            side = int(rng.integers(*self.sides, endpoint=True))
            image = image.copy()
            image.thumbnail((side, side))
        return self.view.draw(image, rng)

    def finish(self, views: torch.Tensor, drawn: Float32) -> torch.Tensor:
        return self.view.finish(views, drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTargetOptions:
    """The options of learning from pairs and a classifier."""

    teaching: str = option("folder with names.npz and classes.npz, as `recipe start` writes it", "")
    class_weight: float = option("weight of what the classifier sees, beside the pairs", 1.0, low=0)
    thumbnails: float = option("share of pictures seen as thumbnails", 0.0, low=0, high=1)
    names: int = option("things of each list in a step, at most", 1000, low=1)
    adjust: bool = option("leave out of what is learnt how often a thing shows", True)

    def __post_init__(self) -> None:
        if not self.teaching:
            raise InputError(
                "method class_targets needs teaching; name the folder of `recipe start`"
            )

    @property
    def absolute(self) -> Mapping[str, str]:
        """Return options that name the same from any working folder, in place of their values."""
        return {"teaching": str(Path(self.teaching).expanduser().absolute())}


class ClassTargets(Method):
    """Learn from pairs of picture and caption, and from what a classifier sees in the pictures.

    Pictures that classes.npz lacks are not taught: a classifier of photos is wrong about drawings.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._pairs = Pairs(replace(setup, options=PairOptions()))
        folder = Path(setup.options.teaching).expanduser()
        for name in (NAMES_FILE, CLASSES_FILE):
            if not (folder / name).is_file():
                raise InputError(f"teaching is {folder}, which has no {name}; run `recipe start`")
        self._lists = vocabulary.load(folder / NAMES_FILE)
        with np.load(folder / CLASSES_FILE) as arrays:
            ids, seen = arrays["image_ids"].tolist(), arrays["probabilities"]
        self._rows = {image_id: row for row, image_id in enumerate(ids)}
        self._seen = torch.from_numpy(seen).float()
        self._often = how_often(self._seen, self._lists, adjust=setup.options.adjust)
        log_scale = torch.tensor(math.log(SCALE), device=setup.towers.device)
        self._log_scale = torch.nn.Parameter(log_scale)
        self._drawn: list[tuple[list[int], list[str]]] = []  # of each list, for this step
        self._terms: dict[str, float] = {}

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        return {**self._pairs.shared, "class_log_scale": self._log_scale}

    def prepare(
        self, inputs: Inputs, on_progress: Callable[[str, int, int], None], stop: threading.Event
    ) -> None:
        """Raise InputError if the classifier has seen none of the pictures."""
        self._pairs.prepare(inputs, on_progress, stop)
        if self._rows.keys().isdisjoint(inputs.data.image_ids):
            raise InputError(
                f"{self.setup.options.teaching} has none of the {len(inputs.data)} pictures of "
                f"{inputs.data.folder}; run `recipe start` on the same data"
            )

    def augment(self) -> Augment | None:
        view = super().augment()
        share = self.setup.options.thumbnails
        return Thumbnails(view, share) if view and share else view

    def views(self, batch: Batch) -> Sequence[View]:
        towers, most = self.setup.towers, self.setup.options.names
        plan = batch.plan
        rng = random.Random(f"{self.setup.config.seed} {plan.epoch} {plan.number}")
        self._drawn = [names.draw(rng, most) for names in self._lists]
        texts = [text for _, texts in self._drawn for text in texts]
        texts += texts[:1] * (-len(texts) % world_size())  # to share evenly; the loss ignores them
        own = texts[own_slice(len(texts))]
        order = torch.tensor(np.argsort([len(text) for text in own], kind="stable"))
        tokens = towers.encoder.tokenize(own)
        return (*self._pairs.views(batch), View(towers.texts, tokens, side="text", order=order))

    def loss(self, rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        pictures, captions, names = rows
        pairs = self._pairs.loss((pictures, captions), batch)
        ids = [batch.data.image_ids[number] for number in batch.plan.pictures]
        taught = [place for place, image_id in enumerate(ids) if image_id in self._rows]
        seen = self._seen[[self._rows[ids[place]] for place in taught]]
        classes, start = pairs.new_zeros(()), 0
        for part, often, (chosen, _) in zip(self._lists, self._often, self._drawn, strict=True):
            shown = (seen @ torch.from_numpy(part.classes[chosen]).T).to(pictures)
            own = names[start : start + len(chosen)]
            loss = class_loss(
                pictures[taught], own, self._log_scale, shown, often[chosen].to(pictures)
            )
            classes = classes + part.weight * loss
            start += len(chosen)
        self._terms = {"pairs_loss": float(pairs.detach()), "class_loss": float(classes.detach())}
        return pairs + self.setup.options.class_weight * classes

    @torch.no_grad()
    def after_step(self, rows: Sequence[torch.Tensor], step: int) -> None:
        self._pairs.after_step(rows, step)
        self._log_scale.clamp_(0.0, math.log(100.0))

    def metrics(self) -> dict[str, float]:
        scale = float(self._log_scale.detach().exp())
        return {**self._pairs.metrics(), **self._terms, "class_scale": scale}


ENTRY = MethodEntry(
    "data_prep.builtin_model.class_targets:ClassTargets",
    "pictures and their captions, and what a classifier sees in the pictures, by name "
    "(Hinton et al. 2015, arXiv 1503.02531)",
    options=ClassTargetOptions,
    losses="pairs",
    recipes=("full", "lora"),
)
