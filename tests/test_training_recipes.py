"""What recipes train, at which rates, what decays; adapters; the running mean of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP
from torch.nn.utils import parametrize
from transformers import MT5Config, MT5EncoderModel
from transformers.pytorch_utils import Conv1D

from clipkit import towers
from clipkit.errors import ModelError
from clipkit.losses import LOSSES
from clipkit.training.config import TrainConfig
from clipkit.training.data import CaptionedPictures
from clipkit.training.frozen_towers import find_heads
from clipkit.training.methods.method import Method, Setup
from clipkit.training.recipes import (
    LowRank,
    Trained,
    adapter_parameters,
    add_adapters,
    choose_parameters,
    is_matrix,
    make_optimizer,
    merge_adapters,
    rate_factor,
)
from clipkit.training.registry import METHODS
from clipkit.training.towers import TrainableTowers, checkpoint_activations
from clipkit.training.weights import L2SP, Ema

Checkpoint = Callable[..., Path]
KINDS = ["vit", "resnet", "siglip", "timm-hf"]


def tiny(folder: Path, loss: str = "infonce") -> TrainableTowers:
    encoder = towers.load(str(folder), device="cpu", precision="float32")
    return TrainableTowers(encoder, loss=loss)


def options(**changes: Any) -> TrainConfig:
    return TrainConfig.from_mapping({"data": "d", **changes})


NO_PICTURES = CaptionedPictures(Path("nowhere"), (), (), (), (), np.empty(0, np.int64), 0)


def pairs(model: TrainableTowers, config: TrainConfig) -> Method:
    loss = LOSSES["siglip" if model.logit_bias is not None else "infonce"]
    return METHODS["pairs"](
        Setup(config, loss, config.method_options(), {}, model, NO_PICTURES, 2, 1)
    )


def chosen(model: TrainableTowers, config: TrainConfig) -> Trained:
    return choose_parameters(model, config, pairs(model, config))


# ---- what is trained


def test_lit_locks_the_whole_image_tower(tiny_checkpoint: Checkpoint) -> None:
    trained = chosen(tiny(tiny_checkpoint("vit")), options(recipe="lit"))
    assert trained.sides == {"text"}
    assert not any(name.startswith("visual.") for name in trained.towers)
    assert "text_projection" in trained.towers and set(trained.shared) == {"logit_scale"}


def test_full_trains_everything_or_the_last_layers(tiny_checkpoint: Checkpoint) -> None:
    model = tiny(tiny_checkpoint("vit"))
    everything = chosen(model, options(recipe="full"))
    assert everything.count == everything.total
    few = chosen(model, options(recipe="full", train_image_layers=1, train_text_layers=0))
    assert "visual.transformer.resblocks.1.ln_1.weight" in few.towers
    assert "visual.proj" in few.towers  # what follows the last layer
    assert "visual.transformer.resblocks.0.ln_1.weight" not in few.towers
    assert "visual.conv1.weight" not in few.towers
    text = {n for n in few.towers if not n.startswith("visual.")}
    assert text == {"ln_final.weight", "ln_final.bias", "text_projection"}
    assert not model.model.visual.conv1.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_heads_trains_only_the_projections(tiny_checkpoint: Checkpoint, kind: str) -> None:
    model = tiny(tiny_checkpoint(kind))
    trained = chosen(model, options(recipe="heads"))
    names = {
        "vit": {"visual.proj", "text_projection"},
        "resnet": {
            "visual.attnpool.c_proj.weight",
            "visual.attnpool.c_proj.bias",
            "text_projection",
        },
        "siglip": {
            "visual.head.proj.weight",
            "text.text_projection.weight",
            "text.text_projection.bias",
        },
        "timm-hf": {
            "visual.head.mlp.fc1.weight",
            "visual.head.mlp.fc1.bias",
            "visual.head.mlp.fc2.weight",
            "text.proj.0.weight",
            "text.proj.2.weight",
        },
    }
    assert set(trained.towers) == trained.heads == names[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_head_and_the_head_are_the_tower(tiny_checkpoint: Checkpoint, kind: str) -> None:
    model = tiny(tiny_checkpoint(kind))
    side = model.encoder.preferred_side
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    tokens = model.encoder.tokenize(["red cake", "a dog"])
    with torch.no_grad():
        for head, encode, inputs in zip(
            find_heads(model.model),
            (model.image_features, model.text_features),
            (pixels, tokens),
            strict=True,
        ):
            assert head is not None
            whole = encode(inputs)
            with head.removed():
                features = encode(inputs)
            torch.testing.assert_close(head(features), whole)
            torch.testing.assert_close(encode(inputs), whole)  # it is back


TRUNKS: dict[str, dict[str, Any]] = {
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},  # MobileCLIP's
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "test_efficientnet": {},
}


@pytest.mark.parametrize("name", TRUNKS)
def test_what_precedes_a_trunks_last_layer_is_pooled(name: str) -> None:
    """Fails for the version that takes out the trunk's whole head, with its pooling: a FastViT of 256
    pixels then keeps 1,024 x 8 x 8 numbers of each picture, and an EfficientNet had no head."""
    with torch.random.fork_rng():
        trunk = timm.create_model(name, num_classes=6, **TRUNKS[name]).eval()
    kinds = [type(module) for module in trunk.modules()]
    side = TRUNKS[name].get("img_size", 64)
    visual = torch.nn.Sequential()
    visual.trunk = trunk
    model = torch.nn.Module()
    model.visual, model.text = visual, torch.nn.Module()
    head, _ = find_heads(model)
    assert head is not None
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        whole = visual(pixels)
        with head.removed():
            features = visual(pixels)
        assert features.ndim == 2 and whole.shape == (2, 6)
        torch.testing.assert_close(head(features), whole)
        torch.testing.assert_close(visual(pixels), whole)
    assert [type(module) for module in trunk.modules()] == kinds


def test_cocas_projections_are_its_heads() -> None:
    with torch.random.fork_rng():
        model = CoCa(
            embed_dim=8,
            multimodal_cfg={"width": 16, "heads": 2, "layers": 1, "context_length": 6},
            text_cfg={
                **{"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
                **{"embed_cls": True, "output_tokens": True},
            },
            vision_cfg={
                **{"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
                **{"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            },
        ).eval()
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[1, 9, 49, 0, 0], [1, 2, 3, 49, 0]])
    for head, encode, inputs in zip(
        find_heads(model), (model.encode_image, model.encode_text), (pixels, tokens), strict=True
    ):
        assert head is not None
        with torch.no_grad():
            whole = encode(inputs, normalize=False)
            with head.removed():
                features = encode(inputs, normalize=False)
            torch.testing.assert_close(head(features), whole)


def test_towers_without_projections_are_refused() -> None:
    model = torch.nn.Module()
    model.visual, model.text = torch.nn.Module(), torch.nn.Module()
    with pytest.raises(ModelError, match=r"neither tower ends in a projection.*lora or full"):
        find_heads(model)


def test_a_loss_with_a_bias_gives_a_model_without_one_its_own(tiny_checkpoint: Checkpoint) -> None:
    model = tiny(tiny_checkpoint("vit"), loss="siglip")
    trained = chosen(model, options(recipe="lit"))
    assert trained.shared["logit_bias"].item() == -10.0
    assert model.model.logit_bias is None  # no part of the checkpoint
    assert tiny(tiny_checkpoint("siglip"), loss="infonce").logit_bias is None


# ---- rates and decay


def test_gains_biases_embeddings_and_scalars_do_not_decay(tiny_checkpoint: Checkpoint) -> None:
    """Fails for the version that gives AdamW `model.parameters()`: everything decays."""
    for kind in KINDS:
        model = tiny(tiny_checkpoint(kind), loss="siglip")
        trained = chosen(model, options(recipe="full"))
        decaying = {n for n, p in trained.named.items() if is_matrix(n, p)}
        spared = trained.named.keys() - decaying
        assert {"logit_scale", "logit_bias"} <= spared
        assert all(trained.named[name].ndim >= 2 for name in decaying)
        assert not any("embed" in name or name.endswith("bias") for name in decaying)
        for group in make_optimizer(trained, options(weight_decay=0.3)).param_groups:
            assert group["weight_decay"] == (0.3 if set(group["names"]) & decaying else 0.0)
            assert set(group["names"]) <= decaying or not set(group["names"]) & decaying
    assert "text.transformer.encoder.layer.0.attention.self.query.weight" in decaying
    assert "text.transformer.embeddings.word_embeddings.weight" in spared


def test_each_layer_learns_less_than_the_one_above(tiny_checkpoint: Checkpoint) -> None:
    """Two blocks, so: projection 1, block 1 0.5, block 0 0.25, stem 0.125 of the rate."""
    model = tiny(tiny_checkpoint("vit"))
    config = options(recipe="full", learning_rate=0.08, layer_decay=0.5, image_rate=2, head_rate=3)
    trained = chosen(model, config)
    rates = {
        name: group["base_lr"]
        for group in make_optimizer(trained, config).param_groups
        for name in group["names"]
    }
    expected = {
        "visual.proj": 0.08 * 2 * 3,
        "visual.ln_post.weight": 0.08 * 2,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.04 * 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 0.02 * 2,
        "visual.conv1.weight": 0.01 * 2,
        "visual.class_embedding": 0.01 * 2,
        "text_projection": 0.08 * 3,
        "ln_final.weight": 0.08,
        "transformer.resblocks.0.ln_1.weight": 0.02,
        "token_embedding.weight": 0.01,
        "logit_scale": 0.08,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_stages_of_other_towers_are_layers_too(tiny_checkpoint: Checkpoint) -> None:
    config = options(recipe="full", learning_rate=1.0, layer_decay=0.5)
    trained = chosen(tiny(tiny_checkpoint("timm-hf")), config)
    rates = {
        name: group["base_lr"]
        for group in make_optimizer(trained, config).param_groups
        for name in group["names"]
    }
    stem, top = rates["visual.trunk.conv_stem.weight"], rates["visual.trunk.conv_head.weight"]
    assert stem < rates["visual.trunk.blocks.0.0.conv.weight"] < top == 1.0
    assert rates["visual.trunk.bn2.weight"] == 1.0 and rates["visual.trunk.bn1.weight"] == stem
    assert rates["text.transformer.encoder.layer.1.output.dense.weight"] == 0.5


def test_a_block_of_t5_is_a_layer() -> None:
    """mT5 calls its blocks `block.N`, and the parts of each `layer.0` and `layer.1`. Three blocks, so
    the rates are 0.5, 0.25 and 0.125, of the embedding 0.0625. Fails where the parts are taken for
    the layers: every depth is 2 then."""
    t5 = MT5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2)
    model = torch.nn.Module()
    model.transformer = MT5EncoderModel(t5).encoder
    config = options(recipe="full", learning_rate=1.0, layer_decay=0.5, train_text_layers=2)
    named = {f"text.{name}": p for name, p in model.named_parameters()}
    trained = Trained(named, {}, frozenset(), frozenset(), frozenset({"text"}), 0)
    rates = {
        name: group["base_lr"]
        for group in make_optimizer(trained, config).param_groups
        for name in group["names"]
    }
    for block, rate in enumerate((0.125, 0.25, 0.5)):
        own = [r for name, r in rates.items() if f".block.{block}." in name]
        assert len(own) >= 9 and set(own) == {rate}
    assert rates["text.transformer.embed_tokens.weight"] == 0.0625
    assert rates["text.transformer.final_layer_norm.weight"] == 1.0
    assert checkpoint_activations(model) == 3


def test_the_rate_rises_over_a_share_of_the_run_and_falls_to_nothing() -> None:
    """Fails for warm-up in steps, such as 10,000: a short run would end before it is warm."""
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and max(factors) == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert 0 < factors[99] < 0.001
    assert rate_factor(0, 1, 0.1) == 1.0 and rate_factor(0, 5, 0.0) == 1.0


# ---- adapters


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_as_nothing_and_merge_to_what_they_were(
    tiny_checkpoint: Checkpoint, kind: str
) -> None:
    model = tiny(tiny_checkpoint(kind))
    side = model.encoder.preferred_side
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    tokens = model.encoder.tokenize(["red cake", "a dog"])
    shapes = {name: value.shape for name, value in model.model.state_dict().items()}
    kinds = [type(module) for module in model.model.modules()]
    with torch.no_grad():
        before = model.images(pixels), model.texts(tokens)
        assert add_adapters(model.model, rank=4, alpha=8.0) > 0
        for tower, rows in zip((model.images(pixels), model.texts(tokens)), before, strict=True):
            torch.testing.assert_close(tower, rows)
        for parameter in adapter_parameters(model.model):
            parameter.add_(0.05 * torch.randn(parameter.shape))
        trained = model.images(pixels), model.texts(tokens)
        assert (trained[0] - before[0]).abs().max() > 1e-4
        assert (trained[1] - before[1]).abs().max() > 1e-4
        merge_adapters(model.model)
        merged = model.images(pixels), model.texts(tokens)
    assert {name: value.shape for name, value in model.model.state_dict().items()} == shapes
    assert [type(module) for module in model.model.modules()] == kinds
    assert max((a - b).abs().max().item() for a, b in zip(trained, merged, strict=True)) < 1e-5


def test_fused_attention_gets_adapters_for_query_key_and_value(tiny_checkpoint: Checkpoint) -> None:
    """Fails for the version that looks for linear layers only: in_proj_weight is no layer."""
    model = tiny(tiny_checkpoint("vit"))
    chosen(model, options(recipe="lora", lora_rank=2, lora_alpha=2.0))
    attention = model.model.visual.transformer.resblocks[0].attn
    start = attention.in_proj_weight.detach().clone()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    optimizer = torch.optim.SGD(adapter_parameters(model.model), lr=1.0)
    for _ in range(2):
        (model.images(pixels) * torch.arange(16.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    change = (attention.in_proj_weight.detach() - start).view(3, 32, 32)
    for part in change:  # query, key, value
        assert part.abs().max() > 1e-7
        assert torch.linalg.matrix_rank(part.double(), rtol=1e-3) <= 2


@pytest.mark.parametrize("change", ["qk_norm", "scale_heads", "attentional_pool"])
def test_every_attention_of_openclip_gets_adapters(change: str) -> None:
    """Fails for the version that knows torch's attention only: OpenCLIP's own, of blocks with norms or
    scales inside, keeps its query, key and value as they are. The pooler's keys are of another width,
    so that its matrices are apart."""
    vision: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2}
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    if change == "attentional_pool":
        vision["attn_pooler_heads"] = 2
    else:
        text[change] = True
    with torch.random.fork_rng():
        model = CLIP(
            embed_dim=8, vision_cfg={**vision, "head_width": 8, change: True}, text_cfg=text
        )
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("AttentionalPooler" if change == "attentional_pool" else "Attention") in kinds
    expected = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and re.search(r"(in|q|k|v)_proj_weight|out_proj|c_fc|c_proj", name)
    ]
    count = add_adapters(model.eval(), rank=2, alpha=2.0)
    adapted = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for weight in module.parametrizations  # type: ignore[union-attr]
    }
    assert adapted == set(expected) and count == len(expected) >= 16
    rows = model.encode_image(torch.randn(2, 3, 16, 16), normalize=True)
    texts = model.encode_text(
        torch.tensor([[1, 9, 49, 0, 0, 0], [1, 2, 3, 49, 0, 0]]), normalize=True
    )
    (rows * torch.arange(8.0)).sum().backward()
    (texts * torch.arange(8.0)).sum().backward()
    for up in (m.up for m in model.modules() if isinstance(m, LowRank)):
        assert up.grad is not None and up.grad.flatten(1).abs().amax(1).gt(0).all()


def test_a_weight_that_no_adapter_fits_is_named() -> None:
    """Hugging Face's Conv1D is a linear layer whose weight lies the other way round."""
    model = torch.nn.Module()
    model.visual = torch.nn.Linear(2, 2)
    model.text = torch.nn.Sequential(torch.nn.Linear(2, 2), Conv1D(6, 2))
    with pytest.raises(ModelError, match=r"no adapter for weight \(2, 6\) of 1 \(Conv1D\); use"):
        add_adapters(model, rank=2, alpha=2.0)


