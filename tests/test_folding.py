"""Folded batch norms: the same numbers and gradients, and no folding where it would not be so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from clipkit.towers.folding import fold_batch_norms


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics, gains and biases as after a training, at rest."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_mean, norm.bias):
                values.data.normal_(generator=generator)
            for values in (norm.running_var, norm.weight):
                values.data.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def small() -> nn.Module:
    torch.manual_seed(0)
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.BatchNorm2d(4),
        )
    )


def folded(model: nn.Module, picture: torch.Tensor) -> int:
    return fold_batch_norms(model, lambda: model(picture[:1]))


def test_a_value_by_hand() -> None:
    """2 * 5 = 10; (10 - 1) / sqrt(3 + 1) * 3 + 4 = 17.5"""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1.0)).eval()
    for values, value in zip(
        (model[0].weight, model[1].running_mean, model[1].running_var),
        (2.0, 1.0, 3.0),
        strict=True,
    ):
        values.data.fill_(value)
    model[1].weight.data.fill_(3.0)
    model[1].bias.data.fill_(4.0)
    picture = torch.full((1, 1, 1, 1), 5.0)
    assert folded(model, picture) == 1
    assert model(picture).item() == pytest.approx(17.5)


def test_outputs_gradients_and_weights_are_those_of_the_unfolded_model() -> None:
    plain, model = small(), small()
    picture = torch.randn(2, 3, 9, 9)
    assert folded(model, picture) == 2
    assert torch.allclose(model(picture), plain(picture), atol=1e-5)
    for each in (plain, model):
        (each(picture) ** 2).sum().backward()
    for (name, expected), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None, name
        assert torch.allclose(got.grad, expected.grad, rtol=1e-4, atol=1e-3), name
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_changed_weight_counts_at_once() -> None:
    """Training changes weights in place: nothing folded may be kept from before."""
    plain, model = small(), small()
    picture = torch.randn(2, 3, 9, 9)
    folded(model, picture)
    model(picture)
    for each in (plain, model):
        with torch.no_grad():
            each[0].weight.mul_(2.0)
            each[1].running_var.mul_(3.0)
    assert torch.allclose(model(picture), plain(picture), atol=1e-5)


def test_a_norm_in_training_mode_uses_the_batch_s_own_statistics() -> None:
    plain, model = small(), small()
    picture = torch.randn(4, 3, 9, 9)
    folded(model, picture)
    for each in (plain, model):
        each.train()
    assert torch.allclose(model(picture), plain(picture), atol=1e-5)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


class Branch(nn.Module):
    """Something else reads what the convolution gives, before its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class Twice(nn.Module):
    """One convolution, two norms: neither is the convolution's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.conv(self.a(self.conv(x))))


@pytest.mark.parametrize("make", [Branch, Twice])
def test_what_cannot_be_folded_is_left_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = settled(make())
    plain, picture = deepcopy(model), torch.randn(2, 3, 5, 5)
    assert folded(model, picture) == 0
    assert torch.equal(model(picture), plain(picture))


@pytest.mark.parametrize(
    ("name", "least"),
    [("efficientnet_lite0", 49), ("resnet18", 20), ("mobileone_s0", 30), ("convnext_atto", 0)],
)
def test_timm_s_towers(name: str, least: int) -> None:
    """EfficientNet-Lite0 has 49 convolutions with a norm each, ResNet-18 has 20."""
    torch.manual_seed(0)
    model = settled(timm.create_model(name, num_classes=0))
    plain, picture = deepcopy(model), torch.randn(2, 3, 64, 64)
    assert folded(model, picture) >= least
    with torch.no_grad():
        expected, got = plain(picture), model(picture)
    assert float((got - expected).norm() / expected.norm()) < 1e-4


def test_a_tower_without_batch_norms_is_not_even_run() -> None:
    def run() -> torch.Tensor:
        raise AssertionError("there is nothing to fold")

    assert fold_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), run) == 0
