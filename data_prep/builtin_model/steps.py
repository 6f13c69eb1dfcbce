"""What a training step of the built-in model is made of: pairs, imagined pictures, loss, rates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from data_prep.builtin_model.sources import ART_PROMPTS, PHOTO_PROMPTS, Example, caption, fill


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A step's pairs: real pictures by row, then imagined ones by class.

    `classes` and `bases` (C,) are each imagined picture's class and the row it starts from; `texts`
    are the captions of all N = len(rows) + C; `ignore` bool (N, N) marks pairs (picture, text)
    that are no negatives although they are not on the diagonal.
    """

    rows: list[int]
    classes: torch.Tensor
    bases: torch.Tensor
    texts: list[str]
    ignore: torch.Tensor


def batches(
    examples: Sequence[Example],
    class_names: Sequence[str],
    likely: torch.Tensor,
    *,
    count: int,
    n_classes: int,
    rng: random.Random,
) -> Iterator[Batch]:
    """One epoch: every picture once with one of its captions, in `count` mixed batches, each with
    `n_classes` imagined pictures (fewer where two classes share a name).

    likely: bool (examples, classes), what the classifier sees in a picture: no negatives of it.
    """
    groups = [[i for i, e in enumerate(examples) if e.art == art] for art in (False, True)]
    names = sorted({name: c for c, name in enumerate(class_names)}.items())
    supply = [
        c for _ in range(-(-count * n_classes // len(names))) for c in rng.sample(names, len(names))
    ]
    orders = [rng.sample(group, len(group)) for group in groups]
    for step in range(count):
        rows = [i for order in orders for i in order[step::count]]
        stated = [caption(examples[i], rng) for i in rows]
        wanted = supply[step * n_classes : (step + 1) * n_classes]
        classes = list({c: name for name, c in wanted}.items())
        drawn = [rng.random() < 0.35 for _ in classes]
        texts = [text for text, _ in stated]
        texts += [
            fill(ART_PROMPTS if art else PHOTO_PROMPTS, name, rng)
            for art, (_, name) in zip(drawn, classes, strict=True)
        ]
        ids = torch.tensor([c for c, _ in classes], dtype=torch.long)
        ignore = torch.zeros(len(texts), len(texts), dtype=torch.bool)
        ignore[: len(rows), len(rows) :] = likely[rows][:, ids]
        said_by: dict[str, list[int]] = {}
        for b, (_, phrase) in enumerate(stated):
            said_by.setdefault(phrase, []).append(b)
        for a, i in enumerate(rows):  # what another row says may be true of this picture too
            for phrase in {*examples[i].phrases, *examples[i].keywords} & said_by.keys():
                ignore[a, said_by[phrase]] = True
        ignore.fill_diagonal_(False)
        bases = torch.tensor([rng.choice(groups[art]) for art in drawn], dtype=torch.long)
        yield Batch(rows, ids, bases, texts, ignore)


class ClassPictures:
    """Pooled features of pictures that were never taken, one of each class of the classifier.

    A linear classifier's weight is w = inv(S) (m_class - m), S the features' covariance; so S w
    points from the mean picture to the class. A real picture's features (shrunk to their mean: its
    own content should fade) go along S w until the classifier is as sure as of a clear photo.
    """

    def __init__(
        self, features: torch.Tensor, art: torch.Tensor, classifier: torch.nn.Linear
    ) -> None:
        self.features, self.art = features, art  # float32 (N, 1280), bool (N,)
        photos = features[~art]
        self.means = torch.stack([photos.mean(0), features[art].mean(0)])
        covariance = torch.cov(photos.T)  # shrunk: 6,091 photos span little of 1,280 dimensions
        covariance = 0.7 * covariance + 0.3 * torch.diag(covariance.diag())
        self.weights = classifier.weight - classifier.weight.mean(0)
        self.shifts = self.weights @ covariance  # (1000, 1280)
        self.gains = (self.shifts * self.weights).sum(1)  # rise of the own logit along one shift

    def __call__(self, classes: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
        """Classes (C,) and the rows (C,) to start from -> float32 (C, 1280)."""
        mean = self.means[self.art[bases].long()]
        x = mean + 0.7 * (self.features[bases] - mean)
        logit = (x * self.weights[classes]).sum(1)
        steps = (8 + 4 * torch.rand(len(classes)) - logit).clamp(min=0) / self.gains[classes]
        return (x + steps[:, None] * self.shifts[classes]).clamp(0, 6)  # means of ReLU6


def contrast(
    pictures: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, ignore: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) over (N, DIM) each; `ignore` (N, N) are pairs that
    are not negatives although they are not on the diagonal."""
    logits = scale.exp() * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    logits = logits.masked_fill(ignore, -1e4)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def optimizer(
    parameters: Sequence[torch.nn.Parameter], *, rate: float, decay: float
) -> torch.optim.Optimizer:
    """AdamW; decay on matrices only, never on gains, biases and the temperature."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def schedule(step: int, steps: int) -> float:
    """A tenth of warm-up, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
