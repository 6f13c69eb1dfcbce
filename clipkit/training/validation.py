"""Evaluation during training: recall both ways on the validation split, which of two models is
better by it, and a watch for collapse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.metrics import (
    alignment,
    covariance_spectrum,
    effective_rank,
    rank_captions,
    uniformity,
)
from clipkit.training.distributed import gather_uneven
from clipkit.training.inputs import Inputs
from clipkit.training.towers import Towers

Float32 = npt.NDArray[np.float32]

_KS = (1, 5, 10)
_BLOCK = 256  # rows of similarities at a time
_LEAST = 0.25  # of what variance and effective rank were at the start


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found. Recalls are fractions; `space` describes the pictures' vectors."""

    recall: dict[str, float]  # "text_to_image/R@1", ...
    space: dict[str, float]
    pictures: int
    captions: int
    hits: list[float]  # of each picture: the share of R@1, R@5 and R@10 both ways that it gained
    losses: list[float]  # of each picture: see `contrast`

    @property
    def mean_recall(self) -> float:
        """The mean of R@1, R@5 and R@10 both ways."""
        return float(np.mean(list(self.recall.values())))

    @property
    def loss(self) -> float:
        """The mean of `losses`, without what is but rounding of float32."""
        return round(float(np.mean(self.losses)), 6)

    def beats(self, other: Scores) -> bool:
        """Recall decides as far as it can tell: beyond one standard error of the paired difference.
        What it cannot tell apart, as on a few dozen pictures, the loss decides, which still
        moves where recall is at its ceiling.
        """
        if exceeds(self.hits, other.hits):
            return True
        return not exceeds(other.hits, self.hits) and self.loss < other.loss

    def worry(self, start: Scores | None) -> str | None:
        """A sentence if the space is collapsing, compared with how it was at the start."""
        for name, words in (("variance", "variance"), ("effective_rank", "effective rank")):
            now, then = self.space[name], start.space[name] if start else 0.0
            if now < _LEAST * then:
                return (
                    f"the embeddings are collapsing: their {words} is {now:.3g}, after {then:.3g} "
                    "at the start; lower learning_rate or raise batch"
                )
        return None


def evaluate(towers: Towers, inputs: Inputs) -> Scores:
    """Recall@1, 5 and 10 both ways, the loss, and the space's shape. All processes share the work
    and get the same result. InputError if an embedding is not finite."""
    pictures, texts = embed(towers, inputs)
    data = inputs.data
    every = texts[data.captions]
    ranked = rank_captions(pictures, every, data.owner)
    recall = {
        f"{direction}/R@{k}": float(ranking.hit_at(k).mean())
        for direction, ranking in zip(("text_to_image", "image_to_text"), ranked, strict=True)
        for k in _KS
    }
    to_image, to_text = (np.mean([r.hit_at(k) for k in _KS], axis=0) for r in ranked)
    hits = (_by_picture(to_image, data.owner) + to_text) / 2
    losses = contrast(pictures, every, data.owner, scale=float(towers.logit_scale.detach().exp()))
    spectrum = covariance_spectrum(pictures)
    space = {
        "variance": float(spectrum.sum()),
        "effective_rank": effective_rank(spectrum),
        "alignment": alignment(pictures[data.owner], every),
    }
    if len(pictures) > 1:
        space["uniformity"] = uniformity(pictures)
    return Scores(recall, space, len(pictures), len(every), hits.tolist(), losses.tolist())


def exceeds(these: Sequence[float], those: Sequence[float]) -> bool:
    """Whether `these`, of the same pictures, are higher on average by more than the standard error
    of the difference."""
    difference = np.subtract(these, those)
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return bool(difference.mean() > error)


def contrast(
    pictures: Float32, texts: Float32, owner: npt.NDArray[np.int64], *, scale: float
) -> Float32:
    """The contrastive loss, in nats, of each picture among all: unit rows (N, D) and (M, D), the
    picture of each caption int64 (M,) -> float32 (N,). Every picture needs a caption. InfoNCE (van den
    Oord et al. 2018, arXiv 1807.03748) over the whole split instead of a batch.

    Half of it is the cross-entropy of the picture given its captions, their mean; half, that
    of any of its captions given the picture. Like recall it compares with all pictures, but it moves
    before a rank does.
    """
    images, words, owns = (torch.from_numpy(rows) for rows in (pictures, texts, owner))
    told = torch.cat(
        [
            F.cross_entropy(scale * rows @ images.T, own, reduction="none")
            for rows, own in zip(torch.split(words, _BLOCK), torch.split(owns, _BLOCK), strict=True)
        ]
    )
    shown = []
    numbers = torch.arange(len(images))
    for rows, number in zip(torch.split(images, _BLOCK), torch.split(numbers, _BLOCK), strict=True):
        logits = scale * rows @ words.T
        others = owns[None] != number[:, None]
        own = logits.masked_fill(others, -torch.inf)
        shown.append(logits.logsumexp(1) - own.logsumexp(1))
    mean: Float32 = ((_by_picture(told.numpy(), owner) + torch.cat(shown).numpy()) / 2).astype("f4")
    return mean


def _by_picture(values: npt.NDArray[Any], owner: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean over each picture's captions: (M,) -> (N,)."""
    means: npt.NDArray[np.float64] = np.bincount(owner, values) / np.bincount(owner)
    return means


def embed(towers: Towers, inputs: Inputs) -> tuple[Float32, Float32]:
    """Unit rows of all pictures (N, D), as they are served, and of all distinct captions (M, D)."""
    towers.mode(False)
    # no_grad, not inference_mode: under autocast that one is five times as slow on a CPU.
    with torch.no_grad():
        pictures = _joined(towers.images(chunk) for chunk in inputs.pictures())
        texts = _joined(towers.texts(chunk) for chunk in inputs.captions())
    return pictures, texts


def _joined(chunks: Iterable[torch.Tensor]) -> Float32:
    rows = gather_uneven(torch.cat(list(chunks)))
    return rows.float().cpu().numpy()
