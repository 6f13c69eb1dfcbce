"""A real folder, whole: indexing speed and memory, the second run, from words to hits, a cold search.

    python tests/bench/bench_library.py --pictures FOLDER [--model builtin] [--captions FILE]

Indexing and the cold search run as commands of their own, timed from start to exit, imports and model
included; the peak memory is the command's own (ru_maxrss). From words to hits is one process that has
loaded the model and the library, as the app has: parse, text tower, search and rows of 24 hits.

Queries are captions, each once: of FILE (JSON lines with `captions`), else of the sample gallery.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipkit import towers
from clipkit.catalog import Catalog
from clipkit.search import Searcher
from data_prep import gallery

CLI = [sys.executable, "-m", "app.cli"]
PROJECT = Path(__file__).parents[2]


def run(arguments: Sequence[str]) -> tuple[float, float]:
    """Run a clipkit command to its end: (seconds, peak memory in MB). Its errors end the benchmark."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*CLI, *arguments], cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(
                f"{' '.join(arguments)}: exit code {process.returncode}\n{output.read().decode()}"
            )
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return seconds, usage.ru_maxrss * unit / 1e6


def read_queries(captions: Path | None, *, count: int, seed: int) -> list[str]:
    listings = [captions] if captions else sorted(gallery.folder().glob("*/metadata.jsonl"))
    rows = [json.loads(line) for path in listings for line in path.read_text().splitlines()]
    distinct = sorted({_as_words(row["captions"][0]) for row in rows})
    return random.Random(seed).sample(distinct, min(count, len(distinct)))


def _as_words(caption: str) -> str:
    """A caption as a person would type it: without signs that the query language gives a meaning."""
    return " ".join(re.sub(r"[^\w' ]", " ", caption).split())


def words_to_hits(
    index: Path, spec: str, queries: Sequence[str]
) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of each query, and the median share of each part, in milliseconds."""
    encoder = towers.load(spec)
    with Catalog.open(index) as catalog:
        searcher = Searcher(catalog, encoder)
        for words in queries[:10]:
            searcher.search(words)
        total: list[float] = []
        parts: list[dict[str, float]] = []
        for words in queries:
            started = time.perf_counter()
            result = searcher.search(words, k=24)
            total.append((time.perf_counter() - started) * 1000)
            parts.append(dict(result.seconds))
            if not result.hits:
                sys.exit(f"no hits for {words!r}")
    return total, {name: statistics.median(p[name] for p in parts) * 1000 for name in parts[0]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--pictures", type=Path, required=True)
    options.add_argument("--model", default="builtin")
    options.add_argument("--captions", type=Path)
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    queries = read_queries(given.captions, count=given.queries, seed=given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        command = ["index", str(given.pictures.resolve()), "--index", str(index)]
        first, memory = run([*command, "--model", given.model])
        with Catalog.open(index) as catalog:
            stats = catalog.stats(catalog.encoders()[-1].encoder_id)
        second = sorted(run([*command, "--model", given.model])[0] for _ in range(3))
        cold = sorted(run(["search", words, "--index", str(index)])[0] for words in queries[:5])
        times, parts = words_to_hits(index, given.model, queries)
    rows = [
        ("pictures, files skipped", f"{stats.pictures:,}, {stats.skipped:,}"),
        ("first run", f"{first:.1f} s, {stats.pictures / first:.1f} pictures/s"),
        ("peak memory of the first run", f"{memory:,.0f} MB"),
        (
            "second run, nothing changed (of 3)",
            f"{second[1]:.2f} s ({second[0]:.2f}-{second[-1]:.2f}), {second[1] / first:.2%}",
        ),
        (
            f"words to hits, p50 / p95 (n = {len(times)})",
            f"{np.percentile(times, 50):.1f} / {np.percentile(times, 95):.1f} ms",
        ),
        ("  of which, p50", ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items()) + " ms"),
        ("cold `clipkit search` (of 5)", f"{cold[2]:.2f} s ({cold[0]:.2f}-{cold[-1]:.2f})"),
    ]
    print(f"model {given.model}, {os.cpu_count()} cores")
    for name, value in rows:
        print(f"{name:<40} {value}")


if __name__ == "__main__":
    main()
