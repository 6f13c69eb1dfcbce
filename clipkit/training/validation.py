"""Validation during training: recall and loss on the validation split, the comparison of two models
by them, and a warning if the embeddings collapse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipkit.arrays import Float32
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

_KS = (1, 5, 10)
_BLOCK_ROWS = 256  # rows of similarities at a time
_COLLAPSED = 0.25  # of the variance or effective rank at the start


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of an evaluation. Recalls are fractions; `space` describes the pictures' vectors."""

    recall: dict[str, float]  # "text_to_image/R@1", ...
    space: dict[str, float]
    pictures: int
    captions: int
    hits: list[float]  # per picture: mean of its hits at 1, 5 and 10, both ways
    losses: list[float]  # per picture: see `picture_losses`

    @property
    def mean_recall(self) -> float:
        """Return the mean of R@1, R@5 and R@10, both ways."""
        return float(np.mean(list(self.recall.values())))

    @property
    def loss(self) -> float:
        """Return the mean of `losses`, to six digits: float32 holds no more."""
        return round(float(np.mean(self.losses)), 6)

    def beats(self, other: Scores) -> bool:
        """Return whether recall is higher by more than a standard error of the paired difference or,
        if recalls differ by less, the loss is lower.

        The loss decides on small splits, and where recall is at its ceiling.
        """
        if exceeds(self.hits, other.hits):
            return True
        return not exceeds(other.hits, self.hits) and self.loss < other.loss

    def collapse_warning(self, start: Scores | None) -> str | None:
        """Return a sentence if the embeddings have collapsed since the start, else None."""
        for name in ("variance", "effective_rank"):
            now, before = self.space[name], start.space[name] if start else 0.0
            if now < _COLLAPSED * before:
                return (
                    f"the embeddings are collapsing: {name.replace('_', ' ')} fell from "
                    f"{before:.3g} to {now:.3g}; lower learning_rate or raise batch"
                )
        return None


def evaluate(towers: Towers, inputs: Inputs) -> Scores:
    """Measure recall at 1, 5 and 10 both ways, the loss, and the space's shape.

    All processes share the work and return the same. Raises InputError if an embedding is not finite.
    """
    pictures, texts = embed(towers, inputs)
    data = inputs.data
    captions = texts[data.captions]
    rankings = rank_captions(pictures, captions, data.owner)
    recall = {
        f"{direction}/R@{k}": float(ranking.hit_at(k).mean())
        for direction, ranking in zip(("text_to_image", "image_to_text"), rankings, strict=True)
        for k in _KS
    }
    to_image, to_text = (np.mean([r.hit_at(k) for k in _KS], axis=0) for r in rankings)
    hits = (_by_picture(to_image, data.owner) + to_text) / 2
    scale = float(towers.logit_scale.detach().exp())
    losses = picture_losses(pictures, captions, data.owner, scale=scale)
    spectrum = covariance_spectrum(pictures)
    space = {
        "variance": float(spectrum.sum()),
        "effective_rank": effective_rank(spectrum),
        "alignment": alignment(pictures[data.owner], captions),
    }
    if len(pictures) > 1:
        space["uniformity"] = uniformity(pictures)
    return Scores(recall, space, len(pictures), len(captions), hits.tolist(), losses.tolist())


def embed(towers: Towers, inputs: Inputs) -> tuple[Float32, Float32]:
    """Encode all pictures, preprocessed as at inference, and all distinct captions: float32 unit rows
    (N, D) and (M, D)."""
    towers.mode(False)
    # no_grad, not inference_mode: under autocast on a CPU that is five times slower.
    with torch.no_grad():
        pictures = _gathered(towers.images(chunk) for chunk in inputs.pictures())
        texts = _gathered(towers.texts(chunk) for chunk in inputs.captions())
    return pictures, texts


def _gathered(chunks: Iterable[torch.Tensor]) -> Float32:
    return gather_uneven(torch.cat(list(chunks))).float().cpu().numpy()


def exceeds(these: Sequence[float], those: Sequence[float]) -> bool:
    """Return whether `these`, of the same pictures, are higher on average by more than the standard
    error of the difference."""
    difference = np.subtract(these, those)
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return bool(difference.mean() > error)


def picture_losses(
    pictures: Float32, texts: Float32, owner: npt.NDArray[np.int64], *, scale: float
) -> Float32:
    """Compute each picture's contrastive loss in nats against the whole split: float32 (N,).

    pictures (N, D) and texts (M, D) are unit rows; owner, int64 (M,), is each caption's picture, and
    every picture needs a caption. A picture's loss is the mean of two parts: the loss of its picture
    given each of its captions, averaged, and that of any of its captions given the picture. This is
    InfoNCE with several positives (MIL-NCE; Miech et al. 2020, arXiv 1912.06430). Like recall it
    compares with all pictures, but it changes before a rank does.
    """
    numbers = np.arange(len(pictures))
    to_image = _losses(texts, pictures, owner, numbers, scale)
    to_text = _losses(pictures, texts, numbers, owner, scale)
    return ((_by_picture(to_image, owner) + to_text) / 2).astype(np.float32)


def _losses(
    rows: Float32,
    candidates: Float32,
    ids: npt.NDArray[np.int64],
    candidate_ids: npt.NDArray[np.int64],
    scale: float,
) -> Float32:
    """Compute -log of the softmax share of the candidates that have the row's id: float32 (R,)."""
    others = torch.from_numpy(candidates).T
    losses = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        logits = scale * torch.from_numpy(rows[block]) @ others
        foreign = torch.from_numpy(ids[block, None] != candidate_ids)
        own = logits.masked_fill(foreign, -torch.inf).logsumexp(1)
        losses.append(logits.logsumexp(1) - own)
    result: Float32 = torch.cat(losses).numpy()
    return result


def _by_picture(values: npt.NDArray[Any], owner: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Average over each picture's captions: (M,) -> (N,)."""
    means: npt.NDArray[np.float64] = np.bincount(owner, values) / np.bincount(owner)
    return means
