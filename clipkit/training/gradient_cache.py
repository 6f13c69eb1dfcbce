"""Batches larger than memory: gradient caching (GradCache; Gao et al. 2021, arXiv 2101.06983).

    1. every chunk through its tower without a graph: only the embeddings are kept
    2. the loss over all embeddings, once; its gradients with respect to them are the cache
    3. every chunk again, with a graph, from the same random state; the cached gradient goes back

The gradients are those of one big batch, for any chunk size. The loss is computed once, so the
gradient of logit_scale and logit_bias is right as well (it would come out times the number of chunks
if each chunk computed the loss anew). Dropout draws the same masks twice, because the random state
is replayed. BatchNorm cannot be chunked: in training mode each chunk would be normalised by its own
statistics, and the running ones updated twice. `freeze_batch_norms` keeps it in evaluation mode.

A batch that fits into one chunk goes through its tower once, like plain training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.errors import InputError
from clipkit.training.distributed import random_state, set_random_state

Encode = Callable[[torch.Tensor], torch.Tensor]


class Rows(Protocol):
    """A batch's inputs, a tensor or what gives rows of one."""

    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: torch.Tensor, /) -> torch.Tensor: ...


class Gather(Protocol):
    """All processes' rows from this one's, and where its own are among them."""

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, slice]: ...


class ChunkedTower:
    """One tower's pass over one batch: forward in chunks, and backward from cached gradients.

    `trained`: whether the tower has parameters to train; a locked one is passed once, without graph.
    `device`: where the tower computes, whose random state is replayed (default: the inputs').
    `order` (B,) is how rows are put into chunks, such as texts by length; the result does not
    depend on it.
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
        """Embeddings (B, D) in the order of the inputs, without a graph."""
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
        """Add to the parameters' gradients what `gradient` (B, D), of the loss, makes of them."""
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
    images: ChunkedTower,
    texts: ChunkedTower,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    gather: Gather,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    check: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = lambda *_: None,
) -> torch.Tensor:
    """The loss over all processes' pairs; every parameter's gradient is added to its `.grad`.

    loss: of all embeddings (B, D) each. It runs once, in full, in every process: the gradients of
    what it uses itself (logit_scale) are whole and alike everywhere; those of a tower are this
    process's share, to be summed over processes (see `distributed.sum_gradients`).
    scale: applied to the loss before going back (half precision's loss scaling).
    check: sees all embeddings and the loss before anything goes back, and may raise.
    """
    ours = [images.forward(), texts.forward()]
    gathered = [gather(rows) for rows in ours]
    leaves = [rows.detach().requires_grad_() for rows, _ in gathered]
    value = loss(*leaves)
    check(leaves[0], leaves[1], value.detach())
    scale(value).backward()  # type: ignore[no-untyped-call]
    for tower, leaf, (_, own) in zip((images, texts), leaves, gathered, strict=True):
        if leaf.grad is not None:
            tower.backward(leaf.grad[own])
    return value.detach()


def freeze_batch_norms(model: torch.nn.Module) -> int:
    """Put every BatchNorm into evaluation mode, statistics fixed; how many there are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.eval()
    return len(norms)


def refuse_batch_norms(model: torch.nn.Module) -> None:
    """InputError if a BatchNorm is in training mode: chunks would change what it computes."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise InputError(
                f"{name} is a BatchNorm in training mode, which a batch in chunks cannot have: each "
                "chunk would be normalised by itself, and its statistics counted twice; freeze it"
            )


def _scattered(parts: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Rows computed in the order `rows`, put back into the order of the batch."""
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[rows.to(joined.device)] = joined
    return result
