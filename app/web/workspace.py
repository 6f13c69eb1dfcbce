"""The state behind the page: one index folder, one model, at most one indexing run.

page.py, api.py and routes.py call it; it knows neither Gradio nor FastAPI. Threads may share it.
Pictures are named by content hash only, also to open a picture's file on the screen. The only paths
that a request may carry are those of folders, to index, to forget or (app.web.folders) to list.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from app.corrections import Corrections, Mark, export, marked_words
from app.web.folders import Listing, Root, browsable, listing, path_of
from app.web.indexing import Indexer, Run
from app.web.pictures import (
    QUERY_MEGAPIXELS,
    Decoding,
    DroppedPictures,
    Places,
    Recent,
    ServerBusy,
    UnknownPictureError,
    query_limits,
)
from app.web.requests import SearchRequest
from app.web.teaching import Teacher
from clipkit.arrays import Float32
from clipkit.catalog import Catalog, CatalogStats, Facets, Filters, PictureRow
from clipkit.errors import ClipkitError, EncoderMismatch, ImageError, InputError, ModelError
from clipkit.images import Limits, decode, encode_for_web, image_id, read_bytes, thumbnail
from clipkit.index_models import IndexModel, drop_model, models_of, use_model
from clipkit.lazy_encoder import LazyEncoder
from clipkit.library import open_encoder
from clipkit.query import Example, Query, parse
from clipkit.search import Empty, Searcher, SearchHit, SearchResult
from clipkit.search.query_encoder import encoder_mismatch
from clipkit.wording import printable

log = logging.getLogger(__name__)

FOLDERS_SHOWN = 500  # choices of the folder filter
THUMBNAIL_SIDE = 320  # of those that the index stores
SENT_MEGABYTES = 64  # re-encoded pictures in memory
VECTORS_MEGABYTES = 4  # vectors of pictures that came with requests
NEWEST = 18  # pictures on the start page
NEWEST_UP_TO = 20_000  # pictures in a library whose start page lists its newest


class PictureGoneError(InputError):
    """The picture is in the catalog, but its file was deleted or has other content now."""


class NotAllowedError(InputError):
    """The page is read-only, or others can reach it."""


@dataclass(frozen=True, slots=True)
class FolderRow:
    """A folder of the library. `key` is its path in a form that HTML can hold, whatever bytes it has."""

    path: str
    key: str
    pictures: int  # at any depth below


@dataclass(frozen=True, slots=True, eq=False)
class SearchAnswer:
    """The answer to a SearchRequest."""

    hits: tuple[SearchHit, ...]
    total: int  # pictures that pass the filters
    seconds: float
    empty: Empty | None = None  # why nothing passes
    words: str | None = None  # what a mark of a hit says is shown; None: hits cannot be marked
    marks: Mapping[str, bool] = field(default_factory=dict)  # right or wrong, by image_id
    notes: tuple[str, ...] = ()  # SearchResult.notes
    cursor: str | None = None  # where the next page begins; None after the last hit
    stable: bool = True  # more hits come after these; else they would lie between them


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that `similarity` compares."""

    kind: str  # "image_id", "image" (a file's bytes) or "text"
    value: str | bytes


@dataclass(frozen=True, eq=False)
class Contents:
    """Counts, folders, values to filter by and newest pictures of the library, for one value of the
    catalog's change counter. Each part is read when it is first used, then cached."""

    catalog: Catalog | None  # None: there is no index yet
    changes: int

    @cached_property
    def _stats(self) -> CatalogStats | None:
        return self.catalog.stats() if self.catalog else None

    @property
    def pictures(self) -> int:
        return self._stats.pictures if self._stats else 0

    @property
    def newest_at(self) -> str | None:
        """When a picture was last added; UTC, ISO 8601."""
        return self._stats.newest if self._stats else None

    @cached_property
    def folders(self) -> tuple[FolderRow, ...]:
        """Return the FOLDERS_SHOWN folders with the most pictures, for the filter."""
        folders = self.catalog.folders(FOLDERS_SHOWN) if self.catalog else []
        keys = [
            hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest() for path, _ in folders
        ]
        return tuple(FolderRow(path, key, n) for (path, n), key in zip(folders, keys, strict=True))

    @cached_property
    def facets(self) -> Facets:
        """Return the formats, cameras and tags that pictures have, for the filters."""
        return self.catalog.facets() if self.catalog else Facets()

    @cached_property
    def models(self) -> list[IndexModel]:
        """Return the models of the index, the oldest first."""
        return models_of(self.catalog) if self.catalog else []

    @property
    def roots(self) -> tuple[str, ...]:
        """The indexed folders."""
        return self._stats.roots if self._stats else ()

    @cached_property
    def newest(self) -> tuple[PictureRow, ...]:
        """Return the NEWEST pictures by date; none of a library above NEWEST_UP_TO, where sorting every
        row would take too long."""
        if self.catalog is None or self.pictures > NEWEST_UP_TO:
            return ()
        nums, _ = self.catalog.listed("date", limit=NEWEST)
        rows = self.catalog.rows(nums)
        return tuple(rows[num] for num in nums if num in rows)


