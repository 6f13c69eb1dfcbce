"""A queue of keys and a memory bank: what they hold, by hand; whole runs with them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from test_training_choices import captioned
from test_training_resume import final_state, train_with_a_kill
from training_runs import metrics, run

from clipkit.losses.views import queued
from clipkit.training.config import TrainConfig
from clipkit.training.data import Plan
from clipkit.training.inputs import Batch
from clipkit.training.methods.method import Method, Setup
from clipkit.training.methods.momentum import KeyQueue
from clipkit.training.methods.queue import CaptionOwners
from clipkit.training.registry import METHODS
from clipkit.training.run_folder import RunFolder

CPU = torch.device("cpu")
E1, E2 = torch.eye(2)


def numbered(first: int, count: int) -> torch.Tensor:
    """Rows (first, first), (first + 1, first + 1), ..."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, 2)


# ---- the queue


def test_a_queue_after_three_steps() -> None:
    """Five places, two keys a step: the fifth key takes the last place, the sixth the first one's."""
    queue = KeyQueue(5, [2], numbers=1, device=CPU)
    assert queue.rows[0].shape == (0, 2) and queue.of.shape == (1, 0)
    assert queue.metrics(0) == {"queue_fill": 0.0, "queue_age": 0.0}
    held, ages, fills = [], [], []
    for step in (1, 2, 3):
        keys = numbered(2 * step - 1, 2)
        queue.add([keys], 10 * keys[:, 0].long()[None], step=step)
        held.append(queue.rows[0][:, 0].tolist())
        ages.append(queue.metrics(step)["queue_age"])
        fills.append(queue.metrics(step)["queue_fill"])
    assert held == [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [6.0, 2.0, 3.0, 4.0, 5.0]]
    assert queue.of.tolist() == [[60, 20, 30, 40, 50]]
    assert ages == [0.0, 1.0, 2.0]  # key 2 is of step 1
    assert fills == [0.4, 0.8, 1.0]
    queue.add([numbered(7, 2)], torch.zeros(1, 2, dtype=torch.int64), step=4)
    assert queue.metrics(4)["queue_age"] == 2.0  # key 4 is of step 2; 2 and 3 have left


def test_of_more_keys_than_places_the_last_ones_are_held() -> None:
    queue = KeyQueue(3, [2], numbers=1, device=CPU)
    queue.add([numbered(1, 7)], torch.arange(1, 8)[None], step=1)
    assert sorted(queue.of[0].tolist()) == [5, 6, 7] == sorted(queue.rows[0][:, 0].tolist())
    none = KeyQueue(0, [2], numbers=1, device=CPU)
    none.add([numbered(1, 2)], torch.arange(2)[None], step=1)
    assert none.rows[0].shape == (0, 2)


def test_a_saved_queue_goes_on_where_it_was() -> None:
    first, second = (KeyQueue(5, [2, 3], numbers=2, device=CPU) for _ in range(2))

    def add(queue: KeyQueue, step: int) -> None:
        keys = numbered(3 * step, 3)
        of = torch.stack([keys[:, 0].long(), -keys[:, 0].long()])
        queue.add([keys, keys[:, :1].repeat(1, 3)], of, step=step)

    for step in (1, 2):
        add(first, step)
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        add(queue, 3)
    assert first.metrics(3) == second.metrics(3)
    for one, other in zip([*first.rows, first.of], [*second.rows, second.of], strict=True):
        assert torch.equal(one, other)


# ---- pairs


class Fixed:
    """Towers that pass on two-dimensional rows, times a weight each that is trained."""

    class Encoder:
        dim = 2
        preferred_batch = 4

    encoder = Encoder()
    device = CPU

    def __init__(self) -> None:
        self.model = torch.nn.Module()
        self.model.visual = torch.nn.Linear(2, 2, bias=False)
        self.model.text = torch.nn.Linear(2, 2, bias=False)
        for linear in (self.model.visual, self.model.text):
            torch.nn.init.eye_(linear.weight)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        self.logit_bias = None

    def mode(self, training: bool) -> None: ...

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.visual(inputs), dim=1)

    def texts(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.text(inputs), dim=1)


