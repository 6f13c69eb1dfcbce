"""Measure a model on the data of the built-in model's card.

    python -m data_prep.builtin_model.measure --data DIR [--model SPEC] [--write]

Pictures are decoded by `clipkit.images` and encoded by `clipkit.towers` with the stored weights, as in
the product, and measured by `clipkit.metrics`. Every figure has its n and a 95 % interval over what was
sampled: pictures, or keywords if they are the queries.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit import checkpoint, images, metrics, towers
from clipkit.arrays import Float32, Float64
from data_prep.builtin_model import sources, vocabulary

CUTS = (1, 5, 10)
CIFAR_PROMPTS = ("a photo of a {}.", "a blurry photo of a {}.", "a picture of a {}", "{}")
CLASS_PROMPTS = ("a photo of a {}.", "a picture of a {}", "{}")


def encode_files(encoder: towers.DualEncoder, paths: Sequence[Path]) -> Float32:
    """Encode picture files, decoded as for indexing: float32 (N, D), unit rows."""
    side, rows = encoder.preferred_side, []
    for start in range(0, len(paths), encoder.preferred_batch):
        batch = paths[start : start + encoder.preferred_batch]
        pictures = [images.decode(path.read_bytes(), target=side).rgb for path in batch]
        rows.append(encoder.encode_images(pictures))
    return np.concatenate(rows)


def flickr_recall(encoder: towers.DualEncoder, data: Path) -> dict[str, dict[str, Any]]:
    """Measure retrieval both ways on Flickr8k's development split: 1,000 pictures, 5 captions each."""
    photos = sources.read_photos(data, "dev")
    owner = np.repeat(np.arange(len(photos)), [len(photo.phrases) for photo in photos])
    texts = encoder.encode_texts([text for photo in photos for text in photo.phrases])
    pictures = encode_files(encoder, [photo.path for photo in photos])
    to_image, to_text = metrics.rank_captions(pictures, texts, owner)
    return {
        "flickr8k_dev_text_to_image": {
            f"R@{k}": percent(to_image.hit_at(k), groups=owner) for k in CUTS
        },
        "flickr8k_dev_image_to_text": {f"R@{k}": percent(to_text.hit_at(k)) for k in CUTS},
    }


def keyword_hits(
    encoder: towers.DualEncoder, examples: Sequence[sources.Example], *, first: int = 5
) -> dict[str, Any]:
    """Search every keyword of the drawings: how often is a picture that has it among the `first`, how
    often would it be in random order, and at which rank does it come?"""
    keywords = sorted({word for example in examples for word in example.keywords})
    place = {word: row for row, word in enumerate(keywords)}
    pairs = [(place[word], row) for row, e in enumerate(examples) for word in e.keywords]
    pictures = encode_files(encoder, [example.path for example in examples])
    ranking = metrics.rank_pairs(encoder.encode_texts(keywords), pictures, pairs)
    return {
        "pictures": len(examples),
        f"hit@{first}": percent(ranking.hit_at(first)),
        f"hit@{first}_by_chance": percent(ranking.chance_hit_at(first)),
        "MRR": percent(ranking.reciprocal_rank(), scale=1.0),
    }


def zero_shot(encoder: towers.DualEncoder, data: Path) -> Float64:
    """Classify CIFAR-10's sample by its class names: float64 (pictures,), 1 where correct."""
    folders = sorted(f for f in (data / "cifar10_sample").iterdir() if f.is_dir())
    files = [(label, path) for label, f in enumerate(folders) for path in sorted(f.iterdir())]
    classes = np.zeros((len(folders), encoder.dim), np.float32)
    for prompt in CIFAR_PROMPTS:
        classes += encoder.encode_texts([prompt.format(folder.name) for folder in folders])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)  # the more prompts agree, the longer
    scores = encode_files(encoder, [path for _, path in files]) @ classes.T
    correct = scores.argmax(axis=1) == np.array([label for label, _ in files])
    return np.asarray(correct, np.float64)


def zero_shot_of(encoder: towers.DualEncoder, data: Path, numbers: Sequence[int]) -> Float64:
    """Classify photos of some of ImageNet's classes among these: float64 (classes,), 1 where correct."""
    every = vocabulary.read_classes(data)
    classes = [every[number] for number in numbers]
    vectors = np.zeros((len(classes), encoder.dim), np.float32)
    for prompt in CLASS_PROMPTS:
        vectors += encoder.encode_texts([prompt.format(each.names[0]) for each in classes])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = encode_files(encoder, [each.photo for each in classes]) @ vectors.T
    return np.asarray(scores.argmax(axis=1) == np.arange(len(classes)), np.float64)


def percent(
    samples: Float64, *, groups: npt.NDArray[np.int64] | None = None, scale: float = 100.0
) -> dict[str, Any]:
    """Compute the mean and its 95 % interval of samples (n,), by `groups` if several share a picture."""
    interval = metrics.mean_interval(samples, groups=groups)
    value, low, high = (round(x * scale, 3) for x in (interval.value, interval.low, interval.high))
    return {"value": value, "low": low, "high": high, "n": interval.n}


def measure(encoder: towers.DualEncoder, data: Path) -> Mapping[str, Any]:
    """Compute all figures of the model card, in percent except for the reciprocal rank."""
    return {
        **flickr_recall(encoder, data),
        "clip_art_held_out_keywords": keyword_hits(encoder, sources.read_art(data, held_out=True)),
        "cifar10_sample_zero_shot": {"accuracy": percent(zero_shot(encoder, data))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="see MODEL_CARD.md")
    parser.add_argument("--model", default="builtin")
    parser.add_argument(
        "--write", action="store_true", help="also write them to the model's clipkit.json"
    )
    held_out = "also of the classes that `recipe start --without DRAW` left out"
    parser.add_argument(
        "--held-out", type=int, choices=range(vocabulary.DRAWS), metavar="DRAW", help=held_out
    )
    args = parser.parse_args()
    encoder = towers.load(args.model, precision="float32")
    figures = dict(measure(encoder, args.data))
    if args.held_out is not None:
        correct = zero_shot_of(encoder, args.data, vocabulary.held_out(args.held_out))
        figures["imagenet_held_out_classes"] = {"accuracy": percent(correct)}
    if args.write:
        folder = checkpoint.find_folder(args.model)
        if folder is None:
            parser.error(f"--write needs a model in a folder, not {args.model!r}")
        path = folder / checkpoint.PROVENANCE_FILE
        provenance = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        text = json.dumps({**provenance, "metrics": figures}, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
