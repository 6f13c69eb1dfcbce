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

from clipkit.errors import InputError
from clipkit.losses import Kind
from clipkit.options import NoOptions, imported, option

if TYPE_CHECKING:
    from clipkit.training.methods.method import Method

Duplicates = Literal["mask", "positive"]  # as clipkit.losses.pairs, which imports torch
TextPair = Literal["dropout", "other", "triplet"]
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
class PictureViewOptions:
    """The options of learning from views of pictures."""

    jitter: float = option("strength of the changes of colour (0: none)", 0.5, low=0, high=1)
    grey: float = option("share of views without colour", 0.2, low=0, high=1)
    blur: float = option(
        "share of blurred views (-1: half of them, none of pictures below 64 pixels)",
        -1.0,
        low=-1,
        high=1,
    )
    projection_layers: int = option(
        "layers of the head that the loss is computed behind (0: no head)", 2, low=0
    )
    projection_hidden: int = option("their width (0: that of the vectors)", 0, low=0)
    projection_width: int = option("width of the last of them", 128, low=1)
    keep_space: float = option(
        "weight of staying near the start's vectors, so that texts still find pictures", 0.0, low=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """The options of learning from pairs with a queue of keys."""

    queue_size: int = option(
        "earlier keys that are negatives (at most the other pictures)", 4096, low=0
    )
    # ALBEF's 0.995 is for a hundred thousand steps; over a thousand, 0.9 finds more than 0.99.
    momentum: float = option("share of itself that the momentum tower keeps", 0.9, low=0, below=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MocoOptions(PictureViewOptions):
    """The options of MoCo."""

    queue_size: int = option(
        "earlier keys that are negatives (at most the other pictures)", 4096, low=0
    )
    momentum: float = option("share of itself that the momentum tower keeps", 0.99, low=0, below=1)
    temperature: float = option("cosines are divided by it", 0.2, above=0)
    symmetric: bool = option("use each view as query and as key, for twice the time", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions(PictureViewOptions):
    """The options of the memory bank."""

    bank_negatives: int = option("rows of the bank drawn for a batch", 4096, low=1)
    bank_momentum: float = option("share of its row that a picture keeps", 0.5, low=0, below=1)
    temperature: float = option("cosines are divided by it", 0.07, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByolOptions(PictureViewOptions):
    """The options of BYOL; without predictor, stop_gradient or momentum it may collapse."""

    momentum: float = option(
        "share of itself that the momentum tower keeps, rising to 1 (0: the tower itself, SimSiam)",
        0.996,
        low=0,
        below=1,
    )
    predictor: bool = option("predict the target by a head of its own", True)
    stop_gradient: bool = option("targets get no gradient; can be off with momentum 0", True)

    def __post_init__(self) -> None:
        if not self.stop_gradient and self.momentum:
            raise InputError(
                f"stop_gradient is off, but momentum is {self.momentum:g}: a momentum tower gets no "
                "gradient; use momentum 0"
            )


# What a method over views of pictures has in place of a recipe's defaults. Views are cut small, as in
# MoCo v2 (SimCLR: 0.08). How well views find each other says little of what a tower is good for, so
# the last weights are kept, as in the papers.
_VIEW_DEFAULTS = {"crop": 0.2, "keep": "last", "interpolate": False, "patience": 0}
_TEXTS_ONLY = frozenset(("text_rate", "train_text_layers"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """The options of learning from labels."""

    per_class: int = option("pictures of a label in a batch, at least", 4, low=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCseOptions:
    """The options of SimCSE."""

    captions: TextPair = option(
        "a caption's positive: itself by dropout, another of its picture, or that and a hard negative "
        "(triplet)",
        "dropout",
    )
    dropout_rate: float = option("dropout of the text tower", 0.1, low=0, below=1)
    temperature: float = option("cosines are divided by it", 0.05, above=0)
    keep_space: float = option(
        "weight of staying near the start's vectors, so that texts still find pictures", 0.0, low=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageOptions:
    """The options of learning from queries and passages."""

    bm25_negatives: int = option(
        "hard negatives are drawn from this many of BM25's best (0: no hard negatives)", 30, low=0
    )
    temperature: float = option("cosines are divided by it", 0.05, above=0)
    keep_space: float = option(
        "weight of staying near the start's vectors, so that texts still find pictures", 0.0, low=0
    )


# Options that mean nothing to a method without pictures.
_OF_PICTURES = frozenset(("crop", "flip", "image_rate", "train_image_layers"))


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
        from clipkit import checkpoint  # which imports numpy

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
    "simclr": MethodEntry(
        "clipkit.training.methods.views:SimClr",
        "two views of a picture, the other pictures' views are negatives, without captions "
        "(SimCLR; Chen et al. 2020, arXiv 2002.05709)",
        options=PictureViewOptions,
        losses="views",
        needs=frozenset(),
        recipes=("full", "lora"),
        defaults=_VIEW_DEFAULTS,
        unused=_TEXTS_ONLY,
    ),
    "queue": MethodEntry(
        "clipkit.training.methods.queue:QueuedPairs",
        "as pairs, with keys of earlier batches as negatives too, for small batches "
        "(MoCo on both sides; He et al. 2020, arXiv 1911.05722)",
        options=QueueOptions,
    ),
    "moco": MethodEntry(
        "clipkit.training.methods.moco:Moco",
        "two views of a picture, keys of earlier batches are negatives, without captions "
        "(MoCo v2; Chen et al. 2020, arXiv 2003.04297)",
        options=MocoOptions,
        needs=frozenset(),
        recipes=("full", "lora"),
        defaults=_VIEW_DEFAULTS,
        unused=_TEXTS_ONLY,
    ),
    "memory": MethodEntry(
        "clipkit.training.methods.moco:MemoryBank",
        "a view of a picture, its and others' rows in a memory bank, without captions "
        "(Wu et al. 2018, arXiv 1805.01978)",
        options=MemoryOptions,
        needs=frozenset(),
        recipes=("full", "lora"),
        defaults=_VIEW_DEFAULTS,
        unused=_TEXTS_ONLY,
    ),
    "byol": MethodEntry(
        "clipkit.training.methods.byol:Byol",
        "predict what a momentum tower makes of the other view, without captions or negatives "
        "(BYOL; Grill et al. 2020, arXiv 2006.07733)",
        options=ByolOptions,
        needs=frozenset(),
        recipes=("full", "lora"),
        defaults=_VIEW_DEFAULTS,
        unused=_TEXTS_ONLY,
    ),
    "labels": MethodEntry(
        "clipkit.training.methods.labels:Labels",
        "pictures with labels, those of one label close and others apart "
        "(SupCon; Khosla et al. 2020, arXiv 2004.11362)",
        options=LabelOptions,
        losses="labels",
        needs=frozenset(("labels",)),
        recipes=("full", "lora", "heads"),
        unused=_TEXTS_ONLY,
    ),
    "simcse": MethodEntry(
        "clipkit.training.methods.texts:SimCse",
        "captions alone, each found again under dropout, or another of its picture "
        "(SimCSE; Gao et al. 2021, arXiv 2104.08821)",
        options=SimCseOptions,
        recipes=("full", "lora"),
        unused=_OF_PICTURES | {"dropout"},
    ),
    "passages": MethodEntry(
        "clipkit.training.methods.texts:Passages",
        "captions alone: a query finds another caption among the batch's and hard negatives by BM25 "
        "(DPR; Karpukhin et al. 2020, arXiv 2004.04906)",
        options=PassageOptions,
        recipes=("full", "lora"),
        unused=_OF_PICTURES,
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
