"""One indexing run: what is on the disk, what of it needs work, the work, and what is gone.

What the disk holds and what the catalog knows pass by each other as two sorted streams; what needs
work and what is gone wait in temporary files. So memory does not grow with the library.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipkit import checkpoint, images
from clipkit.catalog import Catalog, EncoderRow, KnownFile
from clipkit.embed.pictures import (
    DECODED_MEGAPIXELS,
    Encoded,
    Known,
    Unreadable,
    encode_pictures,
)
from clipkit.embed.streams import Spool, side_by_side
from clipkit.embed.walk import Folder, FoundFile, Problem, distinct_roots, walk
from clipkit.errors import ClipkitError, ImageError, ModelError
from clipkit.index_models import is_complete, join_vectors, register, space_of
from clipkit.lazy_encoder import Encoder, Towers
from clipkit.records import FolderCaptions, Texts

log = logging.getLogger(__name__)

COMMIT_SECONDS = 2.0
THUMBNAIL_SIDE = 320
SNAPSHOT_EVERY = 50_000  # new vectors after which a run asks whether a new snapshot is due


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run: `done` of `total` files that need work, `rate` in files per second;
    `reasons` counts the files that it skipped by their reason."""

    phase: Literal["walking", "embedding", "finishing"]
    seen: int = 0
    done: int = 0
    total: int = 0
    added: int = 0
    moved: int = 0
    skipped: int = 0
    rate: float = 0.0
    eta_seconds: float | None = None
    current: str = ""
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, in files. `reasons` counts the newly skipped files by their reason;
    `skipped_before` those that were skipped in an earlier run and have not changed. A moved file is
    neither added nor removed. `purged` counts the pictures of which no file was left. A run that was
    `stopped` removed nothing; `waiting` files that it found to need work are left to the next one.

    `model` is the spec of the run's model. `reencoded` counts the files of pictures that were in the
    index with another model's vectors and got this one's. Of the `pictures` of the index
    `without_vector` have none of it yet, some of them because the model gives none (`refused`).
    `answers` is the spec of the model that searches use now; `model_before` of the one that they used
    before, if this run made the change."""

    added: int
    duplicates: int
    moved: int
    removed: int
    unchanged: int
    skipped_before: int
    skipped: int
    reasons: Mapping[str, int]
    unavailable: tuple[str, ...]
    stopped: bool
    embedded: int
    seconds: float
    model: str = ""
    model_before: str | None = None
    reencoded: int = 0
    without_vector: int = 0
    purged: int = 0
    waiting: int = 0
    pictures: int = 0
    refused: int = 0
    answers: str = ""

    @property
    def pictures_per_second(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0


class _Rate:
    """Files per second over the last half minute."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, files: int) -> None:
        now = time.monotonic()
        self._marks.append((now, self._marks[-1][1] + files))
        while now - self._marks[0][0] > 30 and len(self._marks) > 2:
            self._marks.popleft()

    def per_second(self) -> float:
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0


