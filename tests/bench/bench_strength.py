"""What strong, fair and weak are worth, before and after they became probabilities.

    python -m tests.bench.bench_strength --data DIR [--cache DIR]

Texts of three datasets (data_prep/builtin_model/strength.py says which pictures are right for them) are
searched in libraries of 300, 9,000 and 100,000 pictures. Before: z-scores, strong from 4 and fair from
2.5 standard deviations above the query's mean. After: the calibration, fitted on the two other
datasets. Shipped: the built-in model's own, which is fitted on all three, so that its figures are not
of new data. A table row is the first pages of 24 hits of all texts that have a right picture there.

DIR is that of MODEL_CARD.md. Libraries: the dataset's own pictures; then, up to 9,000, the other
datasets and Flickr8k's training photos; then all further pictures. They count as right by their captions
or titles, crops by those of the whole picture, ImageNet's by its class only: much that fits there counts
as wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from clipkit import strength, towers
from clipkit.arrays import Bool, Float64
from data_prep.builtin_model import strength as fitting
from data_prep.builtin_model.strength import Text

STRONG_Z, FAIR_Z = 4.0, 2.5
BANDS = ("strong", "fair", "weak")
NOTHING_THERE = """asdfgh|qwertzuiop|xkcd blorp zzz|lorem ipsum dolor sit amet|fnord quux|aaaaaaa|invoice
tax return 2019|democracy|justice|the meaning of life|inflation|photosynthesis|supply and demand|my wife
Angela Merkel|quarterly revenue growth|stock exchange rates|Eiffel Tower at night|the planet Saturn
an x-ray of a hand|electron microscope image of a virus|an astronaut on the moon|a bowl of ramen
a sushi platter|a dentist|a barcode|a circuit board|handwritten letter|a bar chart|hund|katze
ein rotes Auto|une pizza|fahrrad im regen|пицца|собака|犬|😀|한국"""


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
    p = calibration.probabilities(hits.cosine, hits.pictures)
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
    pool = fitting.read_pool(encoder, args.data, args.cache)
    shipped = strength.read("builtin", encoder.encoder_id)
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
        content = {k: getattr(calibration, k) for k in ("constant", "cosine", "size")}
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
            print(f"   before  | {row(hits, nothing, None)}")
            print(f"   after   | {row(hits, nothing, calibration)}")
            print(f"   shipped | {row(hits, nothing, shipped)}", flush=True)


if __name__ == "__main__":
    main()
