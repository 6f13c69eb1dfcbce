"""Sorting a library into words, and the reports that are kept: what the evaluation page works on.

Sorting is zero-shot classification of the vectors that the catalog holds: only the words are encoded,
no picture is read. Knows neither Gradio nor FastAPI. Threads may share it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.paths import reports_folder
from clipkit.catalog import Catalog, PictureRow
from clipkit.errors import InputError
from eval.prompts import Templates, load_templates
from eval.session import Session
from eval.zero_shot import class_vectors, classify

if TYPE_CHECKING:
    from app.web.workspace import Workspace

LEAST_WORDS, MOST_WORDS = 2, 200
MOST_LETTERS = 200  # of one word
CLOSE = 0.1  # a lead over the second word below this is no decision
BEST_SHOWN, CLOSE_SHOWN = 10, 24
BLOCK = 16_384  # pictures at a time: 13 MB of probabilities for 200 words
REMEMBERED = 4  # sortings, some 20 MB each for a million pictures
REPORTS_SHOWN = 200
REPORT_MEGABYTES = 64
# What stands around a word when it is encoded, as the page offers it.
CHOICES: Mapping[str, str] = {
    "simple": "in seven phrasings: photos, drawings, large, small",
    "plain": "as “a photo of a …”",
    "alone": "the words alone",
    "imagenet1k": "in 80 phrasings",
}
_REPORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


class UnknownReportError(InputError):
    """No report, or no sorting, has this name."""


@dataclass(frozen=True, slots=True)
class Question:
    """Into which words to sort, and how they are put."""

    words: tuple[str, ...]
    choice: str = "simple"

    @classmethod
    def from_page(cls, data: Mapping[str, Any]) -> Question:
        """Read what a browser sent: words on lines or between commas. InputError says what is wrong."""
        text, choice = data.get("words"), data.get("choice") or "simple"
        if not isinstance(text, str):
            raise InputError(f"words is {text!r}; it must be text")
        if not isinstance(choice, str) or choice not in CHOICES:
            raise InputError(f"there is no phrasing {choice!r}; choose one of {', '.join(CHOICES)}")
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
        return cls(tuple(words.values()), choice)

    @property
    def templates(self) -> Templates:
        return (
            Templates("alone", ("{}",)) if self.choice == "alone" else load_templates(self.choice)
        )


@dataclass(frozen=True, slots=True)
class Guess:
    """A picture and the two words that fit it best, with their probabilities."""

    row: PictureRow
    word: str
    probability: float
    second: str
    second_probability: float


@dataclass(frozen=True, slots=True)
class Group:
    """The pictures that a word got."""

    word: str
    count: int
    share: float  # of all pictures, 0..1
    confidence: float | None  # mean probability of the word over its pictures; None without any
    best: tuple[Guess, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sorting:
    """The answer to a Question: every picture's two best words, and what the page shows of it."""

    key: str  # hex digits that name it
    question: Question
    groups: tuple[Group, ...]  # the largest first
    close: tuple[Guess, ...]  # the closest calls first
    close_total: int
    seconds: float
    nums: npt.NDArray[np.int64]  # (N,) the catalog's
    first: npt.NDArray[np.int16]  # (N,) positions in question.words
    second: npt.NDArray[np.int16]
    probability: npt.NDArray[np.float32]  # (N,) of the first
    runner_up: npt.NDArray[np.float32]  # (N,) of the second

    def guess(self, at: int, row: PictureRow) -> Guess:
        words = self.question.words
        return Guess(
            row,
            words[self.first[at]],
            float(self.probability[at]),
            words[self.second[at]],
            float(self.runner_up[at]),
        )


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A saved report as the list shows it."""

    name: str  # of its folder
    title: str
    models: tuple[str, ...]
    created_at: str  # UTC, ISO; empty if it does not say


class Evaluation:
    """See the module."""

    def __init__(self, workspace: Workspace, *, reports: Path | None = None) -> None:
        self._workspace = workspace
        self._reports = reports or reports_folder()
        self._sortings: OrderedDict[str, Sorting] = OrderedDict()
        self._lock = threading.Lock()

    # ---- sorting

    def sort(self, question: Question) -> Sorting:
        """Sort the library. InputError: no pictures, or none with this model's vectors; ModelError."""
        begun = time.perf_counter()
        model = self._workspace.model
        with self._catalog() as catalog:
            key = _key(question, model.encoder_id, catalog.change_counter())
            with self._lock:
                if (known := self._sortings.get(key)) is not None:
                    self._sortings.move_to_end(key)
                    return known
            stored = catalog.vectors(model.encoder_id)
            if not len(stored.nums):
                raise InputError(
                    f"no picture of this library has a vector of model {model.spec}; "
                    "add pictures first, or start the page with the model of the index"
                )
            session = Session()
            rows = class_vectors(model, question.words, question.templates, session)
            ranked = _two_best(stored.vectors, rows, session.logit_scale(model))
            sorting = _summed(catalog, key, question, stored.nums, ranked, begun)
        with self._lock:
            self._sortings[key] = sorting
            while len(self._sortings) > REMEMBERED:
                self._sortings.popitem(last=False)
        return sorting

    def table(self, key: str) -> Iterator[bytes]:
        """A sorting as CSV in UTF-8, piece by piece. UnknownReportError at once if it is forgotten."""
        with self._lock:
            sorting = self._sortings.get(key)
        if sorting is None:
            raise UnknownReportError("this sorting is no longer remembered; sort again")
        return self._lines(sorting)

    def _lines(self, sorting: Sorting) -> Iterator[bytes]:
        yield _csv([("path", "word", "probability", "second word", "its probability")])
        with self._catalog() as catalog:
            for start in range(0, len(sorting.nums), 1000):
                nums = sorting.nums[start : start + 1000].tolist()
                found = catalog.rows(nums)  # a picture may have left since
                guesses = (
                    sorting.guess(at, found[num])
                    for at, num in enumerate(nums, start)
                    if num in found
                )
                yield _csv(
                    (
                        guess.row.path,
                        guess.word,
                        f"{guess.probability:.4f}",
                        guess.second,
                        f"{guess.second_probability:.4f}",
                    )
                    for guess in guesses
                )

    def _catalog(self) -> Catalog:
        folder = self._workspace.folder
        if not (folder / "catalog.sqlite").exists():
            raise InputError("there are no pictures to sort yet; add a folder of them first")
        return Catalog.open(folder)

    # ---- reports

    def reports(self) -> list[ReportRow]:
        """The saved reports, the newest first; what is no report is left out."""
        try:
            names = [path.name for path in self._reports.iterdir()]
        except OSError:
            return []
        found = [row for name in names if (row := self._report(name)) is not None]
        found.sort(key=lambda row: (row.created_at, row.name), reverse=True)
        return found[:REPORTS_SHOWN]

    def report_page(self, name: str) -> bytes:
        """A report's HTML, by the name of its folder. UnknownReportError if there is none."""
        path = self._below(name, "report.html")
        try:
            if path is not None and path.stat().st_size <= REPORT_MEGABYTES * 1_000_000:
                return path.read_bytes()
        except OSError:
            pass  # said below
        raise UnknownReportError("there is no report of this name; it may have been deleted")

    def _report(self, name: str) -> ReportRow | None:
        path = self._below(name, "report.json")
        try:
            if path is None or path.stat().st_size > REPORT_MEGABYTES * 1_000_000:
                return None
            told = json.loads(path.read_bytes())
            models = told["names"] if "names" in told else [told["model"]]
            return ReportRow(
                name, str(told["title"]), tuple(map(str, models)), str(told.get("created_at", ""))
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _below(self, name: str, file: str) -> Path | None:
        """A file of a report's folder. None for a name that is none, or that leads elsewhere."""
        if not _REPORT.fullmatch(name) or ".." in name:
            return None
        path = self._reports / name / file
        try:
            real = path.resolve(strict=True)
            return path if real == self._reports.resolve() / name / file else None
        except (OSError, RuntimeError):
            return None


# ---- sorting, step by step

Ranked = tuple[
    npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.float32]
]