# Pictures 0 and 2 share "a dog"; 1 and 3 share nothing.
DATA = captioned([["a dog"], ["a cat"], ["a dog", "a pet"], ["a car"]])


def made(method: str, towers: Any, *, batch: int = 2, **options: Any) -> Method:
    config = TrainConfig.from_mapping({"data": "d", "method": method, **options})
    chosen = config.method_options()
    setup = Setup(config, None, chosen, {}, towers, DATA, batch, 9)
    result = METHODS[method](setup)
    result.prepare(None, lambda *_: None, threading.Event())  # type: ignore[arg-type]
    return result


def batch_of(pictures: list[int], texts: list[int], rows: torch.Tensor) -> Batch:
    plan = Plan(0, 0, np.array(pictures), np.array([texts]))
    return Batch(plan, DATA, (rows,), [rows], [torch.arange(len(rows))])


def step(method: Method, batch: Batch, number: int) -> torch.Tensor:
    rows = [view.encode(view.rows) for view in method.views(batch)]  # type: ignore[arg-type]
    loss = method.loss(rows, batch)
    method.after_step([r.detach() for r in rows], number)
    return loss


def test_the_loss_with_a_queue_by_hand() -> None:
    """Temperature 1. Step 1: pictures 2 and 3 with "a dog" and "a car" at e1 and e2, so the queue has
    them. Step 2: picture 0, "a dog", at e1, and 1, "a cat", at e2.

    Step 1, no queue: own score 1, the other's 0: log(e + 1) - 1.
    Step 2: picture 0 has its own caption with 1, "a cat" with 0, "a car" with 0; "a dog" of picture 2
    is left out: log(e + 2) - 1. Picture 1: own 1, others 0, 0 and "a car" 1: log(2e + 2) - 1. The
    captions the same. Fails without the mask, log(2e + 2) - 1 for picture 0 too, and without a queue.
    """
    method = made("queue", Fixed(), queue_size=2)
    rows = torch.stack([E1, E2])
    first = step(method, batch_of([2, 3], [0, 3], rows), 1)
    assert first.item() == pytest.approx(math.log(math.e + 1) - 1)
    second = step(method, batch_of([0, 1], [0, 1], rows), 2)
    expected = (math.log(math.e + 2) + math.log(2 * math.e + 2)) / 2 - 1
    assert second.item() == pytest.approx(expected)
    assert method.metrics() == {
        "logit_scale": 1.0,
        "positive_cosine": pytest.approx(1.0),
        "queue_fill": 1.0,
        "queue_age": 0.0,  # of two places, both are of step 2
    }


def test_a_pictures_own_earlier_keys_are_left_out() -> None:
    """The same two pictures again, picture 2 with its other caption: own score 1; 0 of the other
    picture, and 0 of its earlier key: log(e + 2) - 1. Fails with it: log(2e + 2) - 1."""
    method = made("queue", Fixed(), queue_size=2)
    rows = torch.stack([E1, E2])
    step(method, batch_of([2, 3], [0, 3], rows), 1)
    second = step(method, batch_of([2, 3], [2, 3], rows), 2)
    assert second.item() == pytest.approx(math.log(math.e + 2) - 1)


def test_only_queries_and_the_scale_get_gradients() -> None:
    towers = Fixed()
    method = made("queue", towers, queue_size=2)
    rows = torch.stack([E1, F.normalize(E1 + E2, dim=0)])
    step(method, batch_of([2, 3], [0, 3], rows), 1)
    step(method, batch_of([0, 1], [0, 1], rows), 2).backward()
    image, text = towers.model.visual.weight.grad, towers.model.text.weight.grad
    assert image is not None and text is not None and 0 < image.norm() < math.inf > text.norm() > 0
    assert towers.logit_scale.grad is not None and 0 < abs(towers.logit_scale.grad) < math.inf


