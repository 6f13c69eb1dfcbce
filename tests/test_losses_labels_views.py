"""Losses over labels and over two views: values by hand, gradients, and agreement with peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipkit.errors import InputError
from clipkit.losses import LOSSES, losses_of
from clipkit.losses.labels import (
    contrastive,
    lifted_structure,
    n_pair,
    norm_softmax,
    soft_nearest_neighbour,
    sup_con,
    triplet,
)
from clipkit.losses.views import cosine_regression, nt_xent, queued, relational, teacher_contrast

E1, E2 = torch.eye(2, dtype=torch.float64)
TWO_AND_TWO = torch.tensor([0, 0, 1, 1])
TIGHT = torch.stack([E1, E1, E2, E2])  # of one label: distance 0; of two: the root of 2
MIXED = torch.stack([E1, E2, E1, E2])  # of one label: the root of 2; of two: 0 and the root of 2
ROOT = math.sqrt(2)
APPROX = {"abs": 1e-5}  # distances are at least 1e-6


def unit_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # positives at 0; negatives at 1.414, 0.586 inside of a margin of 2
        (contrastive(TIGHT, TWO_AND_TWO, margin=2.0), (2 - ROOT) ** 2),
        # positives at 1.414; of two negatives one at 0, one beyond a margin of 1
        (contrastive(MIXED, TWO_AND_TWO, margin=1.0), 2 + 1 / 2),
        (triplet(TIGHT, TWO_AND_TWO, margin=1.5, mining="all"), 1.5 - ROOT),
        (triplet(TIGHT, TWO_AND_TWO, margin=1.5, mining="semihard"), 1.5 - ROOT),
        (triplet(TIGHT, TWO_AND_TWO, margin=1.5, mining="hard"), 1.5 - ROOT),
        (triplet(TIGHT, TWO_AND_TWO, margin=1.0, mining="all"), 0.0),
        # negatives at 0 and as far as the positive
        (triplet(MIXED, TWO_AND_TWO, margin=0.2, mining="all"), (ROOT + 0.2 + 0.2) / 2),
        (triplet(MIXED, TWO_AND_TWO, margin=0.2, mining="semihard"), 0.0),
        (triplet(MIXED, TWO_AND_TWO, margin=0.2, mining="hard"), ROOT + 0.2),
        # own score 1, the other label's 0
        (n_pair(TIGHT, TWO_AND_TWO, scale=1.0), math.log1p(math.exp(-1))),
        # one positive with score 1, two negatives with 0
        (sup_con(TIGHT, TWO_AND_TWO, temperature=1.0), math.log(1 + 2 / math.e)),
        (sup_con(TIGHT, TWO_AND_TWO, temperature=1.0, inside=True), math.log(1 + 2 / math.e)),
        # three of one label. E1: positives with score 1 and 0 of e + 1; E2: two with 0 of 2
        (
            sup_con(TIGHT[:3], torch.zeros(3, dtype=torch.long), temperature=1.0),
            (2 * (math.log(math.e + 1) - 0.5) + math.log(2)) / 3,
        ),
        # the mean of the shares inside is 1/2 for each: (e + 1) / (e + 1) / 2
        (
            sup_con(TIGHT[:3], torch.zeros(3, dtype=torch.long), temperature=1.0, inside=True),
            math.log(2),
        ),
        # four negatives of the pair, each exp(1 - 1.414)
        (lifted_structure(TIGHT, TWO_AND_TWO, margin=1.0), (math.log(4) + 1 - ROOT) ** 2 / 2),
        # squared distances: own 0, two others 2
        (soft_nearest_neighbour(TIGHT, TWO_AND_TWO, temperature=1.0), math.log1p(2 * math.exp(-2))),
        # each row's class 1, the other 0; proxies of any length
        (
            norm_softmax(TIGHT, TWO_AND_TWO, 3 * torch.stack([E1, E2]), temperature=1.0),
            math.log1p(math.exp(-1)),
        ),
        # the other view with score 1, two others with 0
        (nt_xent(TIGHT[1:3], TIGHT[1:3], temperature=1.0), math.log(1 + 2 / math.e)),
        (nt_xent(TIGHT[1:3], TIGHT[1:3], temperature=1.0, decoupled=True), math.log(2) - 1),
        # the key with 1, the queue with 0 and 1
        (queued(E1[None], E1[None], MIXED[:2], temperature=1.0), math.log(2 + 1 / math.e)),
        (cosine_regression(TIGHT[:2], MIXED[:2]), 1.0),  # distances squared 0 and 2
        # distances 1, 3, 2 by their mean 2, and 1, 2, 1 by 4/3: differences 1/4, 0, 1/4, halved squares
        (
            relational(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])),
            1 / 48,
        ),
        # both teachers are the same, so that no student tells them apart
        (
            teacher_contrast(torch.stack([E1, E2]), torch.stack([E1, E1]), temperature=1.0),
            math.log(2),
        ),
        # cosines over 1/2: (2, 0) and (1.6, 1.2) for the teachers E1 and E2, whose own are 2 and 1.2
        (
            teacher_contrast(
                torch.stack([E1, 0.8 * E1 + 0.6 * E2]), torch.stack([E1, E2]), temperature=0.5
            ),
            (math.log1p(math.exp(-2)) + math.log1p(math.exp(0.4))) / 2,
        ),
    ],
)
def test_values_by_hand(value: torch.Tensor, expected: float) -> None:
    assert value.item() == pytest.approx(expected, **APPROX)


ROWS = unit_rows(8, 5, 1)
LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 0, 3])  # three, two, two, and one alone
PROXIES = 2 * unit_rows(4, 5, 3)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "supcon": [{}, {"inside": True}],
    "triplet": [{"mining": kind, "margin": 0.9} for kind in ("all", "semihard", "hard")],
    "ntxent": [{}, {"decoupled": True}],
}


@pytest.mark.parametrize("name", [*losses_of("labels"), *losses_of("views")])
def test_gradients(name: str) -> None:
    """Against finite differences, of rows that are made unit rows first."""
    loss = LOSSES[name]
    for options in SETTINGS.get(name, [{}]):

        def value(rows: torch.Tensor, options: dict[str, Any] = options) -> torch.Tensor:
            rows = F.normalize(rows, dim=1)
            args = (rows, LABELS) if loss.kind == "labels" else (rows[:4], rows[4:])
            args += (PROXIES,) if loss.has_proxies else ()
            return loss(*args, **options)

        assert torch.autograd.gradcheck(value, (ROWS.clone().requires_grad_(),))


COMPARING = sorted(name for name, loss in losses_of("labels").items() if not loss.has_proxies)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [5]])
def test_a_batch_without_positives_or_negatives_is_no_error(name: str, labels: list[int]) -> None:
    rows = unit_rows(len(labels), 4, 2).requires_grad_()
    value = LOSSES[name](rows, torch.tensor(labels))
    value.backward()
    assert math.isfinite(value.item()) and rows.grad is not None
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("name", sorted({*COMPARING} - {"npair"}))
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    """(N-pair's anchors are the first of their label.)"""
    order = torch.tensor([5, 1, 7, 0, 2, 6, 4, 3])
    value, other = LOSSES[name](ROWS, LABELS), LOSSES[name](ROWS[order], LABELS[order])
    assert value.item() == pytest.approx(other.item(), rel=1e-9)


def test_n_pairs_are_the_first_two_of_each_label() -> None:
    """0: rows 0 and 2; 1: rows 1 and 4; 2: rows 3 and 5. Row 6, the third of its label, and row 7,
    which is alone, do not count."""
    logits = 3 * ROWS[[0, 1, 3]] @ ROWS[[2, 4, 5]].T
    expected = F.cross_entropy(logits, torch.arange(3))
    assert n_pair(ROWS, LABELS, scale=3.0).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "call",
    [
        lambda: sup_con(ROWS, LABELS[:3]),
        lambda: sup_con(ROWS[:0], LABELS[:0]),
        lambda: norm_softmax(ROWS, LABELS, PROXIES[:, :4]),
        lambda: nt_xent(ROWS[:3], ROWS[:4]),
        lambda: relational(ROWS[:3], ROWS[:4]),
        lambda: teacher_contrast(ROWS[:3], ROWS[:4]),
    ],
)
def test_shapes_are_checked(call: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(InputError, match="must"):
        call()


def test_the_vectors_of_classes_are_learned() -> None:
    proxies = PROXIES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: norm_softmax(ROWS, LABELS, p), (proxies,))


