"""Two processes are one: the same gradients of towers, logit_scale and logit_bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file

from clipkit.errors import InputError
from clipkit.losses.pairs import siglip
from clipkit.training import distributed
from clipkit.training.config import TrainConfig
from clipkit.training.gradient_cache import ChunkedTower, backward
from clipkit.training.run_folder import RunFolder

pytestmark = pytest.mark.end_to_end

PAIRS = 8


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)
            )
            self.text = torch.nn.Linear(5, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-1.0))
        self.double()

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image(rows), dim=-1)

    def texts(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(rows), dim=-1)

    def loss(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return siglip(images, texts, self.logit_scale, self.logit_bias)

    def scalars(self) -> list[torch.nn.Parameter]:
        return [self.logit_scale, self.logit_bias]

    def towers(self) -> list[torch.nn.Parameter]:
        return [*self.image.parameters(), *self.text.parameters()]


def gradients(chunk: int) -> dict[str, torch.Tensor]:
    """Of the one batch that all processes share; each passes its own rows through the towers."""
    model = Pair()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(PAIRS, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randn(PAIRS, 5, generator=generator, dtype=torch.float64)
    own = distributed.own_slice(PAIRS)
    value, _ = backward(
        [
            ChunkedTower(model.images, pixels[own], chunk=chunk),
            ChunkedTower(model.texts, tokens[own], chunk=chunk),
        ],
        lambda rows: model.loss(*rows),
        gather=distributed.gather,
    )
    distributed.sum_gradients(model.towers(), model.scalars())
    return {"loss": value} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients_without_exact_gather() -> dict[str, torch.Tensor]:
    """The wrong version: what other processes sent is constant, and all gradients are averaged."""
    model = Pair()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(PAIRS, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randn(PAIRS, 5, generator=generator, dtype=torch.float64)
    own = distributed.own_slice(PAIRS)
    gathered = []
    for encode, rows in ((model.images, pixels[own]), (model.texts, tokens[own])):
        local = encode(rows)
        every = distributed.gather(local.detach())[0].clone()
        every[own] = local
        gathered.append(every)
    model.loss(gathered[0], gathered[1]).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= distributed.world_size()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def decayed() -> dict[str, torch.Tensor]:
    """Three weights of 1 after a step at rate 0.1 with decay 0.5: used by all, by the last process, by
    none."""
    weights = {name: torch.nn.Parameter(torch.ones(())) for name in ("all", "last", "none")}
    weights["all"].grad = torch.tensor(1.0 / distributed.world_size())
    if distributed.rank() == distributed.world_size() - 1:
        weights["last"].grad = torch.tensor(1.0)
    distributed.sum_gradients(weights.values(), [])
    torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.5).step()
    return {name: weight.detach() for name, weight in weights.items()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {
        "whole": gradients(chunk=100),
        "chunks": gradients(chunk=3),
        "wrong": gradients_without_exact_gather(),
        "uneven": distributed.gather_uneven(torch.full((rank + 1, 2), float(rank))),
        "collected": distributed.collect({"rank": rank}),
        "decayed": decayed(),
    }
    with pytest.raises(InputError, match=r"batch is 7, which 2 processes cannot share.*use 6"):
        distributed.own_slice(7)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Fails for the version that gathers without gradients and averages: there the towers' come
    out halved, and logit_scale's do not. Gradient caching works within each process.

    A first step of AdamW takes a weight of 1 with a gradient of 1 to 1 - 0.1 * 0.5 - 0.1 = 0.85. Without
    a gradient it stays; fails for the version that fills in zeros, whose decay makes it 0.95."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    expected = gradients(chunk=100)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for way in ("whole", "chunks"):
            assert results[way].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(results[way][name], gradient, msg=f"{way} {name}")
        torch.testing.assert_close(results["wrong"]["logit_scale"], expected["logit_scale"])
        torch.testing.assert_close(results["wrong"]["text.weight"], expected["text.weight"] / 2)
        assert results["uneven"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert results["collected"] == [{"rank": 0}, {"rank": 1}]
        for step in (results["decayed"], decayed()):
            assert {name: weight.item() for name, weight in step.items()} == pytest.approx(
                {"all": 0.85, "last": 0.85, "none": 1.0}
            )


def test_cuda_tensors_travel_by_nccl_and_cpu_tensors_by_gloo() -> None:
    """Fails for "nccl" alone, which cannot gather the CPU's tensors: features, counts, objects."""
    assert distributed.backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert distributed.backend(torch.device("cpu")) == "gloo"


def test_one_process_is_a_world_of_one() -> None:
    rows = torch.arange(6.0).view(3, 2)
    with distributed.joined(torch.device("cpu")):  # not started by torchrun: nothing to join
        assert distributed.world_size() == 1 and distributed.rank() == 0
    assert distributed.gather(rows) == (rows, slice(0, 3))
    assert distributed.gather_uneven(rows) is rows
    assert distributed.collect("x") == ["x"]


def trained(options: dict[str, Any], name: str) -> None:
    """A whole run of two steps: hard negatives, gradient caching, evaluation, export."""
    sizes = {"name": name, "epochs": 1, "batch": 6, "chunk": 2, "device": "cpu", "workers": 1}
    more = {"hard_negatives": 1, "tensorboard": False, "recipe": "full", "interpolate": False}
    from clipkit.training import train

    train(TrainConfig.from_mapping({**options, **sizes, **more}))


def trained_by_one_of_two(rank: int, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trained(options, "two")
    dist.destroy_process_group()


@pytest.mark.slow  # three processes import the towers' libraries
def test_a_whole_run_of_two_processes_equals_one(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], noise_picture: Callable[..., Image.Image]
) -> None:
    from test_training_data import write_split

    captions = [[f"caption {i} {c}" for c in range(2)] for i in range(13)]
    for split in ("train", "validation"):
        write_split(tmp_path / "data", captions, noise_picture, split=split)
    options = {
        "data": str(tmp_path / "data"),
        "out": str(tmp_path / "runs"),
        "start": str(tiny_checkpoint("vit")),
    }
    torch.multiprocessing.spawn(trained_by_one_of_two, (str(tmp_path), options), nprocs=2)
    trained(options, "one")
    one, two = (RunFolder(tmp_path / "runs" / name).load() for name in ("one", "two"))
    assert one is not None and two is not None
    assert one["history"]["step"] == two["history"]["step"] == 2
    start = load_file(Path(options["start"]) / "open_clip_model.safetensors")
    for name, tensor in one["parameters"].items():
        # AdamW's first steps divide a gradient by its size: where it is about 0, so is its sign.
        moved = (tensor - start[name]).abs().mean()
        assert (two["parameters"][name] - tensor).abs().mean() <= 0.02 * moved, name
    assert one["parameters"]["visual.proj"].ne(start["visual.proj"]).any()
    assert one["history"]["start"]["metrics"] == two["history"]["start"]["metrics"]
