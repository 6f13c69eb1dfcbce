"""The snapshot of a catalog: its vectors as a saved index, current up to a sequence number.

A snapshot is derived. One that is missing, damaged or of another encoder is never searched: the
catalog's own vectors are used instead, and the next `refresh_snapshot` builds a new one.
"""

from __future__ import annotations

import logging
import shutil

import numpy as np

from clipkit.catalog import Catalog, SnapshotPointer
from clipkit.errors import ClipkitError, IndexDamaged
from clipkit.index.kinds import Ids
from clipkit.index.vector_index import Manifest, VectorIndex, read_manifest

log = logging.getLogger(__name__)

SNAPSHOT_FROM = 50_000  # vectors outside a snapshot before a (new) one is worth its build
SNAPSHOT_SHARE = 0.1  # ... and their least share of the library


def load_snapshot(
    catalog: Catalog, encoder_id: str, pointer: SnapshotPointer | None
) -> tuple[VectorIndex, Ids] | None:
    """Load the snapshot that `pointer` names: the index and its nums, int64 (N,), sorted.

    Returns None if there is no snapshot or it may not be searched; the log says why.
    """
    if pointer is None:
        return None
    folder = catalog.folder / "snapshots" / pointer.name
    try:
        manifest = read_manifest(folder)
        if (manifest.encoder_id, manifest.last_seq) != (encoder_id, pointer.last_seq):
            raise IndexDamaged(
                f"{folder} holds vectors of encoder {manifest.encoder_id} up to seq "
                f"{manifest.last_seq}; the catalog says {encoder_id} and {pointer.last_seq}"
            )
        index = VectorIndex.load(folder)
        return index, np.load(folder / "ids.npy")  # load() has just checked every byte
    except (ClipkitError, OSError) as error:
        log.warning("snapshot not used, searching the catalog's vectors instead: %s", error)
        return None


def refresh_snapshot(catalog: Catalog, encoder_id: str, *, force: bool = False) -> Manifest | None:
    """Build a snapshot and point the catalog, open for writing, to it, if enough is outside one.

    That is when at least SNAPSHOT_FROM vectors and SNAPSHOT_SHARE of all are newer than the current
    snapshot, when that one is damaged, or with `force`. Returns None if nothing was done. The
    previous snapshot stays for readers that are loading it now; older ones are deleted.
    """
    catalog.commit()
    pointer = catalog.snapshot(encoder_id)
    total = len(catalog.live_nums(encoder_id))
    usable = load_snapshot(catalog, encoder_id, pointer)
    after = pointer.last_seq if pointer and usable else 0
    newer = len(catalog.vectors(encoder_id, after_seq=after).nums) if after else total
    if not total or not (force or (newer >= SNAPSHOT_FROM and newer >= SNAPSHOT_SHARE * total)):
        return None
    stored = catalog.vectors(encoder_id)
    index = VectorIndex.build(stored.nums, stored.vectors)
    folder = catalog.folder / "snapshots"
    folder.mkdir(exist_ok=True)
    names = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
    name = f"{int(names[-1]) + 1 if names else 1:06d}"
    index.save(folder / name, encoder_id=encoder_id, last_seq=stored.last_seq)
    catalog.point_to_snapshot(encoder_id, name=name, last_seq=stored.last_seq)
    pointers = [pointer, *(catalog.snapshot(row.encoder_id) for row in catalog.encoders())]
    in_use = {name, *(pointer.name for pointer in pointers if pointer)}
    for old in names:
        if old not in in_use:
            shutil.rmtree(folder / old, ignore_errors=True)
    return read_manifest(folder / name)
