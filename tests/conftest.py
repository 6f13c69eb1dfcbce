"""What several tests share: small random checkpoints and small pictures, made on the spot."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

# Nothing in the tests may reach a network, and what tries fails at once instead of retrying.
os.environ["HF_HUB_OFFLINE"] = "1"
# Side by side, the test processes share the cores; torch reads this when it is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Examples have no time limit: the tests must pass on a busy machine.
settings.register_profile("clipkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clipkit")

_VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_HF_TOKENS = {"hf_tokenizer_name": "a/tokenizer", "context_length": 16}

# One of each family: OpenCLIP's ViT (both activations) and ResNet, SigLIP's text tower (not causal,
# read at the last position, full-length padding), and timm with a Hugging Face text transformer.
TINY: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "vision_cfg": _VISION, "text_cfg": _TEXT},
    "vit-quickgelu": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": _VISION,
        "text_cfg": _TEXT,
    },
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": _TEXT,
    },
    "siglip": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": {
            **_HF_TOKENS,
            "vocab_size": 64,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
    "timm-hf": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_efficientnet",
            "timm_pool": "avg",
            "timm_proj": "mlp",
        },
        "text_cfg": {
            **_HF_TOKENS,
            "hf_model_name": "nobody/tiny-bert",
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "mlp",
        },
    },
}
PREPROCESS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit-quickgelu": {"interpolation": "bilinear", "resize_mode": "squash"},
    "resnet": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    "siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "timm-hf": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "longest", "fill_color": 255},
}
WORDS = "a photo of the red green blue cake car dog cat penguin guitar tree house boat".split()


def make_checkpoint(folder: Path, kind: str = "vit", *, seed: int = 0) -> Path:
    """Write a random OpenCLIP checkpoint folder without clipkit's own code."""
    import open_clip.model
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": TINY[kind], "preprocess_cfg": PREPROCESS[kind]}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    arguments = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY[kind].items()}
    custom_text = arguments.pop("custom_text", False)
    text = arguments["text_cfg"]
    if "hf_tokenizer_name" in text:
        _write_tokenizer(folder)
    if "hf_model_name" in text:
        _write_bert_config(folder)
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        custom_text = True
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
        model = model_class(**arguments)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _write_bert_config(folder: Path) -> None:
    from transformers import BertConfig

    BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(kind="vit", seed=0): the folder of a random checkpoint, made once a session."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str = "vit", *, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}")
            made[kind, seed] = make_checkpoint(folder, kind, seed=seed)
        return made[kind, seed]

    return make


@pytest.fixture
def noise_picture() -> Callable[..., Image.Image]:
    """noise_picture(width, height, seed=0): a smooth random RGB picture, unlike any other seed's."""

    def make(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def clipkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """clipkit("eval", ...): exit code, stdout and stderr of the command, run in this process, with
    caches and reports below tmp_path."""
    from app.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPKIT_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def noise_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `training_runs.write_noise`."""
    from training_runs import write_noise

    folder = tmp_path_factory.mktemp("dataset")
    write_noise(folder)
    return folder


@pytest.fixture(scope="session")
def small_towers(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]
) -> Path:
    """See `training_runs.write_small`."""
    from training_runs import write_small

    folder = tmp_path_factory.mktemp("small")
    write_small(tiny_checkpoint("timm-hf"), tiny_checkpoint("vit"), folder)
    return folder


@pytest.fixture
def options(noise_dataset: Path, tmp_path: Path, small_towers: Path) -> dict[str, Any]:
    """Of a short training run: 3 epochs of 2 batches of 6, in chunks of 4."""
    return {
        "data": noise_dataset,
        "out": tmp_path / "runs",
        "name": "run",
        "start": str(small_towers),
        "recipe": "full",
        "epochs": 3,
        "batch": 6,
        "chunk": 4,
        "learning_rate": 1e-3,
        "device": "cpu",
        "workers": 2,
        "patience": 0,
        "tensorboard": False,
    }
