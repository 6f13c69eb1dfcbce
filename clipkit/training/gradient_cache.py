"""Batches larger than memory, by gradient caching (GradCache; Gao et al. 2021, arXiv 2101.06983).

    1. Every chunk passes through its tower without a graph; only the embeddings are stored.
    2. The loss is computed once over all embeddings; its gradients at them are the cache.
    3. Every chunk passes again with a graph, from the same random state, and the cached gradients go
       back through it.

The gradients are those of one large batch, for any chunk size. Since the loss is computed once, the
gradients of logit_scale and logit_bias are right too; if each chunk computed it again, they would be
multiplied by the number of chunks. Dropout draws the same masks twice, because the random state is
replayed. BatchNorm in training mode cannot be chunked: each chunk would be normalised by its own
statistics, and the running ones updated twice. `freeze_batch_norms` keeps it in evaluation mode; with
the statistics of the batch, a run takes the whole batch as one chunk.

A batch that fits into one chunk passes its tower once, as in plain training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.errors import InputError
from clipkit.training.distributed import random_state, set_random_state

Encode = Callable[[torch.Tensor], torch.Tensor]
Gather = Callable[[torch.Tensor], tuple[torch.Tensor, slice]]  # see `distributed.gather`


class Rows(Protocol):
    """A batch's inputs: a tensor, or an object that reads rows of one."""

    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One column of a batch: a tower, and this process's rows that go through it.

    side: the tower whose parameters `encode` uses, to be trained if the run trains that tower; None
        for what is never trained, such as a momentum tower.
    order: int64 (B,), see `ChunkedTower`.
    """

    encode: Encode
    rows: Rows
    side: Literal["image", "text"] | None = None
    order: torch.Tensor | None = None


class ChunkedTower:
    """One tower's pass over one batch: forward in chunks, and backward from cached gradients.

    trained: whether the tower has parameters to train; a locked one is passed once, without graph.
    order: int64 (B,), the rows in the order of chunks, such as texts by length; the result does not
        depend on it.
    device: where the tower computes and whose random state is replayed (default: the inputs').
    Raises InputError for a chunk below 1.
    """

    def __init__(
        self,
        encode: Encode,
        inputs: Rows,
        *,
        chunk: int,
        trained: bool = True,
        order: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; it must be at least 1 pair")
        self._encode, self._inputs, self._trained = encode, inputs, trained
        rows = torch.arange(len(inputs)) if order is None else order
        self._chunks = torch.split(rows, chunk)
        self._device = device or inputs.device
        self._states: list[dict[str, torch.Tensor]] = []
        self._whole: torch.Tensor | None = None  # the only chunk's embeddings, with their graph

    def forward(self) -> torch.Tensor:
        """Compute embeddings (B, D) in the order of the inputs, without a graph."""
        if len(self._chunks) == 1 and self._trained:
            rows = self._chunks[0]
            self._whole = self._encode(self._inputs[rows])
            return _scattered([self._whole.detach()], rows)
        parts = []
        for rows in self._chunks:
            self._states.append(random_state(self._device))
            with torch.no_grad():
                parts.append(self._encode(self._inputs[rows]))
        return _scattered(parts, torch.cat(self._chunks))

    def backward(self, gradient: torch.Tensor) -> None:
        """Add to the parameters' gradients, given the loss's `gradient` (B, D) at the embeddings."""
        if not self._trained:
            return
        if self._whole is not None:
            self._whole.backward(gradient[self._chunks[0]])  # type: ignore[no-untyped-call]
            return
        after = random_state(self._device)
        for rows, state in zip(self._chunks, self._states, strict=True):
            set_random_state(state)
            self._encode(self._inputs[rows]).backward(gradient[rows])  # type: ignore[no-untyped-call]
        set_random_state(after)  # the draws of the second pass do not count


def backward(
    towers: Sequence[ChunkedTower],
    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    *,
    gather: Gather,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    check: Callable[[Sequence[torch.Tensor], torch.Tensor], None] = lambda *_: None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the loss over all processes' rows, and add every parameter's gradient to its `.grad`.

    Return the loss and the rows (B, D) of each tower, all without a graph.

    loss: called once in every process with all rows, (B, D) for each tower. The gradients of
        parameters that it uses itself (logit_scale) are complete and equal everywhere; those of a
        tower are this process's share, to be summed by `distributed.sum_gradients`.
    scale: applied to the loss before the backward pass (loss scaling in half precision).
    check: called with all rows and the loss before the backward pass; it may raise.
    """
    gathered = [gather(tower.forward()) for tower in towers]
    leaves = [rows.detach().requires_grad_() for rows, _ in gathered]
    value = loss(leaves)
    rows = [leaf.detach() for leaf in leaves]
    check(rows, value.detach())
    scale(value).backward()  # type: ignore[no-untyped-call]
    for tower, leaf, (_, own) in zip(towers, leaves, gathered, strict=True):
        if leaf.grad is not None:
            tower.backward(leaf.grad[own])
    return value.detach(), rows


def freeze_batch_norms(model: torch.nn.Module) -> int:
    """Put every BatchNorm into evaluation mode, with fixed statistics; return how many there are."""
    norms = batch_norms(model)
    for norm in norms.values():
        norm.eval()
    return len(norms)


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every BatchNorm by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def _scattered(parts: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Put rows that were computed in the order `rows` back into the order of the batch."""
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[rows.to(joined.device)] = joined
    return result
