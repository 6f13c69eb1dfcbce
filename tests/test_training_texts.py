"""Learning from captions alone: the loss, dropout, hard negatives, and whole runs."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F  # noqa: N812
from test_losses_labels_views import E1, E2, unit_rows
from test_training_choices import captioned
from test_training_resume import final_state, train_with_a_kill
from training_runs import metrics, run, weights

from clipkit import load
from clipkit.errors import DatasetError, InputError
from clipkit.losses.texts import in_batch
from clipkit.training import TrainConfig
from clipkit.training.config import method_and_loss_options
from clipkit.training.data import CaptionedPictures, Plan
from clipkit.training.gradient_cache import ChunkedTower, backward
from clipkit.training.inputs import Batch
from clipkit.training.methods.method import Setup
from clipkit.training.methods.texts import (
    Passages,
    SimCse,
    TextDropout,
    hard_negatives,
    no_negatives,
)
from clipkit.training.registry import METHODS, PassageOptions, SimCseOptions
from clipkit.training.run_folder import RunFolder
from clipkit.training.towers import TrainableTowers

EYE = torch.stack([E1, E2])


# ---- the loss


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # own score 1, the other's 0
        (in_batch(EYE, EYE, temperature=1.0), math.log1p(math.exp(-1))),
        # a hard negative E1 for both: of e, 1, e and of 1, e, 1
        (
            in_batch(EYE, torch.stack([E1, E2, E1]), temperature=1.0),
            (math.log(2 + 1 / math.e) + math.log(1 + 2 / math.e)) / 2,
        ),
        # the first query leaves the other's passage out: nothing is left but its own
        (
            in_batch(EYE, EYE, temperature=1.0, left_out=torch.tensor([[0, 1]])),
            math.log1p(math.exp(-1)) / 2,
        ),
        (in_batch(EYE, EYE, temperature=0.5), math.log1p(math.exp(-2))),
    ],
)
def test_the_loss_by_hand(value: torch.Tensor, expected: float) -> None:
    assert value.item() == pytest.approx(expected)


def test_the_gradient_of_the_loss() -> None:
    left_out = torch.tensor([[0, 1], [2, 4]])

    def value(rows: torch.Tensor) -> torch.Tensor:
        rows = F.normalize(rows, dim=1)
        return in_batch(rows[:3], rows[3:], temperature=0.3, left_out=left_out)

    assert torch.autograd.gradcheck(value, (unit_rows(8, 4, 0).requires_grad_(),))


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="2 queries have 1 passages; each needs its own"):
        in_batch(EYE, EYE[:1])
    with pytest.raises(InputError, match="must be"):
        in_batch(EYE, EYE[:, :1])


def test_sentence_transformers_agrees() -> None:
    losses = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses",
        reason="the extra `bench` is not installed",
    )
    rows = unit_rows(9, 5, 1).float()
    peer = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)
    expected = peer.compute_loss_from_embeddings([rows[:3], rows[3:6], rows[6:]], None)
    assert in_batch(rows[:3], rows[3:]).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- what is no negative


def test_captions_of_the_own_picture_and_equal_ones_are_no_negatives() -> None:
    """Pictures 0 and 1 share "b". Of query 0 (texts 0, 1), texts 1 and 2 in the batch: its own passage
    at place 0 stays; at place 1 the shared one; at place 3 its own again."""
    data = captioned([["a", "b"], ["b", "c"], ["d", "e"]])
    b, c, e, a = (data.texts.index(word) for word in "bcea")
    pairs = no_negatives(data, np.array([0, 1, 2]), np.array([b, c, e, a]))
    assert sorted(map(tuple, pairs.tolist())) == [(0, 3), (1, 0)]
    assert no_negatives(data, np.array([2]), np.array([e])).shape == (0, 2)


CROWD = [
    ["a dog runs on grass", "the dog is fast"],
    ["a dog runs on sand", "a dog by the sea"],
    ["A dog runs on grass.", "green grass"],
    ["two cats sleep", "sleeping cats"],
]


def negatives(data: CaptionedPictures, count: int) -> dict[str, list[str]]:
    rows = hard_negatives(data, count, lambda *_: None, threading.Event())
    return {
        text: [data.texts[n] for n in row if n >= 0]
        for text, row in zip(data.texts, rows, strict=True)
    }


def test_hard_negatives_share_words_and_belong_to_another_picture() -> None:
    """Pictures 0 and 2 have a caption of one meaning: neither's captions are negatives of it. Fails for
    BM25's best hit as it comes, which is the caption itself, and then its twin."""
    pytest.importorskip("bm25s", reason="the extra `passages` is not installed")
    data = captioned(CROWD)
    meanings = data.meanings.copy()
    meanings[data.texts.index("A dog runs on grass.")] = meanings[0]
    hard = negatives(replace(data, meanings=meanings), 2)
    assert hard["a dog runs on grass"] == ["a dog runs on sand", "a dog by the sea"]
    assert hard["A dog runs on grass."] == ["a dog runs on sand", "a dog by the sea"]
    assert hard["a dog runs on sand"][0] in ("a dog runs on grass", "A dog runs on grass.")
    assert hard["two cats sleep"] == []  # its words are in its picture's captions alone


