"""Freed memory that is kept needs no new pages from the system."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from clipkit.heap import freed_memory_kept

torch = pytest.importorskip("torch")
PAGES = 64 * 2**20 // resource.getpagesize()  # of a block of 64 MB


def pages_taken() -> int:
    """Take and free a block eight times, and return how many pages the system gave for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Return how many pages of memory the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def show() -> None:
    outside = pages_taken()
    with freed_memory_kept():
        pages_taken()  # glibc before 2.38 finds an aligned block again at the eighth time only
        pages_taken()
        inside, kept = pages_taken(), resident()
    print(outside, inside, kept - resident())


def counted(**environment: str) -> list[int]:
    command = [sys.executable, "-c", "from tests.test_heap import show; show()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in run.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept_for_the_time_of_a_training() -> None:
    """Outside, every block is new; inside, it is the one before; the end gives it back. What the
    environment has set stays."""
    outside, inside, given_back = counted()
    if outside < 7 * PAGES:
        pytest.skip(f"pages are larger, or not counted here: {outside} for 8 blocks of {PAGES}")
    assert inside < PAGES / 2 and given_back > PAGES / 2
    chosen, kept, _ = counted(GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")
    assert chosen > 7 * PAGES and kept > 7 * PAGES
