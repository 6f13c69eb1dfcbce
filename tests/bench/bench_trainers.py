"""clipkit, sentence-transformers and open_clip_train: the same towers, pictures and wall time.

    python tests/bench/bench_trainers.py --data DIR --minutes 20 [--recipe heads] [--out FOLDER]

DIR holds flickr8k/ (default: $CLIPKIT_DATA). Each run is a process of its own with --threads threads
and --workers decoders, starts from one checkpoint (the public towers, random heads) and has --minutes
from its start to its end, loading, caching and saving included. As a user would, each is first timed
for a few steps; then its number of steps is set so that its cosine ends within the time. Nobody looks
at the development split before the end: last weights, no early stopping, no mixing with the start.

Recipe full trains the last 3 image stages, the last 4 text layers and the heads; heads, these alone.
All: AdamW, weight decay on matrices, warm-up and clipping as clipkit's, one of a picture's five
captions at a time, crops of half to all of it. What they cannot express is printed below the table.

Needs `pip install clipkit[builtin-recipe,bench]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_runs import (
    WORDS,
    Bench,
    child_command,
    open_clip_checkpoint,
    open_clip_command,
    write_dataset,
    write_start,
)

STEP = re.compile(r"^step \d+|Train Epoch: \d+ \[")  # a line for each step
SPARE = 0.03  # of the time, in case later steps are slower than the first
KS = (1, 5, 10)
METRICS = [f"{way}/R@{k}" for way in ("text_to_image", "image_to_text") for k in KS]

# clipkit's options by recipe. The others get the same where they can express them.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {
        "learning_rate": 1.5e-4,
        "text_rate": 1 / 3,
        "head_rate": 2.0,
        "layer_decay": 1.0,
        "train_image_layers": 3,
        "train_text_layers": 4,
    },
    "heads": {},
}
NOTES = {
    "sentence-transformers": (
        "the temperature is a constant of the loss, not learned; everything else is expressible in "
        "the module, transform and freezing that its user writes (trainer_runs.py), but each step "
        "computes the frozen layers again"
    ),
    "open_clip_train": (
        "one learning rate for all; recipe full trains all of the text tower "
        "(--lock-text-unlocked-layers fails for BERT: KeyError 'layer_attr'); no frozen batch norms "
        "(--lock-image-freeze-bn-stats replaces timm's norm-and-activation layers by norms alone, "
        "which breaks the tower), so batch "
        "statistics are used, in locked stages too; the text tower's dropout acts; no flips; crops "
        "are shaped around the square, not the picture; a batch may hold a picture twice; captions "
        f"are padded to {WORDS} tokens; each step computes the frozen layers again"
    ),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """What a run took: seconds from start to end, when each step ended, and the peak memory of its
    largest process (decoding workers, which only the others have, are not added)."""

    seconds: float
    stamps: tuple[float, ...]
    peak: int

    @property
    def per_step(self) -> float:
        """The median; the first step, which warms up, counts only where there is no other."""
        ends = [0.0, *self.stamps] if len(self.stamps) == 1 else list(self.stamps)
        return statistics.median(b - a for a, b in itertools.pairwise(ends))

    @property
    def fixed(self) -> float:
        """Seconds that do not grow with the number of steps."""
        return max(0.0, self.seconds - len(self.stamps) * self.per_step)


def fitted_steps(budget: float, timing: Timing) -> int:
    """How many steps end within `budget` seconds, with a little to spare; at least one."""
    return max(1, int((budget * (1 - SPARE) - timing.fixed) / timing.per_step))


# --------------------------------------------------------------------------- running


def timed(command: Sequence[str], log: Path, threads: int) -> Timing:
    """Run to the end; what it says goes into `log`, of which a failure shows the tail."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}  # its threads do not survive a fork
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    stamps: list[float] = []
    assert process.stdout is not None
    with process.stdout, log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            if STEP.search(line):
                stamps.append(time.monotonic() - began)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not stamps:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-30:])
        sys.exit(f"{tail}\nfailed with {process.returncode}: {' '.join(command)}")
    return Timing(seconds, tuple(stamps), usage.ru_maxrss * 1024)


