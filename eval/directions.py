"""What retrieval asks and how a ranking answers: captions and pictures both ways, or tags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit import metrics
from clipkit.metrics import Interval, Ranking
from eval.data import Captioned

__all__ = ["Asked", "Way", "ask_captions", "ask_tags", "percent", "ranked"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def percent(share: float) -> str:
    """ "37.3 %"; small shares keep two digits."""
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The texts, and which pictures each is true of: pairs (P, 2) of text and picture."""

    texts: tuple[str, ...]
    pairs: Int64
    both_ways: bool
    warnings: tuple[str, ...] = ()

    def parts(self) -> Iterator[str | bytes]:
        """All that a fingerprint must cover."""
        yield from self.texts
        yield self.pairs.tobytes()


def ask_captions(data: Captioned) -> Asked:
    """Every caption, its own picture relevant; and the same the other way round."""
    owners: dict[str, set[int]] = {}
    for text, owner in zip(data.captions, data.owner.tolist(), strict=True):
        owners.setdefault(text, set()).add(owner)
    shared = sum(len(owners[text]) > 1 for text in data.captions)
    warning = (
        f"{shared:,} of {len(data.captions):,} captions stand at several pictures, "
        "and only one of these counts as found"
    )
    pairs = np.stack([np.arange(len(data.owner)), data.owner], axis=1)
    return Asked(data.captions, pairs, both_ways=True, warnings=(warning,) if shared else ())


def ask_tags(data: Captioned) -> Asked:
    """Every distinct tag, all pictures that bear it relevant."""
    texts = tuple(sorted({tag for tags in data.tags for tag in tags}))
    number = {tag: at for at, tag in enumerate(texts)}
    pairs = [(number[tag], row) for row, tags in enumerate(data.tags) for tag in tags]
    return Asked(texts, np.array(sorted(set(pairs)), np.int64), both_ways=False)


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One direction. `unit` is what each query is resampled with: its own number or its picture's."""

    name: str
    ranking: Ranking
    unit: Int64  # (Q,)
    asking: str  # in words: what asks, and what it should find
    answer: str
    hit: str = "R"

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def values(self, ks: Sequence[int]) -> dict[str, Float64]:
        """Each metric's value per query (Q,)."""
        ranking = self.ranking
        return {
            **{f"{self.hit}@{k}": ranking.hit_at(k) for k in ks},
            "mean_rank": ranking.best_rank(),
            "MRR": ranking.reciprocal_rank(),
            "mAP": ranking.average_precision(),
            "nDCG@10": ranking.ndcg(10),
        }

    def per_unit(self, values: Float64) -> Float64:
        """Values (Q,) -> one per unit, whose mean is theirs: the unit's sum, over the mean number of
        queries that a unit has."""
        units = int(self.unit.max()) + 1
        sums = np.asarray(np.bincount(self.unit, values, units), np.float64)
        return sums * (units / len(values))

    def median_rank(self, seed: int) -> Interval:
        """The median of the best ranks, resampled by unit."""
        rank = self.ranking.best_rank()
        order = np.argsort(rank)
        ascending, unit = rank[order], self.unit[order]
        units = int(unit.max()) + 1

        def median(rows: Int64) -> float:
            passed = np.cumsum(np.bincount(rows, minlength=units)[unit])  # queries up to each
            middle = ((passed[-1] - 1) // 2, passed[-1] // 2)
            return float(ascending[np.searchsorted(passed, middle, side="right")].mean())

        resamples = 1000 if len(rank) < 50_000 else 200
        return metrics.statistic_interval(median, units, resamples=resamples, seed=seed)

    def cuts(self, found: Mapping[str, Interval]) -> list[tuple[int, Interval, float]]:
        """(K, what was found, what guessing finds), for each K that was asked for."""
        start = f"{self.name}/{self.hit}@"
        ks = [int(name.removeprefix(start)) for name in found if name.startswith(start)]
        return [(k, found[f"{start}{k}"], float(self.ranking.chance_hit_at(k).mean())) for k in ks]

    def at_chance(self, found: Mapping[str, Interval]) -> str:
        """A warning, if the model is not above guessing at any K."""
        cuts = [cut for cut in self.cuts(found) if cut[2] < 1]
        if not cuts or not all(i.low <= chance + 1e-9 for _, i, chance in cuts):
            return ""
        return f"{self.title}: the model finds no more than guessing does"

    def words(self, found: Mapping[str, Interval]) -> str:
        """The result in a sentence."""
        cuts = self.cuts(found)
        (k, first, chance), (last, most, _) = cuts[0], cuts[-1]
        place = "first" if k == 1 else f"among the first {k}"
        more = f" and among the first {last} for {percent(most.value)}" if last != k else ""
        sure = (
            f" (95 % interval {percent(first.low)} to {percent(first.high)})" if first.n > 1 else ""
        )
        median = found[f"{self.name}/median_rank"].value
        return (
            f"{self.answer} comes {place} for {percent(first.value)}{sure} of "
            f"{self.ranking.queries:,} {self.asking}{more}, at place {median:,.10g} of "
            f"{self.ranking.candidates:,} in the median; guessing puts it {place} for "
            f"{percent(chance)}."
        )


def ranked(asked: Asked, pictures: Float32, texts: Float32) -> list[Way]:
    """Rank pictures (N, D) and texts (M, D) for each other, in every direction that was asked for."""
    own = np.arange(len(pictures))
    if not asked.both_ways:
        ranking = metrics.rank_pairs(texts, pictures, asked.pairs)
        own = np.arange(len(texts))
        return [Way("tag_to_image", ranking, own, "tags", "A picture that bears the tag", "hit")]
    owner = asked.pairs[:, 1]
    to_image, to_text = metrics.rank_captions(pictures, texts, owner)
    return [
        Way("text_to_image", to_image, owner, "captions", "The right picture"),
        Way("image_to_text", to_text, own, "pictures", "A caption of the picture"),
    ]
