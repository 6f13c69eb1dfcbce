"""The running means that encode keys: by hand, with every recipe, and without a trace in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_training_recipes import chosen, options, tiny

from clipkit.training.distributed import gather
from clipkit.training.frozen_towers import FrozenTowers
from clipkit.training.gradient_cache import ChunkedTower, backward
from clipkit.training.methods.momentum import Momentum
from clipkit.training.towers import Towers, TrainableTowers

Checkpoint = Callable[..., Path]


class Scalars(torch.nn.Module):
    """A weight for each tower, a norm with statistics, and what no tower has."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.weight = torch.nn.Parameter(torch.zeros(()))
        self.visual.norm = torch.nn.BatchNorm1d(1, affine=False)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.locked = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))


class Few:
    """Towers of the above."""

    def __init__(self) -> None:
        self.model = Scalars()

    def mode(self, training: bool) -> None:
        self.model.train(training)


def few() -> tuple[Few, Towers]:
    towers = Few()
    return towers, towers  # type: ignore[return-value]


def set_all(model: torch.nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(value)


def test_two_updates_by_hand() -> None:
    """m = 0.9, weights 0, then 1, then 3: the mean is 0.1 x 1 = 0.1, then 0.9 x 0.1 + 0.1 x 3 = 0.39."""
    towers, momentum_towers = few()
    momentum = Momentum(momentum_towers, ("image", "text"), 0.9)
    for step, value in ((1, 1.0), (2, 3.0)):
        set_all(towers.model, value)
        momentum.update(step)
    model = towers.model
    with momentum.applied():
        inside = [p.item() for p in (model.visual.weight, model.weight, model.locked)]
        scale = model.logit_scale.item()
    assert inside == pytest.approx([0.39, 0.39, 3.0]) and scale == 3.0
    assert {p.item() for p in model.parameters()} == {3.0}
    assert set(momentum.state_dict()) == {
        *("visual.weight", "weight", "visual.norm.running_mean", "visual.norm.running_var")
    }


def test_only_the_sides_asked_for() -> None:
    towers, momentum_towers = few()
    momentum = Momentum(momentum_towers, ("text",), 0.9)
    assert set(momentum.state_dict()) == {"weight"}


def test_momentum_rises_to_one_along_a_cosine() -> None:
    """1 - m is 0.4, times (1 + cos(pi step / 4)) / 2: 1/2 at step 2, nothing from step 4 on."""
    towers, momentum_towers = few()
    momentum = Momentum(momentum_towers, ("text",), 0.6, rise=4)
    set_all(towers.model, 1.0)
    momentum.update(2)
    assert momentum.state_dict()["weight"].item() == pytest.approx(0.2)
    for step in (4, 5):
        momentum.update(step)
    assert momentum.state_dict()["weight"].item() == pytest.approx(0.2)


def test_statistics_are_averaged_and_used() -> None:
    """EMAN: a row's norm does not depend on its batch. Fails in training mode, where a batch of one
    value has no variance: every row would be 0."""
    towers, momentum_towers = few()
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Dropout(0.9))
    momentum = Momentum(momentum_towers, ("image",), 0.5, own={"head": head})
    assert isinstance(head[0], torch.nn.BatchNorm1d) and head[0].running_mean is not None
    head[0].running_mean.fill_(2.0)
    momentum.update(1)  # the mean of 0 and 2
    rows = torch.full((3, 1), 5.0)
    keys = momentum.encoder(head)(rows)
    assert keys.flatten().tolist() == pytest.approx([4 / math.sqrt(1 + 1e-5)] * 3)
    assert head[0].running_mean.item() == 2.0 and not keys.requires_grad
    assert head.training and head[1].training and towers.model.training


def test_a_saved_mean_goes_on_bit_for_bit() -> None:
    means = []
    for restored in (False, True):
        towers, momentum_towers = few()
        momentum = Momentum(momentum_towers, ("image", "text"), 0.99)
        set_all(towers.model, 1 / 3)
        momentum.update(1)
        if restored:
            state = {name: tensor.clone() for name, tensor in momentum.state_dict().items()}
            momentum = Momentum(momentum_towers, ("image", "text"), 0.99)
            momentum.load_state_dict(state)
        set_all(towers.model, math.pi)
        momentum.update(2)
        means.append(momentum.state_dict())
    assert means[0].keys() == means[1].keys()
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])


@pytest.mark.parametrize("recipe", ["heads", "lit", "lora", "full"])
def test_it_encodes_as_a_model_with_the_means_weights(
    tiny_checkpoint: Checkpoint, recipe: str
) -> None:
    """After a change of the trained weights by 1 and one update with m = 0.75, keys are those of a
    model whose trained weights have changed by 1/4."""
    trainable = tiny(tiny_checkpoint("vit"))
    trained = chosen(trainable, options(recipe=recipe))
    towers: Towers = trainable
    inputs = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    if recipe == "heads":
        towers, inputs = FrozenTowers(trainable, dropout=0.5), torch.randn(3, 32)
    towers.mode(True)  # the dropout of features must not reach the keys
    momentum = Momentum(towers, trained.sides, 0.75)
    noise = {name: torch.randn_like(p) for name, p in trained.towers.items()}
    change(trained.towers, noise, 1.0)
    momentum.update(1)
    keys = momentum.encoder(towers.images)(inputs)
    change(trained.towers, noise, -0.75)
    towers.mode(False)
    with torch.no_grad():
        expected = towers.images(inputs)
    torch.testing.assert_close(keys, expected)
    start = tiny(tiny_checkpoint("vit"))
    if recipe != "lit":
        assert not torch.allclose(keys, _images(start, recipe, inputs), atol=1e-3)


@torch.no_grad()
def change(
    parameters: Mapping[str, torch.nn.Parameter], noise: dict[str, torch.Tensor], by: float
) -> None:
    for name, parameter in parameters.items():
        parameter.add_(noise[name], alpha=by)


def _images(trainable: TrainableTowers, recipe: str, inputs: torch.Tensor) -> torch.Tensor:
    towers: Towers = trainable
    if recipe == "heads":
        towers = FrozenTowers(trainable, dropout=0.0)
    with torch.no_grad():
        return towers.images(inputs)


@pytest.mark.parametrize("chunk", [2, 5])
def test_gradients_are_those_without_it(tiny_checkpoint: Checkpoint, chunk: int) -> None:
    """A batch of one chunk has its graph before the keys are encoded: its weights must be back when
    the gradients go through it."""
    towers = tiny(tiny_checkpoint("vit"))
    trained = chosen(towers, options(recipe="full"))
    momentum = Momentum(towers, ("image",), 0.9)
    for mean in momentum.state_dict().values():
        mean.add_(0.1)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    keys = momentum.encoder(towers.images)(pixels)
    (keys * towers.images(pixels)).sum().backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad.clone() for n, p in trained.towers.items() if p.grad is not None}
    towers.model.zero_grad()
    _, rows = backward(
        [
            ChunkedTower(towers.images, pixels, chunk=chunk),
            ChunkedTower(momentum.encoder(towers.images), pixels, chunk=chunk, trained=False),
        ],
        lambda rows: (rows[0] * rows[1]).sum(),
        gather=gather,
    )
    torch.testing.assert_close(rows[1], keys)
    assert F.cosine_similarity(rows[0], rows[1]).max() < 0.999
    for name, gradient in expected.items():
        got = trained.towers[name].grad
        assert got is not None
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6, msg=name)
