"""The training methods: an entry in `METHODS` makes one available to the configuration, the command
line and the loop.

A method says what a batch consists of and what its loss is (`method.Method`); loop, gradient
caching, processes, resume, running mean and report are the same for all. This module imports no
torch: an entry names its class, which is imported when a run begins.
"""

# ruff: noqa: RUF009  `option` returns a field
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clipkit.losses import Kind, imported
from clipkit.options import NoOptions, option

if TYPE_CHECKING:
    from clipkit.training.methods.method import Method

Duplicates = Literal["mask", "positive"]  # as clipkit.losses.pairs, which imports torch
Need = Literal["captions", "labels"]
Recipe = Literal["heads", "lit", "lora", "full"]


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A registered method: its class, and what its user must know about it."""

    make: str | Callable[..., Method]  # itself, or "module:name"
    summary: str  # two lines: what it does, with its paper
    options: type = NoOptions
    losses: Kind | None = None  # the kind of the losses that it may be trained with; None: its own
    needs: frozenset[Need] = frozenset(("captions",))  # what a picture must have to be used
    # the recipes that can be used with it, the usual one first
    recipes: tuple[Recipe, ...] = ("heads", "lit", "lora", "full")
    # of TrainConfig's options, in place of the recipe's
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()  # TrainConfig's options that mean nothing here

    def __call__(self, *args: Any, **kwargs: Any) -> Method:
        """Make the method."""
        made: Method = imported(self.make)(*args, **kwargs)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """The options of learning from pictures and their captions."""

    duplicates: Duplicates = option("equal captions in a batch: mask, or positive", "mask")
    hard_negatives: int = option("similar pictures added to a picture's batch (0: off)", 0, low=0)
    hard_negatives_every: int = option("epochs between two searches for them", 1, low=1)
    hard_negatives_margin: float = option(
        "skip pictures that match a caption better than this share of its own picture's score",
        0.95,
        above=0,
        high=1,
    )


METHODS: dict[str, MethodEntry] = {
    "pairs": MethodEntry(
        "clipkit.training.methods.pairs:Pairs",
        "pictures and their captions, every other caption of the batch a negative "
        "(CLIP; Radford et al. 2021, arXiv 2103.00020)",
        options=PairOptions,
        losses="pairs",
    ),
}
