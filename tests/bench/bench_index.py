"""A snapshot beside Faiss's IndexFlatIP and beside fp16 codes that are loaded whole; kinds in memory.

    python tests/bench/bench_index.py --n 1000000
    python tests/bench/bench_index.py --vectors rows.npy [--texts dev.jsonl] [--kinds exact rabitq]

Vectors are seeded and clustered, or unit rows float16 of a .npy file. Queries are half near a picture,
half far from all as words are, or, with --texts, captions ("captions" of each line) by the built-in
text tower, to whose vectors the file must belong.
Each way is built in a process of its own (seconds, peak MB) and opened in another (seconds from a warm
disk cache; MB after all searches, with and without pages of files; one thread, p50 and p95 of one query,
k = 10). Recall is tie-aware and against IndexFlatIP. --kinds adds the kinds of an index in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from clipkit.catalog.rows import StoredVectors
from clipkit.index import KINDS, Snapshot, VectorIndex
from clipkit.index.building import build_snapshot
from clipkit.picture_set import PictureSet

Floats = npt.NDArray[np.float32]
Ask = Callable[[Floats], object]
LINE = "{:<12}{:>10}{:>28}{:>11}{:>7}{:>9} "
WAYS = ("IndexFlatIP", "fp16 whole", "snapshot")
CHUNK = 16_384


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


# ---- each way in processes of its own


def chunks(path: Path) -> Iterator[npt.NDArray[np.float16]]:
    """Read the rows of a .npy file some at a time, without mapping it: pages would count as memory."""
    shape = np.load(path, mmap_mode="r").shape
    with path.open("rb") as file:
        file.seek(path.stat().st_size - 2 * shape[0] * shape[1])
        for start in range(0, shape[0], CHUNK):
            count = min(CHUNK, shape[0] - start)
            yield np.fromfile(file, np.float16, count * shape[1]).reshape(count, -1)


def build(way: str, rows: Path, folder: Path) -> None:
    """Build one way of searching below `folder`."""
    size, dim = np.load(rows, mmap_mode="r").shape
    if way == "snapshot":
        numbered = ((i * CHUNK, chunk) for i, chunk in enumerate(chunks(rows)))
        stored = (StoredVectors(np.arange(at, at + len(c)), c, size) for at, c in numbered)
        build_snapshot(folder / way, stored, encoder_id="bench", dim=dim, total=size)
        return
    index: Any = faiss.IndexFlatIP(dim)
    if way == "fp16 whole":
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
    for chunk in chunks(rows):
        index.add(chunk.astype(np.float32))
    faiss.write_index(index, str(folder / way))


def search(way: str, folder: Path, queries: Floats) -> dict[str, Any]:
    """Open one way and search; return figures, and the scores that were found."""
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    if way == "snapshot":
        snapshot = Snapshot.open(folder / way)

        def ask(query: Floats, k: int, only: npt.NDArray[np.bool_] | None = None) -> Floats:
            allowed = None if only is None else PictureSet.of_mask(only)
            return snapshot.search(query, k, allowed=allowed)[0][1]

        size = snapshot.size
    else:
        if way == "fp16 whole":  # as clipkit did: every byte is checked before it is used
            with (folder / way).open("rb") as file:
                hashlib.file_digest(file, "sha256")
        index = faiss.read_index(str(folder / way))

        def ask(query: Floats, k: int, only: npt.NDArray[np.bool_] | None = None) -> Floats:
            params = None
            if only is not None:
                selector = faiss.IDSelectorBitmap(np.packbits(only, bitorder="little"))
                params = faiss.SearchParameters(sel=selector)
            scores: Floats = index.search(query, k, params=params)[0][0]
            return scores[scores > -2]

        size = index.ntotal
    opened = time.perf_counter() - started
    first = seconds(ask, queries[:1], 10)
    for query in queries[:10]:
        ask(query[None], 10)
    result: dict[str, Any] = {"open": opened, "first": 1e3 * first, "searches": {}}
    result["memory"] = memory()  # of an opened index after a few searches
    shares = [(k, None) for k in (10, 100, 1000, 10_000)]
    shares += [(10, share) for share in (0.5, 0.1, 0.01, 0.001)]
    for k, share in shares:
        some = queries if (k, share) == (10, None) else queries[:: max(1, len(queries) // 40)]
        only = None if share is None else np.random.default_rng(7).random(size) < share
        found, taken = [], []
        for query in some:
            began = time.perf_counter()
            found.append(ask(query[None], min(k, size), only).tolist())
            taken.append(1e3 * (time.perf_counter() - began))
        name = f"k={k}" if share is None else f"filter {share:.1%}"
        result["searches"][name] = (found, float(np.median(taken)), float(np.percentile(taken, 95)))
    result["memory_after"] = memory()
    return result


def kilobytes() -> dict[str, int]:
    """Return what the system says about this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.endswith("kB")}


def memory() -> tuple[int, int]:
    """Return the megabytes that this process holds, and those of them that are no pages of files."""
    kb = kilobytes()
    return kb["VmRSS"] // 1000, kb["RssAnon"] // 1000


