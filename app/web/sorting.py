"""Classify a library by words: zero-shot classification of the vectors that the catalog holds.

Only the words are encoded; no picture is read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32, Int64
from clipkit.catalog import Catalog, PictureRow
from clipkit.errors import InputError
from eval.prompts import Templates, load_templates
from eval.session import Session
from eval.zero_shot import class_vectors, classify

if TYPE_CHECKING:
    from app.web.workspace import Workspace
    from clipkit.search.live_vectors import LiveVectors

LEAST_WORDS, MOST_WORDS = 2, 200
MOST_LETTERS = 200  # of one word
# Choices of the least probability, in percent, of a word for its pictures, with their names on the page.
FLOORS: Mapping[str, str] = {
    "0": "always the nearest word",
    "50": "at least 50 %",
    "70": "at least 70 %",
    "90": "at least 90 %",
}
NONE = "None of these"  # the pictures for which no word reaches the floor
# With a floor, these compete with the words. Any 3 of CIFAR-10's classes on pictures of all 10, mean
# precision and recall: floor 50, 26.5 and 67.0 % without them, 37.4 and 48.1 % with them; floor 70,
# 32.0 and 54.4 % against 45.3 and 34.1 %.
BACKGROUND = ("thing", "object", "scene", "picture")
CLOSE = 0.1  # a lead over the second word below this is no decision
BEST_SHOWN, CLOSE_SHOWN = 10, 24
BLOCK = 16_384  # pictures at a time: 13 MB of probabilities for 200 words
REMEMBERED = 4  # sortings, some 20 MB each for a million pictures
# The prompt templates around a word, with their names on the page.
PHRASINGS: Mapping[str, str] = {
    "simple": "in seven phrasings: photos, drawings, large, small",
    "plain": "as “a photo of a …”",
    "alone": "the words alone",
    "imagenet1k": "in 80 phrasings",
}


class UnknownSortingError(InputError):
    """No sorting in memory has this key."""


@dataclass(frozen=True, slots=True)
class SortRequest:
    """The words to sort into, the phrasing in which they are encoded, and the least probability, in
    percent, that a word must have."""

    words: tuple[str, ...]
    phrasing: str = "simple"
    floor: int = 0

    @classmethod
    def from_page(cls, data: Mapping[str, Any]) -> SortRequest:
        """Read what a browser sent: words on lines or between commas. Raises InputError."""
        text, phrasing = data.get("words"), data.get("choice") or "simple"
        if not isinstance(text, str):
            raise InputError(f"words is {text!r}; it must be text")
        if not isinstance(phrasing, str) or phrasing not in PHRASINGS:
            raise InputError(f"unknown phrasing {phrasing!r}; choose from {', '.join(PHRASINGS)}")
        floor = data.get("floor") or "50"
        if not isinstance(floor, str) or floor not in FLOORS:
            raise InputError(f"unknown floor {floor!r}; choose from {', '.join(FLOORS)}")
        pieces = text.encode("utf-8", "replace").decode().replace(",", "\n").splitlines()
        words = {" ".join(piece.split()).casefold(): " ".join(piece.split()) for piece in pieces}
        words.pop("", None)
        if not LEAST_WORDS <= len(words) <= MOST_WORDS:
            raise InputError(
                f"{len(words):,} different {'word' if len(words) == 1 else 'words'} to sort into; "
                f"write {LEAST_WORDS} to {MOST_WORDS}, a line each or with commas between them"
            )
        for word in words.values():
            if len(word) > MOST_LETTERS:
                raise InputError(
                    f"“{word[:40]}…” has {len(word):,} letters; the limit is {MOST_LETTERS}"
                )
        return cls(tuple(words.values()), phrasing, int(floor))

    @property
    def templates(self) -> Templates:
        if self.phrasing == "alone":
            return Templates("alone", ("{}",))
        return load_templates(self.phrasing)


@dataclass(frozen=True, slots=True)
class Guess:
    """A picture with the two most probable words."""

    row: PictureRow
    word: str
    probability: float
    second: str
    second_probability: float


@dataclass(frozen=True, slots=True)
class Group:
    """The pictures for which a word is the most probable, or no word is probable enough."""

    word: str
    count: int
    share: float  # of all pictures, 0..1
    confidence: float | None  # mean probability of the word over its pictures; None without any
    best: tuple[Guess, ...]
    number: int = 0  # of the word in the request; -1: none of them


@dataclass(frozen=True, slots=True, eq=False)
class Sorting:
    """The two most probable words of every picture, and the part of it that the page shows."""

    key: str  # hex digits
    request: SortRequest
    groups: tuple[Group, ...]  # the largest first, NONE last
    close: tuple[Guess, ...]  # the closest calls first
    close_total: int
    seconds: float
    nums: Int64  # (N,) the catalog's
    first: npt.NDArray[np.int16]  # (N,) positions in request.words
    second: npt.NDArray[np.int16]
    probability: Float32  # (N,) of the first
    runner_up: Float32  # (N,) of the second

    @property
    def unsure(self) -> npt.NDArray[np.bool_]:
        """(N,) whether no word reaches the floor."""
        return np.asarray(self.probability < self.request.floor / 100)

    def members(self, number: int) -> Int64:
        """Return the positions of a group's pictures."""
        chosen = self.unsure if number < 0 else (self.first == number) & ~self.unsure
        return np.flatnonzero(chosen)

    def guess(self, at: int, row: PictureRow) -> Guess:
        words = self.request.words
        return Guess(
            row,
            words[self.first[at]],
            float(self.probability[at]),
            words[self.second[at]],
            float(self.runner_up[at]),
        )


