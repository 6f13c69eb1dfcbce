"""Short training runs on tiny towers: what several test files begin them with and read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training_data import write_split

from clipkit import checkpoint
from clipkit.training import RunSummary, TrainConfig, train

WORDS = "red green blue cake car dog cat penguin guitar tree house boat".split()


def write_noise(folder: Path) -> None:
    """14 training and 6 validation pictures of noise, two captions each, some of them equal."""

    def noise(width: int, height: int, seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("validation", 6)):
        captions = [[" ".join(rng.choice(WORDS, 2)) for _ in range(2)] for _ in range(count)]
        write_split(folder, captions, noise, split=split)


def write_colours(folder: Path) -> Path:
    """Twelve plain colours, each with a name of its own, to train on and to validate with."""
    hues = [tuple(int(v) for v in np.random.default_rng(i).integers(0, 256, 3)) for i in range(12)]

    def plain(width: int, height: int, seed: int) -> Image.Image:
        return Image.new("RGB", (width, height), hues[seed])

    for split in ("train", "validation"):
        write_split(folder, [[word] for word in WORDS], plain, split=split)
    return folder


def write_small(hugging_face: Path, vit: Path, folder: Path) -> None:
    """OpenCLIP's ViT of 32 pixels and a Hugging Face text tower, which has dropout: 60 thousand
    parameters, so that many states are written quickly."""
    import open_clip.model

    for path in hugging_face.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    model_cfg, preprocess_cfg = checkpoint.read_config(hugging_face)
    model_cfg["vision_cfg"] = checkpoint.read_config(vit)[0]["vision_cfg"]
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    text = {**model_cfg["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CustomTextCLIP(**{**model_cfg, "text_cfg": text})
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


def run(options: dict[str, Any], **changes: Any) -> RunSummary:
    return train(TrainConfig.from_mapping({**options, **changes}))


def weights(folder: Path | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return load_file(folder / "open_clip_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def altered(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of a checkpoint with other weights."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = weights(source)
    change(tensors)
    save_file(tensors, target / "open_clip_model.safetensors")
    return str(target)


def without_validation(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "train").symlink_to(source / "train")
    return target
