"""Index kinds: the Faiss structures that propose candidates, and the store of the vectors themselves.

The only module that imports Faiss (measured with 1.15.1). `KINDS` is the extension point: a kind is a
structure that quickly proposes rows to score; the scores are computed from the codes.

    exact    no structure: Faiss scans all codes (ScalarQuantizer fp16)
    rabitq   one bit per dimension, scanned flat (RaBitQ fast-scan, arXiv 2405.12497)
    ivf      the same bits in inverted lists, of which the nearest few are scanned
    hnsw     a neighbour graph over the codes (arXiv 1603.09320)

Faiss spreads a batch over OpenMP threads; a single query is faster on one (8 against 13 ms), hence
`threads`. OPENBLAS_CORETYPE is left alone: searching fp16 codes uses no BLAS; on a Zen 3 CPU, Haswell
gained nothing in a batched flat search and 12 % in the k-means of ivf's build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

faiss: Any = _faiss  # its stubs lack keywords that its Python wrappers take

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Hits = tuple[Ids, Floats]

VERSION = f"faiss {faiss.__version__}"
CHUNK = 65_536  # rows decoded at a time when building
# Rows decoded at a time when scoring: 1 MB of float32 at 512 dimensions stays in cache.
_BLOCK = 512


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let Faiss use `count` threads (None: as many as it would) for calls made by this thread.

    The setting is OpenMP's nthreads-var, of which every thread of the program has its own
    (OpenMP 5.2, section 2.2), so concurrent searches do not disturb each other.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def selecting(mask: Mask) -> Any:
    """Return a Faiss selector of the rows where mask, bool (N,), is set."""
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))


class Store:
    """The vectors: sorted ids (N,) and fp16 codes (N, 2 D) in memory that numpy and Faiss share.

    `codes` and `rows16` are views of Faiss's memory and are valid as long as the store.
    """

    def __init__(self, ids: Ids, dim: int) -> None:
        """Allocate the codes; the caller fills `rows16`."""
        size = len(ids)
        self.ids = ids
        self.dim = dim
        self.flat = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        self.codes: npt.NDArray[np.uint8] = np.empty((0, 2 * dim), np.uint8)
        if size:
            self.flat.codes.resize(size * 2 * dim)
            self.flat.ntotal = size
            memory = faiss.rev_swig_ptr(self.flat.codes.data(), size * 2 * dim)
            self.codes = memory.reshape(size, 2 * dim)
        self.rows16: npt.NDArray[np.float16] = self.codes.view(np.float16)  # (N, D), the same bytes

    def decode(self, rows: npt.NDArray[Any] | slice) -> Floats:
        """Return these rows as float32 (M, D)."""
        codes = np.ascontiguousarray(self.codes[rows])
        decoded: Floats = self.flat.sa_decode(codes)
        return decoded

    def drawn(self, count: int, seed: int) -> Floats:
        """Draw `count` rows (all if there are fewer) without replacement: float32 (M, D)."""
        size = len(self.ids)
        rows = np.random.default_rng(seed).choice(size, min(count, size), replace=False)
        return self.decode(np.sort(rows))

    def scores(self, query: Floats, rows: Ids | None) -> Floats:
        """Return the cosines, float32 (M,), of `rows` (None: all) with one query.

        einsum without BLAS sums every row in the same order, at any position, so equal vectors get
        equal scores; a BLAS product does not guarantee that.
        """
        count = len(self.ids) if rows is None else len(rows)
        out = np.empty(count, np.float32)
        with threads(1):  # blocks are too small for more than one
            for start in range(0, count, _BLOCK):
                part = slice(start, start + _BLOCK)
                decoded = self.decode(part if rows is None else rows[part])
                np.einsum("ij,j->i", decoded, query, out=out[part])
        return out

    def best(self, query: Floats, rows: Ids | None, k: int) -> Hits:
        """Return the k best of `rows` (None: all) by (-score, id)."""
        scores = self.scores(query, rows)
        if rows is None:
            rows = np.arange(len(scores))
        if k < len(scores):  # keep everything that ties with rank k, then sort only that
            enough = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
            scores, rows = scores[enough], rows[enough]
        order = np.lexsort((rows, -scores))[:k]  # rows are sorted by id: row order is id order
        return self.ids[rows[order]], scores[order]

    def scan(self, queries: Floats, k: int, count: int, selector: Any) -> list[Ids | None]:
        """Return, per query, rows that certainly include the k best of the `count` selected ones.

        None where the scores around rank k are too close: Faiss and einsum sum the same products in
        different orders, each with an error of at most dim * 2^-24 relative to |query| |row|.
        """
        want = min(2 * k + 32, count)
        params = None if selector is None else faiss.SearchParameters(sel=selector)
        scores, candidates = self.flat.search(queries, want, params=params)
        slack = self.dim * 2.0**-23 * np.linalg.norm(queries, axis=1)
        certain = (scores[:, k - 1] - scores[:, -1] > slack) | (want == count)
        return [rows if sure else None for rows, sure in zip(candidates, certain, strict=True)]


@dataclass(frozen=True, slots=True)
class Kind:
    """A source of candidates. `build(store, seed)` makes the Faiss structure over the store's rows;
    `search(structure, queries, count, settings)` returns rows int64 (Q, count), -1 for none; `levels`
    are its settings from fast to thorough, tried until the recall goal is met: "refine" candidates are
    scored per hit, the other keys are the kind's own.
    """

    build: Callable[[Store, int], Any]
    search: Callable[[Any, Floats, int, Mapping[str, Any]], Ids]
    levels: tuple[Mapping[str, int], ...]


def _add_all(structure: Any, store: Store) -> Any:
    for start in range(0, len(store.ids), CHUNK):
        structure.add(store.decode(slice(start, start + CHUNK)))
    return structure


def _rotated(structure: Any, seed: int) -> Any:
    """Rotate at random before one-bit coding.

    Real embeddings have a few dimensions far larger than the others, on which a sign per dimension
    wastes bits. Recall@10 of thin-margin queries on such synthetic data rose from 0.34 to 0.66.
    """
    rotation = faiss.RandomRotationMatrix(structure.d, structure.d)
    with threads(1):  # a small QR decomposition, which contended threads slow down tenfold
        rotation.init(seed)
    return faiss.IndexPreTransform(rotation, structure)


def serialized(structure: Any) -> npt.NDArray[np.uint8]:
    """Serialise a structure without the codes that it shares with the store."""
    data: npt.NDArray[np.uint8] = faiss.serialize_index(structure, faiss.IO_FLAG_SKIP_STORAGE)
    return data


def revive(data: npt.NDArray[np.uint8], store: Store) -> Any:
    """Deserialise a structure from verified bytes: Faiss's reader trusts them."""
    structure = faiss.deserialize_index(data, faiss.IO_FLAG_SKIP_STORAGE)
    return _share_codes(structure, store) if isinstance(structure, faiss.IndexHNSW) else structure


