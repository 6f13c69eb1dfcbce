"""Measure a model on the data that the built-in one was made for: what its model card states.

    python -m clipkit.builtin.measure --data DIR [--model SPEC] [--write]

Everything goes the way the product goes: pictures through `clipkit.images`, towers through
`clipkit.towers`, weights as they are stored. Every figure comes with its n and a 95 % bootstrap
interval over what was sampled: pictures, or keywords where a query is a keyword.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import checkpoint, images, towers
from clipkit.builtin import sources

__all__ = ["flickr_recall", "keyword_hits", "measure", "recall_hits", "zero_shot"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
CUTS = (1, 5, 10)
CIFAR_PROMPTS = ("a photo of a {}.", "a blurry photo of a {}.", "a picture of a {}", "{}")


def encode_files(encoder: towers.DualEncoder, paths: Sequence[Path]) -> Float32:
    """Picture files -> float32 (N, D), unit rows, decoded as indexing decodes them."""
    side, rows = encoder.preferred_side, []
    for start in range(0, len(paths), encoder.preferred_batch):
        batch = paths[start : start + encoder.preferred_batch]
        pictures = [images.decode(path.read_bytes(), target=side).rgb for path in batch]
        rows.append(encoder.encode_images(pictures))
    return np.concatenate(rows)


def recall_hits(
    pictures: Float32, texts: Float32, owner: npt.NDArray[np.int64]
) -> tuple[Float64, Float64]:
    """Retrieval both ways: (text-to-image, image-to-text) hits, each (pictures, 3) for K = 1, 5, 10.

    pictures (N, D) and texts (M, D) are unit rows; owner (M,) is each text's picture. Text-to-image
    takes every caption as a query, averaged per picture; image-to-text is a hit if any of the
    picture's captions is in the first K. Ties count against the model (the pessimistic rank).
    """
    scores = texts @ pictures.T  # (M, N)
    own = scores[np.arange(len(owner)), owner]
    rank = (scores >= own[:, None]).sum(axis=1)  # from 1: the own picture counts itself
    hits = (rank[:, None] <= np.array(CUTS)).astype(float)
    captions = np.bincount(owner, minlength=len(pictures))
    summed = [np.bincount(owner, column, len(pictures)) for column in hits.T]
    to_image: Float64 = np.stack(summed, axis=1) / captions[:, None]

    best = np.full(len(pictures), -np.inf, np.float32)
    np.maximum.at(best, owner, own)
    scores[np.arange(len(owner)), owner] = -np.inf
    rank = 1 + (scores >= best).sum(axis=0)
    return to_image, (rank[:, None] <= np.array(CUTS)).astype(float)


def flickr_recall(encoder: towers.DualEncoder, data: Path) -> tuple[Float64, Float64]:
    """`recall_hits` on Flickr8k's development split: 1,000 pictures, five captions each."""
    photos = sources.read_photos(data, "dev")
    owner = np.repeat(np.arange(len(photos)), [len(photo.phrases) for photo in photos])
    texts = encoder.encode_texts([text for photo in photos for text in photo.phrases])
    return recall_hits(encode_files(encoder, [photo.path for photo in photos]), texts, owner)


def keyword_hits(
    encoder: towers.DualEncoder, examples: Sequence[sources.Example], *, first: int = 5
) -> tuple[Float64, Float64, Float64]:
    """Every keyword of the drawings as a query: (hit, reciprocal rank, chance), each (keywords,).

    A hit is a picture with that keyword among the `first`; chance is the same for a random order.
    """
    keywords = sorted({word for example in examples for word in example.keywords})
    pictures = encode_files(encoder, [example.path for example in examples])
    order = np.argsort(-encoder.encode_texts(keywords) @ pictures.T, axis=1, kind="stable")
    relevant = np.array([[word in e.keywords for e in examples] for word in keywords])
    ranked = np.take_along_axis(relevant, order, axis=1)
    n, carriers = len(examples), relevant.sum(axis=1)
    misses = np.ones(len(keywords))
    for drawn in range(first):
        misses *= np.maximum(0, n - carriers - drawn) / (n - drawn)
    return ranked[:, :first].any(axis=1).astype(float), 1 / (ranked.argmax(axis=1) + 1), 1 - misses


def zero_shot(encoder: towers.DualEncoder, data: Path) -> Float64:
    """CIFAR-10's sample classified by its class names: (pictures,) of 0 and 1."""
    folders = sorted(f for f in (data / "cifar10_sample").iterdir() if f.is_dir())
    files = [(label, path) for label, f in enumerate(folders) for path in sorted(f.iterdir())]
    classes = np.zeros((len(folders), encoder.dim), np.float32)
    for prompt in CIFAR_PROMPTS:
        classes += encoder.encode_texts([prompt.format(folder.name) for folder in folders])
    scores = encode_files(encoder, [path for _, path in files]) @ classes.T
    correct = scores.argmax(axis=1) == np.array([label for label, _ in files])
    return np.asarray(correct, np.float64)


def interval(samples: Float64, *, scale: float = 100.0) -> dict[str, Any]:
    """Mean and 95 % percentile bootstrap interval of (n,) samples, 2,000 resamplings, seeded."""
    rng = np.random.default_rng(0)
    means = [samples[rng.integers(0, len(samples), len(samples))].mean() for _ in range(2000)]
    low, high = np.percentile(means, (2.5, 97.5))
    value, low, high = (round(float(x) * scale, 3) for x in (samples.mean(), low, high))
    return {"value": value, "low": low, "high": high, "n": len(samples)}


def measure(encoder: towers.DualEncoder, data: Path) -> Mapping[str, Any]:
    """All of the model card's figures, in percent but for the reciprocal rank."""
    to_image, to_text = flickr_recall(encoder, data)
    report: dict[str, Any] = {}
    for name, hits in (
        ("flickr8k_dev_text_to_image", to_image),
        ("flickr8k_dev_image_to_text", to_text),
    ):
        report[name] = {f"R@{k}": interval(hits[:, i]) for i, k in enumerate(CUTS)}
    drawings = sources.read_art(data, held_out=True)
    hit, reciprocal, chance = keyword_hits(encoder, drawings)
    report["clip_art_held_out_keywords"] = {
        "pictures": len(drawings),
        "hit@5": interval(hit),
        "hit@5_by_chance": interval(chance),
        "MRR": interval(reciprocal, scale=1.0),
    }
    report["cifar10_sample_zero_shot"] = {"accuracy": interval(zero_shot(encoder, data))}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="see MODEL_CARD.md")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--write", action="store_true", help="also into the model's clipkit.json")
    args = parser.parse_args()
    encoder = towers.load(args.model, precision="float32")
    metrics = measure(encoder, args.data)
    if args.write:
        folder = checkpoint.find_folder(args.model)
        if folder is None:
            parser.error(f"--write needs a model in a folder, not {args.model!r}")
        path = folder / checkpoint.PROVENANCE_FILE
        provenance = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        text = json.dumps({**provenance, "metrics": metrics}, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