@dataclass(frozen=True, slots=True)
class Run:
    """A trainer, perhaps with one of several learning rates."""

    trainer: str
    rate: float | None = None

    @property
    def name(self) -> str:
        return self.trainer if self.rate is None else f"{self.trainer}, lr {self.rate:g}"

    def command(self, bench: Bench, out: Path, steps: int) -> list[str]:
        if self.rate is None:
            return child_command(self.trainer, bench, out, steps)
        return open_clip_command(bench, out, steps, self.rate)

    def train(
        self, bench: Bench, out: Path, *, budget: float, pilot: int, steps: int, threads: int
    ) -> tuple[Timing, Path]:
        """Pilot, unless `steps` are given, then the run; its figures and its checkpoint."""
        if not steps and bench.recipe == "heads" and self.trainer == "clipkit":
            steps = bench.heads_steps()
        if not steps:
            trial = out.with_name(f"{out.name}-pilot")
            trial.mkdir(parents=True)
            pilot_timing = timed(self.command(bench, trial, pilot), trial / "log.txt", threads)
            shutil.rmtree(trial)  # with whatever it has cached
            steps = fitted_steps(budget, pilot_timing)
            print(
                f"{self.name}: {pilot_timing.fixed:.1f} s and {pilot_timing.per_step:.2f} s a step, "
                f"so {steps} steps of {bench.batch}",
                flush=True,
            )
        out.mkdir(parents=True)
        command = self.command(bench, out, steps)
        (out / "command.json").write_text(json.dumps(command), encoding="utf-8")
        timing = timed(command, out / "log.txt", threads)
        print(f"{self.name}: {timing.seconds / 60:.1f} minutes", flush=True)
        if self.trainer == "open_clip_train":
            return timing, open_clip_checkpoint(bench, out)
        return timing, out / ("run/checkpoint" if self.trainer == "clipkit" else "checkpoint")


# --------------------------------------------------------------------------- telling


def measure(folder: Path, data: Path, *, limit: int | None) -> Any:
    """clipkit's own evaluation on the development split, in float32."""
    from clipkit.lazy_encoder import LazyEncoder
    from eval.data import open_captioned
    from eval.retrieval import evaluate_retrieval

    encoder = LazyEncoder(str(folder), device="cpu", precision="float32")
    file = str(data / "flickr8k" / "dev.jsonl")
    return evaluate_retrieval(encoder, open_captioned(file, limit=limit))


def table(timings: Mapping[str, Timing], reports: Mapping[str, Any], batch: int) -> Iterator[str]:
    ways = [f"{'T2I' if m.startswith('text') else 'I2T'} {m.split('/')[1]}" for m in METRICS]
    heads = ["trainer", "pairs/s", "steps", "batch", "peak MB", "minutes", *ways]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, report in reports.items():
        cells = ["", "", "", "", ""]
        if timing := timings.get(name):
            cells = [f"{batch / timing.per_step:.1f}", str(len(timing.stamps)), str(batch)]
            cells += [f"{timing.peak / 1e6:,.0f}", f"{timing.seconds / 60:.1f}"]
        for metric in METRICS:
            value = report.metrics[metric]
            cells.append(f"{100 * value.value:.1f} ({100 * value.low:.1f}-{100 * value.high:.1f})")
        yield f"| {' | '.join([name, *cells])} |"


def comparisons(reports: Mapping[str, Any]) -> Iterator[str]:
    """clipkit against each, the same pictures: difference, 95 % interval, p."""
    from clipkit.metrics import paired_test

    if "clipkit" not in reports:
        return
    yield "| clipkit minus | " + " | ".join(METRICS) + " |"
    yield "|---" * (len(METRICS) + 1) + "|"
    for name, report in reports.items():
        if name != "clipkit":
            tests = [paired_test(report.samples[m], reports["clipkit"].samples[m]) for m in METRICS]
            cells = [
                f"{100 * t.difference:+.1f} ({100 * t.low:+.1f} to {100 * t.high:+.1f}), "
                f"p {t.p_value:.3g}"
                for t in tests
            ]
            yield f"| {' | '.join([name, *cells])} |"


