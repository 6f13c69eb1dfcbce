"""One indexing run: what is there, what of it needs work, the work, and what is gone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from clipkit import images
from clipkit.catalog import Catalog, KnownFile
from clipkit.embed.progress import Progress, Rate, Summary
from clipkit.embed.walk import FoundFile, Problem, distinct_roots, walk
from clipkit.errors import ImageError
from clipkit.index import refresh_snapshot
from clipkit.records import FolderCaptions, Texts

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

COMMIT_SECONDS = 2.0
THUMBNAIL_SIDE = 320


class ImageEncoder(Protocol):
    """What indexing needs of `towers.DualEncoder`."""

    encoder_id: str
    spec: str

    @property
    def dim(self) -> int: ...
    @property
    def preferred_side(self) -> int: ...
    @property
    def preferred_batch(self) -> int: ...
    def preprocess(self, image: Image.Image) -> Any: ...
    def encode_images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]: ...
    def describe(self) -> str: ...


def index_folders(
    catalog: Catalog,
    folders: Sequence[str | os.PathLike[str]],
    *,
    encoder_id: str,
    load_encoder: Callable[[], ImageEncoder],
    workers: int | None = None,
    batch_size: int | None = None,
    limits: images.Limits | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring the catalog (open for writing) up to date with what lies below `folders`.

    The towers are loaded only if a picture must be embedded. `stop`, once set, ends the run soundly
    after the current batch. Raises InputError for a folder that does not exist and never did.
    """
    run = _Run(
        catalog=catalog,
        encoder_id=encoder_id,
        load_encoder=load_encoder,
        workers=workers or max(2, os.cpu_count() or 1),
        batch_size=batch_size,
        limits=limits or images.Limits(),
        on_progress=on_progress or (lambda _: None),
        stop=stop or threading.Event(),
    )
    return run.over(distinct_roots(folders, known=lambda f: catalog.places_below(f) > 0))


@dataclass(frozen=True, slots=True)
class _Known:
    """A file whose content is a picture that has its vector already."""

    file: FoundFile
    num: int


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    file: FoundFile
    image_id: str
    picture: images.Picture
    thumbnail: bytes
    texts: Texts
    pixels: Any  # what encoder.preprocess gave