def test_spellings_of_one_caption_do_not_crowd_out_its_negatives() -> None:
    """Six spellings of one caption come before the one negative. Fails for a search as deep as there
    are meanings, not texts."""
    pytest.importorskip("bm25s", reason="the extra `passages` is not installed")
    spelt = ["a dog runs", "A dog runs", "a Dog runs", "a dog Runs", "A Dog runs", "a Dog Runs"]
    data = captioned([spelt, ["a dog runs far away"], ["two cats sleep"], ["it rains"]])
    meanings = np.where([text in spelt for text in data.texts], 99, np.arange(len(data.texts)))
    data = replace(data, meanings=meanings)
    assert negatives(data, 1)["a dog runs"] == ["a dog runs far away"]


def test_a_stop_ends_the_search_for_hard_negatives() -> None:
    pytest.importorskip("bm25s", reason="the extra `passages` is not installed")
    from clipkit.training.frozen_towers import FeaturesStopped

    stop = threading.Event()
    stop.set()
    with pytest.raises(FeaturesStopped):
        hard_negatives(captioned(CROWD), 2, lambda *_: None, stop)


def test_without_bm25s_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'clipkit\[passages\]', or leave them out"):
        hard_negatives(captioned(CROWD), 2, lambda *_: None, threading.Event())


# ---- batches


@pytest.fixture
def towers(small_towers: Path) -> TrainableTowers:
    encoder = load(str(small_towers), device="cpu", precision="float32")
    return TrainableTowers(encoder, loss=None)


def setup(towers: TrainableTowers, data: CaptionedPictures, method: str, **options: Any) -> Setup:
    config = TrainConfig.from_mapping({"data": "nowhere", "method": method, **options})
    return Setup(config, None, config.method_options(), {}, towers, data, 4, 10)


def test_a_query_brings_its_passage_and_one_of_its_hard_negatives(towers: TrainableTowers) -> None:
    """Drawn anew each epoch; a text without candidates stands in for itself."""
    data = captioned([[f"{i}a", f"{i}b", f"{i}c"] for i in range(8)])
    method = Passages(setup(towers, data, "passages"))
    hard = np.full((len(data.texts), 3), -1)
    hard[:12] = (np.arange(12)[:, None] + [6, 9, 12]) % 24
    method._hard = hard
    fixed = type("Fixed", (), {"data": data})()

    def planned(epoch: int) -> list[Plan]:
        return list(method.plans(fixed, epoch=epoch, batch=4, searching=lambda: None))

    drawn = []
    for epoch in range(4):
        for plan in planned(epoch):
            queries, passages, negatives = plan.texts
            assert (queries != passages).all()
            for row, picture in enumerate(plan.pictures):
                assert queries[row] in data.owned[picture] and passages[row] in data.owned[picture]
                candidates = hard[queries[row]] if queries[row] < 12 else [queries[row]]
                assert negatives[row] in candidates
            drawn.append(tuple((negatives - queries)[queries < 12]))
    assert len(set(drawn)) > 4
    assert (planned(2)[1].texts == planned(2)[1].texts).all()


def test_pictures_need_two_captions(towers: TrainableTowers) -> None:
    data = captioned([["a"], ["b", "c"], ["d"]])
    with pytest.raises(DatasetError, match="1 training pictures of nowhere have two captions"):
        Passages(setup(towers, data, "passages"))
    with pytest.raises(DatasetError, match="have two captions"):
        SimCse(setup(towers, data, "simcse", captions="other"))
    SimCse(setup(towers, data, "simcse"))


# ---- dropout


TEXTS = ["red cake", "green car", "blue dog and cat", "penguin"]


def batch_of(towers: TrainableTowers, data: CaptionedPictures, rows: int = 1) -> Batch:
    texts = np.array([[data.owned[i][r] for i in range(len(data))] for r in range(rows)])
    plan = Plan(0, 0, np.arange(len(data)), texts)
    tokens = [towers.encoder.tokenize([data.texts[t] for t in row]) for row in texts]
    return Batch(plan, data, (), tokens, [torch.tensor([3, 0, 1, 2])] * rows)


