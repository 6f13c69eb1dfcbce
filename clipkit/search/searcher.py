"""Search a catalog: the entry that the page, the API and the command line share.

1. Filters and phrases come first: only pictures that pass them are ranked, and `total` counts them.
2. Words, examples and exclusions are encoded as one vector (query_encoder.py); pictures rank by
   their cosine to it, and the higher the more of the words are in their names (name_matches.py).
   With phrases, this ranking (weight 1) and each phrase's are fused by reciprocal rank.
3. Ties go by image_id.
4. `sort:` orders the hits. With words or examples the k best are chosen first, then sorted. Without,
   all pictures that pass are sorted: by the phrases' ranks, or else by date, the newest first.
5. Where no picture passes, the answer says which filter or phrase leaves none (empty.py).

Filters, phrases, `similar` and examples that are in the library need no encoder: it is loaded by
the first query that has something to encode.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit import strength
from clipkit.arrays import Float32, Int64
from clipkit.catalog import Catalog, Filters, PictureRow
from clipkit.errors import InputError
from clipkit.lazy_encoder import Encoder
from clipkit.picture_set import PictureSet
from clipkit.query import Query, parse
from clipkit.search.empty import Empty, explain_empty
from clipkit.search.live_vectors import LiveVectors, follow
from clipkit.search.name_matches import NameMatches, match_names
from clipkit.search.query_encoder import QueryEncoder, encoder_mismatch
from clipkit.text_towers import unreadable_words

NOTHING_STANDS_OUT = "Nothing clearly shows this. These pictures are the nearest."
BUILTIN_IS_SMALL = (
    "The built-in model is small: the README names larger ones under Use other models."
)
FIRST_NAMED = 1_000  # pictures with words of the query in their names that are always compared
RRF_K = 60  # Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion", SIGIR, section 2

# (weight, nums, a key for each, the best least): equal keys are a tie
Ranking = tuple[float, Int64, npt.NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One picture of a result.

    `score` is None where nothing was compared, as in pictures that filters or phrases alone list.
    `probability` and `strength` are None there too, where the model is not calibrated (see
    clipkit.strength), and where the query holds an example picture.
    """

    rank: int  # from 1
    score: float | None  # cosine
    strength: str | None  # the band of `probability`: "strong", "fair" or "weak"
    picture: PictureRow
    probability: float | None = None  # of being right for the query's words
    named: tuple[str, ...] = ()  # words of the query in its names, if most of them are


@dataclass(frozen=True, slots=True)
class SearchResult:
    hits: tuple[SearchHit, ...]
    total: int  # exact: all pictures that pass filters and phrases
    seconds: Mapping[str, float]  # by stage: "load" (new vectors), "encode", "search", "rows"
    notes: tuple[str, ...] = ()  # sentences for the user about the whole result
    empty: Empty | None = None  # why no picture passes filters and phrases


class _Clock:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "encode", "search", "rows"), 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