def test_lora_trains_adapters_projections_and_the_scale_only(tiny_checkpoint: Checkpoint) -> None:
    model = tiny(tiny_checkpoint("vit"))
    trained = chosen(model, options(recipe="lora"))
    assert trained.sides == {"image", "text"}
    assert all("parametrizations" in n for n in trained.towers if n not in trained.heads)
    assert trained.heads == {"visual.proj", "text_projection"}
    assert trained.count < trained.total / 10
    needing = {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert needing == set(trained.named)


def test_a_tower_that_takes_no_adapter_is_named() -> None:
    model = torch.nn.Module()
    model.visual = torch.nn.Conv2d(3, 4, 3)
    model.text = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"the image tower \(Conv2d\) has no attention.*full"):
        add_adapters(model, rank=2, alpha=2.0)


# ---- the running mean


def test_the_running_mean_by_hand() -> None:
    """Weights 0, then 1 after each step, decay at most 0.5: after step 1 the decay is 2/11, so the
    mean is 9/11; after step 2 it is 3/12: 1/4 x 9/11 + 3/4."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    ema = Ema({"w": parameter}, 0.5)
    parameter.data.fill_(1.0)
    ema.update(1)
    with ema.applied():
        assert parameter.item() == pytest.approx(9 / 11)
    ema.update(2)
    assert ema.state_dict()["w"].item() == pytest.approx(9 / 44 + 3 / 4)
    assert parameter.item() == 1.0


def test_the_mean_steps_aside_bit_for_bit() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1 / 3, math.pi]))
    before = parameter.detach().clone()
    ema = Ema({"w": parameter}, 0.9)
    ema.update(5)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(parameter, before)
    other = Ema({"w": parameter}, 0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.state_dict()["w"], ema.state_dict()["w"])


def test_no_mean_is_the_weights_themselves() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ema = Ema({"w": parameter}, 0.0)
    ema.update(1)
    with ema.applied():
        assert parameter.tolist() == [1.0, 1.0]
    assert ema.state_dict() == {}


# ---- L2-SP


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5])
def test_l2_sp_rests_at_its_limit_whatever_the_rate_is(rate: float) -> None:
    """Gradients that never change sign move AdamW by its rate r per step. Of size 2 at the start, with
    a drift of 5 %, the limit is l = 0.1. A step and a pull take a distance d to

        (d + r) (1 - r / (l + r)) = (d + r) l / (l + r),

    which is d where d l + d r = d l + r l, so d = l: 0.1 for every rate. The error shrinks by
    l / (l + r) per step; 2,000 steps leave 0.1 * (0.1 / 0.101)**2000 = 2e-10 of it at the lowest rate.

    Fails for a pull of min(1, r / l), which rests at l - r and pins the weights to the start from
    r = l on; and for decay towards zero, which ends far from the start.
    """
    matrix = torch.nn.Parameter(torch.full((3, 3), 2.0))
    vector = torch.nn.Parameter(torch.full((3,), 2.0))
    names = {"params": [matrix, vector], "names": ["w", "b"]}
    optimizer = torch.optim.AdamW([names], lr=rate, weight_decay=0.0)
    l2sp = L2SP(optimizer, 0.05)
    for _ in range(2000 if rate < 0.01 else 300):
        optimizer.zero_grad()
        (matrix.sum() + vector.sum()).backward()
        optimizer.step()
        l2sp.pull()
    torch.testing.assert_close(2 - matrix.detach(), torch.full((3, 3), 0.1), rtol=0, atol=2e-4)
    assert (2 - vector.detach() > 0.2).all()  # a vector is free


def test_without_drift_nothing_is_pulled() -> None:
    matrix = torch.nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = torch.optim.AdamW([{"params": [matrix], "names": ["w"]}], lr=0.01)
    l2sp = L2SP(optimizer, 0.0)
    with torch.no_grad():
        matrix += 1
    l2sp.pull()
    assert (matrix == 3).all()


def test_l2_sp_frees_what_begins_at_zero_unless_it_has_a_size() -> None:
    """Of size 2, 5 % are 0.1: at rate 0.025 a pull is 0.025 / 0.125, a fifth of the way back."""
    for size, expected in ((None, 1.0), (2.0, 0.8)):
        matrix = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = torch.optim.AdamW([{"params": [matrix], "names": ["up"]}], lr=0.025)
        l2sp = L2SP(optimizer, 0.05, {} if size is None else {id(matrix): size})
        with torch.no_grad():
            matrix += 1
        l2sp.pull()
        torch.testing.assert_close(matrix.detach(), torch.full((2, 2), expected))


@pytest.mark.parametrize("parts", [1, 3])
def test_an_adapters_size_makes_its_update_as_large_as_the_weight(parts: int) -> None:
    """B drawn at random with `size` as its root mean square, A as initialised: within a few percent."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(parts * 200, 300, generator=generator)
    adapter = LowRank(weight, rank=16, alpha=8, parts=parts, generator=generator)
    with torch.no_grad():
        adapter.up.copy_(adapter.size * torch.randn(adapter.up.shape, generator=generator))
    update = adapter(weight) - weight
    assert update.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.1)
