"""The state of torch's default generators, which dropout draws from: taken, kept, put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["own_generators", "random_state", "set_random_state"]


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Within, the default generators may be seeded and drawn from; afterwards they are as before."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The CPU's state, and the device's where it has its own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    for device in ("cuda", "mps"):
        if device in state:
            getattr(torch, device).set_rng_state(state[device])
