"""Search a catalog: the entry that the page, the API and the command line share.

1. Filters and phrases come first: only pictures that pass them are ranked, and `total` counts them.
2. Words, examples and exclusions are encoded as one vector (query_encoder.py); pictures rank by
   their cosine to it. With phrases, this ranking (weight 1) and each phrase's are fused by reciprocal
   rank.
3. Ties go by image_id.
4. `sort:` orders the hits. With words or examples the k best are chosen first, then sorted. Without,
   all pictures that pass are sorted: by the phrases' ranks, or else by date, the newest first.

Filters, phrases, `similar` and examples that are in the library need no encoder: it is loaded by
the first query that has something to encode.
"""

from __future__ import annotations

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
from clipkit.query import Query, parse
from clipkit.search.live_vectors import LiveVectors, follow
from clipkit.search.query_encoder import QueryEncoder, encoder_mismatch
from clipkit.text_towers import unreadable_words

NOTHING_STANDS_OUT = "Nothing clearly shows this. These pictures are the nearest."
BUILTIN_IS_SMALL = (
    "The built-in model is small: the README names larger ones under Use other models."
)
RRF_K = 60  # Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion", SIGIR, section 2

Rankings = Sequence[tuple[float, Int64]]  # (weight, nums best first)


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


@dataclass(frozen=True, slots=True)
class SearchResult:
    hits: tuple[SearchHit, ...]
    total: int  # exact: all pictures that pass filters and phrases
    seconds: Mapping[str, float]  # by stage: "load" (new vectors), "encode", "search", "rows"
    notes: tuple[str, ...] = ()  # sentences for the user about the whole result


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
        image: Image.Image | bytes | None = None,
        filters: Filters | None = None,
    ) -> SearchResult:
        """Return the k best pictures for a query, with `image` (RGB, or a file's bytes) as one more
        example and `filters` in addition to the query's own.

        Raises QueryError, ImageError (an example cannot be read), EncoderMismatch (the catalog has
        vectors of other encoders only), ModelError (a vector that is not finite), InputError.
        """
        _check_k(k)
        query = parse(query) if isinstance(query, str) else query
        clock = _Clock()
        allowed = self._passing(query, filters)
        rankings = []
        for phrase in query.phrases:
            nums = np.array(self.catalog.phrase(phrase.text), dtype=np.int64)
            rankings.append((phrase.weight, nums))
            allowed = _common(allowed, nums)
        clock.lap("search")
        if not (query.terms or query.exclude or query.examples or image is not None):
            return self._listed(allowed, rankings, k, query.sort, clock)
        live = self._current()
        clock.lap("load")
        if not len(live.nums):
            return SearchResult((), 0, clock.seconds)
        vector = self._queries.vector(query, image, live=live, files=self._files)
        clock.lap("encode")
        result = self._ranked(
            live, vector, allowed, rankings, k, query.sort, clock,
            calibrated=bool(query.terms) and not query.examples and image is None,
        )  # fmt: skip
        return replace(result, notes=self._notes(query, result))

    def similar(
        self,
        image_id: str,
        *,
        k: int = 24,
        filters: Filters | None = None,
        sort: str | None = None,
    ) -> SearchResult:
        """Return the k pictures nearest to one of the library, without itself, in the order `sort` as
        in a query. Needs no encoder.

        Raises InputError if the library has no such picture, EncoderMismatch as `search` does.
        """
        _check_k(k)
        clock = _Clock()
        live = self._current()
        clock.lap("load")
        num = self.catalog.has_picture(image_id)
        vector = live.unit_vector(num)
        if vector is None:
            raise InputError(f"no picture {image_id!r} in this library; search for it by words")
        allowed = self._passing(Query(), filters)
        return self._ranked(live, vector, allowed, [], k, sort, clock, without=num)

    # ---- vectors and filters

    def _current(self) -> LiveVectors:
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

    def _passing(self, query: Query, filters: Filters | None) -> Int64 | None:
        """Return the nums that pass the query's filters and `filters`, sorted; None: all."""
        passing = None
        for one in (self._catalog_filters(query), filters):
            if one is not None and one != Filters():
                passing = _common(passing, self.catalog.matching(one))
        return passing

    def _catalog_filters(self, query: Query) -> Filters:
        """Convert the query's filters to the catalog's.

        A relative `folder:` is below an indexed folder or begins with its name: where
        /home/me/photos is indexed, folder:photos/2023 and folder:2023 are the same.
        """
        values: dict[str, list[str]] = {}
        for item in query.filters:
            values.setdefault(item.key, []).append(item.value)
        one = {key: several[0] for key, several in values.items()}
        folders = [Path(value).expanduser() for value in values.get("folder", ())]
        if not all(folder.is_absolute() for folder in folders):
            roots = [Path(root) for root in self.catalog.roots()]
            tops = [top for root in roots for top in (root, root.parent)] or [Path.cwd()]
            folders = [top / folder for folder in folders for top in tops]  # absolute: stays itself
        return Filters(
            after=one.get("after"),
            before=one.get("before"),
            paths=tuple(values.get("path", ())),
            folders=tuple(str(folder) for folder in folders),
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
        if result.hits and all(hit.strength == "weak" for hit in result.hits):
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
        rankings: Rankings,
        k: int,
        sort: str | None,
        clock: _Clock,
        *,
        without: int | None = None,
        calibrated: bool = False,
    ) -> SearchResult:
        if allowed is not None:
            allowed = _common(allowed, live.nums)
        searched = live.nums if allowed is None else allowed
        total = len(searched)
        if rankings:
            nums, scores = live.search(vector, total, allowed=allowed)
            keys = reciprocal_rank_fusion([(1.0, nums), *rankings], nums)
        else:
            if without is not None:
                at = np.searchsorted(searched, without)
                total -= int(np.isin(without, searched[at : at + 1]))
            nums, scores = _nearest(live, vector, k + (without is not None), allowed)
            nums, scores = nums[nums != without], scores[nums != without]
            keys = scores.astype(np.float64)
        clock.lap("search")
        rows = self._best_rows(nums, keys, k)
        if sort in ("date", "name"):
            rows = _sorted(rows, sort)
        by_num = dict(zip(nums.tolist(), scores.tolist(), strict=True))
        cosines = [by_num[row.num] for row in rows]
        probabilities: Sequence[float | None] = [None] * len(rows)
        calibration = self._calibration(live.encoder_id) if calibrated else None
        if calibration is not None:
            array = np.array(cosines, dtype=np.float32)
            probabilities = calibration.probabilities(array, live.sample @ vector).tolist()
        hits = tuple(
            SearchHit(rank, score, None if p is None else strength.band(p), row, p)
            for rank, (row, score, p) in enumerate(
                zip(rows, cosines, probabilities, strict=True), 1
            )
        )
        clock.lap("rows")
        return SearchResult(hits, total, clock.seconds)

    def _listed(
        self, allowed: Int64 | None, rankings: Rankings, k: int, sort: str | None, clock: _Clock
    ) -> SearchResult:
        """List pictures by filters and phrases alone."""
        nums = self.catalog.matching(Filters()) if allowed is None else allowed
        clock.lap("search")
        if rankings and sort in (None, "score"):
            rows = self._best_rows(nums, reciprocal_rank_fusion(rankings, nums), k)
        elif sort == "name":
            rows = _sorted(self.catalog.rows(nums.tolist()).values(), sort)[:k]
        else:
            newest = self.catalog.newest(k, among=allowed)
            by_num = self.catalog.rows(newest)
            rows = [by_num[num] for num in newest if num in by_num]
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


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1, the number of pictures to show")


def reciprocal_rank_fusion(rankings: Rankings, nums: Int64) -> npt.NDArray[np.float64]:
    """Return a key for each of `nums` (N,), the greater the better: sum of weight / (RRF_K + rank).

    `rankings` are (weight, nums best first). Ranks count from 1 among `nums`, skipping all others; a
    num that is not in a ranking gets nothing from it.
    """
    order = np.argsort(nums)
    keys = np.zeros(len(nums))
    for weight, ranking in rankings:
        ranked = ranking[np.isin(ranking, nums)]
        positions = order[np.searchsorted(nums, ranked, sorter=order)]
        keys[positions] += weight / (RRF_K + 1 + np.arange(len(ranked)))
    return keys.round(12)  # so that 1/61 + 1/62 and 1/62 + 1/61 tie exactly