def _build_rabitq(store: Store, seed: int) -> Any:
    structure = _rotated(faiss.IndexRaBitQFastScan(store.dim, faiss.METRIC_INNER_PRODUCT), seed)
    structure.train(store.drawn(CHUNK, seed))
    return _add_all(structure, store)


def _search_rabitq(structure: Any, queries: Floats, count: int, _: Mapping[str, Any]) -> Ids:
    rows: Ids = structure.search(queries, count)[1]
    return rows


def _build_ivf(store: Store, seed: int) -> Any:
    lists = 2 ** round(np.log2(2 * len(store.ids) ** 0.5))
    lists = max(1, min(lists, len(store.ids) // 39))  # Faiss warns under 39 vectors per list
    coarse = faiss.IndexFlatIP(store.dim)
    inverted = faiss.IndexIVFRaBitQFastScan(coarse, store.dim, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.seed, inverted.cp.spherical = seed, True
    inverted.cp.max_points_per_centroid = 128
    structure = _rotated(inverted, seed)
    structure.train(store.drawn(128 * lists, seed))
    return _add_all(structure, store)


def _search_ivf(structure: Any, queries: Floats, count: int, settings: Mapping[str, Any]) -> Ids:
    inverted = faiss.SearchParametersIVF(nprobe=settings["nprobe"])
    params = faiss.SearchParametersPreTransform(index_params=inverted)
    rows: Ids = structure.search(queries, count, params=params)[1]
    return rows


def _build_hnsw(store: Store, _: int) -> Any:  # Faiss seeds the levels itself
    codes = faiss.IndexScalarQuantizer(
        store.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    structure = faiss.IndexHNSW(codes, 32)
    structure.hnsw.efConstruction = 80
    _add_all(structure, store)  # since Faiss 1.15 the same graph on any number of threads
    return _share_codes(structure, store)


def _share_codes(structure: Any, store: Store) -> Any:
    structure.storage = store.flat
    structure.own_fields = False
    structure.referenced_objects = [store.flat]  # and frees the codes it was built with
    return structure


def _search_hnsw(structure: Any, queries: Floats, count: int, settings: Mapping[str, Any]) -> Ids:
    params = faiss.SearchParametersHNSW(efSearch=max(settings["ef"], 2 * count))
    rows: Ids = structure.search(queries, count, params=params)[1]
    return rows


KINDS: dict[str, Kind | None] = {
    "exact": None,  # no candidates: all codes are scanned
    "rabitq": Kind(_build_rabitq, _search_rabitq, tuple({"refine": r} for r in (16, 32, 64, 128))),
    "ivf": Kind(
        _build_ivf, _search_ivf, tuple({"nprobe": n, "refine": n} for n in (32, 64, 128, 256))
    ),
    "hnsw": Kind(
        _build_hnsw,
        _search_hnsw,
        tuple({"ef": e, "refine": 1} for e in (64, 128, 256, 512, 1024, 2048)),
    ),
}