def test_keys_follow_the_towers_slowly() -> None:
    """m = 0.9; the image tower's weight, the identity, is set to a turn by 90 degrees: after one
    update the key of e1 is (0.9, 0.1) / |.|, which the next step compares captions with."""
    towers = Fixed()
    method = made("queue", towers, queue_size=2, momentum=0.9)
    towers.model.visual.weight.data = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    batch = batch_of([0, 1], [0, 1], torch.stack([E1, E2]))
    step(method, batch, 1)
    keys = [view for view in method.views(batch) if view.side is None]
    assert len(keys) == 2
    expected = F.normalize(torch.tensor([0.9, 0.1]), dim=0)
    torch.testing.assert_close(keys[0].encode(E1[None])[0], expected)
    torch.testing.assert_close(towers.images(E1[None])[0], E2)


def test_a_tower_that_is_not_trained_is_passed_once() -> None:
    towers = Fixed()
    towers.model.visual.requires_grad_(False)
    method = made("queue", towers, queue_size=2)
    batch = batch_of([2, 3], [0, 3], torch.stack([E1, E2]))
    assert [view.side for view in method.views(batch)] == ["image", "text", None]
    assert step(method, batch, 1).item() == pytest.approx(math.log(math.e + 1) - 1)


def test_the_queue_is_no_longer_than_the_other_pictures() -> None:
    method = made("queue", Fixed(), queue_size=4096)
    rows = torch.stack([E1, E2])
    for number in (1, 2, 3):
        step(method, batch_of([2, 3], [0, 3], rows), number)
    assert method.state_dict()["queue"]["of"].shape == (2, 2)


def test_who_has_a_caption() -> None:
    """Meanings 0 "a dog", 1 "a cat", 2 "a pet", 3 "a car"; picture 2 has 0 and 2."""
    owners = CaptionOwners(DATA, CPU)
    of_pictures = owners.of_pictures(np.array([0, 2, 3]), np.array([0, 1, 2]))
    assert of_pictures.tolist() == [[True, False, False], [True, False, True], [False] * 3]
    of_meanings = owners.of_meanings(np.array([0, 2]), np.array([0, 1, 2, 3, 2]))
    assert of_meanings.tolist() == [
        [True, False, True, False, True],
        [False, False, True, False, True],
    ]


def test_masks_of_many_agree_with_sets() -> None:
    rng = np.random.default_rng(0)
    data = captioned(
        [[f"c{n}" for n in rng.choice(20, rng.integers(1, 6), replace=False)] for _ in range(30)]
    )
    owners = CaptionOwners(data, CPU)
    pictures, meanings = rng.integers(0, 30, 12), rng.integers(0, len(data.texts), 40)
    owned = [{*data.meanings[own].tolist()} for own in data.owned]
    expected = [[m in owned[p] for m in meanings] for p in pictures]
    assert owners.of_pictures(pictures, meanings).tolist() == expected
    assert owners.of_meanings(meanings, pictures).T.tolist() == expected


def test_the_masked_loss_by_hand() -> None:
    """The key with 1, the queue with 0 (left out) and 1: log(2e) - 1. A temperature that is a tensor
    gets its gradient: with a factor f of the cosines, log(2 exp f) - f does not change. Fails for
    a mask below the division, whose gradient is NaN."""
    queue, same = torch.stack([E2, E1]), torch.tensor([[True, False]])
    scale = torch.zeros((), requires_grad=True)
    loss = queued(E1[None], E1[None], queue, temperature=(-scale).exp(), same=same)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert scale.grad is not None and scale.grad.item() == pytest.approx(0.0, abs=1e-6)
    nothing = queued(E1[None], E1[None], queue, same=torch.ones(1, 2, dtype=torch.bool))
    assert nothing.item() == 0.0


