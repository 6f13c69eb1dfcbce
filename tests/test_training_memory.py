"""How many rows pass through a tower at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clipkit.errors import InputError
from clipkit.training.memory import explained_out_of_memory, fitted_chunk

GPU = torch.device("cuda")


class Device:
    """A device of which `fixed` bytes are in use, and `row` more for each row that passes."""

    def __init__(self, free: int, row: int = 100, fixed: int = 5000) -> None:
        self.left, self.row, self.fixed, self.rows = free, row, fixed, 0

    def run(self, rows: int) -> None:
        self.rows = rows
        if rows * self.row > self.left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nand more")

    def peak(self, run: Callable[[], None]) -> int:
        run()
        return self.fixed + self.rows * self.row

    def free(self) -> int:
        return self.left


@pytest.mark.parametrize(
    ("free", "batch", "chunk"),
    [
        (10**6, 256, 256),
        (10**6, 65536, 4096),  # the power of two below 0.8 x 10^6 / 100 = 8,000
        (20_000, 256, 128),  # below 160
        (900, 256, 8),  # sixteen do not fit
        (10**6, 4, 4),
    ],
)
def test_a_chunk_is_what_fits_into_memory(free: int, batch: int, chunk: int) -> None:
    """Fails for a constant."""
    device = Device(free)
    assert fitted_chunk(GPU, batch, device.run, device) == chunk


def test_a_cpu_takes_a_chunk_that_stays_in_its_cache() -> None:
    def never(_: int) -> None:
        raise AssertionError

    assert fitted_chunk(torch.device("cpu"), 1000, never) == 32
    assert fitted_chunk(torch.device("cpu"), 10, never) == 10


def test_full_memory_is_explained_with_remedies() -> None:
    """Fails for a version that lets torch's traceback through."""
    device = Device(100)
    words = r"memory is full with 8 pairs in it.*--chunk 4, --activation-checkp.*\(CUDA out of mem"
    with pytest.raises(InputError, match=words):
        fitted_chunk(GPU, 256, device.run, device)
    with pytest.raises(InputError, match="at a time; use --activation"), explained_out_of_memory(1):
        device.run(2)
