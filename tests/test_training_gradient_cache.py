"""Gradient caching equals one big batch: every parameter, any chunk size, dropout included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit import towers
from clipkit.errors import InputError
from clipkit.losses import LOSSES
from clipkit.training.distributed import gather
from clipkit.training.gradient_cache import ChunkedTower, backward, freeze_batch_norms
from clipkit.training.recipes import LowRank, adapter_parameters, add_adapters
from clipkit.training.towers import TrainableTowers, checkpoint_activations, loss_of

Checkpoint = Callable[..., Path]
PAIRS = 5
WORDS = ["red cake", "a blue car", "dog", "the green house boat tree", "penguin guitar"]
Gradients = dict[str, torch.Tensor]


def tiny(folder: Path, *, loss: str = "auto", dropout: bool = False) -> TrainableTowers:
    """Towers in float64, so that the order of additions is no excuse."""
    encoder = towers.load(str(folder), device="cpu", precision="float32")
    encoder.model.double().requires_grad_(True)
    return TrainableTowers(encoder, loss=loss_of(encoder, loss), dropout=dropout)


def inputs(model: TrainableTowers) -> tuple[torch.Tensor, torch.Tensor]:
    side = model.encoder.preferred_side
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (PAIRS, 3, side, side), generator=generator, dtype=torch.uint8)
    return pixels, model.encoder.tokenize(WORDS)


def loss_function(model: TrainableTowers) -> Callable[..., torch.Tensor]:
    kind = LOSSES["infonce" if model.logit_bias is None else "siglip"]
    scalars = [model.logit_scale] + ([model.logit_bias] if model.logit_bias is not None else [])
    return lambda images, texts: kind(images, texts, *scalars)


def gradients(model: TrainableTowers) -> Gradients:
    grads = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad(set_to_none=True)
    return grads


def plain(model: TrainableTowers) -> tuple[float, Gradients]:
    pixels, tokens = inputs(model)
    value = loss_function(model)(model.images(pixels), model.texts(tokens))
    value.backward()
    return value.item(), gradients(model)


def cached(
    model: TrainableTowers, chunk: int, order: torch.Tensor | None = None
) -> tuple[float, Gradients]:
    pixels, tokens = inputs(model)
    value, _ = backward(
        [
            ChunkedTower(model.images, pixels, chunk=chunk),
            ChunkedTower(model.texts, tokens, chunk=chunk, order=order),
        ],
        lambda rows: loss_function(model)(*rows),
        gather=gather,
    )
    return value.item(), gradients(model)


def assert_same(got: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-9)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_any_chunk_size_gives_one_batchs_gradients(
    tiny_checkpoint: Checkpoint, kind: str, chunk: int
) -> None:
    model = tiny(tiny_checkpoint(kind))
    assert_same(cached(model, chunk), plain(model))


@pytest.mark.parametrize("kind", ["resnet", "timm-hf"])
def test_towers_with_batch_norm_are_exact_because_it_is_frozen(
    tiny_checkpoint: Checkpoint, kind: str
) -> None:
    """Fails for the version that leaves BatchNorm in training mode: chunks have other statistics."""
    model = tiny(tiny_checkpoint(kind))
    before = {n: b.clone() for n, b in model.model.named_buffers()}
    assert freeze_batch_norms(model.model) > 0
    assert_same(cached(model, 2), plain(model))
    assert all(torch.equal(b, before[n]) for n, b in model.model.named_buffers())


def test_logit_scale_is_not_counted_once_a_chunk(tiny_checkpoint: Checkpoint) -> None:
    """Fails for the version in which every chunk computes the loss again and goes back through it:
    the towers come out right and logit_scale and logit_bias times the number of chunks."""
    model = tiny(tiny_checkpoint("siglip"))
    expected = plain(model)[1]
    pixels, tokens = inputs(model)
    images, texts = model.images(pixels).detach(), model.texts(tokens).detach()
    for rows in torch.arange(PAIRS).split(2):  # that wrong version, on the images' side
        joined = images.clone()
        joined[rows] = model.images(pixels[rows])
        loss_function(model)(joined, texts).backward()
    wrong = gradients(model)
    torch.testing.assert_close(wrong["logit_scale"], 3 * expected["logit_scale"])
    right = cached(model, 2)[1]
    for name in ("logit_scale", "logit_bias"):
        torch.testing.assert_close(right[name], expected[name])


def test_dropout_draws_the_same_masks_twice(tiny_checkpoint: Checkpoint) -> None:
    """Fails for the version without replay: the second pass would drop other values than those
    whose embeddings the gradients belong to.

    The reference runs the same chunks with a graph, once, from the same random state.
    """
    model = tiny(tiny_checkpoint("timm-hf"), dropout=True)
    model.mode(True)
    norms = [m for m in model.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)  # frozen although dropout acts
    pixels, tokens = inputs(model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        images = torch.cat([model.images(chunk) for chunk in pixels.split(2)])
        texts = torch.cat([model.texts(chunk) for chunk in tokens.split(2)])
        value = loss_function(model)(images, texts)
        value.backward()
        drawn = torch.get_rng_state()
    expected = value.item(), gradients(model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert_same(cached(model, 2), expected)
        assert torch.equal(torch.get_rng_state(), drawn)  # the second pass's draws do not count
        assert cached(model, 2)[0] != expected[0]  # dropout does act


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm-hf"])
def test_activations_computed_again_are_the_same(tiny_checkpoint: Checkpoint, kind: str) -> None:
    model = tiny(tiny_checkpoint(kind))
    expected = plain(model)
    assert checkpoint_activations(model.model) >= 4  # blocks of both towers
    assert_same(cached(model, 2), expected)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind", ["vit", "timm-hf"])
def test_adapters_make_each_weight_once_a_pass(
    tiny_checkpoint: Checkpoint, kind: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all three chunks of the pass without graph and once for each of the pass with one; again
    for blocks whose activations are computed again. Only OpenCLIP's text tower reads one weight more,
    for its dtype. Fails without a cache: torch's attention reads a weight twice, and so did folded batch
    norms; and for one cache over all passes, whose graph is gone after the first."""
    model = tiny(tiny_checkpoint(kind))
    model.model.requires_grad_(False)
    count = add_adapters(model.model, rank=2, alpha=2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in adapter_parameters(model.model):
            parameter.data.add_(0.05 * torch.randn_like(parameter)).requires_grad_()
    pixels, tokens = inputs(model)
    rows = (
        F.normalize(model.image_features(pixels), dim=-1),
        F.normalize(model.text_features(tokens), dim=-1),
    )
    value = loss_function(model)(*rows)
    value.backward()
    expected = value.item(), gradients(model)
    assert len(expected[1]) >= 2 * count
    if again:
        checkpoint_activations(model.model)
    made: list[LowRank] = []
    whole = LowRank.forward

    def counted(adapter: LowRank, weight: torch.Tensor) -> torch.Tensor:
        made.append(adapter)
        return whole(adapter, weight)

    monkeypatch.setattr(LowRank, "forward", counted)
    assert_same(cached(model, 2), expected)
    assert len(set(map(id, made))) == count
    assert 4 * count <= len(made) <= (7 if again else 4) * count + 3


def test_the_order_in_chunks_does_not_matter(tiny_checkpoint: Checkpoint) -> None:
    model = tiny(tiny_checkpoint("vit"))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same(cached(model, 2, order), plain(model))
    assert_same(cached(model, 9, order), plain(model))


def test_a_locked_tower_is_passed_once_without_a_graph(tiny_checkpoint: Checkpoint) -> None:
    model = tiny(tiny_checkpoint("vit"))
    pixels, tokens = inputs(model)
    passes: list[bool] = []

    def locked(chunk: torch.Tensor) -> torch.Tensor:
        passes.append(torch.is_grad_enabled())
        return model.images(chunk)

    image_tower = ChunkedTower(locked, pixels, chunk=2, trained=False)
    text_tower = ChunkedTower(model.texts, tokens, chunk=2)
    backward([image_tower, text_tower], lambda rows: loss_function(model)(*rows), gather=gather)
    assert passes == [False] * 3
    grads = gradients(model)
    assert "token_embedding.weight" in grads and "visual.proj" not in grads


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="chunk is 0; it must be at least 1 pair"):
        ChunkedTower(lambda x: x, torch.zeros(2, 2), chunk=0)