def test_lightly_agrees_on_the_queue() -> None:
    loss = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    generator = torch.Generator().manual_seed(3)
    queries, keys, queue = (
        F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (6, 6, 32)
    )
    peer = loss.NTXentLoss(temperature=0.2, memory_bank_size=(32, 8))
    peer.memory_bank.bank = queue.clone()
    assert queued(queries, keys, queue).item() == pytest.approx(
        peer(queries, keys).item(), rel=1e-5
    )


# ---- views of pictures


class FixedViews(Fixed):
    """As TrainableTowers, whose features have no unit length."""

    def image_features(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.visual(inputs)


@pytest.fixture
def fixed_views(monkeypatch: pytest.MonkeyPatch) -> Callable[[], FixedViews]:
    monkeypatch.setattr("clipkit.training.methods.views.TrainableTowers", FixedViews)
    monkeypatch.setattr("clipkit.training.methods.views.StrongView", lambda *_, **__: None)
    return FixedViews


def views_of(pictures: list[int], *rows: torch.Tensor) -> Batch:
    return Batch(Plan(0, 0, np.array(pictures), np.empty((0, 2), np.int64)), DATA, rows, [], [])


def test_moco_by_hand(fixed_views: Callable[[], FixedViews]) -> None:
    """Temperature 1, no head. Step 1: no queue, so the loss is 0. Step 2: other pictures with queries
    e1, e2, keys e1, e2 and a queue of e1, e2: own 1, queue 1 and 0: log(2e + 1) - 1. Step 3: the same
    pictures again, whose own keys are left out: own 1, the other's 0: log(e + 1) - 1."""
    options = {"projection_layers": 0, "temperature": 1.0, "queue_size": 2}
    method = made("moco", fixed_views(), **options)
    rows = torch.stack([E1, E2])
    losses = [
        step(method, views_of(pictures, rows, rows), number).item()
        for number, pictures in enumerate(([0, 1], [2, 3], [2, 3]), 1)
    ]
    second, third = math.log(2 * math.e + 1) - 1, math.log(math.e + 1) - 1
    assert losses == pytest.approx([0.0, second, third], abs=1e-6)
    assert method.metrics()["queue_fill"] == 1.0
    assert method.metrics()["projection_variance"] == pytest.approx(0.5)  # of e1 and e2


def test_mocos_keys_are_of_the_other_view(fixed_views: Callable[[], FixedViews]) -> None:
    """First views at e1, second ones at e2. With `symmetric` both are queries and both are keys."""
    batch = views_of([0, 1], E1.repeat(2, 1), E2.repeat(2, 1))
    for symmetric, expected in ((False, [E2]), (True, [E2, E1])):
        method = made("moco", fixed_views(), projection_layers=0, symmetric=symmetric)
        step(method, batch, 1)
        keys = method.state_dict()["queue"]["rows"][0]
        assert method.metrics()["positive_cosine"] == pytest.approx(0.0)
        assert torch.equal(keys, torch.stack(expected).repeat_interleave(2, 0)[-2:])


def test_a_memory_bank_by_hand(fixed_views: Callable[[], FixedViews]) -> None:
    """Rows keep 0.5: the row r of picture 0, seen at e1, becomes (r + e1) / |r + e1|. All four rows are
    drawn, the own one is left out among them."""
    options = {"projection_layers": 0, "temperature": 1.0}
    method = made("memory", fixed_views(), **options)
    bank = method.state_dict()["bank"].clone()
    assert bank.shape == (4, 2)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(4))
    loss = step(method, views_of([0, 3], torch.stack([E1, E2])), 1)
    scores = bank @ torch.stack([E1, E2]).T  # (4, 2)
    own = scores[[0, 3], [0, 1]]
    assert loss.item() == pytest.approx((scores.logsumexp(0) - own).mean().item(), rel=1e-5)
    expected = bank.clone()
    expected[0] = F.normalize(bank[0] + E1, dim=0)
    expected[3] = F.normalize(bank[3] + E2, dim=0)
    torch.testing.assert_close(method.state_dict()["bank"], expected)
    assert method.metrics()["bank_fill"] == 0.5


# ---- whole runs

