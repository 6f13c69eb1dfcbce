"""Build a catalog's snapshots, load the current one, and tell when a new one is due.

A snapshot is derived. One that is missing, damaged, older or of another encoder is never searched: the
catalog's own vectors are used instead, and the next `refresh_snapshot` builds a new one.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipkit import durable
from clipkit.catalog import Catalog, SnapshotPointer
from clipkit.catalog.rows import StoredVectors
from clipkit.errors import ClipkitError, IndexDamaged, InputError
from clipkit.index.checked_files import FileWriter, write_facts, write_npy
from clipkit.index.kinds import (
    KINDS,
    Floats,
    Ids,
    Kind,
    Structure,
    searches,
    threads,
    write_structure,
)
from clipkit.index.rows import RowsWriter, StoredRows
from clipkit.index.snapshot import (
    CODES,
    IDS,
    SAMPLE,
    SAMPLE_IDS,
    SAMPLE_ROWS,
    Manifest,
    Snapshot,
    check_cheaply,
    manifest_facts,
    sampling_hash,
)
from clipkit.index.vector_index import recall, sample_queries

log = logging.getLogger(__name__)

SNAPSHOT_FROM = 50_000  # vectors outside a snapshot before a (new) one is worth its build
SNAPSHOT_SHARE = 0.1  # ... and their least share of the library; also the share of dead rows
RECALL_GOAL = 0.999  # recall@10
_FLAT_TO = 5_000_000  # up to here all codes are scanned, in 50 ms; beyond, inverted lists of them
_SMALLEST = 256  # below, codes have nothing to save
_CHUNK = 16_384  # rows read from the catalog at a time
_HEADROOM = 1.1  # of the margin, as other queries differ from those that it was measured with
_TRIES = 4  # margins tried, each a quarter larger, at one level of a kind's settings

Progress = Callable[[str, int, int], None]  # what is done, of which how many of how many
_building = threading.Lock()  # the writer's lock keeps other processes out, this one other threads


class _Stopped(Exception):
    """The build was asked to stop."""


def snapshot_kind(size: int) -> str:
    """Return the kind of index that a library of `size` vectors is searched with."""
    if size < SNAPSHOT_FROM:
        return "exact"  # without a snapshot
    return "rabitq" if size <= _FLAT_TO else "ivf"


def load_snapshot(
    catalog: Catalog, encoder_id: str, pointer: SnapshotPointer | None
) -> Snapshot | None:
    """Open the snapshot that `pointer` names.

    Returns None if there is no snapshot or it may not be searched; the log says why.
    """
    if pointer is None:
        return None
    try:
        return Snapshot.open(_checked(catalog, encoder_id, pointer)[0])
    except (ClipkitError, OSError) as error:
        log.warning("snapshot not used, searching the catalog's vectors instead: %s", error)
        return None


def refresh_snapshot(
    catalog: Catalog,
    encoder_id: str,
    *,
    force: bool = False,
    stop: threading.Event | None = None,
    on_progress: Progress | None = None,
    point: Callable[[str, str, int], None] | None = None,
) -> Manifest | None:
    """Build a snapshot of what is committed and point the catalog, open for writing, to it, if due.

    It is due with `force`; if at least SNAPSHOT_FROM vectors and SNAPSHOT_SHARE of all are newer than
    the current snapshot, which counts as absent when it is damaged or of an older format; or if
    SNAPSHOT_SHARE of its rows are of removed pictures or replaced. Returns None if nothing was built.

    It may run in a thread beside the one that writes: it reads through a catalog of its own, in
    bounded memory, and calls only `point_to_snapshot` of `catalog`, or `point(encoder_id, name,
    last_seq)` instead, which may wait for a moment to commit. The previous snapshot stays for
    readers that are opening it now; older ones are deleted. Raises ClipkitError if the disk is full or
    fails; the previous snapshot then stays the current one.
    """
    with _building, Catalog.open(catalog.folder) as reader:
        pointer = reader.snapshot(encoder_id)
        if not _is_due(reader, encoder_id, pointer, force):
            return None
        folder = catalog.folder / "snapshots"
        try:
            folder.mkdir(exist_ok=True)
            for left in folder.glob(".*.tmp"):  # by processes that were killed while building
                shutil.rmtree(left, ignore_errors=True)
            names = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
            name = f"{int(names[-1]) + 1 if names else 1:06d}"
            manifest = build_snapshot(
                folder / name,
                reader.vector_chunks(encoder_id, rows=_CHUNK),
                encoder_id=reader.vector_space(encoder_id),
                dim=next(row.dim for row in reader.encoders() if row.encoder_id == encoder_id),
                total=len(reader.live_nums(encoder_id)),
                stop=stop,
                on_progress=on_progress,
            )
        except _Stopped:
            return None
        except OSError as error:
            raise ClipkitError(
                f"cannot write a snapshot to {folder}: {error.strerror or error}; it needs free disk "
                "space and a writable folder; searches go on without a new one"
            ) from error
        if point is not None:
            point(encoder_id, name, manifest.last_seq)
        else:
            catalog.point_to_snapshot(encoder_id, name=name, last_seq=manifest.last_seq)
        pointers = [pointer, *(reader.snapshot(row.encoder_id) for row in reader.encoders())]
        in_use = {name, *(pointer.name for pointer in pointers if pointer)}
        for old in names:
            if old not in in_use:
                shutil.rmtree(folder / old, ignore_errors=True)
        return manifest


def _checked(catalog: Catalog, encoder_id: str, pointer: SnapshotPointer) -> tuple[Path, Manifest]:
    """Return the folder and the manifest of the snapshot that `pointer` names, after cheap checks."""
    folder = catalog.folder / "snapshots" / pointer.name
    manifest, space = check_cheaply(folder), catalog.vector_space(encoder_id)
    # by encoder_id: built before an indexing run told the space
    if manifest.encoder_id not in (space, encoder_id) or manifest.last_seq != pointer.last_seq:
        raise IndexDamaged(
            f"{folder} holds vectors of {manifest.encoder_id} up to seq {manifest.last_seq}; "
            f"the catalog says {space} and {pointer.last_seq}"
        )
    return folder, manifest


def _is_due(
    catalog: Catalog, encoder_id: str, pointer: SnapshotPointer | None, force: bool
) -> bool:
    total = len(catalog.live_nums(encoder_id))
    if pointer is None:
        return total > 0 and (force or total >= SNAPSHOT_FROM)
    try:
        _, manifest = _checked(catalog, encoder_id, pointer)
    except IndexDamaged as error:
        log.info("the snapshot is built again: %s", error)
        return total > 0 and (force or total >= SNAPSHOT_FROM)
    newer = catalog.count_vectors(encoder_id, after_seq=pointer.last_seq)
    outdated = manifest.size - (total - newer)  # rows of pictures that are gone, or are newer again
    return (
        (force and total > 0)
        or (newer >= SNAPSHOT_FROM and newer >= SNAPSHOT_SHARE * total)
        or (outdated > 0 and outdated >= SNAPSHOT_SHARE * manifest.size)
    )


def build_snapshot(
    folder: Path,
    chunks: Iterable[StoredVectors],
    *,
    encoder_id: str,
    dim: int,
    total: int,
    kind: str = "auto",
    seed: int = 0,
    stop: threading.Event | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the vectors of `chunks`, in rising order of num, as a new snapshot in `folder`.

    kind="auto" takes rabitq, beyond 5 million vectors ivf, and exact for a handful. Vectors that are
    not of length 1 are left out. The rows are streamed to the disk and from there into the codes, so
    memory holds some thousand rows, and 90 bytes a vector. It works on one thread, and the same input
    gives the same files on any machine with the same Faiss. After an error or a stop nothing is left.
    Raises InputError if the folder exists, OSError from the disk.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; snapshots are never overwritten; choose another name")
    started = time.perf_counter()
    watch = _Watch(stop, on_progress, total)
    # searches.one: those that measure recall are never alone, so that one thread does all
    with threads(1), searches.one(), durable.whole_folder(folder) as temporary:
        ids, last_seq, files = _write_rows(temporary, chunks, watch)
        files[IDS] = write_npy(temporary, IDS, ids)
        rows = StoredRows(temporary, {"files": files}, ids, dim)
        sample_ids = np.sort(ids[np.argsort(sampling_hash(ids), kind="stable")[:SAMPLE_ROWS]])
        sample = rows.read(np.searchsorted(ids, sample_ids))
        files[SAMPLE_IDS] = write_npy(temporary, SAMPLE_IDS, sample_ids)
        with FileWriter(temporary / SAMPLE, hashed=True) as file:
            file.write(sample.astype("<f2"))
        files[SAMPLE] = file.entry

        kind, settings, reached, queries, structure = _choose(
            rows, kind, seed, watch, lambda *made: _trial(temporary, rows, *made)
        )
        if structure is not None:
            with FileWriter(temporary / CODES, hashed=True) as file:
                write_structure(structure, file.write)
            files[CODES] = file.entry
        manifest = Manifest(
            kind=kind,
            dim=dim,
            size=len(ids),
            encoder_id=encoder_id,
            last_seq=last_seq,
            settings=settings,
            recall_at_10=reached,
            queries=queries,
            build_seconds=round(time.perf_counter() - started, 3),
            bytes=sum(entry["bytes"] for entry in files.values()),
        )
        write_facts(temporary, manifest_facts(manifest, files))
    return manifest


class _Watch:
    """The caller's stop event and progress callback."""

    def __init__(self, stop: threading.Event | None, report: Progress | None, total: int) -> None:
        self._stop, self._report, self.total = stop, report, total

    def step(self, what: str, done: int) -> None:
        """Report progress. Raises _Stopped if the build is to stop."""
        if self._stop is not None and self._stop.is_set():
            raise _Stopped
        if self._report is not None:
            self._report(what, done, max(done, self.total))


