"""What the page works on: one index folder, one model, at most one indexing run.

Knows neither Gradio nor FastAPI: ui.py and api.py ask it, and it asks clipkit. Threads may share it.
Pictures leave by content hash only. No path comes in from a request, except the folder that a person
types to have it indexed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from app.corrections import Corrections, Mark, export, said
from app.web.indexing import Indexer, Run
from app.web.requests import Ask, DroppedPictures, UnknownPictureError
from clipkit.catalog import Catalog, Filters, PictureRow
from clipkit.errors import ClipkitError, ImageError, InputError
from clipkit.images import Limits, decode, encode_for_web, image_id, read_bytes, thumbnail
from clipkit.lazy_encoder import LazyEncoder
from clipkit.query import parse
from clipkit.search import Searcher, SearchHit
from clipkit.wording import printable

log = logging.getLogger(__name__)

FOLDERS_SHOWN = 500  # choices of the folder filter
THUMBNAIL_SIDE = 320
NEWEST_UP_TO = 20_000  # pictures in a library that shows its newest unasked


class PictureGoneError(InputError):
    """The catalog knows the picture, but its file is gone or has other content now."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The answer to an Ask."""

    hits: tuple[SearchHit, ...]
    total: int  # pictures that pass the filters
    seconds: float
    said: str | None = None  # the words that a mark of a hit speaks of; None: nothing to mark
    marks: Mapping[str, bool] = field(default_factory=dict)  # right or wrong, by image_id


@dataclass(frozen=True, slots=True)
class Status:
    """What answers here."""

    spec: str
    encoder_id: str | None
    model: str  # "unloaded", "loading" or "ready"
    pictures: int
    newest: str | None  # when a picture was last added; UTC, ISO
    indexing: bool
    corrections: int


