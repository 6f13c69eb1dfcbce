"""One index of pictures as a Python object: open it, add folders, search, look at the hits.

    library = clipkit.Library.open("my-index")
    library.add("~/Pictures")
    for hit in library.search("a red car", k=5):
        print(hit.rank, hit.score, hit.picture.path)

The command line's `clipkit index` and `clipkit search` are thin layers over this class.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self, overload

from clipkit import checkpoint, models
from clipkit.catalog import Catalog, EncoderRow, PictureRow
from clipkit.errors import ClipkitError, ImageError, InputError
from clipkit.index_models import IndexModel, drop_model, models_of, space_of, use_model
from clipkit.lazy_encoder import LazyEncoder
from clipkit.query import Example, Query, format, parse
from clipkit.search import Empty, Searcher, SearchHit, SearchResult
from clipkit.wording import duration, printable

if TYPE_CHECKING:
    from threading import Event

    from PIL import Image

    from clipkit import images
    from clipkit.embed import Progress, Summary

AnyPath = str | os.PathLike[str]

SHOWN_HITS = 60  # hits that `repr` and a notebook show; their thumbnails are some 15 kB each

# Inline styles only: several notebook viewers drop <style> elements.
_GALLERY = """\
<div style="font: 13px system-ui, sans-serif">
<p style="margin: 0 0 8px">{{ heading }}</p>
{%- for note in notes %}
<p style="margin: 0 0 8px">{{ note }}</p>
{%- endfor %}
<div style="display: flex; flex-wrap: wrap; gap: 10px">
{%- for card in cards %}
<figure style="width: 160px; margin: 0" title="{{ card.path }}">
{%- if card.source %}
<img src="{{ card.source }}" alt="{{ card.name }}"
 style="width: 160px; height: 120px; object-fit: contain">
{%- else %}
<div style="width: 160px; height: 120px; line-height: 120px; text-align: center">no preview</div>
{%- endif %}
<figcaption style="overflow-wrap: anywhere">{{ card.name }}<br>{{ card.details }}</figcaption>
</figure>
{%- endfor %}
</div>
{%- if hidden %}
<p style="margin: 8px 0 0">and {{ hidden }} more</p>
{%- endif %}
</div>"""


def default_index() -> Path:
    """Return the index folder that is used when none is named.

    That is CLIPKIT_INDEX if it is set, else `clipkit/index` in the user's data folder.
    """
    if named := os.environ.get("CLIPKIT_INDEX"):
        return Path(named).expanduser()
    from platformdirs import user_data_path

    return user_data_path("clipkit") / "index"


def open_encoder(
    folder: Path,
    model: str | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    runtime: str = "auto",
) -> LazyEncoder:
    """Return the model for the index in `folder`: `model`, else the index's own, else "builtin".

    If the index's own has left its place, what must encode raises a ModelError that says so. If
    `model` is that one at a new place, the index notes the place. Raises ModelError if there is no
    `model` of this name, and IndexDamaged.
    """
    options: Any = {"device": device, "precision": precision, "runtime": runtime}
    with Catalog.open(folder) if _is_index(folder) else nullcontext() as catalog:
        active = catalog.active_encoder() if catalog else None
        rows = catalog.encoders() if catalog else []
        if model is None:
            spec, gone = active.spec if active else "builtin", None
            if catalog and active and models.is_gone(spec):
                identity = checkpoint.Identity(active.encoder_id, space_of(active))
                gone = identity, _gone(catalog, active)
            return LazyEncoder(spec, **options, gone=gone)
    models.check(model)
    encoder = LazyEncoder(model, **options)
    if any(row.encoder_id == encoder.known_id and models.is_gone(row.spec) for row in rows):
        # An index that cannot be written now is still searched.
        with suppress(ClipkitError), Catalog.open(folder, write=True) as catalog:
            catalog.move_encoder(encoder.encoder_id, checkpoint.absolute(model))
    return encoder


def _gone(catalog: Catalog, active: EncoderRow) -> str:
    """Say that the index's own model is not in its place, and what helps."""
    place = f"{active.spec}, which is not there any more"
    if not os.path.isabs(active.spec.partition(":")[2] or active.spec):
        place = f"{active.spec}, a path from the folder in which that was done; run clipkit there"
    counts = [(row.spec, catalog.stats(row.encoder_id).vectors) for row in catalog.encoders()]
    others = [f"{spec} ({n:,} pictures)" for spec, n in counts if n and not models.is_gone(spec)]
    remedy = "index the pictures with another one: clipkit index FOLDER --model builtin"
    if others:
        remedy = f"search with another model that has encoded pictures here: --model {others[-1]}"
    return (
        f"the pictures in the index at {catalog.folder} were encoded with {place}; if the model "
        f"has moved, name its new place with --model PATH; or {remedy}"
    )