def index_folders(
    catalog: Catalog,
    folders: Sequence[str | os.PathLike[str]],
    *,
    encoder: Encoder,
    workers: int | None = None,
    batch_size: int | None = None,
    decoded_megapixels: float = DECODED_MEGAPIXELS,
    limits: images.Limits | None = None,
    activate: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring the catalog (open for writing) up to date with the pictures below `folders`.

    The towers are loaded only if a picture must be encoded. Once `stop` is set the run ends after the
    current batch; what it has done is kept, and nothing is removed. A model other than the catalog's
    active one gets the vectors of all pictures, those outside of `folders` too, and becomes the active
    one when it has them, in one transaction, unless `activate` is False.
    Raises InputError for a folder that does not exist and is not in the catalog, ModelError if the
    towers cannot be loaded, ClipkitError if the disk is full.
    """
    indexing = _Run(
        catalog=catalog,
        encoder=encoder,
        workers=workers or max(2, os.cpu_count() or 1),
        batch_size=batch_size,
        decoded_megapixels=decoded_megapixels,
        limits=limits or images.Limits(),
        activate=activate,
        on_progress=on_progress or (lambda _: None),
        stop=stop or threading.Event(),
    )
    roots = distinct_roots(folders, in_catalog=lambda f: catalog.places_below(f) > 0)
    try:
        return indexing.run(roots)
    except OSError as error:  # of a temporary file
        raise ClipkitError(
            f"cannot write to {catalog.folder}: {error.strerror or error}; it needs free disk space and "
            "a writable folder"
        ) from error


_Facts = dict[str, Any]  # the arguments of Catalog.add_picture


@dataclass(frozen=True, slots=True)
class _Job:
    """A file that is to be read."""

    path: str
    size: int
    mtime_ns: int
    num: int | None  # the picture that the catalog has at this path


@dataclass(frozen=True, slots=True)
class _Extra:
    facts: _Facts
    texts: Texts


@dataclass(eq=False)
class _Run:
    catalog: Catalog
    encoder: Encoder
    workers: int
    batch_size: int | None
    decoded_megapixels: float
    limits: images.Limits
    activate: bool
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    new_places: Counter[int] = field(default_factory=Counter)  # of pictures that were live before
    refused: set[int] = field(default_factory=set)  # known pictures without a usable vector

    def __post_init__(self) -> None:
        self.started = self.committed_at = time.monotonic()
        self.encoder_id = self.encoder.encoder_id
        self.captions = FolderCaptions()
        self._writing = threading.Lock()  # held while what is uncommitted is not whole
        self._is_whole = True
        self._texts_changed: dict[str, bool] = {}  # of the folders that the walk is in
        self._folder_problems: set[str] = set()
        self._rate = _Rate()

    def run(self, roots: Sequence[str]) -> Summary:
        self._share_vectors()
        before = self.catalog.active_encoder()
        unavailable: list[str] = []
        place = self.catalog.folder
        with (
            Spool(place) as work,
            Spool(place) as missing,
            closing(_Snapshots(self.catalog, self.encoder_id, self._point)) as snapshots,
        ):
            for root in roots:
                self.catalog.add_root(root)
                if not self._survey(root, work, missing):
                    unavailable.append(root)
                if self.stop.is_set():
                    break
            if before is not None and before.encoder_id != self.encoder_id:
                self._list_others(roots, work)
            self._embed(work, snapshots)
            stopped = self.stop.is_set()
            self._report("finishing", done=self.counts["done"], total=len(work))
            if not stopped:
                self._remove(missing)
                self.counts["purged"] = self.catalog.purge()
            stats = self.catalog.stats(self.encoder_id)
            without_vector = stats.pictures - stats.vectors
            if not stopped:
                self.catalog.move_encoder(self.encoder_id, checkpoint.absolute(self.encoder.spec))
                if self.activate and is_complete(self.catalog, self.encoder_id):
                    self.catalog.activate_encoder(self.encoder_id)
            self.catalog.commit()
            answers = self.catalog.active_encoder()
            if not stopped and answers is not None:
                snapshots.finish({self.encoder_id, answers.encoder_id}, self.stop)
        switched = before and answers and before.encoder_id != answers.encoder_id
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
            model=self.encoder.spec,
            model_before=before.spec if before and switched else None,
            reencoded=self.counts["reencoded"],
            without_vector=without_vector,
            purged=self.counts["purged"],
            waiting=self.counts["work"] - self.counts["done"] if stopped else 0,
            pictures=stats.pictures,
            refused=len(self.refused),
            answers=self._spec_of(answers),
        )

    def _share_vectors(self) -> None:
        """Give the encoder the vectors of another one whose picture side is the same, if there is one:
        then nothing of what that one has encoded is encoded again."""
        rows = self.catalog.encoders()
        own = next((row for row in rows if row.encoder_id == self.encoder_id), None)
        if any(row is not own and space_of(row) == self.encoder.space_id for row in rows):
            if own is None:
                self._towers()
                register(self.catalog, self.encoder)
            else:
                join_vectors(self.catalog, self.encoder.space_id)

    def _spec_of(self, answers: EncoderRow | None) -> str:
        if answers is None or answers.encoder_id == self.encoder_id:
            return self.encoder.spec
        return answers.spec

    # ---- what is on the disk, and what of it needs work

    def _survey(self, root: str, work: Spool, missing: Spool) -> bool:
        """List what below the root needs work and what is gone; count, note and follow the rest.

        Return False if the root cannot be read, or is empty and was not: then nothing is gone.
        """
        listed, records, mark = 0, 0, missing.mark()
        hidden: Problem | None = None  # the folder that could not be read last
        self.catalog.remove_places([root])  # the note that it could not be read the last time
        found = walk(root, skip=os.path.realpath(self.catalog.folder))
        indexed = self.catalog.known_files(root, encoder_id=self.encoder_id)
        for item, known in side_by_side(found, indexed):
            if self.stop.is_set():
                return True
            records += known is not None
            if isinstance(item, Folder):
                if self._texts_changed.pop(item.path, False):
                    self.catalog.set_text_fingerprint(item.path, item.texts)
                continue
            if isinstance(item, Problem) and item.is_folder:
                if item.reason == "unreadable-folder":
                    hidden = item
                if not item.gone:
                    self._note(item)
                    listed += item.path != root
            elif item is not None:
                listed += 1
                self.counts["seen"] += 1
                self._compare(item, known[1] if known else None, work)
            elif known is not None and hidden and os.fsencode(known[0]).startswith(hidden.key):
                if hidden.gone and hidden.path not in self._folder_problems:
                    self._note(hidden)
            elif known is not None:
                missing.add(known[0])
            if (listed + records) % 1000 == 0:
                self._report("walking", current=item.path if item else "")
                self._commit_if_due()
        self._report("walking")
        available = bool(listed or not records)
        if not available:
            missing.cut(mark)
        return available

    def _compare(self, item: FoundFile | Problem, known: KnownFile | None, work: Spool) -> None:
        num = known.num if known else None
        if isinstance(item, Problem):
            self._skip(item, keep_place=num is not None and item.reason == "unreadable")
            return
        if num is not None and item.folder is not None and self._has_new_texts(item.folder):
            texts = self.captions.for_picture(Path(item.path))
            self.catalog.set_place_texts(item.path, captions=texts.captions, tags=texts.tags)
        same = known and (known.size, known.mtime_ns) == (item.size, item.mtime_ns)
        if known and same and known.state == "ok":
            self.counts["unchanged"] += 1
        elif known and same and known.state == "skipped":
            self.counts["skipped_before"] += 1
        else:
            self._add_work(work, item.path, item.size, item.mtime_ns, num)

    def _has_new_texts(self, folder: Folder) -> bool:
        """Return whether the texts of the pictures in a folder must be read again. What they are as of
        is noted when the walk leaves the folder; those in `work` are read later, and so are newer."""
        if folder.path not in self._texts_changed:
            noted = self.catalog.text_fingerprint(folder.path)
            self._texts_changed[folder.path] = noted != folder.texts
        return self._texts_changed[folder.path]

    def _list_others(self, roots: Sequence[str], work: Spool) -> None:
        """Add the files outside of the roots whose pictures have no vector of the model."""
        within = tuple(root.rstrip(os.sep) + os.sep for root in roots)
        for root in distinct_roots(self.catalog.roots(), in_catalog=lambda _: True):
            for path, known in self.catalog.known_files(root, encoder_id=self.encoder_id):
                if self.stop.is_set():
                    return
                if known.num is None or known.state == "ok" or path.startswith(within):
                    continue
                try:
                    about = os.stat(path)
                except OSError:
                    continue  # of a disk that is not there; counted as a picture without a vector
                self._add_work(work, path, about.st_size, about.st_mtime_ns, known.num)

    def _add_work(self, work: Spool, *row: Any) -> None:
        work.add(*row)
        self.counts["work"] += 1

    # ---- the work

    def _embed(self, work: Spool, snapshots: _Snapshots) -> None:
        results = encode_pictures(
            itertools.starmap(_Job, work),
            self._towers,
            read=lambda job: images.read_bytes(Path(job.path), limits=self.limits),
            lookup=self._stored,
            prepare=self._prepare,
            size=lambda job: job.size,
            workers=self.workers,
            batch_size=self.batch_size,
            decoded_megapixels=self.decoded_megapixels,
        )
        with closing(results):
            while not self.stop.is_set() and (result := next(results, None)) is not None:
                with self._batch():
                    if isinstance(result, Known):
                        texts = self.captions.for_picture(Path(result.item.path))
                        self._place(result.stored, result.item, texts, known="unchanged")
                    elif isinstance(result, Unreadable):
                        self._cannot_read(result.item, result.error)
                    else:
                        snapshots.added(self._add_batch(result))
                self._report("embedding", done=self.counts["done"], total=len(work))
                self._commit_if_due()

    @contextmanager
    def _batch(self) -> Iterator[None]:
        """Let no other thread commit meanwhile, nor, after an error, what was left half done."""
        with self._writing:
            self._is_whole = False
            yield
            self._is_whole = True

    def _point(self, encoder_id: str, name: str, last_seq: int) -> None:
        """Point the catalog to a new snapshot, between two batches. Any thread may call it."""
        with self._writing:
            if not self._is_whole:
                raise ClipkitError("the indexing run failed")
            self.catalog.point_to_snapshot(encoder_id, name=name, last_seq=last_seq)

    def _commit_if_due(self) -> None:
        if time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.catalog.commit()
            self.committed_at = time.monotonic()

    def _stored(self, image_id: str) -> int | None:
        """Return the num of a picture that has its vector already."""
        num = self.catalog.has_picture(image_id)
        if num is None or self.catalog.vector(num, self.encoder_id) is None:
            return None
        return num

    def _prepare(
        self, job: _Job, image_id: str, data: bytes, admit: Callable[[int], None]
    ) -> tuple[Any, _Extra]:
        """In a decode thread: the tower's pixels, and what the catalog keeps of a picture."""
        towers = self._towers()
        side = max(towers.preferred_side, THUMBNAIL_SIDE // 2)
        picture = images.decode(data, target=side, limits=self.limits, admit=admit)
        facts = {
            "image_id": image_id,
            "width": picture.width,
            "height": picture.height,
            "format": picture.format,
            "bytes": job.size,
            "taken_at": picture.taken_at,
            "camera": picture.camera,
            "thumbnail": images.thumbnail(picture.rgb, side=THUMBNAIL_SIDE),
        }
        extra = _Extra(facts, self.captions.for_picture(Path(job.path)))
        return towers.preprocess(picture.rgb), extra

    def _towers(self) -> Towers:
        towers = self.encoder.towers()
        if towers.encoder_id != self.encoder_id:
            raise ModelError(f"model {self.encoder.spec} changed during indexing; start again")
        return towers

    def _add_batch(self, batch: Encoded[_Job, _Extra]) -> int:
        """Write new pictures, or new vectors of known ones; return how many vectors."""
        self._towers()  # raises if its files have changed
        lengths = np.linalg.norm(batch.vectors, axis=1)
        usable = np.asarray(np.abs(lengths - 1) < 0.01)  # neither NaN nor a zero vector
        nums: list[int] = []
        for picture, is_usable in zip(batch.pictures, usable, strict=True):
            num = self.catalog.has_picture(picture.image_id)
            if not is_usable:
                self._refuse(picture.item, num)
                continue
            if num is None:
                num = self.catalog.add_picture(**picture.extra.facts)
            self._place(num, picture.item, picture.extra.texts, known="reencoded")
            nums.append(num)
        register(self.catalog, self.encoder)
        self.catalog.add_vectors(self.encoder_id, np.array(nums, np.int64), batch.vectors[usable])
        self.counts["embedded"] += len(batch.pictures)
        self._rate.add(len(batch.pictures))
        return len(nums)

    def _place(self, num: int, job: _Job, texts: Texts, *, known: str) -> None:
        """Note a file of a picture: a new one, a copy, a moved file, a restored one, or one that is in
        the index already, which counts as `known`."""
        was_live = self.catalog.is_live(num)
        is_new = self.catalog.add_place(
            num,
            job.path,
            size=job.size,
            mtime_ns=job.mtime_ns,
            captions=texts.captions,
            tags=texts.tags,
        )
        self.counts["done"] += 1
        if not was_live:
            self.counts["added"] += 1
        elif is_new:
            self.new_places[num] += 1
        else:
            self.counts[known] += 1

    # ---- what cannot be indexed

    def _cannot_read(self, job: _Job, error: ImageError) -> None:
        """Note a file that cannot be read, whose picture stays, or that is no picture any more."""
        self.counts["done"] += 1
        if error.reason == "unreadable":
            self._try_again(job, error.reason, str(error), keep_place=job.num is not None)
        else:
            self._skip(Problem(job.path, error.reason, str(error), job.size, job.mtime_ns))

    def _refuse(self, job: _Job, num: int | None) -> None:
        """Note a picture of which the model gives no usable vector; with another one's, it stays."""
        message = f"model {self.encoder.spec} gives no usable vector for it; try another model"
        self.counts["done"] += 1
        is_there = num is not None and num == job.num
        if num is not None and self.catalog.is_live(num):
            self.refused.add(num)
        self._try_again(job, "no-vector", message, keep_place=is_there)

    def _try_again(self, job: _Job, reason: str, message: str, *, keep_place: bool) -> None:
        """Record a file that the next run reads again even if its size and time are the same: they do
        not change when a disk or a permission comes back, or another model is used."""
        self._skip(Problem(job.path, reason, message), keep_place=keep_place)

    def _note(self, folder: Problem) -> None:
        """Record a folder that cannot be read; its pictures stay in the catalog."""
        self._folder_problems.add(folder.path)
        self._skip(folder)

    def _skip(self, problem: Problem, *, keep_place: bool = False) -> None:
        self.catalog.add_skipped(
            problem.path,
            size=problem.size,
            mtime_ns=problem.mtime_ns,
            reason=problem.reason,
            message=problem.message,
            keep_place=keep_place,
        )
        self.reasons[problem.reason] += 1

    # ---- what is gone

    def _remove(self, missing: Spool) -> None:
        """Remove the places that are gone, and count those that only moved."""
        gone = (path for (path,) in missing if path not in self._folder_problems)
        while paths := list(itertools.islice(gone, 1000)):
            for num in self.catalog.remove_places(paths):
                what = "moved" if self.new_places[num] else "removed"
                self.counts[what] += 1
                self.new_places[num] -= what == "moved"
            self._commit_if_due()
        self.counts["duplicates"] = self.new_places.total()

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
                moved=self.counts["moved"] + self.new_places.total(),
                skipped=sum(self.reasons.values()),
                rate=rate,
                eta_seconds=(total - done) / rate if rate else None,
                current=current,
                reasons=dict(self.reasons),
            )
        )


