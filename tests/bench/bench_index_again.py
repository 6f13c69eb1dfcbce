"""Measure an index run that finds nothing new. The real command, on real files, twice.

    python tests/bench/bench_index_again.py [--pictures 200000] [--model builtin] [--keep FOLDER]

The pictures are small JPEGs (64 x 64 pixels, 1,000 to a folder, all different): pieces of the sample
gallery's drawings under smooth noise. The first run encodes all of them into a new index, the next two
look for changes. Goal: each of these under 2 % of the first one's time, and under 500 MB at its peak.

Time is the whole command's, from its start to its end; ratios of CPU time say more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import gallery

SIDE = 64
RUNS = ("first run", "nothing new", "once more")


def make_pictures(folder: Path, *, count: int, seed: int) -> None:
    """`count` JPEGs; those that are there already are kept."""
    drawings = []
    for path in sorted(gallery.folder().glob("*/*.png"))[:64]:
        with Image.open(path) as drawing:
            page = Image.new("RGBA", drawing.size, "white")
            page.alpha_composite(drawing.convert("RGBA"))
        drawings.append(page.convert("RGB").resize((4 * SIDE, 4 * SIDE)))
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        left, top = rng.integers(3 * SIDE, size=2).tolist()
        piece = drawings[number % len(drawings)].crop((left, top, left + SIDE, top + SIDE))
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        Image.blend(piece, noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), 0.4).save(path)


def run_index(folder: Path, index: Path, model: str) -> tuple[dict[str, int], float, float, float]:
    """The command's own result, its seconds, its seconds of CPU, and its peak memory in MB.

    ru_maxrss begins with the parent's peak, which is why this file imports neither torch nor clipkit.
    """
    command = [sys.executable, "-m", "app.cli", "index", str(folder), "--index", str(index)]
    command += ["--model", model, "--quiet", "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    cpu = usage.ru_utime + usage.ru_stime
    return json.loads(answer), seconds, cpu, usage.ru_maxrss * unit / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--pictures", type=int, default=200_000)
    options.add_argument("--model", default="builtin")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path, help="folder to make the pictures in, and keep them")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "pictures"
        make_pictures(folder, count=given.pictures, seed=given.seed)
        print(f"{given.pictures:,} JPEGs, {given.model}, {os.cpu_count()} cores")
        print(f"{'':<12} {'seconds':>9} {'':>8} {'of CPU':>9} {'':>8} {'peak MB':>8}")
        first = None
        for title in RUNS:
            result, *costs, peak = run_index(folder, Path(scratch) / "index", given.model)
            seen = result["unchanged"] if first else result["added"] + result["duplicates"]
            if seen != given.pictures or result["skipped"]:
                sys.exit(f"{title}: {seen} of {given.pictures} files, {result}")
            first = first or costs
            cells = [f"{a:9.2f} {a / b:8.2%}" for a, b in zip(costs, first, strict=True)]
            print(f"{title:<12} {' '.join(cells)} {peak:8.0f}", flush=True)


if __name__ == "__main__":
    main()
