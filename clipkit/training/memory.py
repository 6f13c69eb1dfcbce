"""How many rows pass through a tower at a time: as many as the device's memory holds.

The result of a step does not depend on it (`gradient_cache`), only its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from clipkit.errors import InputError

_CHUNK = {"cpu": 32, "mps": 64}  # more is no faster there
_TRIED = (8, 16)  # rows of two trial passes
_SHARE = 0.8  # of the free memory: later batches have longer texts, and memory has gaps


class Memory(Protocol):
    """The memory of a device."""

    def peak(self, run: Callable[[], None]) -> int:
        """Run, and return the most bytes that were in use meanwhile."""

    def free(self) -> int:
        """Return the bytes that may still be used."""


class CudaMemory:
    """The memory of an NVIDIA or AMD GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device))

    def free(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])


def fitted_chunk(
    device: torch.device,
    batch: int,
    run: Callable[[int], None],
    memory: Memory | None = None,
) -> int:
    """Return how many rows of a batch to pass through a tower at a time, at most `batch`.

    run: passes that many rows forward and back through every trained tower. On a GPU two small passes
    tell the memory that a row takes, and the largest power of two that fits is taken.
    Raises InputError if not even a few rows fit.
    """
    if memory is None and device.type != "cuda":
        return min(batch, _CHUNK.get(device.type, 32))
    memory = memory or CudaMemory(device)
    few, more = (min(batch, rows) for rows in _TRIED)
    if few == more:
        return batch
    with explained_out_of_memory(few):
        run(few)  # what libraries allocate at their first use is not a row's
        low = memory.peak(lambda: run(few))
    try:
        high = memory.peak(lambda: run(more))
    except torch.OutOfMemoryError:
        return few
    row = max((high - low) / (more - few), 1.0)
    fitting = max(int(_SHARE * memory.free() / row), 1)
    return batch if fitting >= batch else 1 << (fitting.bit_length() - 1)


@contextmanager
def explained_out_of_memory(chunk: int) -> Iterator[None]:
    """Raise InputError with remedies in place of torch's OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"--chunk {max(1, chunk // 2)}, " if chunk > 1 else ""
        raise InputError(
            f"the device's memory is full with {chunk} pairs in it at a time; use {smaller}"
            "--activation-checkpointing, --precision bfloat16, or a smaller model "
            f"({str(error).splitlines()[0]})"
        ) from error
