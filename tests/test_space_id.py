"""What a picture's vector depends on: `space_id`, which models with the same picture side share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_runs import altered, run, without_validation

from clipkit import checkpoint, towers
from clipkit.lazy_encoder import LazyEncoder

Checkpoint = Callable[..., Path]
Tensors = dict[str, Any]


def identity(spec: Path | str) -> checkpoint.Identity:
    known = checkpoint.identify(str(spec))
    assert known is not None
    return known


def shifted(name: str) -> Callable[[Tensors], None]:
    """Change one tensor by a little."""

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] + 0.01

    return change


@pytest.mark.parametrize(
    ("kind", "name", "same"),
    [
        ("vit", "visual.conv1.weight", False),
        ("vit", "visual.proj", False),
        ("vit", "text_projection", True),
        ("vit", "logit_scale", True),
        ("vit", "token_embedding.weight", True),
        ("siglip", "visual.trunk.norm.weight", False),
        ("siglip", "visual.head.proj.weight", False),
        ("siglip", "text.text_projection.weight", True),
        ("siglip", "logit_bias", True),
        ("timm-hf", "visual.trunk.conv_stem.weight", False),
        ("timm-hf", "visual.trunk.bn1.running_mean", False),
        ("timm-hf", "text.proj.0.weight", True),
    ],
)
def test_a_weight_belongs_to_the_space_if_a_picture_passes_it(
    kind: str, name: str, same: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The vectors of a picture say so themselves; `encoder_id` differs in any case."""
    before = tiny_checkpoint(kind)
    after = altered(before, tmp_path / "after", shifted(name))
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    old, new = (towers.load(str(spec), precision="float32") for spec in (before, after))
    vectors = [model.encode_images([picture]) for model in (old, new)]
    assert np.array_equal(*vectors) == same
    assert (identity(before).space_id == identity(after).space_id) == same
    assert identity(before).encoder_id != identity(after).encoder_id
    assert (old.space_id, new.space_id) == (identity(before).space_id, identity(after).space_id)


@pytest.mark.parametrize(
    ("kind", "part", "setting", "same"),
    [
        ("vit", "model_cfg", {"quick_gelu": True}, False),
        ("timm-hf", "model_cfg", {"quick_gelu": True}, True),  # of the text tower only
        ("siglip", "text_cfg", {"context_length": 8}, True),
        ("vit", "vision_cfg", {"head_width": 8}, False),
        ("vit", "preprocess_cfg", {"mean": [0.1] * 3}, False),
        ("vit", "preprocess_cfg", {"resize_mode": "squash"}, False),
    ],
)
def test_settings_of_the_picture_side_belong_to_the_space(
    kind: str,
    part: str,
    setting: dict[str, Any],
    same: bool,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    before = tiny_checkpoint(kind)
    shutil.copytree(before, tmp_path / "after")
    config = json.loads((before / "open_clip_config.json").read_text())
    (config if part in config else config["model_cfg"])[part] |= setting
    (tmp_path / "after" / "open_clip_config.json").write_text(json.dumps(config))
    one, other = identity(before), identity(tmp_path / "after")
    assert (one.space_id == other.space_id) == same
    assert one.encoder_id != other.encoder_id


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"recipe": "lit"}, True),
        ({"recipe": "heads", "image_rate": 0.0}, True),
        ({"recipe": "lora", "image_rate": 0.0}, True),
        ({"recipe": "full", "image_rate": 0.0}, True),
        ({"recipe": "heads"}, False),
        ({"recipe": "lora"}, False),
        ({"recipe": "full", "train_image_layers": 0}, False),  # all but the projection is locked
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_locked_image_tower_keeps_the_space(
    changes: dict[str, Any], same: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    """The trained texts are searched in the vectors that the start gave the pictures. (Without a
    validation split, which would choose the start where noise has nothing to teach.)"""
    data = without_validation(options["data"], tmp_path / "data")
    summary = run({**options, "data": data, "epochs": 1, "learning_rate": 1e-2, **changes})
    start = LazyEncoder(options["start"])
    result = identity(summary.folder)
    assert result.encoder_id == summary.encoder_id != start.encoder_id
    assert (result.space_id == start.space_id) == same
    told = json.loads((summary.folder / "checkpoint" / "clipkit.json").read_text())
    assert (told["encoder_id"], told["space_id"]) == result
    assert any("needs no new vectors" in note for note in summary.notes) == same


def test_the_builtin_space_is_known_without_torch() -> None:
    """The vectors of every index of this built-in model are named so: only other weights change it."""
    assert identity("builtin") == ("b0943de252b2f907", "f4d320ad38b81008")
    model = LazyEncoder("builtin")
    assert model.space_id == "f4d320ad38b81008" and model.state == "unloaded"


# ---- digests that are stored


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every digest counts as slow, and every file as one that nobody writes just now; the files that
    were read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "_REMEMBER_SECONDS", -1.0)
    monkeypatch.setattr(checkpoint, "_SETTLED_NS", -1)
    read, files = checkpoint.read_weights, []

    def counted(path: Path, *prefixes: str) -> Any:
        files.append(path)
        return read(path, *prefixes)

    monkeypatch.setattr(checkpoint, "read_weights", counted)
    return files


def test_weights_are_digested_once(
    slow: list[Path], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A file with other weights of the same size and modification time is another model."""
    folder = Path(shutil.copytree(tiny_checkpoint("vit"), tmp_path / "model"))
    first = identity(folder)
    assert identity(folder) == first and len(slow) == 1
    other = altered(folder, tmp_path / "other", shifted("visual.proj"))
    weights = folder / "open_clip_model.safetensors"
    facts = weights.stat()
    shutil.copyfile(Path(other) / weights.name, weights)
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert weights.stat().st_size == facts.st_size
    assert identity(folder) == identity(other) != first


def test_a_file_that_was_just_written_is_digested_again(
    slow: list[Path], tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change once more within the time stamp's resolution."""
    monkeypatch.setattr(checkpoint, "_SETTLED_NS", 3600 * 10**9)
    folder = Path(shutil.copytree(tiny_checkpoint("vit"), tmp_path / "model"))
    assert identity(folder) == identity(folder) and len(slow) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"file": 1}', '{"file": null, "digests": 3}'])
def test_a_damaged_cache_costs_time_only(
    content: str, slow: list[Path], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("vit")
    first = identity(folder)
    for file in (tmp_path / "cache" / "clipkit" / "digests").iterdir():
        file.write_text(content)
    assert identity(folder) == first and len(slow) == 2
