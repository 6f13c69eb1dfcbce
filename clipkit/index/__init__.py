"""Nearest neighbours: unit vectors in, ids and exact cosines out.

Every kind (kinds.py, the only module that imports Faiss) stores the vectors as half-precision codes,
rows sorted by id, and one function computes every score from those codes, so a score does not depend
on the kind, the batch or the number of threads. A kind adds a fast way to candidates.

`search` guarantees for every kind: the ids are in this index and allowed, min(k, size, allowed) of
them, sorted by (-score, id). The exact kind returns the k best by that order, also when equal scores
straddle rank k. The others do so among the candidates that they find; how many of the true ten they
find was measured on these vectors when the index was built (`Measured`).

On disk an index is an immutable folder: `ids.npy`, `vectors.npy` (both open with numpy.load),
`candidates.faiss` where the kind has a structure, and `manifest.json`. snapshot.py builds and loads
the one that a catalog points to.
"""

from clipkit.index.kinds import KINDS, Kind
from clipkit.index.snapshot import load_snapshot, refresh_snapshot
from clipkit.index.vector_index import Measured, VectorIndex, read_manifest, typical_queries

__all__ = [
    "KINDS",
    "Kind",
    "Measured",
    "VectorIndex",
    "load_snapshot",
    "read_manifest",
    "refresh_snapshot",
    "typical_queries",
]