def test_two_passes_differ_in_training_alone(towers: TrainableTowers) -> None:
    data = captioned([[text] for text in TEXTS])
    method, batch = SimCse(setup(towers, data, "simcse")), batch_of(towers, data)
    towers.mode(False)
    before = towers.texts(batch.texts[0])
    towers.mode(True)
    first, second = (view.encode(view.rows[torch.arange(4)]) for view in method.views(batch))
    assert not torch.allclose(first, second) and not torch.allclose(first, before)
    towers.mode(False)
    assert torch.equal(towers.texts(batch.texts[0]), before)
    assert not any(module.training for module in towers.model.modules())


def test_dropout_of_zero_changes_nothing(towers: TrainableTowers) -> None:
    data = captioned([[text] for text in TEXTS])
    method = SimCse(setup(towers, data, "simcse", dropout_rate=0.0))
    batch = batch_of(towers, data)
    first, second = (view.encode(view.rows[torch.arange(4)]) for view in method.views(batch))
    assert torch.equal(first, second)


class Block(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + 2


def test_a_tower_without_dropout_layers_drops_what_a_block_adds() -> None:
    """The block adds 2: dropped with 0.25, else divided by 0.75. The input itself always stays. The
    picture tower's block is left alone."""
    model = torch.nn.ModuleDict(
        {
            "visual": torch.nn.ModuleDict({"resblocks": torch.nn.Sequential(Block())}),
            "transformer": torch.nn.ModuleDict({"resblocks": torch.nn.Sequential(Block())}),
        }
    ).eval()
    dropout = TextDropout(model, 0.25)
    visual, text = model["visual"]["resblocks"], model["transformer"]["resblocks"]  # type: ignore[index]
    rows = torch.ones(40, 50)
    assert (text(rows) == 3).all()
    dropout.start()
    assert (visual(rows) == 3).all()
    values, counts = text(rows).unique(return_counts=True)
    assert values.tolist() == pytest.approx([1, 1 + 2 / 0.75])
    assert counts[0] / 2000 == pytest.approx(0.25, abs=0.05)  # standard error 0.01
    model.eval()
    assert (text(rows) == 3).all()


@pytest.mark.parametrize("kind", ["small", "vit"])
def test_gradients_in_chunks_are_those_of_the_same_masks(
    kind: str, towers: TrainableTowers, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Both passes of a chunk draw the same masks, in a tower with dropout layers and in one without.
    Against one graph over all chunks, drawn in the same order."""
    if kind == "vit":
        folder = str(tiny_checkpoint("vit"))
        encoder = load(folder, device="cpu", precision="float32")
        towers = TrainableTowers(encoder, loss=None)
    towers.model.double().requires_grad_(True)
    data = captioned([[text] for text in TEXTS])
    method, batch = SimCse(setup(towers, data, "simcse")), batch_of(towers, data)
    towers.mode(True)
    views, order = method.views(batch), torch.tensor([3, 0, 1, 2])

    def gradients() -> dict[str, torch.Tensor]:
        named = towers.model.named_parameters()
        result = {n: p.grad.clone() for n, p in named if p.grad is not None}
        towers.model.zero_grad()
        return result

    torch.manual_seed(0)
    columns = []
    for view in views:
        rows = torch.cat([view.encode(view.rows[part]) for part in torch.split(order, 3)])
        columns.append(rows[torch.argsort(order)])
    expected_loss = method.loss(columns, batch)
    expected_loss.backward()  # type: ignore[no-untyped-call]
    expected = gradients()
    torch.manual_seed(0)
    chunked = [ChunkedTower(v.encode, v.rows, chunk=3, order=v.order) for v in views]
    loss, _ = backward(
        chunked, lambda rows: method.loss(rows, batch), gather=lambda r: (r, slice(0, 4))
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    got = gradients()
    assert got.keys() == expected.keys() and any(v.abs().max() > 0 for v in got.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_texts_kept_near_the_start_pay_for_their_cosine(towers: TrainableTowers) -> None:
    """A row at right angles to its start costs keep_space, one at it nothing: half of 0.5."""
    data = captioned([["a"], ["b"]])
    method = SimCse(setup(towers, data, "simcse", keep_space=0.5, temperature=1.0))
    method._start = torch.stack([E1, E1])
    batch = Batch(Plan(0, 0, np.array([0, 1]), np.array([[0, 1]])), data, (), [], [])
    value = method.loss([EYE, EYE], batch)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.25)


# ---- whole runs


CHANGES: dict[str, dict[str, Any]] = {
    "simcse": {"method": "simcse", "keep_space": 0.5, "drift": 0.05},
    "simcse-lora": {"method": "simcse", "recipe": "lora", "captions": "other"},
    "passages": {"method": "passages", "bm25_negatives": 0, "dropout": True},
    "triplet": {"method": "simcse", "captions": "triplet"},
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_killed_run_ends_as_if_it_had_not_been_and_leaves_pictures_alone(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every bit of weights, optimizer, mean and random states; the picture tower is the start's."""
    if changes.get("captions") == "triplet":
        pytest.importorskip("bm25s", reason="the extra `passages` is not installed")
    options |= {"checkpoint_every": 1, "keep": "last", **changes}
    whole = run(options)
    config = TrainConfig.from_mapping({**options, "out": tmp_path / "again"})
    again = train_with_a_kill(config, tmp_path / "again" / "run", 3)
    expected, got = final_state(whole.folder), final_state(again.folder)
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        same = torch.equal(got[path], value) if isinstance(value, torch.Tensor) else None
        assert got[path] == value if same is None else same, path
    assert "the picture side is that of the starting model, so an index needs no new vectors" in (
        whole.notes
    )
    start = weights(Path(options["start"]))
    changed = {n for n, value in weights(whole.checkpoint).items() if not value.equal(start[n])}
    assert changed and not any(name.startswith("visual.") for name in changed)
    lines = [line for line in metrics(whole.folder) if "validation_loss" in line]
    assert all(0 < line["picture_recall"] <= 1 for line in lines)
    assert whole.after is not None and set(whole.after) == {
        f"text_to_text/R@{k}" for k in (1, 5, 10)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simcse", "crop": 0.3}, "crop is 0.3, but method simcse does not use it"),
        ({"method": "passages", "flip": False}, "flip is False, but method passages does not"),
        (
            {"method": "simcse", "recipe": "heads"},
            "heads cannot learn by method simcse; use recipe",
        ),
        ({"method": "simcse", "bm25_negatives": 3}, "method simcse has no such option"),
        ({"method": "simcse", "loss": "supcon"}, "loss"),
        ({"per_class": 3}, "method pairs has no such option"),
        ({"method": "labels", "per_class": 1}, "per_class is 1"),
        ({"method": "labels", "loss": "siglip"}, "loss"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_mapping({"data": "nowhere", **options})


def test_an_option_that_is_another_ones_default_counts() -> None:
    """Fails for the version that compared with the default of whichever came last: 0.05 and 0.1 were
    dropped for the losses whose own default is another."""
    for loss in ("supcon", "softnn", "normsoftmax"):
        for temperature in (0.05, 0.1):
            given = {"data": "nowhere", "method": "labels", "loss": loss}
            config = TrainConfig.from_mapping({**given, "temperature": temperature})
            assert config.loss_options(loss)["temperature"] == temperature
    item, kind = method_and_loss_options()["temperature"]
    assert item.default is MISSING and item.name == "temperature" and kind is float


def test_the_methods_name_their_papers() -> None:
    assert {type(METHODS[n].options()) for n in ("simcse", "passages")} == {
        SimCseOptions,
        PassageOptions,
    }
    for name in ("simcse", "passages", "labels"):
        assert "arXiv" in METHODS[name].summary


def one_of_two(rank: int, folder: str, options: dict[str, Any]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run(options, name="two")
    dist.destroy_process_group()


@pytest.mark.end_to_end
@pytest.mark.slow  # three processes import the towers' libraries
@pytest.mark.parametrize("method", ["passages", "simcse"])
def test_two_processes_equal_one(options: dict[str, Any], tmp_path: Path, method: str) -> None:
    """Without dropout, of which each process draws its own: SimCSE's pair is another caption."""
    options |= {"method": method, "keep_space": 0.5, "epochs": 1, "chunk": 2, "interpolate": False}
    if method == "passages":
        pytest.importorskip("bm25s", reason="the extra `passages` is not installed")
    else:
        options |= {"captions": "other", "dropout_rate": 0.0}
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), options), nprocs=2)
    run(options, name="one")
    one, two = (RunFolder(tmp_path / "runs" / name).load() for name in ("one", "two"))
    assert one is not None and two is not None
    start = weights(Path(options["start"]))
    for name, tensor in one["parameters"].items():
        # AdamW's first steps divide a gradient by its size: where it is about 0, so is its sign.
        # A key's bias has none at all: every score of a query gets the same.
        moved = (tensor - start[name]).abs().mean().clamp(min=1e-4)
        assert (two["parameters"][name] - tensor).abs().mean() <= 0.02 * moved, name