RUNS: dict[str, dict[str, Any]] = {
    "queue-heads": {"method": "queue", "recipe": "heads", "queue_size": 5},
    "queue-lit": {"method": "queue", "recipe": "lit", "dropout": True, "queue_size": 8},
    "queue-lora": {"method": "queue", "recipe": "lora", "ema": 0.9},
    "moco": {"method": "moco", "queue_size": 5, "keep": "best"},
    "moco-batch-norm": {
        "method": "moco",
        "start": "scratch:cifar-resnet10-w16",
        "batch_norm": "batch",
        "chunk": 0,
    },
    "memory": {"method": "memory", "recipe": "lora", "bank_negatives": 4},
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Queue, bank and momentum too, every bit. Fails if one of them is not saved."""
    options |= {"checkpoint_every": 1, **changes}
    whole = run(options)
    expected = final_state(whole.folder)
    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", 4)
    got = final_state(again.folder)
    assert got.keys() == expected.keys() and again.steps == whole.steps == 6
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[path], value), path
        else:
            assert got[path] == value, path
    if "batch_norm" in changes:  # the keys' statistics lag behind the tower's
        name = "visual.trunk.bn1.running_mean"
        mean = expected[f"/method/momentum/{name}"]
        assert 0 < mean.norm() < 0.2 * expected[f"/parameters/{name}"].norm()
    names = {"bank_age", "bank_fill"} if changes["method"] == "memory" else {"queue_age"}
    assert names < metrics(whole.folder)[-2].keys() | metrics(whole.folder)[-1].keys()


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["queue-lora", "moco", "memory"])
def test_chunks_do_not_change_the_run(options: dict[str, Any], name: str) -> None:
    """Gradients and keys of chunks of 2 are those of the whole batch of 6."""
    options |= {**RUNS[name], "symmetric": True} if name == "moco" else RUNS[name]
    options |= {"epochs": 1}
    parts = [run({**options, "name": f"chunk{chunk}", "chunk": chunk}).folder for chunk in (2, 6)]
    equal(*parts)


def equal(one: Path, other: Path) -> None:
    """Compare the states of two runs, but for rounding.

    AdamW's first steps divide a gradient by its size: where it is about 0, so is its sign.
    """
    first, second = (RunFolder(folder).load() for folder in (one, other))
    assert first is not None and second is not None and first["history"]["step"] == 2
    for name, value in first["parameters"].items():
        torch.testing.assert_close(second["parameters"][name], value, rtol=0.05, atol=2e-4)
    held, other_held = first["method"], second["method"]
    if "bank" in held:
        torch.testing.assert_close(other_held["bank"], held["bank"], rtol=0, atol=5e-3)
        return
    for rows, others in zip(held["queue"]["rows"], other_held["queue"]["rows"], strict=True):
        torch.testing.assert_close(others, rows, rtol=0, atol=5e-3)
    assert torch.equal(other_held["queue"]["of"], held["queue"]["of"])


def trained(options: dict[str, Any], name: str) -> None:
    run({**options, "name": name, "epochs": 1, "chunk": 2, "workers": 1})


def trained_by_one_of_two(rank: int, folder: str, runs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for changes in runs:
        trained(changes, f"two-{changes['method']}")
    dist.destroy_process_group()


@pytest.mark.slow  # three processes import the towers' libraries
def test_two_processes_equal_one(options: dict[str, Any], tmp_path: Path) -> None:
    """Each holds the keys of all. Fails for a queue of a process's own keys."""
    names = ("queue-heads", "moco", "memory")
    runs = [{**options, **RUNS[name]} for name in names]
    runs[0]["feature_dropout"] = 0.0  # each process drops other values
    torch.multiprocessing.spawn(trained_by_one_of_two, (str(tmp_path), runs), nprocs=2)
    for changes in runs:
        trained(changes, f"one-{changes['method']}")
        folders = [tmp_path / "runs" / f"{n}-{changes['method']}" for n in ("one", "two")]
        equal(*folders)