@dataclass(frozen=True, slots=True)
class Status:
    """Which model and which index answer."""

    spec: str
    encoder_id: str | None
    model: str  # "unloaded", "loading" or "ready"
    pictures: int
    newest: str | None  # when a picture was last added; UTC, ISO 8601
    indexing: bool
    corrections: int
    teaching: str = ""  # the stage of a lesson in progress
    may_teach: bool = True

    @property
    def stage(self) -> str:
        """What the start page shows: "ready" with pictures, else "indexing" or "empty"."""
        return "ready" if self.pictures else "indexing" if self.indexing else "empty"


def facts(row: PictureRow) -> dict[str, Any]:
    """Return what the catalog knows of a picture, for JSON; every text is printable."""
    return {
        "image_id": row.image_id,
        "name": printable(PurePath(row.path).name),
        "path": printable(row.path),
        "places": [printable(place) for place in row.places],
        "width": row.width,
        "height": row.height,
        "format": row.format,
        "bytes": row.bytes,
        "taken_at": row.taken_at,
        "dated": row.dated,
        "camera": printable(row.camera) if row.camera else None,
        "captions": [printable(caption) for caption in row.captions],
        "tags": [printable(tag) for tag in row.tags],
    }


def _is_there(row: PictureRow) -> bool:
    """Return whether a file of the picture's size is in one of its places, without reading it."""
    for place in row.places:
        with suppress(OSError):
            if os.stat(place).st_size == row.bytes:
                return True
    return False


def _finite(vectors: Float32) -> Float32:
    if not np.isfinite(vectors).all():
        raise ModelError("the model gives vectors that are not finite; its weights are damaged")
    return vectors


def desktop_command(path: Path, *, folder: bool = False, platform: str = sys.platform) -> list[str]:
    """Return the command that opens a file, or the folder around it, on this machine's screen."""
    if platform == "darwin":
        return ["open", *(["-R"] if folder else []), str(path)]
    if platform == "win32":
        return ["explorer", f"/select,{path}" if folder else str(path)]
    return ["xdg-open", str(path.parent if folder else path)]