class _Snapshots:
    """Builds snapshots in a thread beside a run, so that one of days has them too."""

    def __init__(
        self, catalog: Catalog, encoder_id: str, point: Callable[[str, str, int], None]
    ) -> None:
        self._catalog = catalog
        self._encoder_id = encoder_id
        self._point = point
        self._halt = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._building: Future[None] | None = None
        self._newer = 0

    def added(self, vectors: int) -> None:
        """Begin to build a snapshot if enough vectors were added since the last one."""
        self._newer += vectors
        if self._newer >= SNAPSHOT_EVERY and (self._building is None or self._building.done()):
            self._newer = 0
            self._building = self._pool.submit(self._build)

    def finish(self, encoder_ids: Iterable[str], stop: threading.Event) -> None:
        """Build the snapshots that are due at the end of a run. Raises ClipkitError."""
        while self._building and not self._building.done() and not stop.is_set():
            wait([self._building], timeout=0.1)
        if stop.is_set():
            return
        for encoder_id in encoder_ids:
            self._refresh(encoder_id, stop)

    def close(self) -> None:
        """End the thread; a snapshot that is not ready is dropped."""
        self._halt.set()
        self._pool.shutdown(cancel_futures=True)

    def _build(self) -> None:
        try:
            self._refresh(self._encoder_id, self._halt)
        except ClipkitError as error:
            log.warning("no new snapshot for now: %s", error)

    def _refresh(self, encoder_id: str, stop: threading.Event) -> None:
        from clipkit.index import refresh_snapshot  # imports Faiss, which `walk` does not need

        refresh_snapshot(self._catalog, encoder_id, stop=stop, point=self._point)
