"""Nearest neighbours: unit vectors in, ids and exact cosines out.

Two classes search alike. A `VectorIndex` (vector_index.py) holds half-precision vectors in memory, in
any of the kinds of kinds.py, the only module that imports Faiss. A `Snapshot` (snapshot.py) is an
immutable folder on disk: its codes are loaded, of its vectors a search reads some hundred, so that a
million pictures take 90 MB. building.py makes and opens the snapshot that a catalog points to.

Rows are sorted by id, and one function computes every score from the half-precision rows, so a score
does not depend on the kind, the batch or the number of threads. A kind adds a fast way to candidates.

`search` guarantees: the ids are in this index and allowed, min(k, size, allowed) of them, sorted by
(-score, id). The exact kind returns the k best by that order, also when equal scores straddle rank k.
The others do so among the candidates that they find; how many of the true ten they find was measured
on these vectors when the index was built.
"""

from clipkit.index.building import load_snapshot, refresh_snapshot, snapshot_kind
from clipkit.index.kinds import KINDS, Kind
from clipkit.index.snapshot import Manifest, Snapshot, read_manifest, sampling_hash
from clipkit.index.vector_index import Measured, VectorIndex, typical_queries

__all__ = [
    "KINDS",
    "Kind",
    "Manifest",
    "Measured",
    "Snapshot",
    "VectorIndex",
    "load_snapshot",
    "read_manifest",
    "refresh_snapshot",
    "sampling_hash",
    "snapshot_kind",
    "typical_queries",
]
