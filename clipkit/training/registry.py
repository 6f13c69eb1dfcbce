"""The training methods: an entry in `METHODS` makes one available to the configuration, the command
line and the loop.

A method says what a batch consists of and what its loss is (`method.Method`); loop, gradient
caching, processes, resume, running mean and report are the same for all. This module imports no
torch: an entry names its class, which is imported when a run begins.
"""

# ruff: noqa: RUF009  `option` returns a field
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clipkit import checkpoint
from clipkit.errors import InputError
from clipkit.losses import Kind, imported
from clipkit.options import NoOptions, option

if TYPE_CHECKING:
    from clipkit.training.methods.method import Method

Duplicates = Literal["mask", "positive"]  # as clipkit.losses.pairs, which imports torch
Need = Literal["captions", "labels"]
Space = Literal["own", "teacher"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """The options of learning from teachers."""

    teacher: str = option("models, or files of vectors (.npz), separated by commas", "")
    space: Space = option("the space that results: the start's own, or the teacher's", "own")
    cosine: float = option("weight of the distance from the teacher's vector", 1.0, low=0)
    relational: float = option("weight of the difference of distances between pictures", 1.0, low=0)
    contrastive: float = option("weight of InfoNCE against the teacher's vectors", 1.0, low=0)
    teacher_temperature: float = option(
        "cosines to the teacher's vectors are divided by it", 0.07, above=0
    )
    pairs: float = option(
        "weight of the captions' loss, as method pairs has it (0: off)", 0.0, low=0
    )

    def __post_init__(self) -> None:
        if not self.teachers:
            raise InputError(
                "method distill needs a teacher; name a model, or a file of vectors (.npz): "
                "--teacher ViT-B-32/laion2b_s34b_b79k"
            )
        if not any((self.cosine, self.relational, self.contrastive)):
            raise InputError(
                "cosine, relational and contrastive are all 0, so nothing is learnt from the "
                "teacher; give one of them a weight"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Return the models and files, one by one."""
        return tuple(name.strip() for name in str(self.teacher).split(",") if name.strip())

    @property
    def absolute(self) -> Mapping[str, str]:
        """Return options that name the same from any working folder, in place of their values."""
        places = (
            os.path.abspath(os.path.expanduser(n)) if n.endswith(".npz") else n
            for n in self.teachers
        )
        return {"teacher": ",".join(map(checkpoint.absolute, places))}

    @property
    def needs(self) -> frozenset[Need]:
        """Return what a picture must have beside what every run of the method needs."""
        return frozenset(("captions",) if self.pairs else ())


METHODS: dict[str, MethodEntry] = {
    "pairs": MethodEntry(
        "clipkit.training.methods.pairs:Pairs",
        "pictures and their captions, every other caption of the batch a negative "
        "(CLIP; Radford et al. 2021, arXiv 2103.00020)",
        options=PairOptions,
        losses="pairs",
    ),
    "distill": MethodEntry(
        "clipkit.training.methods.distill:Distill",
        "pictures and what a larger model makes of them, computed once: their vectors, distances "
        "and neighbours (RKD; Park et al. 2019, arXiv 1904.05068; CRD; Tian et al. 2020, arXiv "
        "1910.10699)",
        options=DistillOptions,
        losses="pairs",
        needs=frozenset(),
        recipes=("heads", "lora", "full"),
    ),
}
