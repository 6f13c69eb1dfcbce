"""Validation during training: what each kind of method is measured by on the validation split, the
comparison of two models by it, and a warning if the embeddings collapse.

    of_pairs    a caption finds its picture, and a picture one of its captions
    of_views    a view of a picture finds another view of it among all pictures' views
    of_texts    a caption finds another caption of its picture
    of_labels   a picture's nearest neighbours have its label
    of_teacher  a picture's vector finds the teacher's vector of it

All processes share the work and return the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipkit.arrays import Float32, Int64
from clipkit.errors import DatasetError
from clipkit.metrics import (
    alignment,
    covariance_spectrum,
    effective_rank,
    neighbour_losses,
    neighbour_votes,
    rank_captions,
    ridge_accuracy,
    uniformity,
)
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.distributed import collect, gather_uneven, world_size
from clipkit.training.inputs import Batch, Inputs, UnreadablePicturesError, readable_batch
from clipkit.training.towers import Towers

_KS = (1, 5, 10)
_BLOCK_ROWS = 256  # rows of similarities at a time
_COLLAPSED = 0.25  # of the variance or effective rank at the start
_VIEW_SCALE = 10.0  # of cosines of views, whose methods have temperatures of their own


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of an evaluation of n items: pictures, or captions."""

    title: str  # of the mean of `metrics`, such as "mean recall"
    metrics: dict[str, float]  # fractions by name, "text_to_image/R@1", ...
    space: dict[str, float]  # the shape of the space, and probes
    hits: list[float]  # (n,): of each item, how far it was right
    losses: list[float]  # (n,): of each item, lower is better
    spectrum: list[float]  # eigenvalues of the covariance, largest first

    @property
    def mean(self) -> float:
        """Return the mean of `metrics`."""
        return float(np.mean(list(self.metrics.values())))

    @property
    def loss(self) -> float:
        """Return the mean of `losses`, to six digits: float32 holds no more."""
        return round(float(np.mean(self.losses)), 6)

    def beats(self, other: Scores) -> bool:
        """Return whether the hits are higher by more than a standard error of the paired difference or,
        if they differ by less, the loss is lower.

        The loss decides on small splits, and where hits are at their ceiling.
        """
        if exceeds(self.hits, other.hits):
            return True
        return not exceeds(other.hits, self.hits) and self.loss < other.loss

    def collapse_warning(self, start: Scores | None) -> str | None:
        """Return a sentence if the embeddings have collapsed since the start, else None."""
        for name in ("variance", "effective_rank"):
            now, before = self.space[name], start.space[name] if start else 0.0
            least = 1.0 if name == "effective_rank" else 0.0  # of vectors on a line
            if max(now - least, 0.0) < _COLLAPSED * max(before - least, 0.0):
                return (
                    f"the embeddings are collapsing: {name.replace('_', ' ')} fell from "
                    f"{before:.3g} to {now:.3g}; lower learning_rate or raise batch"
                )
        return None


def of_pairs(towers: Towers, inputs: Inputs) -> Scores:
    """Measure recall at 1, 5 and 10 both ways.

    Raises InputError if an embedding is not finite, as the other evaluations do.
    """
    data, pictures = inputs.data, embed_pictures(towers, inputs)
    captions = embed_captions(towers, inputs)[data.captions]
    rankings = rank_captions(pictures, captions, data.owner)
    metrics = {
        f"{direction}/R@{k}": float(ranking.hit_at(k).mean())
        for direction, ranking in zip(("text_to_image", "image_to_text"), rankings, strict=True)
        for k in _KS
    }
    to_image, to_text = (np.mean([r.hit_at(k) for k in _KS], axis=0) for r in rankings)
    hits = (_by_picture(to_image, data.owner) + to_text) / 2
    scale = float(towers.logit_scale.detach().exp())
    losses = picture_losses(pictures, captions, data.owner, scale=scale)
    space = {"alignment": alignment(pictures[data.owner], captions)}
    return _scores("mean recall", metrics, hits, losses, pictures, space, data.labels)


def of_views(towers: Towers, inputs: Inputs, views: Sequence[Iterable[torch.Tensor]]) -> Scores:
    """Measure recall at 1, 5 and 10 of a picture's second view, given its first.

    views: two, each this process's share of all pictures in chunks, uint8 (n, 3, H, W).
    """
    pictures = embed_pictures(towers, inputs)
    with torch.no_grad():
        first, second = (gathered(map(towers.images, part), inputs.data) for part in views)
    return _found(first, second, "view_to_view", pictures, inputs.data.labels)


def of_texts(towers: Towers, inputs: Inputs, pictures: Float32 | None = None) -> Scores:
    """Measure recall at 1, 5 and 10 of a picture's second caption, given its first.

    pictures: float32 unit rows (N, D); with them `space` also has the mean recall of pictures and
        captions, "picture_recall", which is not what the texts are trained for.
    Raises DatasetError if fewer than two pictures have two captions.
    """
    data = inputs.data
    pairs = np.array([owned[:2] for owned in data.owned if len(owned) > 1], np.int64).reshape(-1, 2)
    if len(pairs) < 2:
        raise DatasetError(
            f"{len(pairs)} pictures of the validation split of {data.folder} have two captions; at "
            "least 2 must, so that a caption can find another one of its picture"
        )
    texts = embed_captions(towers, inputs)
    scores = _found(texts[pairs[:, 0]], texts[pairs[:, 1]], "text_to_text", texts)
    if pictures is not None:
        rankings = rank_captions(pictures, texts[data.captions], data.owner)
        recall = np.mean([ranking.hit_at(k).mean() for ranking in rankings for k in _KS])
        scores.space["picture_recall"] = float(recall)
    return scores


