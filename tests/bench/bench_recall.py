"""Memory and time of retrieval metrics over synthetic pictures and captions.

    python tests/bench/bench_recall.py [--pictures 200000] [--captions 5] [--dim 512]

Pictures are random unit rows in float16, a caption is its picture and noise. Prints one line of
JSON: sizes, seconds, scores per second, peak memory, and figures to see that it is no nonsense.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import numpy as np
import numpy.typing as npt

from clipkit.metrics import mean_interval, rank_captions

Float16 = npt.NDArray[np.float16]
CHUNK = 8192


def unit_rows(vectors: npt.NDArray[np.float32]) -> Float16:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, np.float16)


def synthetic(
    pictures: int, captions: int, dim: int, *, noise: float = 2.5, seed: int = 0
) -> tuple[Float16, Float16, npt.NDArray[np.int64]]:
    """Pictures (N, D), texts (N * captions, D) at cosine 1 / sqrt(1 + noise^2), and owners."""
    rng = np.random.default_rng(seed)
    rows = np.empty((pictures, dim), np.float16)
    for start in range(0, pictures, CHUNK):
        shape = rows[start : start + CHUNK].shape
        rows[start : start + CHUNK] = unit_rows(rng.standard_normal(shape, np.float32))
    owner = rng.permutation(np.repeat(np.arange(pictures), captions))
    texts = np.empty((len(owner), dim), np.float16)
    for start in range(0, len(owner), CHUNK):
        own = rows[owner[start : start + CHUNK]].astype(np.float32)
        noisy = own + noise / np.sqrt(dim) * rng.standard_normal(own.shape, np.float32)
        texts[start : start + CHUNK] = unit_rows(noisy)
    return rows, texts, owner


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args()

    pictures, texts, owner = synthetic(args.pictures, args.captions, args.dim)
    loaded = peak_mb()
    began = time.perf_counter()
    to_image, to_text = rank_captions(pictures, texts, owner)
    seconds = time.perf_counter() - began
    found: dict[str, object] = {
        "pictures": len(pictures),
        "texts": len(texts),
        "dim": args.dim,
        "seconds": round(seconds, 2),
        "million_scores_per_second": round(len(pictures) * len(texts) / seconds / 1e6, 1),
        "peak_mb": round(peak_mb()),
        "peak_mb_before_ranking": round(loaded),
    }
    for name, ranking, groups in (("t2i", to_image, owner), ("i2t", to_text, None)):
        for k in (1, 10):
            interval = mean_interval(ranking.hit_at(k), groups=groups)
            bounds = (interval.value, interval.low, interval.high)
            found[f"{name}/R@{k}"] = [round(x, 4) for x in bounds]
        found[f"{name}/mAP"] = round(float(ranking.average_precision().mean()), 4)
    found["peak_mb_with_figures"] = round(peak_mb())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
