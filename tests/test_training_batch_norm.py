"""BatchNorm with the statistics of the batch: its running ones belong to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import metrics, run, weights

from clipkit import towers
from clipkit.errors import InputError
from clipkit.towers.folding import synchronise_batch_norms
from clipkit.training import config as training_config
from clipkit.training import towers as training_towers
from clipkit.training.data import CaptionedPictures
from clipkit.training.inputs import PictureInputs
from clipkit.training.weights import Ema, mix

SCRATCH = "scratch:cifar-resnet10-w16"
FIRST = "visual.trunk.bn1"


@pytest.fixture
def scratch(options: dict[str, Any]) -> dict[str, Any]:
    """Of a run that trains a network with BatchNorm from scratch, without a mean of the weights."""
    return {**options, "start": SCRATCH, "batch_norm": "batch", "chunk": 0, "ema": 0.0}


def load(spec: str | Path | None) -> towers.DualEncoder:
    return towers.load(str(spec), device="cpu", precision="float32")


def statistics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if "running" in n or "batches_tracked" in n}


def test_a_step_by_hand(scratch: dict[str, Any], noise_dataset: Path) -> None:
    """Running mean and variance start at 0 and 1 and go a tenth of the way to the batch's own, with the
    unbiased variance: Ioffe & Szegedy 2015 (arXiv 1502.03167), torch's default momentum.

    All 14 pictures are the batch, each as at inference, so that their order does not matter.
    """
    done = run(scratch, batch=14, max_steps=1, crop=1.0, flip=False, keep="last")
    encoder = load(SCRATCH)
    data = CaptionedPictures.read(noise_dataset, "train")
    inputs = PictureInputs(data, training_towers.TrainableTowers(encoder, loss="infonce"))
    rows: list[torch.Tensor] = []
    norm = encoder.model.get_submodule(FIRST)
    norm.train()  # else its convolution would be folded with it
    norm.register_forward_pre_hook(lambda _, x: rows.append(x[0]))
    with torch.no_grad():
        encoder.image_features(torch.cat(list(inputs.pictures())))
    channels = rows[0].transpose(0, 1).flatten(1)  # (16, 14 * 32 * 32)
    saved = weights(done.checkpoint)
    torch.testing.assert_close(saved[f"{FIRST}.running_mean"], 0.1 * channels.mean(1))
    torch.testing.assert_close(saved[f"{FIRST}.running_var"], 0.9 + 0.1 * channels.var(1))
    assert saved[f"{FIRST}.num_batches_tracked"] == 1
    assert load(done.checkpoint).untrained == frozenset()  # pairs train both towers


def test_the_best_weights_come_with_their_own_statistics(scratch: dict[str, Any]) -> None:
    """The loss that is measured with what was kept is that of the best step, which is not the last.

    Fails if the statistics of the last step stay behind.
    """
    done = run(scratch, epochs=6, learning_rate=0.03, warmup=0.0)
    evaluated = {e["step"]: e["validation_loss"] for e in metrics(done.folder) if "loss" not in e}
    assert 0 < done.best_step < max(evaluated)
    mixture = json.loads((done.folder / "summary.json").read_text())["mixture"]
    assert mixture.keys() == {"0.0", "1.0"}  # a random start is not mixed with
    assert mixture["1.0"]["loss"] == evaluated[done.best_step]


def test_frozen_statistics_stay(scratch: dict[str, Any]) -> None:
    first = run(scratch, max_steps=2, keep="last")
    start = str(first.checkpoint)
    then = run(scratch, start=start, name="then", batch_norm="frozen", chunk=4, keep="last")
    before, after = weights(first.checkpoint), weights(then.checkpoint)
    assert statistics(before)
    for name, value in statistics(before).items():
        assert torch.equal(after[name], value), name
    assert not torch.equal(after[f"{FIRST}.weight"], before[f"{FIRST}.weight"])


def test_the_mean_of_the_weights_has_the_mean_of_the_statistics() -> None:
    """After step 1 the decay is 2 / 11: the mean of 0 and 11 is 9. A count is not averaged."""
    running = torch.zeros(1)
    ema = Ema({"running_mean": running}, 0.9)
    running += 11  # in place, as BatchNorm does it
    ema.update(1)
    with ema.applied():
        torch.testing.assert_close(running, torch.tensor([9.0]))
    assert running == 11


@pytest.mark.parametrize(("alpha", "mean", "count"), [(0.0, 2.0, 5), (0.25, 3.0, 9), (1.0, 6.0, 9)])
def test_a_mixture_has_mixed_statistics(alpha: float, mean: float, count: int) -> None:
    """Mean 2 at the start, 6 trained; 5 and 9 batches. At 0 it is the start again, its count too."""
    norm = torch.nn.BatchNorm1d(1)
    start = {"running_mean": torch.tensor([2.0]), "num_batches_tracked": torch.tensor(5)}
    trained = {"running_mean": torch.tensor([6.0]), "num_batches_tracked": torch.tensor(9)}
    mix(norm, start, trained, alpha)
    assert (norm.running_mean, norm.num_batches_tracked) == (mean, count)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chunk": 4}, r"chunk is 4, but batch_norm batch takes its statistics over all 6 pairs"),
        (
            {"start": f"{SCRATCH}-gn"},
            r"but scratch:cifar-resnet10-w16-gn has no BatchNorm; leave it",
        ),
        ({"batch_norm": "frozen"}, r"untrained, so its BatchNorms have no statistics yet; use"),
        ({"activation_checkpointing": True}, r"passes each block twice.*leave one of them out"),
        ({"recipe": "lora"}, r"batch_norm is batch, but recipe lora does not use it"),
        ({"batch_norm": "none"}, r"batch_norm is 'none'; use one of frozen, batch"),
    ],
)
def test_what_cannot_be_is_refused(
    scratch: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        run(scratch, **changes)
    assert not Path(scratch["out"]).exists()


def test_several_processes_need_gpus(
    scratch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_towers, "world_size", lambda: 2)
    config = training_config.TrainConfig.from_mapping(scratch)
    with pytest.raises(InputError, match=r"over 2 processes, which torch does on GPUs only"):
        training_towers.check_batch_norms(load(SCRATCH), config, 3)


@pytest.mark.parametrize("kind", ["scratch", "timm-hf"])
def test_synchronised_norms_compute_as_before(
    kind: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """In evaluation mode, unfolded, with the activations that an EfficientNet's norms hold."""
    encoder = load(SCRATCH if kind == "scratch" else tiny_checkpoint(kind))
    pixels = torch.randint(0, 256, (3, 3, *encoder.config.image_size), dtype=torch.uint8)
    for norm in encoder.model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean.uniform_(-0.5, 0.5)
    before = encoder.encode_images(pixels)
    names = [name for name, _ in encoder.model.named_parameters()]
    synchronise_batch_norms(encoder.model)
    norms = [m for m in encoder.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms
    assert [name for name, _ in encoder.model.named_parameters()] == names
    torch.testing.assert_close(encoder.encode_images(pixels), before, atol=1e-5, rtol=0)