def bench_all(args: argparse.Namespace, out: Path) -> str:
    """All runs, then all measurements; the report in Markdown."""
    lines = (args.data / "flickr8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: args.pictures or None]
    folder = (args.data / "flickr8k").resolve()
    pictures = [(str(folder / row["image"]), row["captions"]) for row in rows]
    bench = Bench(
        scratch=out,
        pictures=pictures,
        options={**OPTIONS[args.recipe], **dict(args.clipkit)},
        **{k: getattr(args, k) for k in ("recipe", "batch", "chunk", "accum_freq", "workers")},
        **{k: getattr(args, k) for k in ("scale", "seed", "flags")},
    )
    write_start(bench.start, seed=args.seed)
    write_dataset(out / "dataset", pictures)
    (out / "pictures.json").write_text(json.dumps(pictures), encoding="utf-8")
    rates = args.learning_rates or [bench.config(out, 1).learning_rate]
    runs = [Run(trainer) for trainer in args.trainers if trainer != "open_clip_train"]
    if "open_clip_train" in args.trainers:
        runs += [Run("open_clip_train", rate) for rate in rates]
    timings: dict[str, Timing] = {}
    checkpoints = {"start": bench.start}
    for number, run in enumerate(runs):
        timings[run.name], checkpoints[run.name] = run.train(
            bench,
            out / f"{number}-{run.trainer}",
            budget=60 * args.minutes,
            pilot=args.pilot_steps,
            steps=dict(args.steps).get(run.trainer, 0),
            threads=args.threads,
        )
    reports = {
        name: measure(folder, args.data, limit=args.dev_pictures or None)
        for name, folder in checkpoints.items()
    }
    title = (
        f"Recipe {args.recipe}, {len(pictures)} training pictures, {args.minutes:g} minutes, "
        f"{args.threads} threads; in percent, 95 % intervals over the {reports['start'].n['pictures']} "
        "pictures of the development split:"
    )
    notes = [f"- {name}: {NOTES[name]}." for name in args.trainers if name in NOTES]
    parts = [[title], table(timings, reports, args.batch), comparisons(reports), notes]
    return "\n\n".join(filter(None, ("\n".join(part) for part in parts)))


def main() -> None:
    def setting(text: str) -> tuple[str, Any]:
        key, _, value = text.partition("=")
        try:
            return key, json.loads(value)
        except ValueError:
            return key, value

    trainers = ["clipkit", "sentence-transformers", "open_clip_train"]
    cores = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"), help="flickr8k/ in it")
    add("--minutes", type=float, default=20.0, help="for each, from its start to its end")
    add("--recipe", choices=tuple(OPTIONS), default="full")
    add("--trainers", type=lambda text: text.split(","), default=trainers)
    add("--batch", type=int, default=256)
    add("--chunk", type=int, default=32, help="pairs in memory at a time, with cached gradients")
    add("--accum-freq", type=int, default=1, help="open_clip_train's; 1 is its fastest")
    add("--scale", type=float, default=20.0, help="sentence-transformers' constant 1/temperature")
    add(
        "--learning-rates",
        type=lambda text: [float(part) for part in text.split(",")],
        help="open_clip_train's, a run for each (default: clipkit's learning_rate)",
    )
    add("--flags", type=shlex.split, default=[], help="more of open_clip_train's, in one string")
    add("--clipkit", type=setting, action="append", default=[], metavar="KEY=VALUE")
    add("--steps", type=setting, action="append", default=[], metavar="TRAINER=N")
    add("--pilot-steps", type=int, default=5)
    add("--pictures", type=int, default=0, help="only so many to train on (0: all)")
    add("--dev-pictures", type=int, default=0, help="only so many to measure on (0: all)")
    add("--threads", type=int, default=cores)
    add("--workers", type=int, default=2, help="decoders: clipkit's threads, others' processes")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="a new folder to keep everything in")
    args = parser.parse_args()
    if args.data is None:
        parser.error("name the data: --data DIR, or CLIPKIT_DATA")
    if not (args.data / "flickr8k" / "train.jsonl").is_file():
        parser.error(f"{args.data} has no flickr8k/train.jsonl; name the folder that has it")
    if unknown := set(args.trainers) - set(trainers):
        parser.error(f"unknown trainers {', '.join(sorted(unknown))}; use {', '.join(trainers)}")
    if args.out and args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        report = bench_all(args, out)
        (out / "report.md").write_text(report + "\n", encoding="utf-8")
        print(f"\n{report}")


if __name__ == "__main__":
    main()
