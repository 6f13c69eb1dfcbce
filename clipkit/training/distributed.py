"""Training by several processes, as started by `torchrun`, with the gradients of one process.

Each process computes the whole loss over all processes' embeddings. The gradient of its own rows goes
back through its own towers; summed over processes, that is the gradient of one process with the
whole batch. logit_scale and logit_bias are used by the loss alone: their gradients are complete in
every process and must not be summed. (Averaging all gradients instead, as DistributedDataParallel
does, divides the towers' by the number of processes and leaves logit_scale's as it is.)

Without `torchrun` there is one process, and every function here works with a world size of 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from clipkit.errors import InputError

_BUCKET = 2**24  # gradient values summed in one call


def world_size() -> int:
    """Return the number of processes that train together; 1 outside of `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_device(device: torch.device) -> torch.device:
    """Return this process's GPU if torchrun started one process per GPU, else `device`."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def backend(device: torch.device) -> str:
    """Return the communication backends for tensors on `device` and on the CPU.

    NCCL cannot gather CPU tensors, such as features that were computed once, so gloo stays beside it.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connect the processes that `torchrun` started while the context is open; else do nothing."""
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield
        return
    dist.init_process_group(backend(device))
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_slice(count: int) -> slice:
    """Return this process's rows of a batch of `count`. Raises InputError for an uneven share."""
    size = world_size()
    if count % size:
        raise InputError(
            f"batch is {count}, which {size} processes cannot share evenly; "
            f"use {count // size * size or size}"
        )
    share = count // size
    return slice(rank() * share, (rank() + 1) * share)


def gather(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """Gather equally many `rows` (b, D) of every process as (B, D), in order of rank.

    Also return the slice of this process's rows. The result has no graph; `gradient_cache.backward`
    carries the gradients.
    """
    if world_size() == 1:
        return rows, slice(0, len(rows))
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), own_slice(len(rows) * world_size())


def gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """Gather any number of `rows` (n, D) of every process, in order of rank."""
    if world_size() == 1:
        return rows
    return torch.cat([part.to(rows.device) for part in collect(rows.cpu())])


def collect(value: Any) -> list[Any]:
    """Return every process's `value`, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return once every process has called this."""
    collect(None)


def sum_gradients(
    towers: Iterable[torch.nn.Parameter], shared: Sequence[torch.nn.Parameter]
) -> None:
    """Sum the towers' gradients over processes, in place.

    Those of `shared`, such as logit_scale, are complete already; they are averaged, so that
    rounding cannot let processes drift apart. A weight without a gradient in any process stays so:
    with one of zeros, the optimizer would decay it.
    """
    size = world_size()
    if size == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in _with_gradient(list(towers)):
        if parameter.grad is None:  # every process must sum the same list
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= _BUCKET:
            _sum_in_place(bucket)
            bucket = []
    _sum_in_place(bucket)
    complete = [parameter.grad for parameter in shared if parameter.grad is not None]
    _sum_in_place(complete)
    for grad in complete:
        grad /= size


def _with_gradient(parameters: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return the parameters that have a gradient in any process."""
    if not parameters:
        return []
    own = [parameter.grad is not None for parameter in parameters]
    counts = torch.tensor(own, dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(counts)
    return [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]


def _sum_in_place(gradients: Sequence[torch.Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([grad.reshape(-1) for grad in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [grad.numel() for grad in gradients])
    for grad, part in zip(gradients, parts, strict=True):
        grad.copy_(part.view_as(grad))


class RandomStates:
    """The random states of all processes, saved and restored with the state of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Collect every process's state: all of them must call this."""
        return {"by_rank": collect(random_state(self._device))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this process's state."""
        set_random_state(state["by_rank"][rank()])


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Restore torch's default generators when the context is left."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the CPU's generator, and of the device's if it has its own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    for device in ("cuda", "mps"):
        if device in state:
            getattr(torch, device).set_rng_state(state[device])