class Sorter:
    """Sorts the library of one workspace and keeps the last REMEMBERED results. Threads may share it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._sortings: OrderedDict[str, Sorting] = OrderedDict()
        self._lock = threading.Lock()

    def sort(self, request: SortRequest) -> Sorting:
        """Sort all pictures.

        Raises InputError if none has a vector of this model, ModelError, and ServerBusy while too many
        others sort.
        """
        begun = time.perf_counter()
        model = self._workspace.model
        live = self._workspace.searcher().live()
        parts = (request, model.encoder_id, live.changes)
        key = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        with self._lock:
            if (cached := self._sortings.get(key)) is not None:
                self._sortings.move_to_end(key)
                return cached
        if not len(live.nums):
            raise InputError(
                f"no picture of this library has a vector of model {model.spec}; "
                "add pictures first, or start the page with the model of the index"
            )
        with self._workspace.classifying.take():
            session = Session()
            words = request.words + (BACKGROUND if request.floor else ())
            rows = class_vectors(model, words, request.templates, session)
            scale, most = session.logit_scale(model), len(request.words)
            classes, values = _two_best(live, rows, scale, most)
            sorting = Sorting(key, request, (), (), 0, 0.0, live.nums, *classes, *values)
            with self._catalog() as catalog:
                sorting = _with_groups(sorting, catalog)
            sorting = replace(sorting, seconds=time.perf_counter() - begun)
        with self._lock:
            self._sortings[key] = sorting
            while len(self._sortings) > REMEMBERED:
                self._sortings.popitem(last=False)
        return sorting

    def best(self, sorting: Sorting, number: int, most: int) -> tuple[Guess, ...]:
        """Return the `most` surest pictures of a group, the surest first."""
        with self._catalog() as catalog:
            return _guesses(sorting, catalog, sorting.members(number), -sorting.probability, most)

    def table(self, key: str) -> Iterator[bytes]:
        """Return a sorting as pieces of CSV in UTF-8. Raises UnknownSortingError, at once and not with
        the first piece, if it is no longer in memory."""
        with self._lock:
            sorting = self._sortings.get(key)
        if sorting is None:
            raise UnknownSortingError("this result is no longer in memory; sort again")
        return self._lines(sorting)

    def _lines(self, sorting: Sorting) -> Iterator[bytes]:
        yield _csv([("path", "word", "probability", "second word", "its probability", "sure")])
        with self._catalog() as catalog:
            for start in range(0, len(sorting.nums), 1000):
                nums = sorting.nums[start : start + 1000].tolist()
                rows = catalog.rows(nums)  # a picture may have left the catalog since
                unsure = sorting.unsure
                guesses = (
                    (sorting.guess(at, rows[num]), "no" if unsure[at] else "yes")
                    for at, num in enumerate(nums, start)
                    if num in rows
                )
                yield _csv(
                    (
                        guess.row.path,
                        guess.word,
                        f"{guess.probability:.4f}",
                        guess.second,
                        f"{guess.second_probability:.4f}",
                        sure,
                    )
                    for guess, sure in guesses
                )

    def _catalog(self) -> Catalog:
        folder = self._workspace.folder
        if not (folder / "catalog.sqlite").exists():
            raise InputError("there are no pictures to sort yet; add a folder of them first")
        return Catalog.open(folder)


# ---- sorting, step by step


def _two_best(
    live: LiveVectors, rows: Float32, scale: float, most: int
) -> tuple[npt.NDArray[np.int16], Float32]:
    """Return the two most probable of the first `most` classes (C, D) for each of the N live pictures,
    and their probabilities among all C, (2, N) each."""
    size = len(live.nums)
    classes, values = np.empty((2, size), np.int16), np.empty((2, size), np.float32)
    start = 0
    for nums, vectors in live.blocks(BLOCK):
        block = slice(start, start + len(nums))
        probabilities = classify(vectors, rows, logit_scale=scale)[:, :most]
        each = np.arange(len(probabilities))
        for rank in (0, 1):
            classes[rank, block] = best = probabilities.argmax(axis=1)
            values[rank, block] = probabilities[each, best]
            probabilities[each, best] = -1.0
        start = block.stop
    return classes, values


def _with_groups(sorting: Sorting, catalog: Catalog) -> Sorting:
    """Return the sorting with its groups and close calls, equal ones in the order of `nums`."""

    probability, groups = sorting.probability, []
    for number, word in [*enumerate(sorting.request.words), (-1, NONE)]:
        ours = sorting.members(number)
        confidence = float(probability[ours].mean(dtype=np.float64)) if len(ours) else None
        best = _guesses(sorting, catalog, ours, -probability, BEST_SHOWN)
        share = len(ours) / len(sorting.nums)
        groups.append(Group(word, len(ours), share, confidence, best, number))
    none = groups.pop()
    groups.sort(key=lambda group: -group.count)
    lead = probability - sorting.runner_up
    close = np.flatnonzero((lead < CLOSE) & ~sorting.unsure)
    return replace(
        sorting,
        groups=(*groups, *([none] if sorting.request.floor else [])),
        close=_guesses(sorting, catalog, close, lead, CLOSE_SHOWN),
        close_total=len(close),
    )


def _guesses(
    sorting: Sorting, catalog: Catalog, at: Int64, order: Float32, most: int
) -> tuple[Guess, ...]:
    """Return the first of the pictures at these positions by `order` (N,), then by num."""
    first = at[np.lexsort((sorting.nums[at], order[at]))][:most]
    nums = sorting.nums[first].tolist()
    rows = catalog.rows(nums)
    pairs = zip(first.tolist(), nums, strict=True)
    return tuple(sorting.guess(at, rows[num]) for at, num in pairs if num in rows)


def _csv(rows: Any) -> bytes:
    """Return rows as CSV; a cell that a spreadsheet would run as a formula gets an apostrophe."""
    out = io.StringIO()
    safe = ([f"'{c}" if c[:1] in "=+-@\t\r" and c else c for c in row] for row in rows)
    csv.writer(out).writerows(safe)
    return out.getvalue().encode("utf-8", "replace")