class Workspace:
    """See the module. `may_index`: whether folders may be indexed from the page."""

    def __init__(
        self,
        folder: Path,
        model: LazyEncoder,
        *,
        may_index: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.may_index = may_index
        self.limits = limits or Limits()
        self.dropped = DroppedPictures(limits=self.limits)
        self.corrections = Corrections(folder)
        self._indexer = Indexer(folder, model, limits=self.limits)
        self._lock = threading.Lock()
        self._opened: tuple[Catalog, Searcher] | None = None

    def _open(self) -> tuple[Catalog, Searcher] | None:
        """Catalog and searcher; None while there is no index."""
        with self._lock:
            if self._opened is None and (self.folder / "catalog.sqlite").exists():
                catalog = Catalog.open(self.folder)
                searcher = Searcher(
                    catalog, self.model, encoder_id=self.model.known_id, files=False
                )
                self._opened = catalog, searcher
            return self._opened

    def close(self) -> None:
        """Stop a run, wait for its end, close the catalog."""
        self._indexer.close()
        with self._lock:
            if self._opened is not None:
                self._opened[0].close()
            self._opened = None

    def status(self) -> Status:
        opened = self._open()
        stats = opened[0].stats() if opened else None
        corrections = self._readable()
        return Status(
            spec=self.model.spec,
            encoder_id=self.model.known_id,
            model=self.model.state,
            pictures=stats.pictures if stats else 0,
            newest=stats.newest if stats else None,
            indexing=self.indexing,
            corrections=corrections.total() if corrections else 0,
        )

    # ---- searching

    def search(self, ask: Ask) -> Found:
        """Raises ClipkitError with the sentence to show."""
        begun = time.perf_counter()
        opened = self._open()
        if opened is None:
            return Found((), 0, 0.0)
        _, searcher = opened
        filters = self._filters(ask)
        words = None
        if ask.similar:
            result = searcher.similar(ask.similar, k=ask.k, filters=filters)
        else:
            picture = self.dropped[ask.picture] if ask.picture else None
            query = parse(ask.words)
            result = searcher.search(query, k=ask.k, image=picture, filters=filters)
            words = None if picture else said(query)
        kept = self._readable() if words else None
        return Found(
            hits=result.hits,
            total=result.total,
            seconds=time.perf_counter() - begun,
            said=words if kept else None,
            marks=kept.of(words) if kept and words else {},
        )

    def _readable(self) -> Corrections | None:
        """The corrections; None if their file cannot be read: a search can do without."""
        try:
            self.corrections.total()
        except ClipkitError as error:
            log.warning("%s", error)
            return None
        return self.corrections

    def newest(self, number: int) -> tuple[PictureRow, ...]:
        """Pictures to show before anything is asked: the latest by date. Needs no model."""
        # Listing sorts every row of the library: half a second at this size, too long beyond.
        if self.status().pictures > NEWEST_UP_TO:
            return ()
        return tuple(hit.picture for hit in self.search(Ask(k=number)).hits)

    def folders(self) -> list[tuple[str, int]]:
        """Folders and how many pictures lie below each, for the filter."""
        opened = self._open()
        return [] if opened is None else opened[0].folders(FOLDERS_SHOWN)

    def _filters(self, ask: Ask) -> Filters:
        folders: tuple[str, ...] = ()
        if ask.folder:
            folders = tuple(name for name, _ in self.folders() if folder_key(name) == ask.folder)
            if not folders:
                raise InputError("that folder has no pictures any more; choose another one")
        return Filters(
            after=ask.after.isoformat() if ask.after else None,
            before=ask.before.isoformat() if ask.before else None,
            folders=folders,
        )

    # ---- pictures, by content hash

    def thumbnail(self, picture_id: str) -> bytes:
        """A small JPEG; one that is missing is made from the file and kept."""
        catalog, row = self._known(picture_id)
        small = catalog.thumbnail(picture_id)
        if small is None:
            picture = decode(self._bytes(row), target=THUMBNAIL_SIDE, limits=self.limits)
            small = thumbnail(picture.rgb)
            catalog.put_thumbnail(picture_id, small)
        return small

    def picture(self, picture_id: str) -> tuple[bytes, str]:
        """(bytes, MIME type) as any browser shows it, made anew: no metadata leaves."""
        _, row = self._known(picture_id)
        return encode_for_web(self._bytes(row), limits=self.limits)

    def details(self, picture_id: str) -> dict[str, Any]:
        """What the catalog knows of a picture, as JSON; every text printable."""
        _, row = self._known(picture_id)
        return {
            "image_id": row.image_id,
            "name": printable(PurePath(row.path).name),
            "places": [printable(place) for place in row.places],
            "width": row.width,
            "height": row.height,
            "format": row.format,
            "bytes": row.bytes,
            "taken_at": row.taken_at,
            "camera": printable(row.camera) if row.camera else None,
            "captions": [printable(caption) for caption in row.captions],
            "tags": [printable(tag) for tag in row.tags],
        }

    def _known(self, picture_id: str) -> tuple[Catalog, PictureRow]:
        opened = self._open()
        row = opened[0].row(picture_id) if opened else None
        if opened is None or row is None:
            raise UnknownPictureError(f"this library has no picture {picture_id}")
        return opened[0], row

    def _bytes(self, row: PictureRow) -> bytes:
        """The file's bytes, from the first of its places that still holds this very content."""
        for place in row.places:
            try:
                data = read_bytes(Path(place), limits=self.limits)
            except ImageError:
                continue
            if image_id(data) == row.image_id:
                return data
        name = printable(PurePath(row.path).name)
        raise PictureGoneError(f"the file {name} is gone or has changed; index its folder again")

    # ---- right or wrong

    def mark(self, mark: Mark) -> int:
        """Keep what somebody said of a hit; how many corrections there are then. UnknownPictureError,
        and what Corrections.put raises."""
        self._known(mark.picture)
        self.corrections.put(mark)
        return self.corrections.total()

    def exported(self) -> Iterator[dict[str, Any]]:
        """The corrections as rows for `clipkit data build`."""
        opened = self._open()
        return export(self.corrections.all(), opened[0]) if opened else iter(())

    # ---- indexing

    @property
    def run(self) -> Run | None:
        return self._indexer.run

    @property
    def indexing(self) -> bool:
        return self._indexer.busy

    def index(self, folders: Sequence[str]) -> None:
        """Index folders in the background. InputError, CatalogBusy: see Indexer.start."""
        if not self.may_index:
            raise InputError("this page may not index; on the server: clipkit index FOLDER")
        self._indexer.start(folders)

    def stop(self) -> None:
        self._indexer.stop()


def folder_key(folder: str) -> str:
    """A folder's name as the page sends it: it survives the way, whatever bytes the path has."""
    return hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
