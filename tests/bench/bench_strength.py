"""What strong, fair and weak are worth, before and after they became probabilities.

    python -m tests.bench.bench_strength --data DIR [--cache DIR]

Texts of three datasets (data_prep/builtin_model/strength.py says which pictures are right for them) are
searched in libraries of 300, 9,000 and 100,000 pictures. Before: z-scores, strong from 4 and fair from
2.5 standard deviations above the query's mean. After: the calibration, fitted on the two other
datasets. A table row is the first pages of 24 hits of all texts that have a right picture there.

DIR is that of MODEL_CARD.md with imagenet_sample/ and cifar10_train.zip. Libraries: the dataset's
own pictures; then, up to 9,000, the other datasets and Flickr8k's training photos; then Openclipart and
ImageNet's sample, CIFAR-10's training pictures and 38,287 random crops. The model was trained on
Flickr8k's and Openclipart's training pictures, and they count as right by their captions, crops by those
of the whole picture, ImageNet's by its class only: much that fits there counts as wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from clipkit import strength, towers
from clipkit.arrays import Bool, Float64
from data_prep.builtin_model import sources
from data_prep.builtin_model import strength as fitting
from data_prep.builtin_model.strength import Picture, Pool, Text

STRONG_Z, FAIR_Z = 4.0, 2.5
BANDS = ("strong", "fair", "weak")
NOTHING_THERE = """asdfgh|qwertzuiop|xkcd blorp zzz|lorem ipsum dolor sit amet|fnord quux|aaaaaaa|invoice
tax return 2019|democracy|justice|the meaning of life|inflation|photosynthesis|supply and demand|my wife
Angela Merkel|quarterly revenue growth|stock exchange rates|Eiffel Tower at night|the planet Saturn
an x-ray of a hand|electron microscope image of a virus|an astronaut on the moon|a bowl of ramen
a sushi platter|a dentist|a barcode|a circuit board|handwritten letter|a bar chart|hund|katze
ein rotes Auto|une pizza|fahrrad im regen|пицца|собака|犬|😀|한국"""


def further_pictures(data: Path) -> Iterable[Picture]:
    """Yield the pictures that fill a library up to 100,000, in this order."""
    for e in sources.read_art(data, held_out=False):
        words = fitting.stems(*e.phrases, *e.keywords)
        yield Picture(str(e.path), "openclipart_train", words, fitting.reader(e.path))
    sample, train = data / "imagenet_sample", sources.read_photos(data, "train")
    whole = [
        (sample / row["image"], fitting.stems(*row["names"]))
        for row in sources.read_rows(sample / "classes.jsonl")
    ]
    for path, words in whole:
        yield Picture(str(path), "imagenet", words, fitting.reader(path))
    archive = zipfile.ZipFile(data / "cifar10_train.zip")
    for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
        words = fitting.stems(fitting.CLASSES[name.split("/")[-2]])

        def from_archive(name: str = name) -> Image.Image:
            return Image.open(io.BytesIO(archive.read(name))).convert("RGB")

        yield Picture(f"cifar10_train/{name}", "cifar10_train", words, from_archive)
    origins = whole * 14 + [(e.path, fitting.stems(*e.phrases)) for e in train] * 4
    order = np.random.default_rng(1).permutation(len(origins))
    for i in order[:38_287].tolist():
        path, words = origins[i]

        def cropped(path: Path = path, i: int = i) -> Image.Image:
            return crop(fitting.reader(path)(), np.random.default_rng(i))

        yield Picture(f"{path}#{i}", "crop", words, cropped)


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out a random 30 to 60 % of a picture's area."""
    side = rng.uniform(0.3, 0.6) ** 0.5
    width, height = int(picture.width * side), int(picture.height * side)
    x, y = (
        int(rng.integers(0, most + 1)) for most in (picture.width - width, picture.height - height)
    )
    return picture.crop((x, y, x + width, y + height))


def auc(scores: Float64, right: Bool) -> float:
    """Return the probability that a right hit scores higher than a wrong one."""
    positive, negative = int(right.sum()), int((~right).sum())
    ranks = rankdata(scores)[right].sum() - positive * (positive + 1) / 2
    return float(ranks / (positive * negative))


