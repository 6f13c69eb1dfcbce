"""What names say beside the cosine: which words of a query a picture has in its folders, file name,
captions and tags, and how much higher it ranks for that.

People name folders: the pictures in a folder called "watch" are wanted by `watch`, whatever a small
model makes of them. For a query, a picture ranks by

    cosine + NAME_WEIGHT * spread * coverage ** COVERAGE_POWER

where the spread is the standard deviation of the query's cosines to the library's sample, and the
coverage, from 0 to 1, is the share of the query's words that the picture has, each counted by how
specific it is: not at all if half of all pictures have it, as they have the words of the folder that
all lie in. So the cosine decides between pictures with the same words, and alone where no name has any.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Int64
from clipkit.catalog import Catalog
from clipkit.query import Query

# Both measured by tests/bench/bench_folder_names.py. The weight finds pictures that the model does not
# recognise, and still helps where four of five pictures in a folder are not what it is called.
NAME_WEIGHT = 3.0
# Above 1: a single word of many says less than its share, so that sentences keep their best pictures.
COVERAGE_POWER = 1.5
NAMED_COVERAGE = 0.5  # above it, a picture's names are reason enough to show it
MOST_WORDS = 32  # of a query that are looked up; of more, one says nothing

_WORD = re.compile(r"[^\W_]+")  # as FTS5's unicode61 splits
_STOP_WORDS = frozenset(
    "a about above after all an and any are as at be before behind being below beside between by can "
    "down during for from has have he her his how i in inside into is it its like me my near next no "
    "not of off on one onto or our out outside over she so some something someone than that the their "
    "them there these they this those through to two under up us very was we were what when where "
    "which while who whose will with without you your "
    "photo photos photograph photographs picture pictures image images snapshot".split()
)
_ENDINGS = (  # of a word, and what the word may end in without it
    ("s", ("",)),
    ("es", ("",)),
    ("ies", ("y",)),
    ("ves", ("f", "fe")),
    ("ing", ("", "e")),
    ("ed", ("", "e")),
)
_IRREGULAR = tuple(
    pair.split("/")
    for pair in "man/men woman/women child/children person/people mouse/mice goose/geese "
    "foot/feet tooth/teeth".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class NameMatches:
    """The pictures that have words of a query in their names."""

    words: tuple[tuple[str, Int64], ...]  # each word, and the nums that have it, sorted
    nums: Int64  # (M,) of all these pictures, sorted
    coverage: npt.NDArray[np.float64]  # (M,) from 0 to 1, greater than 0

    def bonus(self, nums: Int64, spread: float) -> npt.NDArray[np.float64]:
        """Return what is added to the cosine of each of `nums` (N,); 0 for one without a match."""
        bonus = np.zeros(len(nums))
        if len(self.nums):
            at = np.minimum(np.searchsorted(self.nums, nums), len(self.nums) - 1)
            same = self.nums[at] == nums
            bonus[same] = NAME_WEIGHT * spread * self.coverage[at[same]] ** COVERAGE_POWER
        return bonus

    def words_of(self, num: int) -> tuple[str, ...]:
        """Return the words of the query that a picture has in its names, if these are what it is asked
        for: not "red" of "a red car"."""
        at = np.searchsorted(self.nums, num)
        if at == len(self.nums) or self.nums[at] != num or self.coverage[at] <= NAMED_COVERAGE:
            return ()
        return tuple(
            word for word, nums in self.words if num in nums[np.searchsorted(nums, num) :][:1]
        )


def match_names(catalog: Catalog, query: Query, *, pictures: int, others: float) -> NameMatches:
    """Look up the query's texts in the names of the catalog's live pictures, of which there are
    `pictures`. `others` is the weight of the query's example pictures, of which names say nothing."""
    weights = _content_words(query)
    matches = [found.nums for found in catalog.having([spellings(word) for word in weights])]
    texts = sum(term.weight for term in query.terms)
    total = sum(weights.values()) * (texts + others) / texts if weights else 0.0
    specific = []
    for (word, weight), nums in zip(weights.items(), matches, strict=True):
        share = weight / total * max(0.0, 1 - 2 * len(nums) / max(pictures, 1))
        if share and len(nums):
            specific.append((word, nums, share))
    coverage = np.zeros(max((int(nums[-1]) + 1 for _, nums, _ in specific), default=0))
    for _, nums, share in specific:
        coverage[nums] += share  # by num: nums are small integers
    union = np.flatnonzero(coverage)
    return NameMatches(tuple((word, nums) for word, nums, _ in specific), union, coverage[union])


def _content_words(query: Query) -> dict[str, float]:
    """Return the words of the query's texts that a name may be known by, with their text's weight."""
    words = (
        (word, term.weight)
        for term in query.terms
        for word in _WORD.findall(term.text.casefold())
        if word not in _STOP_WORDS and not (len(word) == 1 and word.isascii())
    )
    return dict(itertools.islice(words, MOST_WORDS))


def spellings(word: str) -> set[str]:
    """Return an English word with its regular forms: plural and singular, -ing and -ed.

    Among them are many that are no words; no name has those. Nothing is cut to less than three letters.
    """
    stems = {word}
    for ending, replacements in _ENDINGS:
        stem = word.removesuffix(ending)
        if len(word) > len(stem) >= 3:
            stems |= {stem + replacement for replacement in replacements}
            if stem[-1] == stem[-2]:  # running, stopped
                stems.add(stem[:-1])
    forms = set(stems)
    for stem in stems:
        open_stem = stem.removesuffix("e")
        forms |= {stem + "s", stem + "es", open_stem + "ing", open_stem + "ed"}
        forms |= {stem + stem[-1] + "ing", stem + stem[-1] + "ed"}
        if stem.endswith("y"):
            forms.add(stem[:-1] + "ies")
        if stem.endswith(("f", "fe")):
            forms.add(open_stem[:-1] + "ves")
    for pair in _IRREGULAR:
        if forms.intersection(pair):
            forms.update(pair)
    return forms