def child(*arguments: object) -> dict[str, Any]:
    """Run a part of this benchmark in a process of its own; return what it prints."""
    command = [sys.executable, __file__, "--part", *map(str, arguments)]
    answer: dict[str, Any] = json.loads(subprocess.check_output(command))
    return answer


def part(what: str, way: str, rows: str, folder: str) -> None:
    """Do one part and print its figures as JSON."""
    if what == "search":
        print(json.dumps(search(way, Path(folder), np.load(Path(folder) / "queries.npy"))))
        return
    started = time.perf_counter()
    build(way, Path(rows), Path(folder))
    taken = time.perf_counter() - started
    peak = kilobytes()["VmHWM"] // 1000  # not getrusage's, which begins with the parent's
    files = Path(folder, way)
    size = sum(f.stat().st_size for f in (files.iterdir() if files.is_dir() else [files]))
    print(json.dumps({"build": taken, "peak": peak, "disk": size / 1e6}))


def compare(rows: Path, queries: Floats, folder: Path) -> None:
    """Print a table of every way, and one of its searches."""
    np.save(folder / "queries.npy", queries)
    results = {}
    for way in WAYS:
        results[way] = child("build", way, rows, folder) | child("search", way, rows, folder)
    print("| | build s | peak MB | disk MB | open s | first ms | MB open | MB after (of files) |")
    print("|---|---|---|---|---|---|---|---|")
    for way, r in results.items():
        held = " | ".join(
            f"{all_} ({all_ - own})" for all_, own in (r["memory"], r["memory_after"])
        )
        figures = [f"{r['build']:.1f}", r["peak"], f"{r['disk']:.0f}", f"{r['open']:.2f}"]
        print("|", way, "|", *(f"{each} |" for each in figures), f"{r['first']:.0f} | {held} |")
    print("\n| search: p50 / p95 ms, recall |", " | ".join(WAYS), "|")
    print("|---|" + "---|" * len(WAYS))
    for name, (truth, _, _) in results["IndexFlatIP"]["searches"].items():
        cells = []
        for way in WAYS:
            found, p50, p95 = results[way]["searches"][name]
            pairs = [(np.array(f), np.array(t)) for f, t in zip(found, truth, strict=True)]
            recall = np.mean([np.sum(f >= t[-1] - 1e-5) / len(t) for f, t in pairs if len(t)])
            cells.append(f"{p50:.1f} / {p95:.1f}, {min(recall, 1):.4f}")
        print(f"| {name} |", " | ".join(cells), "|")


def encoded(path: Path, count: int) -> Floats:
    """Encode captions of a JSON-lines file with the built-in text tower."""
    import clipkit

    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    texts = [line["captions"][0] for line in lines if line.get("captions")]
    vectors: Floats = clipkit.load("builtin").encode_texts(texts[:: max(1, len(texts) // count)])
    return vectors[:count]


def main() -> None:
    """Build, measure and print one row per way, and one per kind that is named."""
    if sys.argv[1:2] == ["--part"]:
        part(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vectors", type=Path, help="a .npy file of float16 unit rows")
    parser.add_argument("--texts", type=Path, help="JSON lines with captions, for queries")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(KINDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.vectors
        if path is None:
            path = Path(folder) / "rows.npy"
            np.save(path, clustered(arguments.n, arguments.dim))
        rows = np.load(path, mmap_mode="r")
        if arguments.texts is None:
            queries = make_queries(rows, arguments.queries)
        else:
            queries = encoded(arguments.texts, arguments.queries)
        print(f"{rows.shape[0]} x {rows.shape[1]}, {len(queries)} queries\n")
        compare(path, queries, Path(folder))
        if arguments.kinds:
            print()
            in_memory(rows, queries, arguments.kinds)


def in_memory(rows: npt.NDArray[np.float16], queries: Floats, kinds: list[str]) -> None:
    """Print one row per kind of index in memory."""
    cores = faiss.omp_get_max_threads()
    print(LINE.format("kind", "recall@10", "p50 (spread) p95 ms", "batch q/s", "MB", "build s"))
    flat = faiss.IndexFlatIP(rows.shape[1])
    built = seconds(flat.add, rows.astype(np.float32))

    def ask_flat(queries: Floats) -> Floats:
        faiss.omp_set_num_threads(1 if len(queries) == 1 else cores)
        scores: Floats = flat.search(queries, 10)[0]
        return scores

    truth, mb = ask_flat(queries), f"{rows.nbytes * 2 / 1e6:.0f}"
    print(row("IndexFlatIP", list(truth), truth, ask_flat, queries, mb, f"{built:.1f}"))
    faiss.omp_set_num_threads(cores)
    for kind in kinds:
        started = time.perf_counter()
        index = VectorIndex.build(np.arange(len(rows)), rows, kind=kind)
        built = time.perf_counter() - started
        ask = partial(index.search, k=10)
        rest = f"{index.measured.bytes / 1e6:.0f}", f"{built:.1f}"
        found = [scores for _, scores in ask(queries)]
        print(row(index.kind, found, truth, ask, queries, *rest), dict(index.settings))


if __name__ == "__main__":
    main()