class _Watched:
    """The rows of a snapshot, of which every reading in order is watched."""

    def __init__(self, rows: StoredRows, watch: _Watch, what: str) -> None:
        self._rows, self._watch, self._what = rows, watch, what
        self.dim, self.size, self.drawn = rows.dim, rows.size, rows.drawn

    def chunks(self) -> Iterator[Floats]:
        done = 0
        for chunk in self._rows.chunks():
            self._watch.step(self._what, done)
            yield chunk
            done += len(chunk)


def _write_rows(
    folder: Path, chunks: Iterable[StoredVectors], watch: _Watch
) -> tuple[Ids, int, dict[str, Any]]:
    """Stream the vectors to the disk; return their ids, the last seq and the entries of the files."""
    last_seq, done, unfit = 0, 0, 0
    with RowsWriter(folder) as writer:
        for chunk in chunks:
            watch.step("writing vectors", done)
            lengths = np.linalg.norm(chunk.vectors.astype(np.float32), axis=1)
            fit = np.abs(lengths - 1) < 0.01  # NaN is unfit
            writer.add(chunk.nums[fit], chunk.vectors[fit])
            last_seq, done = chunk.last_seq, done + len(fit)
            unfit += int(np.count_nonzero(~fit))
    if unfit:
        log.warning("left %d vectors out of the snapshot: their length is not 1", unfit)
    return writer.ids, last_seq, writer.entries


