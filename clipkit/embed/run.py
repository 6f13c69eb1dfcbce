"""One indexing run: what is on the disk, what of it needs work, the work, and what is gone."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipkit import checkpoint, images
from clipkit.catalog import Catalog, KnownFile
from clipkit.embed.pictures import Encoded, Known, Unreadable, encode_pictures
from clipkit.embed.walk import FoundFile, Problem, distinct_roots, walk
from clipkit.errors import ModelError
from clipkit.lazy_encoder import Encoder
from clipkit.records import FolderCaptions

if TYPE_CHECKING:
    from clipkit.towers import DualEncoder

COMMIT_SECONDS = 2.0
THUMBNAIL_SIDE = 320


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run: `done` of `total` files that need work, `rate` in files per second."""

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


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, in files. `reasons` counts the newly skipped files by their reason;
    `skipped_before` those that were skipped in an earlier run and have not changed. A moved file is
    neither added nor removed.

    `model` is the spec of the run's model. `reencoded` counts the files of pictures that were in the
    index with another model's vectors and got this one's; `without_vector` the pictures of the index
    that still have none of it. `model_before` is the spec of the model that answered before, if a
    completed run has put this one in its place."""

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
    limits: images.Limits | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring the catalog (open for writing) up to date with the pictures below `folders`.

    The towers are loaded only if a picture must be encoded. Once `stop` is set the run ends after the
    current batch; what it has done is kept. Raises InputError for a folder that does not exist and is
    not in the catalog, ModelError if the towers cannot be loaded.
    """
    indexing = _Run(
        catalog=catalog,
        encoder=encoder,
        workers=workers or max(2, os.cpu_count() or 1),
        batch_size=batch_size,
        limits=limits or images.Limits(),
        on_progress=on_progress or (lambda _: None),
        stop=stop or threading.Event(),
    )
    return indexing.run(distinct_roots(folders, in_catalog=lambda f: catalog.places_below(f) > 0))


_Facts = dict[str, Any]  # the arguments of Catalog.add_picture


