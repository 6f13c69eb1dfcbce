"""The contrastive losses: an entry in `LOSSES` makes one available to the configuration, the command
line and training.

Each is a pure function of embeddings, which are unit rows, and returns a scalar. They lie in modules
by what they compare: `pairs` (a picture and its caption), `views` (two views of one thing), `labels`
(things of one label), `texts` (two texts of one thing; not registered, since their methods have no
other). This module imports no torch: an entry names its function, which is imported when it is first
used.
"""

# ruff: noqa: RUF009  `option` returns a field
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clipkit.options import NoOptions, imported, option

if TYPE_CHECKING:
    import torch

Kind = Literal["pairs", "views", "labels"]


Mining = Literal["all", "semihard", "hard"]  # as losses.labels, which imports torch


@dataclass(frozen=True, slots=True)
class Loss:
    """A registered loss: its function, and what training and its user must know about it."""

    function: str | Callable[..., torch.Tensor]  # itself, or "module:name"
    summary: str = ""  # what it does, with its paper
    kind: Kind = "pairs"  # what it compares
    options: type = NoOptions
    has_bias: bool = False  # takes logit_bias after logit_scale
    has_proxies: bool = False  # takes a vector of each class after the labels
    clamps_scale: bool = True  # keep the scale within [1, 100]: CLIP, section 2.5

    def __call__(self, *rows: Any, **options: Any) -> torch.Tensor:
        """Compute the loss."""
        value: torch.Tensor = imported(self.function)(*rows, **options)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoNceOptions:
    """The options of InfoNCE."""

    label_smoothing: float = option("share of the target spread evenly", 0.0, low=0, below=1)
    hardness: float = option("weight of hard negatives (Robinson 2021)", 0.0, low=0)
    debias: float = option("share of false negatives (Chuang 2020)", 0.0, low=0, below=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NtXentOptions:
    """The options of NT-Xent."""

    temperature: float = option("cosines are divided by it", 0.5, above=0)
    decoupled: bool = option("leave the other view out of the negatives (DCL, Yeh 2022)", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupConOptions:
    """The options of SupCon."""

    temperature: float = option("cosines are divided by it", 0.1, above=0)
    inside: bool = option("mean over positives inside of the logarithm (L_in)", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveOptions:
    """The options of the pairwise contrastive loss."""

    margin: float = option("distance beyond which others do not count", 1.0, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TripletOptions:
    """The options of the triplet loss."""

    margin: float = option("by how much negatives should be farther", 0.2, above=0)
    mining: Mining = option("which triplets of a batch count: all, semihard, hard", "semihard")


@dataclass(frozen=True, slots=True, kw_only=True)
class NPairOptions:
    """The options of the N-pair loss."""

    scale: float = option("factor of the cosines", 16.0, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftedOptions:
    """The options of the lifted structured loss."""

    margin: float = option("distance that negatives should have", 1.0, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftNearestOptions:
    """The options of the soft nearest neighbour loss."""

    temperature: float = option("squared distances are divided by it", 0.1, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSoftmaxOptions:
    """The options of the normalised softmax."""

    temperature: float = option("cosines are divided by it", 0.05, above=0)


LOSSES: dict[str, Loss] = {
    "infonce": Loss(
        "clipkit.losses.pairs:info_nce",
        "softmax over the batch, both ways (CLIP; Radford et al. 2021, arXiv 2103.00020)",
        options=InfoNceOptions,
    ),
    "siglip": Loss(
        "clipkit.losses.pairs:siglip",
        "a yes or no for every pair of the batch (Zhai et al. 2023, arXiv 2303.15343)",
        has_bias=True,
        clamps_scale=False,
    ),
    "ntxent": Loss(
        "clipkit.losses.views:nt_xent",
        "softmax over both views of the batch (SimCLR; Chen et al. 2020, arXiv 2002.05709)",
        kind="views",
        options=NtXentOptions,
    ),
    "supcon": Loss(
        "clipkit.losses.labels:sup_con",
        "all of one label are positives (Khosla et al. 2020, arXiv 2004.11362)",
        kind="labels",
        options=SupConOptions,
    ),
    "triplet": Loss(
        "clipkit.losses.labels:triplet",
        "negatives farther than positives by a margin (Schroff et al. 2015, arXiv 1503.03832)",
        kind="labels",
        options=TripletOptions,
    ),
    "contrastive": Loss(
        "clipkit.losses.labels:contrastive",
        "pairs of one label close, others beyond a margin (Chopra et al. 2005)",
        kind="labels",
        options=ContrastiveOptions,
    ),
    "npair": Loss(
        "clipkit.losses.labels:n_pair",
        "one pair a label, the other labels' positives as negatives (Sohn 2016)",
        kind="labels",
        options=NPairOptions,
    ),
    "lifted": Loss(
        "clipkit.losses.labels:lifted_structure",
        "each positive pair against all negatives of both (Oh Song et al. 2016, arXiv 1511.06452)",
        kind="labels",
        options=LiftedOptions,
    ),
    "softnn": Loss(
        "clipkit.losses.labels:soft_nearest_neighbour",
        "the chance to draw a neighbour of the own label (Frosst et al. 2019, arXiv 1902.01889)",
        kind="labels",
        options=SoftNearestOptions,
    ),
    "normsoftmax": Loss(
        "clipkit.losses.labels:norm_softmax",
        "classify by the cosine with a learned vector of each class (Zhai & Wu 2019, arXiv 1811.12649)",
        kind="labels",
        options=NormSoftmaxOptions,
        has_proxies=True,
    ),
}


def losses_of(kind: Kind | None) -> Mapping[str, Loss]:
    """Return the losses that compare rows of this kind, by name; of None there are none."""
    return {name: loss for name, loss in LOSSES.items() if loss.kind == kind}