def _choose(
    rows: StoredRows,
    kind: str,
    seed: int,
    watch: _Watch,
    trial: Callable[[str, Mapping[str, Any], Any], Snapshot],
) -> tuple[str, Mapping[str, Any], float, int, Any]:
    """Return the kind, its settings, its recall@10 by how many queries, and its structure.

    The settings are the first of the kind's levels, and of that the smallest margin, that reach the
    goal. If none does, the kind is exact: all rows are scored.
    """
    if kind == "auto":
        kind = snapshot_kind(max(rows.size, SNAPSHOT_FROM))
    approximate = KINDS[kind] if rows.size >= _SMALLEST else None
    if approximate is None:
        return "exact", {}, 1.0, 0, None
    if approximate.scan is None:
        raise InputError(f"index kind {kind!r} lives in memory; a snapshot cannot be of it")
    structure = approximate.build(_Watched(rows, watch, "making codes"), seed)
    queries = sample_queries(rows, seed)
    nearest, tenth = _ten_nearest(_Watched(rows, watch, "searching exactly"), queries)
    levels = [{n: v for n, v in level.items() if n != "refine"} for level in approximate.levels]
    reached = 0.0
    for level in [level for i, level in enumerate(levels) if level not in levels[:i]]:
        margin = _margin(approximate, structure, level, rows.size, queries, nearest, tenth)
        for _ in range(_TRIES if margin < np.inf else 0):
            settings = {**level, "margin": margin}
            snapshot, scores = trial(kind, settings, structure), []
            for number, query in enumerate(queries):
                watch.step("measuring recall", number * rows.size // len(queries))
                scores.append(snapshot.search(query[None], 10)[0][1])
            if (reached := recall(scores, tenth)) >= RECALL_GOAL:
                return kind, settings, reached, len(queries), structure
            margin *= 1.25
    text = "%s reaches recall@10 %.4f on these vectors; the goal is %.4f; searching exactly"
    log.warning(text, kind, reached, RECALL_GOAL)
    return "exact", {"given_up": kind, "given_up_recall": reached}, 1.0, 0, None


def _ten_nearest(rows: _Watched, queries: Floats) -> tuple[Ids, Floats]:
    """Return each query's ten nearest rows, int64 (Q, 10), and the tenth's score, float32 (Q,), both
    up to rounding."""
    top = np.full((len(queries), 10), -np.inf, np.float32)
    nearest, start = np.zeros(top.shape, np.int64), 0
    for chunk in rows.chunks():
        scores = np.concatenate([top, queries @ chunk.T], axis=1)
        found = np.concatenate(
            [nearest, np.broadcast_to(np.arange(start, start + len(chunk)), scores[:, 10:].shape)],
            1,
        )
        order = np.argpartition(scores, len(chunk), axis=1)[:, len(chunk) :]
        top, nearest = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
        start += len(chunk)
    return nearest, top.min(axis=1)


def _margin(
    kind: Kind,
    structure: Structure,
    settings: Mapping[str, Any],
    size: int,
    queries: Floats,
    nearest: Ids,
    tenth: Floats,
) -> float:
    """Return how far below the tenth's score the estimates of the ten nearest rows may lie, such that
    the recall goal is met in both halves of the queries; infinity if the lists probed lack too many."""
    gaps = np.full(nearest.shape, np.inf)
    for gap, query, rows, score in zip(gaps, queries, nearest, tenth, strict=True):
        mask = np.zeros(size, np.bool_)
        mask[rows] = True
        assert kind.scan is not None
        estimates = kind.scan(structure, query, 40, settings, mask).estimates
        gap[: len(estimates)] = score - estimates
    last = [
        np.sort(half, axis=None)[int(np.ceil(RECALL_GOAL * half.size)) - 1]
        for half in np.split(gaps, [len(gaps) // 2])
    ]
    return max(0.0, float(max(last))) * _HEADROOM


def _trial(
    folder: Path, rows: StoredRows, kind: str, settings: Mapping[str, Any], structure: Any
) -> Snapshot:
    manifest = Manifest(kind, rows.dim, rows.size, "", 0, settings, 0.0, 0, 0.0, 0)
    sample = (np.empty(0, np.int64), np.empty((0, rows.dim), np.float32))
    return Snapshot(folder, manifest, rows, structure, sample)