def bands(
    hits: fitting.Hits, calibration: strength.Calibration | None
) -> tuple[list[str], Float64]:
    """Return each hit's band and score: by the calibration, or by its z-score for None."""
    if calibration is None:
        z = (hits.cosine - hits.mean) / hits.spread
        return ["strong" if v >= STRONG_Z else "fair" if v >= FAIR_Z else "weak" for v in z], z
    logits = calibration.constant + calibration.cosine * hits.cosine
    p = 1 / (1 + np.exp(-logits - calibration.above_mean * (hits.cosine - hits.mean)))
    return [strength.band(v) for v in p], p


def row(hits: fitting.Hits, nothing: fitting.Hits, calibration: strength.Calibration | None) -> str:
    band, score = bands(hits, calibration)
    names, right = np.array(band), hits.right
    cells = []
    for name in BANDS:
        those = names == name
        precision = f"{100 * right[those].mean():3.0f} %" if those.any() else "    -"
        cells.append(f"{precision} of {those.sum():>6,}")
    cells += [f"{100 * right[names == name].sum() / right.sum():3.0f} %" for name in BANDS]
    cells.append(f"{auc(score, right):.3f}")
    for page in (nothing, hits):
        clear = np.zeros(page.text.max() + 1, bool)
        clear[page.text[np.array(bands(page, calibration)[0]) != "weak"]] = True
        cells.append(f"{100 * (~clear[np.unique(page.text)]).mean():3.0f} %")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="a folder for the pictures' vectors")
    args = parser.parse_args()
    encoder = towers.load("builtin")
    own, further = fitting.read_pictures(args.data), list(further_pictures(args.data))
    vectors = [fitting.encode(encoder, pictures, args.cache) for pictures in (own, further)]
    pool = Pool([*own, *further], np.concatenate(vectors))
    texts = fitting.read_texts(args.data, random.Random(0))
    queries = encoder.encode_texts([text.text for text in texts])
    absent = [Text(t, "", frozenset()) for t in NOTHING_THERE.replace("\n", "|").split("|")]
    absent_queries = encoder.encode_texts([text.text for text in absent])
    print(f"{len(pool.vectors):,} pictures, {len(absent)} texts of nothing that is there")
    print(
        "precision of strong, fair, weak | share of right hits | AUC | nothing stands out: absent, real"
    )
    for dataset in fitting.DATASETS:
        others = [other for other in fitting.DATASETS if other != dataset]
        rng = np.random.default_rng(0)
        calibration = fitting.fit(
            pool, texts, queries, others, encoder_id=encoder.encoder_id, rng=rng
        )
        content = {k: getattr(calibration, k) for k in ("constant", "cosine", "above_mean")}
        print(f"{dataset}, fitted on {' and '.join(others)}: {json.dumps(content)}")
        mine = rng.permutation(pool.rows_of(dataset))
        near = rng.permutation(pool.rows_of("flickr8k_train", *others))
        rest = pool.rows_of("openclipart_train", "imagenet", "cifar10_train", "crop")
        few = {"flickr8k": 300, "openclipart": 175, "cifar10": 60}[dataset]
        photos = pool.rows_of("flickr8k")
        for library in (
            np.concatenate([mine[:few], photos[: 300 - few]]),
            np.concatenate([mine, near])[:9_000],
            np.concatenate([mine, near, rest]),
        ):
            rows = np.sort(library)
            numbers = [
                n
                for n, text in enumerate(texts)
                if text.dataset == dataset and np.isin(pool.right(text), rows).any()
            ]
            hits = pool.search([texts[n] for n in numbers], queries[numbers], rows)
            nothing = pool.search(absent, absent_queries, rows)
            print(f"{len(rows):>7,} pictures, {len(numbers):,} texts")
            print(f"   before | {row(hits, nothing, None)}")
            print(f"   after  | {row(hits, nothing, calibration)}", flush=True)


if __name__ == "__main__":
    main()
