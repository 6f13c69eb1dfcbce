"""lightly's SimCLR on the same pictures, network, views and steps as clipkit's, for a study to measure.

    clipkit train DATASET --config eval/recipes/cifar10_methods.toml --out RUNS
    python tests/bench/bench_simclr.py DATASET RUNS/lightly [--epochs 15 --precision bfloat16]
    clipkit eval probe --train DATASET/train --data DATASET/test --model RUNS/lightly

DATASET is what `clipkit data build` made. lightly's own parts are used as its SimCLR example for CIFAR
has them: SimCLRTransform (32 pixels, no blur), SimCLRProjectionHead, NTXentLoss. Start, batch,
temperature, optimizer, schedule and precision are those of the study's run, so that what differs is
the library. The result is a checkpoint folder. Needs `pip install clipkit[peers]`.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import clipkit
from clipkit.training.recipes import adamw, rate_factor

START, TEMPERATURE, WIDTH = "scratch:cifar-resnet10-w16", 0.2, 128


class Views(Dataset[Any]):
    """Two views of each picture below a folder."""

    def __init__(self, folder: Path, transform: SimCLRTransform) -> None:
        self._files = sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png"))
        self._transform = transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, at: int) -> Any:
        with Image.open(self._files[at]) as picture:
            return self._transform(picture.convert("RGB"))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    encoder = clipkit.load(START, device="cpu", precision="float32")
    tower = encoder.model.visual
    tower.train().requires_grad_(True)
    head = SimCLRProjectionHead(encoder.dim, encoder.dim, WIDTH)
    loss_of = NTXentLoss(temperature=TEMPERATURE)
    settings = encoder.config
    transform = SimCLRTransform(
        input_size=32, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0,
        normalize={"mean": list(settings.mean), "std": list(settings.std)},
    )  # fmt: skip
    loader = DataLoader(
        Views(args.dataset / "train", transform), batch_size=args.batch, shuffle=True,
        drop_last=True, num_workers=args.workers, persistent_workers=True,
    )  # fmt: skip
    named = {**dict(tower.named_parameters()), **dict(head.named_parameters(prefix="head"))}
    optimizer = adamw(
        [(name, p, args.rate) for name, p in named.items()], weight_decay=0.01, beta2=0.98
    )
    steps, step, began = args.epochs * len(loader), 0, time.perf_counter()
    half = args.precision == "bfloat16"
    for epoch in range(args.epochs):
        for first, second in loader:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_factor(step, steps, 0.1)
            pixels = torch.cat([first, second]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                features = tower(pixels)
            loss = loss_of(*head(features.float()).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
            optimizer.step()
            step += 1
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, {step / seconds:.2f} steps/s", flush=True
        )
    tower.eval()
    encoder.untrained = frozenset({"text"})
    encoder.save(args.out, provenance={"trained_by": "lightly's SimCLR"})
    print(f"{args.out}: {steps} steps in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