def of_labels(towers: Towers, inputs: Inputs) -> Scores:
    """Measure accuracy of the 1, 5 and 10 nearest other pictures' votes, and mean average precision.

    Raises DatasetError if there are no labels.
    """
    data, pictures = inputs.data, embed_pictures(towers, inputs)
    if data.labels is None:
        raise DatasetError(f"the validation split of {data.folder} has no labels")
    metrics = {}
    right = np.zeros(len(pictures))
    for k in _KS:
        hit = neighbour_votes(pictures, data.labels, k) == data.labels
        metrics[f"neighbours/acc@{k}nn"] = float(hit.mean())
        right += hit / len(_KS)
    losses = neighbour_losses(pictures, data.labels)
    return _scores("accuracy of neighbours", metrics, right, losses, pictures, {}, data.labels)


def of_teacher(
    towers: Towers,
    inputs: Inputs,
    teachers: torch.Tensor,
    mapped: Callable[[torch.Tensor], torch.Tensor],
) -> Scores:
    """Measure recall at 1, 5 and 10 of a picture's teacher vector, given the student's vector.

    teachers: unit rows (N, T); mapped: takes the student's unit rows (N, D) there.
    """
    pictures = embed_pictures(towers, inputs)
    with torch.no_grad():
        students = mapped(torch.from_numpy(pictures).to(towers.device)).float().cpu().numpy()
    targets = teachers.float().cpu().numpy()
    return _found(students, targets, "student_to_teacher", pictures, inputs.data.labels)


def _found(
    first: Float32, second: Float32, name: str, vectors: Float32, labels: Int64 | None = None
) -> Scores:
    """Measure how `first` finds the same row of `second`; `vectors` show the space's shape."""
    numbers = np.arange(len(first))
    ranking = rank_captions(second, first, numbers)[0]
    metrics = {f"{name}/R@{k}": float(ranking.hit_at(k).mean()) for k in _KS}
    hits = np.mean([ranking.hit_at(k) for k in _KS], axis=0)
    losses = picture_losses(second, first, numbers, scale=_VIEW_SCALE)
    space = {"alignment": alignment(first, second)}
    return _scores("mean recall", metrics, hits, losses, vectors, space, labels)


def _scores(
    title: str,
    metrics: dict[str, float],
    hits: npt.NDArray[Any],
    losses: npt.NDArray[Any],
    vectors: Float32,
    space: dict[str, float],
    labels: Int64 | None = None,
) -> Scores:
    """Add what describes a space of unit rows (N, D): its shape and, with labels, two probes."""
    spectrum = covariance_spectrum(vectors)
    space = {
        "variance": float(spectrum.sum()),
        "effective_rank": effective_rank(spectrum),
        **space,
    }
    if "alignment" in space:
        space["positive_cosine"] = 1 - space["alignment"] / 2
    if len(vectors) > 1:
        space["uniformity"] = uniformity(vectors)
    if labels is not None and (known := labels >= 0).sum() > 1:
        rows, labels = vectors[known], labels[known]
        space["knn_accuracy"] = float((neighbour_votes(rows, labels, 5) == labels).mean())
        space["linear_accuracy"] = ridge_accuracy(rows, labels)
    return Scores(title, metrics, space, hits.tolist(), losses.tolist(), spectrum.tolist())


def embed_pictures(towers: Towers, inputs: Inputs) -> Float32:
    """Encode all pictures, preprocessed as at inference: float32 unit rows (N, D)."""
    towers.mode(False)
    # no_grad, not inference_mode: under autocast on a CPU that is five times slower.
    with torch.no_grad():
        return gathered(map(towers.images, inputs.pictures()), inputs.data)


def embed_captions(towers: Towers, inputs: Inputs) -> Float32:
    """Encode all distinct captions: float32 unit rows (M, D)."""
    towers.mode(False)
    with torch.no_grad():
        return gathered(map(towers.texts, inputs.captions()), inputs.data)


def gathered(chunks: Iterable[torch.Tensor], data: CaptionedPictures) -> Float32:
    """Gather all processes' rows, in order of rank; some may have none.

    Raises UnreadablePicturesError in all of them if one meets a picture that cannot be read.
    """
    own: list[Float32] = []
    broken: Mapping[int, str] = {}
    try:
        own = [chunk.float().cpu().numpy() for chunk in chunks]
    except UnreadablePicturesError as error:
        broken = error.pictures
    parts = collect((own, broken))
    if unreadable := {picture: why for _, of in parts for picture, why in of.items()}:
        raise UnreadablePicturesError(data, unreadable)
    return np.concatenate([rows for part, _ in parts for rows in part])


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


def embed_pairs(
    towers: Towers, inputs: Inputs, plan: Plan, *, most: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, Batch] | None:
    """Encode at most `most` pairs of a plan, `chunk` at a time: unit rows of pictures and of captions,
    (n, D) each, of all processes, and the batch that they are of; None where batches have no pictures
    or no captions. All processes must call it."""
    count = min(len(plan.pictures), most) // world_size() * world_size()
    plan = replace(plan, pictures=plan.pictures[:count], texts=plan.texts[:, :count])
    batch = readable_batch(inputs, plan)
    if not batch.pictures or not batch.texts:
        return None
    parts = torch.split(torch.arange(count // world_size()), chunk)
    towers.mode(False)
    with torch.no_grad():
        pictures = torch.cat([towers.images(batch.pictures[0][part]) for part in parts])
        texts = torch.cat([towers.texts(batch.texts[0][part]) for part in parts])
    return gather_uneven(pictures), gather_uneven(texts), batch
