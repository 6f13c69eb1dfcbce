"""Search a catalog: the entry that the page, the API and the command line share.

1. Filters and phrases come first: only pictures that pass them are ranked, and `total` counts them.
2. Words, examples and exclusions are encoded as one vector (query_encoder.py); pictures rank by
   their cosine to it, and the higher the more of the words are in their names (name_matches.py).
   With phrases, this ranking (weight 1) and each phrase's are fused by reciprocal rank; a phrase of
   so many pictures that the catalog does not rank them only filters.
3. Ties go by image_id.
4. `sort:` orders the hits. With words or examples the k best are chosen first, then sorted: each page
   holds the next k best. Without, all pictures that pass are sorted: by the phrases' ranks, or else by
   date, the newest first.
5. A page ends with a cursor, from which the next goes on, to the last picture that passes (ranking.py).
   A state of the library has one order, so pages neither double nor lose a picture. Where the library
   has changed in between, the next page goes on after the last picture shown.
6. Where no picture passes, the answer says which filter or phrase leaves none (empty.py).

Filters, phrases, `similar` and examples that are in the library need no encoder: it is loaded by
the first query that has something to encode.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipkit import strength
from clipkit.arrays import Float32
from clipkit.catalog import Catalog, EncoderRow, Filters, PictureRow
from clipkit.errors import InputError
from clipkit.lazy_encoder import Encoder
from clipkit.picture_set import PictureSet
from clipkit.query import Query, parse
from clipkit.search import cursor as cursors
from clipkit.search.comparison import Comparison, PhraseRanking, reciprocal_rank_fusion
from clipkit.search.cursor import Cursor
from clipkit.search.empty import Empty, explain_empty
from clipkit.search.live_vectors import Follower, LiveVectors, SnapshotDamaged
from clipkit.search.name_matches import match_names
from clipkit.search.query_encoder import QueryEncoder, encoder_mismatch
from clipkit.search.ranking import Ranking
from clipkit.text_towers import unreadable_words

NOTHING_STANDS_OUT = "Nothing clearly shows this. These pictures are the nearest."
BUILTIN_IS_SMALL = (
    "The built-in model is small: the README names larger ones under Use other models."
)

if TYPE_CHECKING:  # a search by words does not wait for Pillow
    from PIL import Image

    Example = Image.Image | bytes | Float32  # RGB, a file's bytes, or a unit vector (D,)


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One picture of a result.

    `score` is None where nothing was compared, as in pictures that filters or phrases alone list.
    `probability` and `strength` are None there too, where the model is not calibrated (see
    clipkit.strength), and where the query holds an example picture.
    """

    rank: int  # from 1, going on from page to page
    score: float | None  # cosine
    strength: str | None  # the band of `probability`: "strong", "fair" or "weak"
    picture: PictureRow
    probability: float | None = None  # of being right for the query's words
    named: tuple[str, ...] = ()  # words of the query in its names, if most of them are


@dataclass(frozen=True, slots=True)
class SearchResult:
    hits: tuple[SearchHit, ...]
    total: int  # exact: all pictures that pass filters and phrases
    # by stage: "load" (new vectors), "encode", "filter" (and names), "scan", "rows"
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()  # sentences for the user about the whole result; of the first page
    empty: Empty | None = None  # why no picture passes filters and phrases
    cursor: str | None = None  # with which the next page is asked for; None on the last