def _is_index(folder: Path) -> bool:
    return (folder / "catalog.sqlite").is_file()


class Hits(Sequence[SearchHit]):
    """The pictures that a search returned, best first: a sequence of `SearchHit`.

    `hit.picture` is the catalog's row: `path`, `width`, `height`, `captions`, `tags`, `dated`, ...
    `hit.score` is the cosine, `hit.probability` that of being right and `hit.strength` its band
    ("strong", "fair" or "weak"). All are None where pictures were only filtered, the last two also
    with an example picture and with a model that is not calibrated. A notebook shows the first
    SHOWN_HITS as a gallery.

    `total` counts all pictures that passed the filters, `seconds` times the search by stage,
    `query` is what was searched for, and `notes` are sentences such as that nothing stands out. Where
    nothing passed, `empty` says why. `cursor` is what the same search takes for its next page, None on
    the last.
    """

    def __init__(self, result: SearchResult, *, query: str, folder: Path) -> None:
        self.query = query
        self.total = result.total
        self.seconds = result.seconds
        self.notes = result.notes
        self.empty: Empty | None = result.empty
        self.cursor = result.cursor
        self._result = result
        self._folder = folder

    def __len__(self) -> int:
        return len(self._result.hits)

    @overload
    def __getitem__(self, at: int) -> SearchHit: ...
    @overload
    def __getitem__(self, at: slice) -> Hits: ...
    def __getitem__(self, at: int | slice) -> SearchHit | Hits:
        if isinstance(at, int):
            return self._result.hits[at]
        part = replace(self._result, hits=self._result.hits[at])
        return Hits(part, query=self.query, folder=self._folder)

    def __repr__(self) -> str:
        width = len(str(len(self)))
        lines = [self._heading(), *(printable(note) for note in self.notes)]
        lines += [
            f"{hit.rank:>{width}}  {_details(hit):<12}  {printable(hit.picture.path)}"
            for hit in self._result.hits[:SHOWN_HITS]
        ]
        if self.empty:
            lines.append(self.empty.sentence)
        if len(self) > SHOWN_HITS:
            lines.append(f"and {len(self) - SHOWN_HITS:,} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the gallery that a notebook shows, with the thumbnails inside."""
        from jinja2 import Environment

        shown = self._result.hits[:SHOWN_HITS]
        sources = _thumbnail_sources([hit.picture for hit in shown], self._folder)
        cards = [
            {
                "path": printable(hit.picture.path),
                "name": printable(PurePath(hit.picture.path).name),
                "details": f"{hit.rank}  {_details(hit)}",
                "source": source,
            }
            for hit, source in zip(shown, sources, strict=True)
        ]
        template = Environment(autoescape=True).from_string(_GALLERY)
        hidden = f"{len(self) - len(shown):,}" if len(self) > len(shown) else ""
        notes = [printable(note) for note in self.notes]
        return template.render(heading=self._heading(), notes=notes, cards=cards, hidden=hidden)

    def _heading(self) -> str:
        subject = f" for {printable(self.query)!r}" if self.query else ""
        seconds = duration(sum(self.seconds.values()))
        return f"{len(self):,} of {self.total:,} pictures{subject}, {seconds}"


class Library:
    """One index: its pictures, and the model that they are searched with.

    Open it with `Library.open`. Any number of processes and threads may search an index, also while
    one of them adds to it. Close it with `close()`, or use it as a context manager.
    """

    def __init__(self, folder: Path, model: str | None, options: Mapping[str, str]) -> None:
        self.folder = folder
        self._model = model
        self._options = options  # of `open_encoder`
        self._lock = threading.RLock()
        self._encoder: LazyEncoder | None = None
        self._active_id: str | None = None  # of the active model for which `_encoder` was opened
        self._catalog: Catalog | None = None
        self._searcher: Searcher | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        path: AnyPath | None = None,
        *,
        model: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        runtime: str = "auto",
    ) -> Self:
        """Open the index in the folder `path` (default: see `default_index`).

        `model` and `runtime` are as `clipkit.load` takes them; the default is the index's active model,
        or "builtin" for a new index. It is loaded by the first search or `add` that needs it. Without
        `model`, each search is with the model that is active then, also after another process has
        switched. A folder without an index is an empty library: `add` creates the index.

            library = clipkit.Library.open()                                   # the default index
            library = clipkit.Library.open("my-index", model="ViT-B-32/openai", device="cuda")
        """
        folder = default_index() if path is None else Path(path).expanduser()
        options = {"device": device, "precision": precision, "runtime": runtime}
        return cls(folder, model, options)

    @property
    def encoder(self) -> LazyEncoder:
        """The model that pictures are added and searched with: the named one, else the active one."""
        with self._lock:
            active = None
            if self._model is None and self._exists() and not self._closed:
                active = self._open().active_encoder()
            if self._encoder is None or (active and active.encoder_id != self._active_id):
                self._encoder = open_encoder(self.folder, self._model, **self._options)
                self._active_id = active.encoder_id if active else None
            return self._encoder

    def __len__(self) -> int:
        """Return the number of pictures in the index, 0 where there is no index yet."""
        return self._open().stats().pictures if self._exists() else 0

    def __repr__(self) -> str:
        if self._closed:
            return f"<clipkit.Library at {printable(str(self.folder))}, closed>"
        return f"<clipkit.Library at {printable(str(self.folder))}, {len(self):,} pictures>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index's files. Closing twice is fine; hits stay usable."""
        with self._lock:
            self._closed = True
            if self._catalog is not None:
                self._catalog.close()
            self._catalog = self._searcher = None

    # ---- searching

    def search(
        self,
        query: str | Query = "",
        *,
        k: int = 12,
        image: AnyPath | bytes | Image.Image | None = None,
        cursor: str | None = None,
    ) -> Hits:
        """Return the k best pictures for a query, an example picture, or both.

        `query` is the query language of the page and the command line (see `clipkit.query`);
        `image` is a file, a file's bytes, or an RGB picture. Without either, the newest pictures.

            library.search("a red car")
            library.search("dog on a beach -leash after:2023 sort:date", k=50)
            library.search("but at night", image="castle.jpg")

        With the `cursor` of hits, the same search returns the page after them; `k` may differ:

            hits = library.search("a red car")
            while hits.cursor:
                hits = library.search("a red car", cursor=hits.cursor)

        Raises QueryError if the query cannot be parsed, ImageError if the example cannot be read,
        EncoderMismatch if the index holds other models' vectors only, and InputError without an index or
        for a cursor of another search.
        """
        parsed = parse(query) if isinstance(query, str) else query
        text = query if isinstance(query, str) else format(query)
        if isinstance(image, str | os.PathLike):
            text = ", ".join(filter(None, (text, f"like {PurePath(image).name}")))
            # Absolute, so that no file name is taken for the image_id of a picture in the index.
            example = Example(os.path.abspath(os.path.expanduser(os.fspath(image))))
            parsed = replace(parsed, examples=(*parsed.examples, example))
            image = None
        searcher = self._search()
        if parsed.terms or parsed.exclude:
            self.encoder.prepare_texts()  # while the vectors are loaded
        result = searcher.search(parsed, k=k, image=image, cursor=cursor)
        return Hits(result, query=text, folder=self.folder)

    def similar(
        self,
        picture: SearchHit | PictureRow | str,
        query: str | Query = "",
        *,
        k: int = 12,
        cursor: str | None = None,
    ) -> Hits:
        """Return the k pictures nearest to one of the library, which is itself left out, or nearest
        to it and a query together.

        `picture` is a hit, its `picture`, or an image_id. Without words, no model is loaded. For a
        file that is not in the library use `search(image=...)`. `cursor` is that of `search`.

            hit = library.search("a red car")[0]
            library.similar(hit)
            library.similar(hit, "at night after:2023")

        Raises InputError if the library does not have the picture, QueryError as `search` does.
        """
        row = picture.picture if isinstance(picture, SearchHit) else picture
        image_id = row if isinstance(row, str) else row.image_id
        name = image_id if isinstance(row, str) else PurePath(row.path).name
        result = self._search().similar(image_id, query, k=k, cursor=cursor)
        text = ", ".join(filter(None, (f"like {name}", str(query))))
        return Hits(result, query=text, folder=self.folder)

    # ---- changing

    def add(
        self,
        *folders: AnyPath,
        on_progress: Callable[[Progress], None] | None = None,
        stop: Event | None = None,
        workers: int | None = None,
        batch_size: int | None = None,
        decoded_megapixels: float | None = None,
        limits: images.Limits | None = None,
    ) -> Summary:
        """Index folders, or bring the index up to date with them; the next search finds the result.

        New and changed pictures are embedded, moved ones recognised by content, deleted ones
        forgotten; what cannot be read is skipped and counted in the summary. `on_progress` is called
        with a `clipkit.embed.Progress` after every picture; `stop`, once set, ends the run after the
        current batch, and a later `add` resumes there. Threads decode no more than
        `decoded_megapixels` at once (default: 40, some 300 MB).

            summary = library.add("~/Pictures", on_progress=lambda p: print(p.done, "of", p.total))
            print(summary.added, summary.skipped)

        Raises InputError for a folder that does not exist, CatalogBusy while another process or
        thread writes to the index, and ModelError if the model cannot be loaded.
        """
        from clipkit.embed import DECODED_MEGAPIXELS, distinct_roots, index_folders

        self._check_open()
        if not self._exists():
            distinct_roots(folders)  # a mistyped folder must not leave an empty index behind
        encoder = self.encoder
        _ = encoder.encoder_id  # nor may a model that cannot be loaded
        with Catalog.open(self.folder, write=True) as catalog:
            return index_folders(
                catalog,
                folders,
                encoder=encoder,
                workers=workers,
                batch_size=batch_size,
                decoded_megapixels=decoded_megapixels or DECODED_MEGAPIXELS,
                limits=limits,
                on_progress=on_progress,
                stop=stop,
            )

    def remove(self, *folders: AnyPath) -> int:
        """Take folders out of the index and return how many files that was; no file is touched.

        Pictures that lie nowhere else are purged: their vectors, texts and thumbnails go. Raises
        InputError, and removes nothing, without an index or for a folder of which it has nothing;
        CatalogBusy while another process writes to it.
        """
        from clipkit.index import refresh_snapshot

        self._open()
        with Catalog.open(self.folder, write=True) as catalog:
            removed = sum(catalog.remove_root(os.path.expanduser(folder)) for folder in folders)
            catalog.purge()
            catalog.commit()
            for encoder in catalog.encoders():
                refresh_snapshot(catalog, encoder.encoder_id)
            return removed

    # ---- the models

    def models(self) -> list[IndexModel]:
        """Return the models that have encoded pictures of this index, the oldest first; none without an
        index."""
        return models_of(self._open()) if self._exists() else []

    def use(self, model: str) -> IndexModel:
        """Make a model of the index the active one, for all processes from their next search on.

        `model` is its spec, its path, or the beginning of its encoder_id. Every picture must have its
        vector: `Library.open(folder, model=...).add(...)` encodes what is missing while the present
        model answers. A model with the same picture side as one of the index needs none of its own.

        Raises InputError as `clipkit.index_models.use_model` does, CatalogBusy while another process
        writes to the index.
        """
        self._open()
        return use_model(self.folder, model)

    def drop(self, model: str) -> int:
        """Remove a model's vectors from the index and return how many went.

        Those that another model shares stay. Raises InputError for the active model and an unknown
        one, CatalogBusy while another process writes to the index.
        """
        self._open()
        return drop_model(self.folder, model)[1]

    # ---- the catalog

    def _exists(self) -> bool:
        return _is_index(self.folder)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"the library at {self.folder} was closed; open it again")

    def _open(self) -> Catalog:
        """Return the catalog, open for reading. Raises InputError without an index."""
        with self._lock:
            self._check_open()
            if self._catalog is None:
                self._catalog = Catalog.open(self.folder)
            return self._catalog

    def _search(self) -> Searcher:
        with self._lock:
            catalog = self._open()
            if self._searcher is None:
                follows = self._model is None
                open_active = (lambda _: self.encoder) if follows else None
                self._searcher = Searcher(catalog, self.encoder, open_active=open_active)
            return self._searcher


