"""Evaluation during training: recall both ways on the validation split, and a watch for collapse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clipkit.metrics import (
    alignment,
    covariance_spectrum,
    effective_rank,
    rank_captions,
    uniformity,
)
from clipkit.training.distributed import gather_uneven
from clipkit.training.inputs import Inputs
from clipkit.training.model import Towers

__all__ = ["Scores", "embed", "evaluate"]

_KS = (1, 5, 10)
_LEAST = 0.25  # of what variance and effective rank were at the start


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found. Recalls are fractions; `space` describes the pictures' vectors."""

    recall: dict[str, float]  # "text_to_image/R@1", ...
    space: dict[str, float]
    pictures: int
    captions: int

    @property
    def mean_recall(self) -> float:
        """The mean of R@1, R@5 and R@10 both ways: what "better" means here."""
        return float(np.mean(list(self.recall.values())))

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
    """Recall@1, 5 and 10 both ways, and the space's shape. All processes share the work and get
    the same result. InputError if an embedding is not finite."""
    pictures, texts = embed(towers, inputs)
    data = inputs.data
    every = texts[data.captions]
    ranked = rank_captions(pictures, every, data.owner)
    recall = {
        f"{direction}/R@{k}": float(ranking.hit_at(k).mean())
        for direction, ranking in zip(("text_to_image", "image_to_text"), ranked, strict=True)
        for k in _KS
    }
    spectrum = covariance_spectrum(pictures)
    space = {
        "variance": float(spectrum.sum()),
        "effective_rank": effective_rank(spectrum),
        "alignment": alignment(pictures[data.owner], every),
    }
    if len(pictures) > 1:
        space["uniformity"] = uniformity(pictures)
    return Scores(recall, space, len(pictures), len(every))


def embed(
    towers: Towers, inputs: Inputs
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Unit rows of all pictures (N, D), as they are served, and of all distinct captions (M, D)."""
    towers.mode(False)
    # no_grad, not inference_mode: under autocast that one is five times as slow on a CPU.
    with torch.no_grad():
        pictures = _joined(towers.images(chunk) for chunk in inputs.pictures())
        texts = _joined(towers.texts(chunk) for chunk in inputs.captions())
    return pictures, texts


def _joined(chunks: Iterable[torch.Tensor]) -> npt.NDArray[np.float32]:
    rows = gather_uneven(torch.cat(list(chunks)))
    return rows.float().cpu().numpy()