class _Clock:
    def __init__(self) -> None:
        stages = ("load", "encode", "filter", "scan", "rows")
        self.seconds = dict.fromkeys(stages, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


@dataclass(frozen=True, slots=True)
class _Request:
    """One page of a search."""

    query: Query
    k: int
    image: Example | None
    filters: Filters | None
    like: str | None  # image_id of an example that is left out of the results
    cursor: str | None

    @property
    def compares(self) -> bool:
        query = self.query
        return bool(query.terms or query.exclude or query.examples or self.examples)

    @property
    def examples(self) -> bool:
        """Whether there is an example beside those of the query."""
        return self.image is not None or self.like is not None

    def fingerprint(self, encoder_id: str) -> str:
        """Return a text that is the same for all pages of a search, and for no other search."""
        image = None
        if self.image is not None:
            data = self.image if isinstance(self.image, bytes) else self.image.tobytes()
            image = hashlib.blake2b(data, digest_size=16).hexdigest()
        filters = self.filters or Filters()
        return cursors.fingerprint(self.query, filters, self.like, image, encoder_id)

    def read_cursor(self, search: str) -> Cursor | None:
        """Return the cursor, if there is one. Raises InputError if it is of another search."""
        return None if self.cursor is None else cursors.read(self.cursor, search)


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """The encoder of a search, and the id of its vectors if that was named."""

    encoder: Encoder
    encoder_id: str | None
    queries: QueryEncoder


class Searcher:
    """Searches one catalog with one encoder; threads may share it.

    `catalog` is one opened for reading; the next query sees what an indexer has committed.
    `encoder` is loaded by the first query that needs it. `encoder_id` names the vectors to search
    before that; without it, and with an encoder whose id only loading tells, they are those of the
    catalog's one encoder. With `open_active`, given where no model was named, a query follows the
    catalog's active encoder, which another process may change: `open_active` opens it. With
    `files=False`, an example `+FILE` is refused, for callers on whose behalf this machine must not read
    its files.
    """

    def __init__(
        self,
        catalog: Catalog,
        encoder: Encoder,
        *,
        encoder_id: str | None = None,
        files: bool = True,
        open_active: Callable[[EncoderRow], Encoder] | None = None,
    ) -> None:
        self.catalog = catalog
        self._model = _Model(encoder, encoder_id, QueryEncoder(encoder))
        self._files = files
        self._open_active = open_active
        self._active_id: str | None = None  # the last active encoder that was followed
        self._switching = threading.Lock()
        self._calibrations: dict[str, strength.Calibration | None] = {}
        self._follower = Follower(catalog)

    def search(
        self,
        query: str | Query = "",
        *,
        k: int = 24,
        image: Example | None = None,
        filters: Filters | None = None,
        cursor: str | None = None,
    ) -> SearchResult:
        """Return the k best pictures for a query, with `image` (RGB, a file's bytes, or a unit vector)
        as one more example and `filters` in addition to the query's own.

        With the `cursor` of a result, return the page after it: give all else as before, but for k.
        Raises QueryError, ImageError (an example cannot be read), EncoderMismatch (the catalog has
        vectors of other encoders only), ModelError (a vector that is not finite), InputError.
        """
        query = parse(query) if isinstance(query, str) else query
        return self._answer(_Request(query, k, image, filters, None, cursor))

    def similar(
        self,
        image_id: str,
        query: str | Query = "",
        *,
        k: int = 24,
        filters: Filters | None = None,
        cursor: str | None = None,
    ) -> SearchResult:
        """Return the k pictures nearest to one of the library, without itself, or nearest to it and a
        query together. Needs no encoder without a query's words.

        Raises InputError if the library has no such picture, else what `search` does.
        """
        query = parse(query) if isinstance(query, str) else query
        return self._answer(_Request(query, k, None, filters, image_id, cursor))

    def live(self) -> LiveVectors:
        """Return the vectors as of now. Raises EncoderMismatch if all are of other encoders."""
        return self._live(self._current_model())

    @property
    def loaded(self) -> bool:
        """Return whether all vectors are loaded. Ask once the model is loaded."""
        return self._follower.has(self._searched_id(self._current_model()))

    def _answer(self, request: _Request) -> SearchResult:
        if request.k < 1:
            raise InputError(
                f"k is {request.k}; it must be at least 1, the number of pictures to show"
            )
        clock = _Clock()
        if request.compares:
            model = self._current_model()
            live = self._live(model)
            clock.lap("load")
            try:
                result = self._compared(request, model, live, clock)
            except SnapshotDamaged as error:
                live = self._follower.without_snapshot(live, error)
                result = self._compared(request, model, live, clock)
        else:
            result = self._listed(request, clock)
        if result.total or request.cursor is not None:
            return result
        empty = explain_empty(
            request.query, request.filters, count=self._count, catalog=self.catalog
        )
        return replace(result, empty=empty)

    # ---- the model and its vectors

    def _current_model(self) -> _Model:
        """Return the model to search with: another one if the catalog has made another active."""
        if self._open_active is None:
            return self._model
        row = self.catalog.active_encoder()
        with self._switching:
            if row is not None and row.encoder_id != self._active_id:
                if self._model.encoder.known_id != row.encoder_id:
                    encoder = self._open_active(row)
                    self._model = _Model(encoder, None, QueryEncoder(encoder))
                self._active_id = row.encoder_id
            return self._model

    def _live(self, model: _Model) -> LiveVectors:
        encoder_id = self._searched_id(model)
        live = self._follower.current(encoder_id)
        if not live.pictures:
            self._check_others(model, encoder_id)
        return live

    def _searched_id(self, model: _Model) -> str:
        if model.encoder_id is not None:
            return model.encoder_id
        if model.encoder.known_id is None:
            encoders = self.catalog.encoders()
            if len(encoders) == 1:
                return encoders[0].encoder_id
        return model.encoder.encoder_id

    def _check_others(self, model: _Model, encoder_id: str) -> None:
        specs = {row.encoder_id: row.spec for row in self.catalog.encoders()}
        others = [key for key in specs if key != encoder_id and len(self.catalog.live_nums(key))]
        if others:
            index = (specs[others[-1]], others[-1])
            raise encoder_mismatch(index, (model.encoder.spec, encoder_id))

    # ---- filters

    def _passing(
        self, query: Query, filters: Filters | None
    ) -> tuple[PictureSet | None, list[PhraseRanking]]:
        """Return the pictures that pass the query's filters and phrases and `filters` (None: all), and
        the rankings of the phrases that have one."""
        passing = None
        rankings: list[PhraseRanking] = []
        for one in (self._catalog_filters(query), filters):
            if one is not None and one != Filters():
                passing = _common(passing, self.catalog.matching(one))
        for phrase in query.phrases:
            matches = self.catalog.phrase(phrase.text)
            passing = _common(passing, matches.nums)
            if matches.bm25 is not None:
                rankings.append((phrase.weight, matches.nums.nums, matches.bm25))
        return passing, rankings

    def _count(self, query: Query, filters: Filters | None) -> int:
        passing, _ = self._passing(query, filters)
        return len(self.catalog.matching(Filters()) if passing is None else passing)

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

    def _calibration(self, model: _Model, encoder_id: str) -> strength.Calibration | None:
        """Return the model's calibration, read once for each encoder."""
        if encoder_id not in self._calibrations:
            self._calibrations[encoder_id] = strength.read(model.encoder.spec, encoder_id)
        return self._calibrations[encoder_id]

    def _notes(self, spec: str, query: Query, hits: Sequence[SearchHit]) -> tuple[str, ...]:
        """Return what a user should know about the result: words that the model cannot read, and
        that nothing stands out."""
        notes = []
        texts = [term.text for term in (*query.terms, *query.exclude)]
        if unread := unreadable_words(spec, texts):
            listed = ", ".join(f"“{word}”" for word in unread)
            knows = " knows English; it" if spec == "builtin" else ""
            notes.append(f"The model {spec}{knows} does not know {listed}.")
        if hits and all(hit.strength == "weak" and not hit.named for hit in hits):
            notes.append(NOTHING_STANDS_OUT)
            if spec == "builtin":
                notes.append(BUILTIN_IS_SMALL)
        return tuple(notes)

    # ---- ranking

    def _compared(
        self, request: _Request, model: _Model, live: LiveVectors, clock: _Clock
    ) -> SearchResult:
        """Rank the pictures that pass by their vectors, and return a page of them."""
        query = request.query
        search = request.fingerprint(live.encoder_id)
        cursor = request.read_cursor(search)
        if not live.pictures:
            return SearchResult((), 0, clock.seconds)
        ranking = live.rankings.get(search)
        if ranking is None:
            ranking = self._ranking(request, model, live, clock)
        nums, scores, rows, following = self._page(ranking, cursor, search, request.k, clock)
        live.rankings.keep(search, ranking)
        present = [at for at, num in enumerate(nums) if num in rows]
        if query.sort in ("date", "name"):
            present.sort(key=lambda at: rows[nums[at]].image_id)
            named = {at: _sort_key(rows[nums[at]], query.sort) for at in present}
            present.sort(key=lambda at: named[at], reverse=query.sort == "date")
        cosines = [scores[at] for at in present]
        probabilities: Sequence[float | None] = [None] * len(present)
        calibrated = query.terms and not (query.examples or request.examples)
        calibration = self._calibration(model, live.encoder_id) if calibrated else None
        if calibration is not None:
            # of the whole library: a filter, which hides other pictures, does not make one more right
            probabilities = calibration.probabilities(cosines, len(live.pictures)).tolist()
        shown = cursor.shown if cursor else 0
        hits = tuple(
            SearchHit(
                rank,
                scores[at],
                None if p is None else strength.band(p),
                rows[nums[at]],
                p,
                ranking.names.words_of(nums[at]),
            )
            for rank, (at, p) in enumerate(zip(present, probabilities, strict=True), shown + 1)
        )
        notes = self._notes(model.encoder.spec, query, hits) if cursor is None else ()
        clock.lap("rows")
        return SearchResult(hits, ranking.total, clock.seconds, notes, cursor=following)

    def _ranking(
        self, request: _Request, model: _Model, live: LiveVectors, clock: _Clock
    ) -> Ranking:
        """Encode the query and look up what passes and whose names have its words."""
        query, image, without = request.query, request.image, None
        if request.like is not None:
            without = self.catalog.has_picture(request.like)
            image = live.unit_vector(without)
            if image is None:
                raise InputError(
                    f"no picture {request.like!r} in this library; search for it by words"
                )
        clock.lap("scan")
        vector = model.queries.vector(query, image, live=live, files=self._files)
        clock.lap("encode")
        passing, phrases = self._passing(query, request.filters)
        others = sum(example.weight for example in query.examples) + request.examples
        names = match_names(self.catalog, query, pictures=len(live.pictures), others=others)
        clock.lap("filter")
        spread = float((live.sample @ vector).std(dtype=np.float64))
        comparison = Comparison(live, vector, passing, without, names, spread, phrases)
        return Ranking(comparison.pictures, comparison.best, self.catalog.image_ids, names)

    def _listed(self, request: _Request, clock: _Clock) -> SearchResult:
        """List pictures by filters and phrases alone."""
        sort = request.query.sort
        search = request.fingerprint("")
        cursor = request.read_cursor(search)
        passing, phrases = self._passing(request.query, request.filters)
        pictures = self.catalog.matching(Filters()) if passing is None else passing
        clock.lap("filter")
        if phrases and sort in (None, "score"):
            nums = pictures.nums
            keys = reciprocal_rank_fusion(phrases, nums)
            every = nums, np.zeros(len(nums), np.float32), keys
            ranking = Ranking(pictures, lambda _: every, self.catalog.image_ids)
            order, _, rows, following = self._page(ranking, cursor, search, request.k, clock)
        else:
            by = "name" if sort == "name" else "date"
            after = cursor.position if cursor else None
            limit = min(request.k, max(1, len(pictures)))
            order, position = self.catalog.listed(by, among=passing, after=after, limit=limit)
            rows = self.catalog.rows(order)
            shown = (cursor.shown if cursor else 0) + len(order)
            following = Cursor(search, shown, position=position).text() if position else None
        shown = cursor.shown if cursor else 0
        present = (rows[num] for num in order if num in rows)
        hits = tuple(
            SearchHit(rank, None, None, row) for rank, row in enumerate(present, shown + 1)
        )
        clock.lap("rows")
        return SearchResult(hits, len(pictures), clock.seconds, cursor=following)

    def _page(
        self, ranking: Ranking, cursor: Cursor | None, search: str, k: int, clock: _Clock
    ) -> tuple[list[int], list[float], dict[int, PictureRow], str | None]:
        """Return nums, scores and rows of the k pictures after the cursor, and the next cursor."""
        start = 0
        if cursor is not None:
            num = self.catalog.has_picture(cursor.image_id)
            start = ranking.after(cursor.place, cursor.key, cursor.image_id, num)
        stop = min(start + k, ranking.total)
        nums, scores, keys = ranking.page(start, stop)
        clock.lap("scan")
        rows = self.catalog.rows(nums.tolist())  # without those that were removed since
        following = None
        if len(nums) and stop < ranking.total:
            last = int(nums[-1])
            image_id = rows[last].image_id if last in rows else self.catalog.image_ids([last])[last]
            shown = (cursor.shown if cursor else 0) + len(rows)
            following = Cursor(search, shown, stop, float(keys[-1]), image_id).text()
        return nums.tolist(), scores.tolist(), rows, following


def _sort_key(row: PictureRow, sort: str) -> str:
    return Path(row.path).name.casefold() if sort == "name" else row.dated or ""


def _common(passing: PictureSet | None, pictures: PictureSet) -> PictureSet:
    """Return those of `pictures` that are in `passing` (None: all)."""
    return pictures if passing is None else passing & pictures
