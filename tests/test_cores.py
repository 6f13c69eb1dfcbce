"""Batches spread over a CPU's cores: rows stay in order, and other threads keep their settings."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from clipkit.towers.encoder import PART, Cores


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_new_thread() -> int:
    """The threads that torch uses for what a thread started now computes."""
    counts: list[int] = []

    def compute() -> None:
        torch.ones(64, 64) @ torch.ones(64, 64)
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    return counts[0]


@pytest.mark.parametrize("rows", [0, 1, PART, PART + 1, 5 * PART - 3])
@pytest.mark.usefixtures("four_threads")
def test_rows_come_back_in_order(rows: int) -> None:
    batch = torch.arange(rows * 3.0).view(rows, 3)
    assert torch.equal(Cores().map(lambda part: part * 2, batch), batch * 2)


@pytest.mark.usefixtures("four_threads")
def test_every_core_computes_alone_and_others_as_before() -> None:
    meeting = threading.Barrier(4)  # passed only if four parts are worked on at a time
    threads: list[int] = []

    def work(part: torch.Tensor) -> torch.Tensor:
        meeting.wait(timeout=30)
        threads.append(torch.get_num_threads())
        return part

    cores = Cores()
    for _ in range(2):
        cores.map(work, torch.zeros(4 * PART, 1))
    assert threads == [1] * 8
    assert torch.get_num_threads() == 4
    assert in_new_thread() == 4


@pytest.mark.usefixtures("four_threads")
def test_no_gradients_whether_split_or_not() -> None:
    weight = torch.ones(1, requires_grad=True)
    for rows in (PART, 3 * PART):
        assert not Cores().map(lambda part: part * weight, torch.ones(rows, 1)).requires_grad


@pytest.mark.usefixtures("four_threads")
def test_a_failure_reaches_the_caller() -> None:
    def work(part: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"{len(part)} rows")

    with pytest.raises(ValueError, match=f"{PART} rows"):
        Cores().map(work, torch.zeros(2 * PART, 1))