@dataclass(eq=False)
class _Run:
    catalog: Catalog
    encoder: Encoder
    workers: int
    batch_size: int | None
    limits: images.Limits
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    new_places: Counter[int] = field(default_factory=Counter)  # of pictures that were live before

    def __post_init__(self) -> None:
        self.started = self.committed_at = time.monotonic()
        self.encoder_id = self.encoder.encoder_id
        self.captions = FolderCaptions()
        # Captions that changed since the last picture was added are read again, which costs little.
        newest = self.catalog.stats().newest
        seconds = datetime.fromisoformat(newest).timestamp() if newest else 0
        self.texts_read_ns = int(seconds) * 10**9
        self._rate = _Rate()

    def run(self, roots: Sequence[str]) -> Summary:
        missing: list[str] = []
        unavailable: list[str] = []
        changed: list[FoundFile] = []
        for root in roots:
            self.catalog.add_root(root)
            indexed = dict(self.catalog.known_files(root, encoder_id=self.encoder_id))
            files, unreadable = self._survey(root)
            if indexed and (root in unreadable or not files):
                unavailable.append(root)
                continue
            changed += self._changed(files, indexed)
            hidden = tuple(folder + os.sep for folder in unreadable)
            missing += [p for p in indexed if p not in files and not p.startswith(hidden)]
        self._embed(changed)
        stopped = self.stop.is_set()
        self._report("finishing", done=self.counts["done"], total=len(changed))
        before = self.catalog.active_encoder()
        if not stopped:
            self._remove(missing)
            self.catalog.activate_encoder(self.encoder_id)
            self.catalog.move_encoder(self.encoder_id, checkpoint.absolute(self.encoder.spec))
        self.catalog.commit()
        replaced = before is not None and before.encoder_id != self.encoder_id and not stopped
        stats = self.catalog.stats(self.encoder_id)
        if not stopped:
            from clipkit.index import refresh_snapshot  # imports Faiss, which `walk` does not need

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
            model=self.encoder.spec,
            model_before=before.spec if before and replaced else None,
            reencoded=self.counts["reencoded"],
            without_vector=stats.pictures - stats.vectors,
        )

    # ---- what is on the disk, and what of it needs work

    def _survey(self, root: str) -> tuple[dict[str, FoundFile | Problem], list[str]]:
        """Return by path what below the root has a picture's suffix, and the folders that cannot
        be read."""
        files: dict[str, FoundFile | Problem] = {}
        unreadable: list[str] = []
        for item in walk(root, skip=os.path.realpath(self.catalog.folder)):
            if self.stop.is_set():
                break
            if isinstance(item, Problem) and item.reason == "unreadable-folder":
                unreadable.append(item.path)
                if item.path == root:
                    break
            files[item.path] = item
            if len(files) % 1000 == 0:
                self._report("walking", current=item.path)
        self.counts["seen"] += len(files)
        self._report("walking")
        return files, unreadable

    def _changed(
        self, files: Mapping[str, FoundFile | Problem], indexed: Mapping[str, KnownFile]
    ) -> Iterator[FoundFile]:
        """Yield the files that are new or changed; count and note the others."""
        for path, item in files.items():
            before = indexed.get(path)
            same = before and (before.size, before.mtime_ns) == (item.size, item.mtime_ns)
            if isinstance(item, Problem):
                self._skip(item)
            elif before and same and before.state == "ok":
                self.counts["unchanged"] += 1
                if before.num is not None and item.texts_ns >= self.texts_read_ns:
                    texts = self.captions.for_picture(Path(path))
                    self.catalog.set_place_texts(path, captions=texts.captions, tags=texts.tags)
            elif before and same and before.state == "skipped":
                self.counts["skipped_before"] += 1
            else:
                yield item

    # ---- the work

    def _embed(self, changed: Sequence[FoundFile]) -> None:
        results = encode_pictures(
            changed,
            self._towers,
            read=lambda file: images.read_bytes(Path(file.path), limits=self.limits),
            lookup=self._stored,
            prepare=self._prepare,
            workers=self.workers,
            batch_size=self.batch_size,
        )
        with closing(results):
            while not self.stop.is_set() and (result := next(results, None)) is not None:
                if isinstance(result, Known):
                    self._place(result.stored, result.item, known="unchanged")
                elif isinstance(result, Unreadable):
                    self._skip(_problem(result.item, result.error.reason, str(result.error)))
                    self.counts["done"] += 1
                else:
                    self._add_batch(result)
                self._report("embedding", done=self.counts["done"], total=len(changed))
                if time.monotonic() - self.committed_at > COMMIT_SECONDS:
                    self.catalog.commit()
                    self.committed_at = time.monotonic()

    def _stored(self, image_id: str) -> int | None:
        """Return the num of a picture that has its vector already."""
        num = self.catalog.has_picture(image_id)
        if num is None or self.catalog.vector(num, self.encoder_id) is None:
            return None
        return num

    def _prepare(self, file: FoundFile, image_id: str, data: bytes) -> tuple[Any, _Facts]:
        """In a decode thread: the tower's pixels, and what the catalog keeps of a picture."""
        towers = self._towers()
        side = max(towers.preferred_side, THUMBNAIL_SIDE // 2)
        picture = images.decode(data, target=side, limits=self.limits)
        facts = {
            "image_id": image_id,
            "width": picture.width,
            "height": picture.height,
            "format": picture.format,
            "bytes": file.size,
            "taken_at": picture.taken_at,
            "camera": picture.camera,
            "thumbnail": images.thumbnail(picture.rgb, side=THUMBNAIL_SIDE),
        }
        return towers.preprocess(picture.rgb), facts

    def _towers(self) -> DualEncoder:
        towers = self.encoder.towers()
        if towers.encoder_id != self.encoder_id:
            raise ModelError(f"model {self.encoder.spec} changed during indexing; start again")
        return towers

    def _add_batch(self, batch: Encoded[FoundFile, _Facts]) -> None:
        """Write new pictures, or new vectors of known ones."""
        towers = self._towers()
        finite = np.asarray(np.isfinite(batch.vectors).all(axis=1))
        nums: list[int] = []
        for picture, usable in zip(batch.pictures, finite, strict=True):
            if not usable:
                message = f"model {towers.spec} gives no finite vector for it; try another model"
                self._skip(_problem(picture.item, "no-vector", message))
                self.counts["done"] += 1
                continue
            num = self.catalog.has_picture(picture.image_id)
            if num is None:
                num = self.catalog.add_picture(**picture.extra)
            self._place(num, picture.item, known="reencoded")
            nums.append(num)
        self.catalog.register_encoder(
            self.encoder_id,
            spec=checkpoint.absolute(towers.spec),
            config_json=towers.describe(),
            dim=towers.dim,
        )
        self.catalog.add_vectors(self.encoder_id, np.array(nums, np.int64), batch.vectors[finite])
        self.counts["embedded"] += len(batch.pictures)
        self._rate.add(len(batch.pictures))

    def _place(self, num: int, file: FoundFile, *, known: str) -> None:
        """Note a file of a picture: a new one, a copy, a moved file, a restored one, or one that is in
        the index already, which counts as `known`."""
        was_live = self.catalog.is_live(num)
        texts = self.captions.for_picture(Path(file.path))
        is_new = self.catalog.add_place(
            num, file.path, size=file.size, mtime_ns=file.mtime_ns,
            captions=texts.captions, tags=texts.tags,
        )  # fmt: skip
        self.counts["done"] += 1
        if not was_live:
            self.counts["added"] += 1
        elif is_new:
            self.new_places[num] += 1
        else:
            self.counts[known] += 1

    def _skip(self, problem: Problem) -> None:
        self.catalog.add_skipped(**asdict(problem))
        self.reasons[problem.reason] += 1

    def _remove(self, missing: Sequence[str]) -> None:
        """Remove the places that are gone, and count those that only moved."""
        lost = Counter(self.catalog.remove_places(missing))
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


def _problem(file: FoundFile, reason: str, message: str) -> Problem:
    return Problem(file.path, reason, message, file.size, file.mtime_ns)