class Searcher:
    """Searches one catalog with one encoder; threads may share it.

    `catalog` is one opened for reading; the next query sees what an indexer has committed.
    `encoder` is loaded by the first query that needs it. `encoder_id` names the vectors to search
    before that; without it, and with an encoder whose id only loading tells, they are those of the
    catalog's one encoder. With `files=False`, an example `+FILE` is refused, for callers on whose
    behalf this machine must not read its files.
    """

    def __init__(
        self,
        catalog: Catalog,
        encoder: Encoder,
        *,
        encoder_id: str | None = None,
        files: bool = True,
    ) -> None:
        self.catalog = catalog
        self._encoder = encoder
        self._queries = QueryEncoder(encoder)
        self._encoder_id = encoder_id
        self._files = files
        self._calibrations: dict[str, strength.Calibration | None] = {}
        self._live: LiveVectors | None = None
        self._following = threading.Lock()

    def search(
        self,
        query: str | Query = "",
        *,
        k: int = 24,
        image: Image.Image | bytes | Float32 | None = None,
        filters: Filters | None = None,
    ) -> SearchResult:
        """Return the k best pictures for a query, with `image` (RGB, a file's bytes, or a vector) as
        one more example and `filters` in addition to the query's own.

        Raises QueryError, ImageError (an example cannot be read), EncoderMismatch (the catalog has
        vectors of other encoders only), ModelError (a vector that is not finite), InputError.
        """
        query = parse(query) if isinstance(query, str) else query
        return self._answer(query, k, image, filters)

    def similar(
        self,
        image_id: str,
        query: str | Query = "",
        *,
        k: int = 24,
        filters: Filters | None = None,
    ) -> SearchResult:
        """Return the k pictures nearest to one of the library, without itself, or nearest to it and a
        query together. Needs no encoder without a query's words.

        Raises InputError if the library has no such picture, else what `search` does.
        """
        query = parse(query) if isinstance(query, str) else query
        return self._answer(query, k, None, filters, like=image_id)

    def _answer(
        self,
        query: Query,
        k: int,
        image: Image.Image | bytes | Float32 | None,
        filters: Filters | None,
        *,
        like: str | None = None,  # image_id of an example that is left out of the results
    ) -> SearchResult:
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1, the number of pictures to show")
        clock = _Clock()
        allowed, rankings = self._passing(query, filters)
        clock.lap("search")
        examples = image is not None or like is not None
        if not (query.terms or query.exclude or query.examples or examples):
            result = self._listed(allowed, rankings, k, query.sort, clock)
        else:
            live = self.live()
            clock.lap("load")
            without = None
            if like is not None:
                without = self.catalog.has_picture(like)
                image = live.unit_vector(without)
                if image is None:
                    raise InputError(f"no picture {like!r} in this library; search for it by words")
            if not len(live.nums):
                return SearchResult((), 0, clock.seconds)
            vector = self._queries.vector(query, image, live=live, files=self._files)
            clock.lap("encode")
            others = sum(example.weight for example in query.examples) + examples
            names = match_names(self.catalog, query, pictures=len(live.nums), others=others)
            result = self._ranked(
                live, vector, allowed, rankings, names, k, query.sort, clock, without=without,
                calibrated=bool(query.terms) and not (query.examples or examples),
            )  # fmt: skip
            result = replace(result, notes=self._notes(query, result))
        if result.total:
            return result
        empty = explain_empty(query, filters, count=self._count, catalog=self.catalog)
        return replace(result, empty=empty)

    # ---- vectors and filters

    def live(self) -> LiveVectors:
        """Return the vectors as of now. Raises EncoderMismatch if all are of other encoders."""
        with self._following:
            encoder_id = self._searched_id()
            old = self._live if self._live and self._live.encoder_id == encoder_id else None
            self._live = live = follow(self.catalog, encoder_id, old)
        if not len(live.nums):
            self._check_others(encoder_id)
        return live

    def _searched_id(self) -> str:
        if self._encoder_id is not None:
            return self._encoder_id
        if self._encoder.known_id is None:
            encoders = self.catalog.encoders()
            if len(encoders) == 1:
                return encoders[0].encoder_id
        return self._encoder.encoder_id

    def _check_others(self, encoder_id: str) -> None:
        specs = {row.encoder_id: row.spec for row in self.catalog.encoders()}
        others = [key for key in specs if key != encoder_id and len(self.catalog.live_nums(key))]
        if others:
            index = (specs[others[-1]], others[-1])
            raise encoder_mismatch(index, (self._encoder.spec, encoder_id))

    def _passing(self, query: Query, filters: Filters | None) -> tuple[Int64 | None, list[Ranking]]:
        """Return the nums that pass the query's filters and phrases and `filters`, sorted (None: all),
        and the phrases' rankings."""
        passing = None
        rankings: list[Ranking] = []
        for one in (self._catalog_filters(query), filters):
            if one is not None and one != Filters():
                passing = _common(passing, self.catalog.matching(one).nums)
        for phrase in query.phrases:
            found = self.catalog.phrase(phrase.text)
            nums = found.nums.nums
            ranks = np.zeros(len(nums)) if found.bm25 is None else found.bm25
            rankings.append((phrase.weight, nums, ranks))
            passing = _common(passing, nums)
        return passing, rankings

    def _count(self, query: Query, filters: Filters | None) -> int:
        passing, _ = self._passing(query, filters)
        return self.catalog.stats().pictures if passing is None else len(passing)

    def _catalog_filters(self, query: Query) -> Filters:
        """Convert the query's filters to the catalog's: a `folder:` that is not absolute is any folder
        of that name, or whose path ends so; one that begins with a dot is seen from the working
        folder."""
        values: dict[str, list[str]] = {}
        for item in query.filters:
            values.setdefault(item.key, []).append(item.value)
        one = {key: several[0] for key, several in values.items()}
        folders = [os.path.expanduser(value) for value in values.get("folder", ())]
        return Filters(
            after=one.get("after"),
            before=one.get("before"),
            paths=tuple(values.get("path", ())),
            folders=tuple(
                os.path.abspath(folder) if folder.split("/")[0] in (".", "..") else folder
                for folder in folders
            ),
            cameras=tuple(values.get("camera", ())),
            formats=tuple(values.get("format", ())),
            tags=tuple(values.get("tag", ())),
            min_width=int(one.get("width", 0)),
            min_height=int(one.get("height", 0)),
            orientation=one.get("orientation"),
        )

    # ---- strength

    def _calibration(self, encoder_id: str) -> strength.Calibration | None:
        """Return the model's calibration, read once for each encoder."""
        if encoder_id not in self._calibrations:
            self._calibrations[encoder_id] = strength.read(self._encoder.spec, encoder_id)
        return self._calibrations[encoder_id]

    def _notes(self, query: Query, result: SearchResult) -> tuple[str, ...]:
        """Return what a user should know about the result: words that the model cannot read, and
        that nothing stands out."""
        spec, notes = self._encoder.spec, []
        texts = [term.text for term in (*query.terms, *query.exclude)]
        if unread := unreadable_words(spec, texts):
            listed = ", ".join(f"“{word}”" for word in unread)
            knows = " knows English; it" if spec == "builtin" else ""
            notes.append(f"The model {spec}{knows} does not know {listed}.")
        if result.hits and all(hit.strength == "weak" and not hit.named for hit in result.hits):
            notes.append(NOTHING_STANDS_OUT)
            if spec == "builtin":
                notes.append(BUILTIN_IS_SMALL)
        return tuple(notes)

    # ---- ranking

    def _ranked(
        self,
        live: LiveVectors,
        vector: Float32,
        allowed: Int64 | None,
        rankings: Sequence[Ranking],
        names: NameMatches,
        k: int,
        sort: str | None,
        clock: _Clock,
        *,
        without: int | None,
        calibrated: bool,
    ) -> SearchResult:
        if allowed is not None:
            allowed = _common(allowed, live.nums)
        searched = live.nums if allowed is None else allowed
        total = len(searched)
        if without is not None:
            at = np.searchsorted(searched, without)
            total -= int(np.isin(without, searched[at : at + 1]))
        sample = live.sample @ vector
        spread = float(sample.std(dtype=np.float64))
        if rankings:
            nums, scores = live.search(vector, len(searched), allowed=allowed)
        else:
            wanted = k + (without is not None)
            nearest = _nearest(live, vector, wanted, allowed)
            nums, scores = _with_named(live, vector, wanted, nearest, allowed, names, spread)
        nums, scores = nums[nums != without], scores[nums != without]
        keys = scores + names.bonus(nums, spread)
        if rankings:
            keys = reciprocal_rank_fusion([(1.0, nums, -keys), *rankings], nums)
        clock.lap("search")
        rows = self._best_rows(nums, keys, k)
        if sort in ("date", "name"):
            rows = _sorted(rows, sort)
        by_num = dict(zip(nums.tolist(), scores.tolist(), strict=True))
        cosines = [by_num[row.num] for row in rows]
        probabilities: Sequence[float | None] = [None] * len(rows)
        calibration = self._calibration(live.encoder_id) if calibrated else None
        if calibration is not None:
            # of the whole library: a filter, which hides other pictures, does not make one more right
            probabilities = calibration.probabilities(cosines, len(live.nums)).tolist()
        hits = tuple(
            SearchHit(
                rank,
                score,
                None if p is None else strength.band(p),
                row,
                p,
                names.words_of(row.num),
            )
            for rank, (row, score, p) in enumerate(
                zip(rows, cosines, probabilities, strict=True), 1
            )
        )
        clock.lap("rows")
        return SearchResult(hits, total, clock.seconds)

    def _listed(
        self,
        allowed: Int64 | None,
        rankings: Sequence[Ranking],
        k: int,
        sort: str | None,
        clock: _Clock,
    ) -> SearchResult:
        """List pictures by filters and phrases alone."""
        nums = self.catalog.matching(Filters()).nums if allowed is None else allowed
        clock.lap("search")
        if rankings and sort in (None, "score"):
            rows = self._best_rows(nums, reciprocal_rank_fusion(rankings, nums), k)
        else:
            among = None if allowed is None else PictureSet.of_sorted(allowed)
            order = "name" if sort == "name" else "date"
            page, _ = self.catalog.listed(order, among=among, limit=k)
            by_num = self.catalog.rows(page)
            rows = [by_num[num] for num in page if num in by_num]
        hits = tuple(SearchHit(rank, None, None, row) for rank, row in enumerate(rows, 1))
        clock.lap("rows")
        return SearchResult(hits, len(nums), clock.seconds)

    def _best_rows(self, nums: Int64, keys: npt.NDArray[np.float64], k: int) -> list[PictureRow]:
        """Return the rows of the k greatest keys, by (-key, image_id)."""
        if len(nums) > k:  # with all that tie with the last one: image_id decides among them
            chosen = keys >= np.partition(keys, len(keys) - k)[len(keys) - k]
            nums, keys = nums[chosen], keys[chosen]
        rows = self.catalog.rows(nums.tolist())
        order = sorted(
            (-key, rows[num].image_id, num)
            for num, key in zip(nums.tolist(), keys.tolist(), strict=True)
            if num in rows  # it may have been removed since
        )
        return [rows[num] for _, _, num in order[:k]]


