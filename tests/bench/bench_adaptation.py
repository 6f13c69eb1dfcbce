"""Adapt the built-in image tower to drawings without their captions: does a search by words gain?

    python tests/bench/bench_adaptation.py --data DIR [--out FOLDER] [--methods simclr byol]
                                           [-- OPTIONS OF clipkit train]

DIR holds openclipart/ and flickr8k/ (default: $CLIPKIT_DATA). Each method sees the training drawings
as pictures alone; the text tower is frozen, and --keep-space holds the image tower to the vectors it
had. Measured before and after, in one comparison with intervals: the keywords of the drawings held
out (a tenth), and, for what was forgotten, the captions of Flickr8k's development photos. No figure
chooses anything: the last weights are measured.

OUT keeps dataset and runs: a second call computes only what is missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from commands import clipkit, write_lines

from data_prep.builtin_model.sources import read_art

# BYOL has no negatives, and its predictor is new: at the towers' rate it would hardly move.
METHODS: Mapping[str, tuple[str, ...]] = {
    "simclr": ("--temperature", "0.2"),
    "byol": ("--momentum", "0.99", "--learning-rate", "1e-4"),
}
COMMON = "--recipe full --keep-space 20 --keep last --no-interpolate --ema 0 --epochs 3 --batch 64"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"), help="openclipart/, flickr8k/")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--out", type=Path, default=Path("bench_adaptation"), help="where to work")
    add("options", nargs="*", help="more options of all runs, after --")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "openclipart" / "captions.jsonl").is_file():
        parser.error(f"{args.data} has no openclipart/captions.jsonl; name the folder that has it")
    data, out = Path(args.data).resolve(), args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    drawings = read_art(data, held_out=False)
    pictures = write_lines(out / "drawings.jsonl", ({"image": str(e.path)} for e in drawings))
    held_out = write_lines(
        out / "held-out.jsonl",
        ({"image": str(e.path), "tags": e.keywords} for e in read_art(data, held_out=True)),
    )
    photos = data / "flickr8k" / "dev.jsonl"
    if not (dataset := out / "dataset").is_dir():
        build = ("data", "build", pictures, "--out", str(dataset), "--uncaptioned", "keep")
        clipkit(*build, "--split", "train")
    for method in args.methods:
        run = out / "runs" / method
        if not (run / "summary.json").is_file():
            options = [*COMMON.split(), *METHODS[method], *args.options]
            where = ("--out", str(run.parent), "--name", method)
            clipkit("train", str(dataset), "--method", method, *options, *where)
    tests = {"drawings": (held_out, "--queries", "tags"), "photos": (str(photos),)}
    for test, what in tests.items():
        for name, model in {
            "before": "builtin",
            **{m: str(out / "runs" / m) for m in args.methods},
        }.items():
            report = out / f"{test}-{name}"
            if not report.is_dir():
                measure = ("eval", "retrieval", "--model", model, "--data", *what)
                clipkit(*measure, "-k", "1,5,10", "--out", str(report))
        for method in args.methods:
            reports = (str(out / f"{test}-before"), str(out / f"{test}-{method}"))
            clipkit(
                "eval",
                "compare",
                *reports,
                "--out",
                str(out / f"compare-{test}-{method}"),
                "--overwrite",
            )


if __name__ == "__main__":
    main()
