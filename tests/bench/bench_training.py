"""What big batches cost: peak memory and time per picture with gradient caching, beside plain training.

    python tests/bench/bench_training.py [--model builtin] [--batches 64,1024,4096] [--chunk 32]
                                         [--repeats 1]

Each line is a process of its own that makes one optimizer step of recipe full on JPEGs of the
tower's size, decoding and augmentation included: "plain" is a batch in one chunk, without caching;
the others go in chunks. Peak memory is the process's highest resident set; pictures per second are
of the step alone (the second one, where there are several). The ratios are to plain.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_indexing import save_vit_b_32
from PIL import Image


def write_dataset(folder: Path, pictures: int, side: int) -> None:
    """Smooth random JPEGs, each with a caption of eight words."""
    rng = np.random.default_rng(0)
    words = "a photo of the red green blue car dog cat tree house boat beach child".split()
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "metadata.jsonl").open("w") as file:
        for i in range(pictures):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            picture.save(folder / "train" / f"{i}.jpg", quality=90)
            caption = f"{i} {' '.join(rng.choice(words, 8))}"
            line = {"file_name": f"{i}.jpg", "image_id": f"{i:032x}", "captions": [caption]}
            file.write(json.dumps(line) + "\n")


def one(dataset: Path, model: str, batch: int, chunk: int, steps: int) -> None:
    """In a process of its own: print seconds a step and peak bytes as JSON."""
    from clipkit.training import Progress, TrainConfig, train

    ended: list[float] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "training":
            ended.append(time.monotonic())

    options = {"data": str(dataset), "start": model, "recipe": "full", "epochs": 99}
    options |= {"batch": batch, "chunk": chunk, "max_steps": steps, "tensorboard": False}
    with tempfile.TemporaryDirectory() as out:
        train(TrainConfig.from_mapping({**options, "out": out}), on_progress=watch)
        lines = [json.loads(line) for line in next(Path(out).glob("*/metrics.jsonl")).open()]
    rates = [line["pictures_per_second"] for line in lines if "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rates": rates, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin", help="a spec, or random-vit-b-32")
    parser.add_argument("--batches", default="64,1024,4096")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        dataset, model, batch, chunk, steps = args.one
        one(Path(dataset), model, int(batch), int(chunk), int(steps))
        return
    batches = [int(part) for part in args.batches.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        dataset, model = Path(scratch) / "dataset", args.model
        if model == "random-vit-b-32":
            model = str(save_vit_b_32(Path(scratch) / "vit", seed=0))
        write_dataset(dataset, max(batches), 224)
        print(f"{args.model}, chunk {args.chunk}, {args.repeats} processes each")
        print(f"{'batch':>14} {'pictures/s':>22} {'peak MB':>9} {'time':>6} {'memory':>7}")
        plain: tuple[float, float] | None = None
        for batch, chunk in [(batches[0], batches[0]), *((b, args.chunk) for b in batches)]:
            rates, peaks = [], []
            for _ in range(args.repeats):
                steps = max(1, min(3, 1024 // batch))
                command = [sys.executable, __file__, "--one", str(dataset), model]
                command += [str(batch), str(chunk), str(steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                rates += figures["rates"][1:] or figures["rates"]
                peaks.append(figures["peak"])
            rate, peak = statistics.median(rates), max(peaks)
            plain = plain or (rate, peak)
            name = f"plain {batch}" if chunk == batch else f"{batch:,}"
            spread = f"{rate:.1f} ({min(rates):.1f}-{max(rates):.1f}, n {len(rates)})"
            slower, larger = plain[0] / rate, peak / plain[1]
            print(f"{name:>14} {spread:>22} {peak / 1e6:>9,.0f} {slower:>6.2f} {larger:>7.2f}")


if __name__ == "__main__":
    main()