def _nearest(
    live: LiveVectors, vector: Float32, k: int, allowed: Int64 | None
) -> tuple[Int64, Float32]:
    """Return the k nearest and all that tie with the last of them."""
    limit = k + 8
    while True:
        nums, scores = live.search(vector, limit, allowed=allowed)
        if len(nums) < limit or scores[-1] < scores[k - 1]:
            return nums, scores
        limit *= 4


def _with_named(
    live: LiveVectors,
    vector: Float32,
    k: int,
    nearest: tuple[Int64, Float32],
    allowed: Int64 | None,
    names: NameMatches,
    spread: float,
) -> tuple[Int64, Float32]:
    """Return the nearest and, of the others in `allowed` (sorted; None: all), those that their names
    may lift to the k best.

    Their cosines are at most the least of the nearest, so they are compared in blocks of falling
    bonus until that is too little: the first block whole, of the others as many as can still win. An
    approximate index may miss one of these as it may any other picture.
    """
    nums, scores = nearest
    least = scores.min(initial=1.0)
    threshold = _kth(scores + names.bonus(nums, spread), k)
    bonus = names.bonus(names.nums, spread)
    can_win = bonus + least >= threshold
    named, bonus = names.nums[can_win], bonus[can_win]
    passing = ~np.isin(named, nums) & np.isin(named, live.nums if allowed is None else allowed)
    named, bonus = named[passing], bonus[passing]
    order = np.argsort(-bonus)
    start, size = 0, FIRST_NAMED
    while start < len(order) and (most := bonus[order[start]]) + least >= threshold:
        block = np.sort(named[order[start : start + size]])
        limit = len(block) if start == 0 else k + 8
        while True:
            more, cosines = live.search(vector, limit, allowed=block)
            both = np.concatenate([nums, more]), np.concatenate([scores, cosines])
            threshold = _kth(both[1] + names.bonus(both[0], spread), k)
            if limit >= len(block) or cosines[-1] + most < threshold:
                break
            limit *= 4
        nums, scores = both
        start, size = start + size, 16 * size
    return nums, scores