@dataclass(eq=False)
class _Run:
    catalog: Catalog
    encoder_id: str
    load_encoder: Callable[[], ImageEncoder]
    workers: int
    batch_size: int | None
    limits: images.Limits
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    new_places: Counter[int] = field(default_factory=Counter)  # of pictures that were live before
    batch: list[_Decoded] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.committed_at = time.monotonic()
        self.captions = FolderCaptions()
        # Captions changed since the last picture was added are read again, which costs little.
        newest = self.catalog.stats().newest
        self.texts_read_ns = (
            int(datetime.fromisoformat(newest).timestamp()) * 10**9 if newest else 0
        )
        self._encoder: ImageEncoder | None = None
        self._encoder_lock = threading.Lock()
        self._rate = Rate()

    def over(self, roots: Sequence[str]) -> Summary:
        gone: list[str] = []
        unavailable: list[str] = []
        todo: list[FoundFile] = []
        for root in roots:
            self.catalog.add_root(root)
            known = self.catalog.known_files(root, encoder_id=self.encoder_id)
            files, blind = self._survey(root)
            if known and (root in blind or not files):
                unavailable.append(root)
                continue
            todo += self._changed(files, known)
            hidden = tuple(folder + os.sep for folder in blind)
            gone += [p for p in known if p not in files and not p.startswith(hidden)]
        self._embed(todo)
        stopped = self.stop.is_set()
        self._report("finishing", done=self.counts["done"], total=len(todo))
        if not stopped:
            self._remove(gone)
        self.catalog.commit()
        if not stopped:
            refresh_snapshot(self.catalog, self.encoder_id)
        return Summary(
            added=self.counts["added"],
            duplicates=self.counts["duplicates"],
            moved=self.counts["moved"],
            removed=self.counts["removed"],
            unchanged=self.counts["unchanged"],
            skipped_before=self.counts["skipped_before"],
            skipped=sum(self.reasons.values()),
            reasons=dict(self.reasons.most_common()),
            unavailable=tuple(unavailable),
            stopped=stopped,
            embedded=self.counts["embedded"],
            seconds=time.monotonic() - self.started,
        )

    # ---- what is there, and what of it needs work

    def _survey(self, root: str) -> tuple[dict[str, FoundFile | Problem], list[str]]:
        """Everything below the root that is, or calls itself, a picture; and the folders that
        could not be read."""
        found: dict[str, FoundFile | Problem] = {}
        blind: list[str] = []
        for item in walk(root, skip=os.path.realpath(self.catalog.folder)):
            if self.stop.is_set():
                break
            if isinstance(item, Problem) and item.reason == "unreadable-folder":
                blind.append(item.path)
                if item.path == root:
                    break
            found[item.path] = item
            if len(found) % 1000 == 0:
                self._report("walking", current=item.path)
        self.counts["seen"] += len(found)
        self._report("walking")
        return found, blind

    def _changed(
        self, found: Mapping[str, FoundFile | Problem], known: Mapping[str, KnownFile]
    ) -> Iterator[FoundFile]:
        for path, item in found.items():
            before = known.get(path)
            same = before and (before.size, before.mtime_ns) == (item.size, item.mtime_ns)
            if isinstance(item, Problem):
                self._skip(item)
            elif before and same and before.state == "ok":
                self.counts["unchanged"] += 1
                if before.num is not None and item.texts_ns >= self.texts_read_ns:
                    texts = self.captions.for_picture(Path(path))
                    self.catalog.set_texts(before.num, captions=texts.captions, tags=texts.tags)
            elif before and same and before.state == "skipped":
                self.counts["skipped_before"] += 1
            else:
                yield item

    # ---- the work

    def _embed(self, todo: Sequence[FoundFile]) -> None:
        """Files through the decode threads, in order, a bounded number at a time."""
        waiting: deque[Future[_Known | _Decoded | Problem]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            for file in todo:
                waiting.append(pool.submit(self._prepare, file))
                if len(waiting) >= 4 * self.workers + (self.batch_size or 32):
                    self._take(waiting.popleft().result(), len(todo))
                if self.stop.is_set():
                    break
            while waiting:
                future = waiting.popleft()
                if not (self.stop.is_set() and future.cancel()):
                    self._take(future.result(), len(todo))
        self._flush()

    def _prepare(self, file: FoundFile) -> _Known | _Decoded | Problem:
        """In a decode thread: one file's bytes, its identity, and if need be its pixels."""
        path = Path(file.path)
        try:
            data = images.read_bytes(path, limits=self.limits)
            image_id = images.image_id(data)
            num = self.catalog.has_picture(image_id)
            if num is not None and self.catalog.has_vector(num, self.encoder_id):
                return _Known(file, num)
            encoder = self._loaded_encoder()
            side = max(encoder.preferred_side, THUMBNAIL_SIDE // 2)
            picture = images.decode(data, target=side, limits=self.limits)
            return _Decoded(
                file,
                image_id,
                picture,
                images.thumbnail(picture.rgb, side=THUMBNAIL_SIDE),
                self.captions.for_picture(path),
                encoder.preprocess(picture.rgb),
            )
        except ImageError as error:
            return Problem(file.path, error.reason, str(error), file.size, file.mtime_ns)

    def _loaded_encoder(self) -> ImageEncoder:
        with self._encoder_lock:
            if self._encoder is None:
                self._encoder = self.load_encoder()
            return self._encoder

    def _take(self, item: _Known | _Decoded | Problem, total: int) -> None:
        """In the calling thread: write what a decode thread made, or keep it for the next batch."""
        if isinstance(item, Problem):
            self._skip(item)
            self.counts["done"] += 1
        elif isinstance(item, _Known):
            self._place(item.num, item.file)
        else:
            self.batch.append(item)
            encoder = self._loaded_encoder()
            if len(self.batch) >= (self.batch_size or encoder.preferred_batch):
                self._flush()
        self._report("embedding", done=self.counts["done"], total=total)
        if time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.catalog.commit()
            self.committed_at = time.monotonic()

    def _flush(self) -> None:
        """Embed and write the batch."""
        if not self.batch:
            return
        encoder = self._loaded_encoder()
        batch, self.batch = self.batch, []
        vectors = encoder.encode_images([item.pixels for item in batch])
        rows: dict[int, int] = {}  # num -> row: two files of one batch may be the same picture
        for row, item in enumerate(batch):
            if not np.isfinite(vectors[row]).all():
                message = f"model {encoder.spec} gives no finite vector for it; try another model"
                file = item.file
                self._skip(Problem(file.path, "no-vector", message, file.size, file.mtime_ns))
                self.counts["done"] += 1
                continue
            known = self.catalog.has_picture(item.image_id)
            if known is None:
                num = self._add(item)
            else:
                num = known
                self._place(num, item.file)
            if known is None or not self.catalog.has_vector(num, self.encoder_id):
                rows[num] = row
        self.catalog.register_encoder(
            self.encoder_id, spec=encoder.spec, config_json=encoder.describe(), dim=encoder.dim
        )
        self.catalog.add_vectors(
            self.encoder_id, np.array(list(rows), np.int64), vectors[list(rows.values())]
        )
        self.counts["embedded"] += len(batch)
        self._rate.add(len(batch))

    def _add(self, item: _Decoded) -> int:
        picture = item.picture
        num = self.catalog.add_picture(
            image_id=item.image_id,
            width=picture.width,
            height=picture.height,
            format=picture.format,
            bytes=item.file.size,
            taken_at=picture.taken_at,
            camera=picture.camera,
            captions=item.texts.captions,
            tags=item.texts.tags,
            thumbnail=item.thumbnail,
        )
        self.catalog.add_place(
            num, item.file.path, size=item.file.size, mtime_ns=item.file.mtime_ns
        )
        self.counts["added"] += 1
        self.counts["done"] += 1
        return num

    def _place(self, num: int, file: FoundFile) -> None:
        """A file of a known picture: a copy, a moved file, or one that came back."""
        was_live = self.catalog.is_live(num)
        fresh = self.catalog.add_place(num, file.path, size=file.size, mtime_ns=file.mtime_ns)
        self.counts["done"] += 1
        if not was_live:
            self.counts["added"] += 1
        elif fresh:
            self.new_places[num] += 1

    def _skip(self, problem: Problem) -> None:
        self.catalog.add_skipped(
            problem.path,
            size=problem.size,
            mtime_ns=problem.mtime_ns,
            reason=problem.reason,
            message=problem.message,
        )
        self.reasons[problem.reason] += 1

    def _remove(self, gone: Sequence[str]) -> None:
        """Forget the places that are no more, and see which of them only moved."""
        lost = Counter(self.catalog.remove_places(gone))
        for num, new in self.new_places.items():
            moved = min(new, lost[num])
            self.counts["moved"] += moved
            lost[num] -= moved
            self.counts["duplicates"] += new - moved
        self.counts["removed"] = sum(lost.values())

    def _report(
        self,
        phase: Literal["walking", "embedding", "finishing"],
        *,
        done: int = 0,
        total: int = 0,
        current: str = "",
    ) -> None:
        rate = self._rate.per_second()
        self.on_progress(
            Progress(
                phase=phase,
                seen=self.counts["seen"],
                done=done,
                total=total,
                added=self.counts["added"],
                moved=sum(self.new_places.values()),
                skipped=sum(self.reasons.values()),
                rate=rate,
                eta_seconds=(total - done) / rate if rate else None,
                current=current,
            )
        )