def test_targets_and_keys_get_no_gradient() -> None:
    """Fails without the stop of the gradient: BYOL and MoCo would collapse."""
    first, second = ROWS[:4].clone().requires_grad_(), ROWS[4:].clone().requires_grad_()
    (cosine_regression(first, second) + queued(first, second, ROWS)).backward()
    assert first.grad is not None and second.grad is None


# ---- the peers: installed with the extra `peers`, for these tests only


def test_pytorch_metric_learning_agrees() -> None:
    losses = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="the extra `peers` is not installed"
    )
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    rows, labels = ROWS.float(), LABELS
    assert sup_con(rows, labels).item() == pytest.approx(
        losses.SupConLoss(temperature=0.1)(rows, labels).item(), rel=1e-5
    )
    for mining, name in (("all", "all"), ("semihard", "semihard")):
        miner = miners.TripletMarginMiner(margin=0.9, type_of_triplets=name)
        peer = losses.TripletMarginLoss(margin=0.9)(rows, labels, miner(rows, labels))
        ours = triplet(rows, labels, margin=0.9, mining=mining)  # type: ignore[arg-type]
        assert ours.item() == pytest.approx(peer.item(), rel=1e-5)
    miner = miners.BatchHardMiner()
    peer = losses.TripletMarginLoss(margin=0.9)(rows, labels, miner(rows, labels))
    assert triplet(rows, labels, margin=0.9, mining="hard").item() == pytest.approx(
        peer.item(), rel=1e-5
    )
    assert lifted_structure(rows, labels).item() == pytest.approx(
        losses.LiftedStructureLoss(neg_margin=1, pos_margin=0)(rows, labels).item(), rel=1e-5
    )
    assert n_pair(rows, labels, scale=1.0).item() == pytest.approx(
        losses.NPairsLoss()(rows, labels).item(), rel=1e-5
    )
    assert nt_xent(rows[:4], rows[4:], temperature=0.5).item() == pytest.approx(
        losses.NTXentLoss(temperature=0.5)(rows, torch.arange(8) % 4).item(), rel=1e-5
    )


