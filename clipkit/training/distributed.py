"""Several processes as one: what `torchrun` started, gathered exactly.

Each process computes the whole loss over all processes' embeddings. Its gradient with respect to the
own rows goes back through the own towers; summed over processes that is the gradient of one process
with the whole batch. logit_scale and logit_bias are used by the loss alone: their gradients are
whole everywhere and must not be summed. (Averaging all gradients instead, as DistributedDataParallel
does, shrinks the towers' by the number of processes and leaves logit_scale's as it is.)

Nothing here needs a second machine: one process is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from clipkit.errors import InputError


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


_BUCKET = 2**24  # gradient values summed in one call


def world_size() -> int:
    """How many processes train together; 1 outside of `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_device(device: torch.device) -> torch.device:
    """This process's GPU, where several on one machine were started to use one each."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within, the processes that `torchrun` started know each other; without it, nothing happens."""
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_slice(count: int) -> slice:
    """Which of a batch's `count` rows are this process's; InputError if they cannot be shared."""
    size = world_size()
    if count % size:
        raise InputError(
            f"batch is {count}, which {size} processes cannot share evenly; "
            f"use {count // size * size or size}"
        )
    share = count // size
    return slice(rank() * share, (rank() + 1) * share)


def gather(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """Equally many `rows` (b, D) of every process -> all (B, D), in order of rank, and the slice
    that holds the own. No graph: `large_batch.backward` carries the gradients."""
    if world_size() == 1:
        return rows, slice(0, len(rows))
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    start = rank() * len(rows)
    return torch.cat(parts), slice(start, start + len(rows))


def gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """Any number of `rows` (n, D) of every process -> all, in order of rank."""
    if world_size() == 1:
        return rows
    counts = [int(n) for n in collect(len(rows))]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    every, _ = gather(padded)
    parts = torch.split(every, max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def collect(value: Any) -> list[Any]:
    """Every process's `value`, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first(value: Any) -> Any:
    """The first process's `value`."""
    return collect(value)[0]


def any_true(flag: bool) -> bool:
    """Whether the flag is set in any process: all take the same decision."""
    return flag if world_size() == 1 else any(collect(flag))


def sum_gradients(
    towers: Iterable[torch.nn.Parameter], alike: Sequence[torch.nn.Parameter]
) -> None:
    """The towers' gradients summed over processes. Those of `alike` (logit_scale, logit_bias) are
    whole already; their mean is taken, so that rounding cannot let processes drift apart."""
    size = world_size()
    if size == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in towers:
        if parameter.grad is None:  # the same ones in every process would be missing
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= _BUCKET:
            _sum_in_place(bucket)
            bucket = []
    _sum_in_place(bucket)
    whole = [parameter.grad for parameter in alike if parameter.grad is not None]
    _sum_in_place(whole)
    for grad in whole:
        grad /= size


def _sum_in_place(gradients: Sequence[torch.Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([grad.reshape(-1) for grad in gradients])
    dist.all_reduce(flat)
    for grad, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        grad.copy_(part.view_as(grad))