def _two_best(
    vectors: npt.NDArray[np.float16], rows: npt.NDArray[np.float32], scale: float
) -> Ranked:
    """Of vectors (N, D) and classes (C, D): the two best classes and their probabilities, (N,) each."""
    size = len(vectors)
    places = np.empty((2, size), np.int16)
    values = np.empty((2, size), np.float32)
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        found = classify(vectors[block].astype(np.float32), rows, logit_scale=scale)
        each = np.arange(len(found))
        for rank in (0, 1):
            places[rank, block] = best = found.argmax(axis=1)
            values[rank, block] = found[each, best]
            found[each, best] = -1.0
    return places[0], places[1], values[0], values[1]


def _summed(
    catalog: Catalog,
    key: str,
    question: Question,
    nums: npt.NDArray[np.int64],
    ranked: Ranked,
    begun: float,
) -> Sorting:
    first, _, probability, runner_up = ranked
    lead = probability - runner_up
    close = np.flatnonzero(lead < CLOSE)
    shown = {"close": close[np.lexsort((nums[close], lead[close]))][:CLOSE_SHOWN]}
    members: list[npt.NDArray[np.int64]] = []
    for number in range(len(question.words)):
        got = np.flatnonzero(first == number)
        members.append(got)
        shown[str(number)] = got[np.lexsort((nums[got], -probability[got]))][:BEST_SHOWN]
    rows = catalog.rows([int(num) for places in shown.values() for num in nums[places]])
    sorting = Sorting(key, question, (), (), len(close), time.perf_counter() - begun, nums, *ranked)

    def guesses(name: str) -> tuple[Guess, ...]:
        found = ((int(at), rows.get(int(nums[at]))) for at in shown[name])
        return tuple(sorting.guess(at, row) for at, row in found if row is not None)

    groups = [
        Group(
            word,
            len(got),
            len(got) / len(nums),
            float(probability[got].mean(dtype=np.float64)) if len(got) else None,
            guesses(str(number)),
        )
        for number, (word, got) in enumerate(zip(question.words, members, strict=True))
    ]
    groups.sort(key=lambda group: -group.count)
    took = time.perf_counter() - begun
    return replace(sorting, groups=tuple(groups), close=guesses("close"), seconds=took)


def _key(question: Question, encoder_id: str, changes: int) -> str:
    parts = repr((question.words, question.choice, encoder_id, changes))
    return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()


def _csv(rows: Any) -> bytes:
    """Rows as CSV. A cell that a spreadsheet would take for a formula gets an apostrophe before it."""
    out = io.StringIO()
    safe = ([f"'{c}" if c[:1] in "=+-@\t\r" and c else c for c in row] for row in rows)
    csv.writer(out).writerows(safe)
    return out.getvalue().encode("utf-8", "replace")