def test_the_normalised_softmax_of_pytorch_metric_learning_agrees() -> None:
    losses = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="the extra `peers` is not installed"
    )
    peer = losses.NormalizedSoftmaxLoss(num_classes=4, embedding_size=5, temperature=0.05)
    proxies = peer.W.detach().T
    assert norm_softmax(ROWS.float(), LABELS, proxies).item() == pytest.approx(
        peer(ROWS.float(), LABELS).item(), rel=1e-5
    )


def test_lightly_agrees() -> None:
    peer = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    first, second = ROWS[:4].float(), ROWS[4:].float()
    assert nt_xent(first, second).item() == pytest.approx(
        peer.NTXentLoss(temperature=0.5)(first, second).item(), rel=1e-5
    )
    assert nt_xent(first, second, temperature=0.1, decoupled=True).item() == pytest.approx(
        peer.DCLLoss(temperature=0.1)(first, second).item(), rel=1e-5
    )
    assert cosine_regression(first, second).item() == pytest.approx(
        2 + 2 * peer.NegativeCosineSimilarity()(first, second).item(), rel=1e-5
    )


def test_the_gradient_towards_a_teacher() -> None:
    """Against finite differences; the teacher gets none."""
    students, teachers = ROWS.clone().requires_grad_(), unit_rows(8, 5, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda rows: teacher_contrast(F.normalize(rows, dim=1), teachers), students
    )
    teacher_contrast(students, teachers).backward()
    assert students.grad is not None and teachers.grad is None
