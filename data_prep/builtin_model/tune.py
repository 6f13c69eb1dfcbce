"""Tune the towers by method `class_targets`, which `clipkit train` does not have; else it is the same.

    torchrun --nproc-per-node 2 -m data_prep.builtin_model.tune --config FILE --set data=DIR start=MODEL
    torchrun --nproc-per-node 2 -m data_prep.builtin_model.tune --resume RUN

Ctrl-C ends a run after its step.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

from clipkit.errors import ClipkitError
from clipkit.training import Progress, TrainConfig, resume, train
from clipkit.training.registry import METHODS
from data_prep.builtin_model.class_targets import ENTRY


def parsed(option: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is as in a TOML file, or a text without quotes."""
    name, _, value = option.partition("=")
    try:
        return name, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name, value


def show(progress: Progress) -> None:
    loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
    left = "" if progress.eta_seconds is None else f", {progress.eta_seconds / 60:.0f} min left"
    print(f"{progress.phase} {progress.done} of {progress.total}{loss}{left}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other options")
    run.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    METHODS["class_targets"] = ENTRY
    try:
        if args.resume:
            summary = resume(args.resume, on_progress=show, stop=stop)
        else:
            config = TrainConfig.from_toml(args.config, dict(map(parsed, args.set)))
            summary = train(config, on_progress=show, stop=stop)
    except ClipkitError as error:
        sys.exit(f"error: {error}")
    sys.exit(f"stopped; go on with --resume {summary.folder}" if summary.stopped else 0)


if __name__ == "__main__":
    main()