def _kth(keys: npt.NDArray[np.floating], k: int) -> float:
    """Return the k-th greatest key; minus infinity if there are fewer."""
    return float(np.partition(keys, len(keys) - k)[len(keys) - k]) if len(keys) >= k else -np.inf


def _sorted(rows: Iterable[PictureRow], sort: str) -> list[PictureRow]:
    """Sort by name or date (newest first, undated rows last). Ties go by image_id."""
    rows = sorted(rows, key=lambda row: row.image_id)
    if sort == "name":
        return sorted(rows, key=lambda row: Path(row.path).name.casefold())
    return sorted(rows, key=lambda row: row.dated or "", reverse=True)


def _common(allowed: Int64 | None, nums: Int64) -> Int64:
    """Return those of the unique `nums` that are in `allowed` (None: all), sorted."""
    if allowed is None:
        return np.sort(nums)
    return np.intersect1d(allowed, nums, assume_unique=True)


def reciprocal_rank_fusion(rankings: Sequence[Ranking], nums: Int64) -> npt.NDArray[np.float64]:
    """Return a key for each of `nums` (N,), the greater the better: sum of weight / (RRF_K + rank).

    `rankings` are (weight, nums, their keys, the best least). Ranks count from 1 among `nums`, skipping
    all others, and equal keys share the best rank of them: they leave it to the other rankings which
    comes first. A num that is not in a ranking gets nothing from it.
    """
    order = np.argsort(nums)
    keys = np.zeros(len(nums))
    for weight, ranking, its_keys in rankings:
        asked = np.isin(ranking, nums)
        ranked, its_keys = ranking[asked], its_keys[asked]
        positions = order[np.searchsorted(nums, ranked, sorter=order)]
        keys[positions] += weight / (RRF_K + 1 + np.searchsorted(np.sort(its_keys), its_keys))
    return keys.round(12)  # so that 1/61 + 1/62 and 1/62 + 1/61 tie exactly
