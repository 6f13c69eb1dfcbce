"""Measure a model on the data that the built-in one was made for: what its model card states.

    python -m data_prep.builtin_model.measure --data DIR [--model SPEC] [--write]

Everything goes the way the product goes: pictures through `clipkit.images`, towers through
`clipkit.towers`, figures through `clipkit.metrics`, weights as they are stored. Every figure comes
with its n and a 95 % interval over what was sampled: pictures, or keywords where one is a query.
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
from data_prep.builtin_model import sources

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


def flickr_recall(encoder: towers.DualEncoder, data: Path) -> dict[str, dict[str, Any]]:
    """Retrieval both ways on Flickr8k's development split: 1,000 pictures, five captions each."""
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
    """Every keyword of the drawings as a query: is a picture with it among the `first`? Chance is
    the same for a random order."""
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
    """CIFAR-10's sample classified by its class names: (pictures,) of 0 and 1."""
    folders = sorted(f for f in (data / "cifar10_sample").iterdir() if f.is_dir())
    files = [(label, path) for label, f in enumerate(folders) for path in sorted(f.iterdir())]
    classes = np.zeros((len(folders), encoder.dim), np.float32)
    for prompt in CIFAR_PROMPTS:
        classes += encoder.encode_texts([prompt.format(folder.name) for folder in folders])
    scores = encode_files(encoder, [path for _, path in files]) @ classes.T
    correct = scores.argmax(axis=1) == np.array([label for label, _ in files])
    return np.asarray(correct, np.float64)


def percent(
    samples: Float64, *, groups: npt.NDArray[np.int64] | None = None, scale: float = 100.0
) -> dict[str, Any]:
    """Mean and 95 % interval of (n,) samples, over `groups` where several belong to one picture."""
    interval = metrics.mean_interval(samples, groups=groups)
    value, low, high = (round(x * scale, 3) for x in (interval.value, interval.low, interval.high))
    return {"value": value, "low": low, "high": high, "n": interval.n}


def measure(encoder: towers.DualEncoder, data: Path) -> Mapping[str, Any]:
    """All of the model card's figures, in percent but for the reciprocal rank."""
    return {
        **flickr_recall(encoder, data),
        "clip_art_held_out_keywords": keyword_hits(encoder, sources.read_art(data, held_out=True)),
        "cifar10_sample_zero_shot": {"accuracy": percent(zero_shot(encoder, data))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="see MODEL_CARD.md")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--write", action="store_true", help="also into the model's clipkit.json")
    args = parser.parse_args()
    encoder = towers.load(args.model, precision="float32")
    figures = measure(encoder, args.data)
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
