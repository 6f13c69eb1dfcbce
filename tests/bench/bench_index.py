"""Speed, size and recall of every index kind beside Faiss's IndexFlatIP, on seeded clustered vectors.

    python tests/bench/bench_index.py --n 100000 --dim 512

recall@10 is tie-aware, over queries near a picture and far from all as words are; milliseconds are
of one query, k = 10, one thread (spread: of three rounds' medians); a batch uses all cores; building
includes measuring the recall; loading is from a warm disk cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from clipkit.index import KINDS, VectorIndex

Floats = npt.NDArray[np.float32]
Ask = Callable[[Floats], object]
LINE = "{:<12}{:>10}{:>28}{:>11}{:>7}{:>9}{:>8} "


def clustered(
    n: int, dim: int, *, seed: int = 0, per_cluster: int = 200
) -> npt.NDArray[np.float16]:
    """Unit rows float16 (n, dim) about random centres; the noise's length is 0.7 of the centre's."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(1, n // per_cluster), dim), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = np.empty((n, dim), np.float16)
    for start in range(0, n, 65_536):
        part = rows[start : start + 65_536]
        noise = random.standard_normal(part.shape, dtype=np.float32) * np.float32(0.7 / dim**0.5)
        noise += centres[random.integers(0, len(centres), len(part))]
        part[:] = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return rows


def make_queries(rows: npt.NDArray[np.float16], count: int) -> Floats:
    """Half at cosine about 0.96 to a row, half at about 0.3, where the ten best are close together."""
    random = np.random.default_rng(1)
    own = rows[random.integers(0, len(rows), count)].astype(np.float32)
    noise = random.standard_normal(own.shape, dtype=np.float32) / np.float32(own.shape[1] ** 0.5)
    queries = own + noise * np.where(np.arange(count) % 2, 3.0, 0.3).astype(np.float32)[:, None]
    unit: Floats = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return unit


def row(
    kind: str, found: list[Floats], truth: Floats, ask: Ask, queries: Floats, *rest: str
) -> str:
    """One line: recall of the scores `found`, times of `ask`, then `rest`."""
    # 1e-4: what rounding the vectors to half precision may move a cosine by
    recall = np.mean([np.mean(f >= t[-1] - 1e-4) for f, t in zip(found, truth, strict=True)])
    rounds = (
        np.array([[seconds(ask, queries[i : i + 1]) for i in range(50)] for _ in range(3)]) * 1e3
    )
    medians, p50, p95 = np.median(rounds, axis=1), np.median(rounds), np.percentile(rounds, 95)
    single = f"{p50:.2f} ({medians.min():.2f}-{medians.max():.2f}) {p95:.2f}"
    rate = len(queries) / min(seconds(ask, queries) for _ in range(3))
    return LINE.format(kind, f"{recall:.3f}", single, f"{rate:.0f}", *rest)


def seconds(call: Callable[..., object], *arguments: object) -> float:  # wall time of one call
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def main() -> None:
    """Build, measure and print one row per kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    cores = faiss.omp_get_max_threads()
    print(f"{arguments.n} x {arguments.dim}, {cores} cores")
    print(
        LINE.format(
            "kind", "recall@10", "p50 (spread) p95 ms", "batch q/s", "MB", "build s", "load s"
        )
    )
    rows = clustered(arguments.n, arguments.dim)
    queries = make_queries(rows, 200)

    flat = faiss.IndexFlatIP(arguments.dim)
    built = seconds(flat.add, rows.astype(np.float32))

    def ask_flat(queries: Floats) -> Floats:
        faiss.omp_set_num_threads(1 if len(queries) == 1 else cores)
        scores: Floats = flat.search(queries, 10)[0]
        return scores

    truth, mb = ask_flat(queries), f"{rows.nbytes * 2 / 1e6:.0f}"
    print(row("IndexFlatIP", list(truth), truth, ask_flat, queries, mb, f"{built:.1f}", "-"))
    faiss.omp_set_num_threads(cores)

    for kind in arguments.kinds:
        started = time.perf_counter()
        index = VectorIndex.build(np.arange(len(rows)), rows, kind=kind)
        built = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder) / "index", encoder_id="bench", last_seq=0)
            loaded = seconds(VectorIndex.load, Path(folder) / "index")
        ask = partial(index.search, k=10)
        rest = f"{index.measured.bytes / 1e6:.0f}", f"{built:.1f}", f"{loaded:.2f}"
        found = [scores for _, scores in ask(queries)]
        print(row(index.kind, found, truth, ask, queries, *rest), dict(index.settings))


if __name__ == "__main__":
    main()
