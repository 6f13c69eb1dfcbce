"""SimCSE and DPR on captions: clipkit beside sentence-transformers, same start, steps and batch.

    python tests/bench/bench_texts.py --data DIR [--steps 300] [--batch 64] [--seeds 0,1,2]

DIR holds flickr8k/ (default: $CLIPKIT_DATA). Each run is a process of its own, starts from the built-in
model's text tower, and trains it on the training photos' captions, of a batch one (or two) a photo:

    sentence-transformers   MultipleNegativesRankingLoss on (caption, the same caption)
    simcse                  clipkit's, its optimizer set as the other's (AdamW, cosine, no layer decay,
                            no L2-SP, no running mean)
    simcse-near             the same, with keep_space 1
    simcse-defaults         the same method as `clipkit train --method simcse` has it
    simcse-other            another caption of the photo as the positive
    passages                DPR with hard negatives by BM25

Last weights; nobody looks at the development split before the end. There each caption searches all
others for one of its own photo's, and captions and photos find each other: what the tower has forgotten.
The table has the median over the seeds, their spread (largest minus smallest), and for the first seed
the 95 % interval over photos and the paired difference from the start.

Needs `pip install clipkit[bench,passages]`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from trainer_runs import write_dataset

KS = (1, 5, 10)
LEVEL = {"layer_decay": 1.0, "drift": 0.0, "ema": 0.0, "warmup": 0.1, "beta2": 0.999}
LEVEL |= {"weight_decay": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "sentence-transformers": {},
    "simcse": {"method": "simcse", **LEVEL},
    "simcse-near": {"method": "simcse", "keep_space": 1.0, **LEVEL},
    "simcse-defaults": {"method": "simcse"},
    "simcse-other": {"method": "simcse", "captions": "other", **LEVEL},
    "passages": {"method": "passages", **LEVEL},
}


# --------------------------------------------------------------------------- children


def train_clipkit(settings: dict[str, Any]) -> None:
    from clipkit.training import TrainConfig, train

    out = Path(settings["out"])
    common = {k: settings[k] for k in ("data", "batch", "seed", "learning_rate")}
    common |= {"out": str(out.parent), "name": out.name, "recipe": "full", "device": "cpu"}
    common |= {"chunk": settings["batch"], "max_steps": settings["steps"], "epochs": 999}
    common |= {"tensorboard": False, "keep": "last"}
    train(TrainConfig.from_mapping({**common, **RUNS[settings["run"]]}))


def train_sentence_transformers(settings: dict[str, Any]) -> None:
    """The same tower in a module of its user's, dropout as in its configuration (0.1)."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    import clipkit

    encoder = clipkit.load("builtin", device="cpu", precision="float32")

    class Tower(InputModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.text = encoder.model.text.requires_grad_(True)

        def preprocess(self, inputs: Sequence[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": encoder.tokenize(list(inputs))}

        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            features["sentence_embedding"] = self.text(features["input_ids"])
            return features

        def save(self, *_: Any, **__: Any) -> None: ...

    lines = (Path(settings["data"]) / "train" / "metadata.jsonl").read_text().splitlines()
    rng = random.Random(settings["seed"])
    texts: list[str] = []
    while len(texts) < settings["steps"] * settings["batch"]:  # one caption a photo, as clipkit's
        photos = [rng.choice(json.loads(line)["captions"]) for line in lines]
        rng.shuffle(photos)
        texts += photos[: len(photos) // settings["batch"] * settings["batch"]]
    texts = texts[: settings["steps"] * settings["batch"]]
    model = SentenceTransformer(modules=[Tower()], device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=settings["out"] + "-trainer",
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["learning_rate"],
        weight_decay=LEVEL["weight_decay"],
        adam_beta2=LEVEL["beta2"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(LEVEL["warmup"] * settings["steps"])),
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings["seed"],
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts}),
        loss=MultipleNegativesRankingLoss(model, scale=20.0),
    ).train()
    with torch.no_grad():
        encoder.model.eval()
    encoder.save(Path(settings["out"]) / "checkpoint")


# --------------------------------------------------------------------------- measuring


Hits = dict[str, npt.NDArray[np.float64]]


def measure(folder: str, captions: Sequence[str], owner: npt.NDArray[Any], photos: Any) -> Hits:
    """Of each caption, whether it finds another one of its photo, and its photo; of each photo,
    whether it finds one of its captions."""
    import clipkit
    from clipkit.metrics import rank_captions

    texts = clipkit.load(folder, device="cpu", precision="float32").encode_texts(list(captions))
    scores = texts @ texts.T
    np.fill_diagonal(scores, -np.inf)
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, : max(KS)]
    own = owner[nearest] == owner[:, None]
    hits = {f"text-text R@{k}": own[:, :k].any(1).astype(float) for k in KS}
    to_image, to_text = rank_captions(photos, texts, owner)
    hits |= {f"text-image R@{k}": to_image.hit_at(k) for k in KS}
    return hits | {f"image-text R@{k}": to_text.hit_at(k) for k in KS}


def table(
    hits: dict[str, list[Hits]], seconds: dict[str, list[float]], owner: Any
) -> Iterator[str]:
    from clipkit.metrics import mean_interval, paired_test

    names = list(hits["start"][0])
    yield f"| run | seeds | s | {' | '.join(names)} |"
    yield "|---" * (len(names) + 3) + "|"
    for run, results in hits.items():
        cells = []
        for name in names:
            values = [100 * float(r[name].mean()) for r in results]
            groups = owner if len(results[0][name]) == len(owner) else None
            interval = mean_interval(results[0][name], groups=groups)
            cell = f"{statistics.median(values):.1f} ±{max(values) - min(values):.1f} "
            cell += f"({100 * interval.low:.1f}-{100 * interval.high:.1f})"
            if run != "start":
                test = paired_test(hits["start"][0][name], results[0][name], groups=groups)
                cell += f" {100 * test.difference:+.1f} p {test.p_value:.2g}"
            cells.append(cell)
        took = f"{statistics.median(seconds[run]):.0f}" if run in seconds else ""
        yield f"| {run} | {len(results)} | {took} | {' | '.join(cells)} |"


def bench(args: argparse.Namespace, out: Path) -> str:
    from PIL import Image

    from clipkit import load

    flickr = (args.data / "flickr8k").resolve()
    rows = [json.loads(line) for line in (flickr / "train.jsonl").read_text().splitlines()]
    pictures = [(str(flickr / row["image"]), row["captions"]) for row in rows]
    write_dataset(out / "dataset", pictures[: args.pictures or None])
    dev = [json.loads(line) for line in (flickr / "dev.jsonl").read_text().splitlines()]
    dev = dev[: args.dev_pictures or None]
    captions = [caption for row in dev for caption in row["captions"]]
    owner = np.repeat(np.arange(len(dev)), [len(row["captions"]) for row in dev])
    encoder = load("builtin", device="cpu", precision="float32")
    photos = np.concatenate(
        [
            encoder.encode_images([Image.open(flickr / row["image"]) for row in dev[at : at + 64]])
            for at in range(0, len(dev), 64)
        ]
    )
    hits = {"start": [measure("builtin", captions, owner, photos)]}
    seconds: dict[str, list[float]] = {}
    for run in args.runs:
        for seed in args.seeds:
            folder = out / f"{run}-{seed}"
            settings = {"run": run, "out": str(folder), "seed": seed, "data": str(out / "dataset")}
            settings |= {k: getattr(args, k) for k in ("steps", "batch", "learning_rate")}
            file = out / f"{run}-{seed}.json"
            file.write_text(json.dumps(settings))
            began = time.monotonic()
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, str(Path(__file__).resolve()), "--child", str(file)]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds.setdefault(run, []).append(time.monotonic() - began)
            hits.setdefault(run, []).append(
                measure(str(folder / "checkpoint"), captions, owner, photos)
            )
            print("\n".join(table(hits, seconds, owner)), flush=True)
    title = (
        f"{args.steps} steps of {args.batch}, rate {args.learning_rate:g}; {len(captions)} captions of "
        f"{len(dev)} photos; percent, median ± spread over seeds (95 % interval), difference from start:"
    )
    return "\n".join(["", title, "", *table(hits, seconds, owner)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"), help="flickr8k/ in it")
    add("--runs", type=lambda text: text.split(","), default=list(RUNS))
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=64)
    add("--learning-rate", type=float, default=3e-5)
    add("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    add("--pictures", type=int, default=0, help="only so many to train on (0: all)")
    add("--dev-pictures", type=int, default=0, help="only so many to measure on (0: all)")
    add("--out", type=Path, help="a new folder to keep everything in")
    add("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        settings = json.loads(args.child.read_text())
        other = settings["run"] == "sentence-transformers"
        (train_sentence_transformers if other else train_clipkit)(settings)
        return
    if args.data is None or not (Path(args.data) / "flickr8k" / "train.jsonl").is_file():
        parser.error("name the folder that has flickr8k/train.jsonl: --data DIR, or CLIPKIT_DATA")
    args.data = Path(args.data)
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"unknown runs {', '.join(sorted(unknown))}; use {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        report = bench(args, out)
        (out / "report.md").write_text(report + "\n", encoding="utf-8")
        print(report)


if __name__ == "__main__":
    main()