class Workspace:
    """See the module. `may_index` says whether folders may be indexed from the page; with `read_only`
    nothing may be changed from it: no marks, no indexing, no forgetting, no file opened.

    With `follows`, the model is that which is active in the index, from the next request on after a
    switch, by whomever; else `model` until the page switches. `open_model` returns the model of a spec,
    None for the active one.
    """

    def __init__(
        self,
        folder: Path,
        model: LazyEncoder,
        *,
        may_index: bool = True,
        read_only: bool = False,
        limits: Limits | None = None,
        follows: bool = False,
        open_model: Callable[[str | None], LazyEncoder] | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self._follows = follows
        self._followed = -1  # the change counter for which the active model was looked up
        self._open_model = open_model or (lambda spec: open_encoder(folder, spec))
        self.may_index = may_index and not read_only
        self.read_only = read_only
        self.limits = limits or Limits()
        places = Places("decoding pictures", 4, waiting=16, seconds=20)
        self._decoding = Decoding(places, QUERY_MEGAPIXELS)
        self._encoding = Places("encoding", 2, waiting=16, seconds=20)
        self.classifying = Places("classifying pictures", 2, waiting=2, seconds=60)
        self.dropped = DroppedPictures(limits=self.limits, decoding=self._decoding)
        self._sent: Recent[bytes] = Recent(SENT_MEGABYTES)
        self._vectors: Recent[Float32] = Recent(VECTORS_MEGABYTES)
        self.corrections = Corrections(folder)
        self._indexer = Indexer(folder, limits=self.limits)
        self.teacher = Teacher(self)
        self._lock = threading.Lock()
        self.observers: list[Callable[[SearchResult], None]] = []  # called after every search
        self._opened: tuple[Catalog, Searcher] | None = None
        self._warm = False
        self._contents = Contents(None, 0)

    def _open(self) -> tuple[Catalog, Searcher] | None:
        """Return catalog and searcher, opened once; None while there is no index."""
        opened = self._opened
        if opened is not None and (
            not self._follows or opened[0].change_counter() == self._followed
        ):
            return opened  # as nearly always: requests do not wait for each other
        with self._lock:
            if self._opened is None and (self.folder / "catalog.sqlite").exists():
                catalog = Catalog.open(self.folder)
                self._opened = catalog, self._searcher(catalog)
                self._load()
            if self._opened is not None and self._follows:
                self._follow_active(self._opened[0])
            return self._opened

    def warm(self) -> None:
        """Load in the background, now and whenever the index or its model is another one, so that no
        search waits: the model, its vectors in the index, and then what filters compare."""
        self._warm = True
        self.model.warm()
        self._load()

    def _load(self) -> None:
        """Load what an index has in memory in the background, if `warm` was called."""

        def load() -> None:
            try:
                opened = self._open()
                if opened is not None:
                    opened[1].live()
                    opened[0].read_columns()
            except ClipkitError as error:  # the first search raises it again
                log.info("the index was not loaded: %s", error)

        if self._warm:
            threading.Thread(target=load, name="clipkit-vectors", daemon=True).start()

    def _searcher(self, catalog: Catalog) -> Searcher:
        return Searcher(catalog, self.model, encoder_id=self.model.known_id, files=False)

    def close(self) -> None:
        """Stop a run, wait for its end and close the catalog."""
        self.teacher.close()
        self._indexer.close()
        with self._lock:
            if self._opened is not None:
                self._opened[0].close()
            self._opened = None

    def contents(self) -> Contents:
        """Return what the library holds now: the same object until the catalog changes."""
        opened = self._open()
        if opened is None:
            return Contents(None, 0)
        catalog, _ = opened
        changes = catalog.change_counter()
        contents = self._contents
        if contents.catalog is not catalog or contents.changes != changes:
            self._contents = contents = Contents(catalog, changes)
        return contents

    def searcher(self) -> Searcher:
        """Return the searcher. Raises InputError if there is no index yet."""
        opened = self._open()
        if opened is None:
            raise InputError("there are no pictures yet; add a folder of them first")
        return opened[1]

    @property
    def space_id(self) -> str | None:
        """The space_id of the model; None until it is loaded, if only that tells it."""
        return self.model.space_id if self.model.known_id else None

    def check_ready(self) -> None:
        """Raise ServerBusy unless words can be searched for now: the model is loaded, and, if there is
        an index, its vectors, which are the model's. Loads nothing."""
        if self.model.state != "ready":
            raise ServerBusy(
                f"the model {self.model.spec} is {self.model.state}; it is not ready yet"
            )
        opened = self._open()
        if opened is None:
            return
        if not opened[1].loaded:
            raise ServerBusy(
                f"the vectors of the model {self.model.spec} are not loaded; it is not ready yet"
            )
        try:
            self._check_model()
        except EncoderMismatch as error:
            raise ServerBusy(str(error)) from error

    def status(self, contents: Contents | None = None) -> Status:
        """Return the status as of `contents`, by default those of now."""
        contents = contents or self.contents()
        corrections = self._readable()
        lesson = self.teacher.lesson
        return Status(
            spec=self.model.spec,
            encoder_id=self.model.known_id,
            model=self.model.state,
            pictures=contents.pictures,
            newest=contents.newest_at,
            indexing=self.indexing,
            corrections=corrections.total() if corrections else 0,
            teaching=lesson.stage if lesson is not None and lesson.working else "",
            may_teach=self.may_index,
        )

    # ---- searching

    def search(self, request: SearchRequest, contents: Contents | None = None) -> SearchAnswer:
        """Search; `contents` are those of now, if the caller has them. Raises ClipkitError."""
        started = time.perf_counter()
        opened = self._open()
        if opened is None:
            return SearchAnswer((), 0, 0.0)
        catalog, searcher = opened
        filters = self._filters(request, contents)
        query = parse(request.words)
        query = replace(query, sort=query.sort or request.sort)
        page: dict[str, Any] = {"k": request.limit, "cursor": request.cursor}
        words = None
        if request.similar:
            self._row(request.similar)
            result = searcher.similar(request.similar, query, filters=filters, **page)
        else:
            query, image = self._with_images(catalog, query, request.images)
            result = searcher.search(query, image=image, filters=filters, **page)
            words = None if request.images else marked_words(query)
        for observe in self.observers:
            observe(result)
        corrections = self._readable() if words and not self.read_only else None
        return SearchAnswer(
            hits=result.hits,
            total=result.total,
            seconds=time.perf_counter() - started,
            empty=result.empty,
            words=words if corrections else None,
            marks=corrections.of(words) if corrections and words else {},
            notes=result.notes,
            cursor=result.cursor,
            # The best are put in order of date or name; without words, all that pass a filter are.
            stable=query.sort in (None, "score") or not result.hits or result.hits[0].score is None,
        )

    def _with_images(
        self, catalog: Catalog, query: Query, images: Sequence[str | bytes]
    ) -> tuple[Query, Float32 | None]:
        """Return the query with those of the `images` that are in the library as examples, and the sum
        (D,) of the others' vectors."""
        examples, vectors = list(query.examples), []
        for image in images:
            name = image if isinstance(image, str) else image_id(image)
            if catalog.has_picture(name) is not None:
                examples.append(Example(name))
            else:
                vectors.append(self._vector_of(self.dropped[name] if image is name else image))
        if vectors:
            self._check_model()
        total = np.sum(vectors, axis=0, dtype=np.float32) if vectors else None
        return replace(query, examples=tuple(examples)), total

    def _check_model(self) -> None:
        """Raise EncoderMismatch if the vectors in the index are not the model's."""
        model, live = self.model, self.searcher().live()
        if live.encoder_id != model.encoder_id:
            raise encoder_mismatch((live.spec, live.encoder_id), (model.spec, model.encoder_id))

    def _vector_of(self, data: bytes) -> Float32:
        """Return the unit vector (D,) of a picture that came with a request.

        Raises ImageError, ModelError and ServerBusy.
        """
        key = f"{self.model.encoder_id} {image_id(data)}"
        vector = self._vectors.get(key)
        if vector is None:
            (vector,) = self.embed_pictures([data])
            self._vectors.put(key, vector, vector.nbytes)
        return vector

    # ---- vectors

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        """Return unit vectors (N, D). Raises ModelError and ServerBusy."""
        with self._encoding.take():
            return _finite(self.model.encode_texts(texts))

    def embed_pictures(self, pictures: Sequence[bytes]) -> Float32:
        """Return unit vectors (N, D) of pictures, each a file's bytes.

        Raises ImageError, ModelError and ServerBusy.
        """
        towers = self.model.towers()
        limits, prepared = query_limits(self.limits), []
        for data in pictures:
            with self._decoding.share() as admit:
                side = towers.preferred_side
                rgb = decode(data, target=side, limits=limits, admit=admit).rgb
                prepared.append(towers.preprocess(rgb))
        with self._encoding.take():
            return _finite(towers.encode_images(prepared))

    def similarity(self, *sides: Side) -> float:
        """Return the cosine of two sides. Raises ClipkitError."""
        if {side.kind for side in sides} not in (
            {"image_id"},
            {"image", "text"},
            {"image"},
            {"text"},
        ):
            self._check_model()
        one, other = (self._vector_of_side(side) for side in sides)
        return float(np.clip(one @ other, -1.0, 1.0))

    def _vector_of_side(self, side: Side) -> Float32:
        if side.kind == "text":
            return self.embed_texts([str(side.value)])[0]
        if isinstance(side.value, bytes):
            return self._vector_of(side.value)
        _, row = self._row(side.value)
        stored = self.searcher().live().unit_vector(row.num)
        if stored is None:
            raise InputError(
                f"picture {side.value} has no vector of the model {self.model.spec} yet"
            )
        return stored

    def _readable(self) -> Corrections | None:
        """Return the corrections; None if their file cannot be read, as searching works without."""
        try:
            self.corrections.total()
        except ClipkitError as error:
            log.warning("%s", error)
            return None
        return self.corrections

    def _filters(self, request: SearchRequest, contents: Contents | None) -> Filters:
        folders: tuple[str, ...] = ()
        if request.folder:
            rows = (contents or self.contents()).folders
            folders = tuple(row.path for row in rows if row.key == request.folder)
            if os.path.isabs(request.folder):
                folders = (request.folder,)
            if not folders:
                raise InputError(
                    f"folder {request.folder!r} has no pictures; give the absolute path of one that "
                    "has, or choose another one"
                )
        return Filters(
            after=request.after.isoformat() if request.after else None,
            before=request.before.isoformat() if request.before else None,
            folders=folders,
            formats=(request.format,) if request.format else (),
            camera=request.camera,
            min_side=request.size,
            orientation=request.orientation,
        )

    # ---- pictures, by content hash

    def thumbnail(self, picture_id: str, size: int = THUMBNAIL_SIDE) -> bytes:
        """Return a JPEG whose longer side is at most `size`.

        One of THUMBNAIL_SIDE that is missing is made from the file and stored in the index, another
        is kept in memory. Raises UnknownPictureError, PictureGoneError, ServerBusy.
        """
        catalog, row = self._row(picture_id)
        if size < THUMBNAIL_SIDE:
            return self._resized(picture_id, size, lambda: self.thumbnail(picture_id))
        if size > THUMBNAIL_SIDE:
            return self._resized(picture_id, size, lambda: self._bytes(row))
        jpeg = catalog.thumbnail(picture_id)
        if jpeg is None:
            jpeg = self._shrink(self._bytes(row), size)
            catalog.put_thumbnail(picture_id, jpeg)
        return jpeg

    def _resized(self, picture_id: str, size: int, source: Callable[[], bytes]) -> bytes:
        key = f"{picture_id} {size}"
        jpeg = self._sent.get(key)
        if jpeg is None:
            jpeg = self._shrink(source(), size)
            self._sent.put(key, jpeg, len(jpeg))
        return jpeg

    def _shrink(self, data: bytes, size: int) -> bytes:
        with self._decoding.share() as admit:
            rgb = decode(data, target=size, limits=self.limits, admit=admit).rgb
            return thumbnail(rgb, side=size)

    def picture(self, picture_id: str) -> tuple[bytes, str]:
        """Return (bytes, MIME type), encoded for any browser and without metadata.

        Raises UnknownPictureError, PictureGoneError, ServerBusy.
        """
        _, row = self._row(picture_id)
        jpeg = self._sent.get(picture_id)
        if jpeg is None or not _is_there(row):
            data = self._bytes(row)
            with self._decoding.share() as admit:
                jpeg, _ = encode_for_web(data, limits=self.limits, admit=admit)
            self._sent.put(picture_id, jpeg, len(jpeg))
        return jpeg, "image/jpeg"

    def details(self, picture_id: str) -> dict[str, Any]:
        """Return what the catalog knows of a picture, for JSON; every text is printable."""
        return facts(self._row(picture_id)[1])

    def _row(self, picture_id: str) -> tuple[Catalog, PictureRow]:
        opened = self._open()
        row = opened[0].row(picture_id) if opened else None
        if opened is None or row is None:
            raise UnknownPictureError(f"no picture {picture_id} in this library")
        return opened[0], row

    @property
    def may_show_files(self) -> bool:
        """True if the page is this machine's own and there is a desktop to show files on."""
        screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        return bool(self.may_index and screen and shutil.which(desktop_command(Path())[0]))

    def show_file(self, picture_id: str, *, folder: bool = False) -> None:
        """Open the picture's file, or the folder around it, in the program that the desktop has for it.

        Raises InputError where `may_show_files` is False, UnknownPictureError, PictureGoneError.
        """
        self._check_may_write()
        if not self.may_show_files:
            raise InputError("this page cannot open files: they are on another machine's screen")
        path, _ = self._file(self._row(picture_id)[1])
        command = desktop_command(path, folder=folder)
        threading.Thread(target=subprocess.run, args=(command,), daemon=True).start()

    def _bytes(self, row: PictureRow) -> bytes:
        return self._file(row)[1]

    def _file(self, row: PictureRow) -> tuple[Path, bytes]:
        """Return the first file that still has the picture's content, and its bytes."""
        for place in row.places:
            try:
                data = read_bytes(Path(place), limits=self.limits)
            except ImageError:
                continue
            if image_id(data) == row.image_id:
                return Path(place), data
        name = printable(PurePath(row.path).name)
        raise PictureGoneError(
            f"the file {name} was deleted or has changed; index its folder again"
        )

    # ---- right or wrong

    def mark(self, mark: Mark) -> int:
        """Store a mark and return how many corrections there are then. Raises UnknownPictureError and
        what Corrections.put raises."""
        self._check_may_write()
        self._row(mark.picture)
        self.corrections.put(mark)
        return self.corrections.total()

    def exported(self) -> Iterator[dict[str, Any]]:
        """Yield the corrections as rows for `clipkit data build`."""
        opened = self._open()
        return export(self.corrections.all(), opened[0]) if opened else iter(())

    # ---- indexing and indexed folders

    @property
    def run(self) -> Run | None:
        """The run in progress, or the last one until it is dismissed, old, or about folders that are not
        indexed any more."""
        run = self._indexer.run
        if run is None or run.summary is None:
            return run
        try:
            return run if {*run.folders} & {*self.contents().roots} else None
        except ClipkitError:
            return run

    @property
    def indexing(self) -> bool:
        return self._indexer.busy

    def index(self, folders: Sequence[str]) -> None:
        """Index folders in the background. Raises InputError and CatalogBusy as Indexer.start does."""
        self._check_may_index()
        self._indexer.start(folders, self.model)

    def stop(self) -> None:
        """Stop the run in progress. Raises NotAllowedError."""
        self._check_may_write()
        self._indexer.stop()

    def dismiss(self) -> None:
        """Show the last run no more, on any page. Raises NotAllowedError."""
        self._check_may_write()
        self._indexer.dismiss()

    # ---- models

    def _follow_active(self, catalog: Catalog) -> None:
        """Change over to the index's active model if it is another one than ours. What is in progress
        goes on with the searcher that it has."""
        changes = catalog.change_counter()
        if changes == self._followed:
            return
        active = catalog.active_encoder()
        if active is not None and active.encoder_id != self.model.known_id:
            self.model = self._open_model(None)
            self.model.warm()
            self._opened = catalog, self._searcher(catalog)
            self._load()
        self._followed = changes

    def models(self) -> list[IndexModel]:
        """Return the models of the index, the oldest first."""
        return self.contents().models

    def use_model(self, name: str) -> IndexModel:
        """Make a model of the index the active one, here and everywhere. Requests in progress end with
        the model that they began with. Raises what clipkit.index_models.use_model does."""
        self._check_may_index()
        model = use_model(self.folder, name)
        self._follows, self._followed = True, -1
        return model

    def drop_model(self, name: str) -> IndexModel:
        """Remove a model's vectors. Raises what clipkit.index_models.drop_model does."""
        self._check_may_index()
        return drop_model(self.folder, name)[0]

    def fill(self, spec: str) -> None:
        """Encode all pictures with a model of the index, or another one by its spec, beside the present
        one, which goes on answering. `spec` must come from our own lists, never be a path as a browser
        sends it. Raises what Indexer.start does, and ModelError."""
        self._check_may_index()
        roots = [root for root in self.contents().roots if os.path.isdir(root)]
        if not roots:
            raise InputError("no indexed folder is there now; add one, or mount its disk")
        self._indexer.start(roots, self._open_model(spec), beside=True)

    def teach(self, what: str) -> None:
        """Start a lesson, or answer one: "start", "cancel", "use", "keep", "undo" or "dismiss". Raises
        what the Teacher's method of that name does."""
        self._check_may_index()
        getattr(self.teacher, what)()

    def roots(self) -> list[Root]:
        """Return the indexed folders. A picture counts once for each file of it."""
        opened = self._open()
        if opened is None:
            return []
        catalog, _ = opened
        skipped = [row.path for row in catalog.skipped()]
        return [
            Root(
                path=root,
                pictures=catalog.places_below(root),
                skipped=sum(PurePath(path).is_relative_to(root) for path in skipped),
                missing=not os.path.isdir(root),
            )
            for root in catalog.roots()
        ]

    def browse(self, key: str) -> Listing:
        """List the folders inside the folder of a key. Raises InputError, see app.web.folders."""
        self._check_may_index()
        return listing(key, browsable(self.contents().roots))

    def forget(self, key: str) -> int:
        """Remove an indexed folder from the index, and return how many files that was.

        Pictures that lie nowhere else are purged, as by `clipkit index --forget`; a snapshot is made
        without them by the next run. Raises InputError, and CatalogBusy while the index is written.
        """
        self._check_may_index()
        path = path_of(key)
        if path not in self.contents().roots:
            raise InputError(
                f"{printable(path)} is not an indexed folder; it may be forgotten already"
            )
        with Catalog.open(self.folder, write=True) as catalog:
            return catalog.remove_root(path)

    def _check_may_write(self) -> None:
        if self.read_only:
            raise NotAllowedError(
                "this page is read-only; start clipkit app without --read-only to change anything"
            )

    def _check_may_index(self) -> None:
        self._check_may_write()
        if not self.may_index:
            raise NotAllowedError(
                "this page may not index folders; on the server: clipkit index FOLDER"
            )