def _details(hit: SearchHit) -> str:
    """Return score and strength, such as "0.605 strong"; empty where nothing was compared."""
    return "" if hit.score is None else f"{hit.score:.3f} {hit.strength or ''}".rstrip()


def _thumbnail_sources(pictures: Sequence[PictureRow], folder: Path) -> list[str]:
    """Return a data URI for each picture, "" for one that has no thumbnail and cannot be read.

    The index is opened again: the library may have been closed since the search.
    """
    try:
        with Catalog.open(folder) as catalog:
            found = [_thumbnail(catalog, picture) for picture in pictures]
    except ClipkitError:  # the index is gone: the names can still be shown
        return [""] * len(pictures)
    prefix = "data:image/jpeg;base64,"
    return [prefix + base64.b64encode(data).decode() if data else "" for data in found]


def _thumbnail(catalog: Catalog, picture: PictureRow) -> bytes | None:
    """Return the catalog's thumbnail (JPEG), or make it from the file if its content is the same."""
    if (data := catalog.thumbnail(picture.image_id)) is not None:
        return data
    from clipkit import images

    try:
        content = images.read_bytes(Path(picture.path))
        if images.image_id(content) != picture.image_id:
            return None
        data = images.thumbnail(images.decode(content, target=320).rgb)
    except ImageError:
        return None
    catalog.put_thumbnail(picture.image_id, data)
    return data
