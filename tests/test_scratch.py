"""Random starts by spec, and the residual networks for 32-pixel pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from clipkit import checkpoint, models, scratch, towers
from clipkit.errors import ModelError

SMALL = "scratch:cifar-resnet10-w16"


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def load(spec: str) -> towers.DualEncoder:
    return towers.load(spec, device="cpu", precision="float32")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("scratch:ViT-B-32", ("ViT-B-32", 0)),
        ("scratch:cifar-resnet18:3", ("cifar-resnet18", 3)),
        ("scratch:", ("", 0)),
        ("ViT-B-32", None),
    ],
)
def test_a_spec_has_a_name_and_a_seed(spec: str, expected: tuple[str, int] | None) -> None:
    assert scratch.parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("scratch:cifar-resnet8", r"no architecture 'cifar-resnet8'; did you mean scratch:cifar-r"),
        ("scratch:ViT-B-33", r"did you mean scratch:ViT-B-3"),
        ("scratch:ViT-B-32:one", r"no architecture 'ViT-B-32:one'"),
        ("scratch:", r"use scratch:NAME or scratch:NAME:SEED with cifar-resnet10-w16, "),
    ],
)
def test_a_wrong_name_gets_the_nearest(spec: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        models.check(spec)


def test_the_networks_are_listed_with_the_models() -> None:
    rows = {row.spec: row for row in models.list_models(["scratch", "50"])}
    assert list(rows) == ["scratch:cifar-resnet50", "scratch:cifar-resnet50-gn"]
    assert rows["scratch:cifar-resnet50"].dim == 2048  # 512 channels, expanded four times
    for spec in rows:
        models.check(spec)


@pytest.mark.parametrize(
    ("name", "count"), [("cifar-resnet18", 11_173_962), ("cifar-resnet50-gn", 23_520_842)]
)
def test_the_networks_have_the_parameters_of_those_in_use(name: str, count: int) -> None:
    """The counts are those of github.com/kuangliu/pytorch-cifar with its layer for ten classes, which
    has 10 weights for each feature and 10 biases. GroupNorm has as many as BatchNorm."""
    from clipkit.towers.resnets import make

    net = scratch.RESNETS[name]
    with torch.device("meta"):
        model = make(net, num_classes=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters + 10 * net.dim + 10 == count


def test_the_first_stage_sees_all_pixels() -> None:
    """No stride and no pooling before it: 16 channels of 32 x 32; each later stage halves the sides."""
    trunk = load(SMALL).model.visual.trunk  # type: ignore[union-attr]
    shapes = {}
    for name in ("layer1", "layer4"):
        trunk.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    with torch.no_grad():
        trunk(torch.zeros(1, 3, 32, 32))
    assert shapes == {"layer1": (1, 16, 32, 32), "layer4": (1, 128, 4, 4)}


def test_a_spec_is_always_the_same_start() -> None:
    """Whatever the state of torch's generator is, which is left as it was."""
    first = load(SMALL)
    torch.rand(3)
    before = torch.get_rng_state()
    again = load(SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.encoder_id == first.encoder_id
    assert load(f"{SMALL}:0").encoder_id == first.encoder_id
    assert load(f"{SMALL}:1").encoder_id != first.encoder_id


def test_group_norm_treats_each_picture_by_itself() -> None:
    """In training mode too, which makes chunks of a batch exact; BatchNorm mixes them."""
    for spec, alone in ((f"{SMALL}-gn", True), (SMALL, False)):
        encoder = load(spec)
        encoder.model.train()
        whole = encoder.image_features(pixels(4))
        parts = torch.cat([encoder.image_features(part) for part in pixels(4).split(2)])
        assert torch.allclose(whole, parts, atol=1e-5) == alone


@pytest.mark.parametrize("spec", [SMALL, f"{SMALL}-gn"])
def test_a_checkpoint_opens_without_training(spec: str, tmp_path: Path) -> None:
    """In another process, with the same pictures' vectors, and still without a use for words."""
    encoder = load(spec)
    encoder.save(tmp_path / "saved")
    np.save(tmp_path / "pixels.npy", pixels(3).numpy())
    np.save(tmp_path / "expected.npy", encoder.encode_images(pixels(3)))
    code = (
        "import sys, clipkit, numpy as np, torch\n"
        "encoder = clipkit.load('saved', device='cpu', precision='float32')\n"
        "rows = encoder.encode_images(torch.from_numpy(np.load('pixels.npy')))\n"
        "np.testing.assert_allclose(rows, np.load('expected.npy'), atol=1e-6)\n"
        "assert 'clipkit.training' not in sys.modules\n"
        "print(encoder.encoder_id, sorted(encoder.untrained))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{encoder.encoder_id} ['image', 'text']\n"
    identity = checkpoint.identify(str(tmp_path / "saved"))
    assert identity == (encoder.encoder_id, encoder.space_id)


def test_an_untrained_text_tower_encodes_no_words(tmp_path: Path) -> None:
    encoder = load(SMALL)
    with pytest.raises(ModelError, match=r"text tower of scratch.*untrained.*an example picture"):
        encoder.encode_texts(["a red car"])
    encoder.untrained = frozenset({"text"})  # as after training by pictures alone
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "clipkit.json").read_text())["untrained"] == ["text"]
    with pytest.raises(ModelError, match="untrained"):
        load(str(tmp_path)).encode_texts(["a red car"])
    encoder.untrained = frozenset()  # as after training by pairs
    encoder.save(tmp_path)
    assert load(str(tmp_path)).encode_texts(["a red car"]).shape == (1, 128)


def test_openclips_architectures_start_from_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    configs = {"tiny": TINY["vit-quickgelu"]}
    monkeypatch.setattr(models, "architectures", lambda: configs)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    encoder = load("scratch:tiny")
    assert encoder.config.activation == "quick_gelu"
    assert encoder.untrained == {"image", "text"}
    assert (
        encoder.encoder_id == load("scratch:tiny").encoder_id != load("scratch:tiny:1").encoder_id
    )
