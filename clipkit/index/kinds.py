"""Index kinds: the Faiss structures that propose candidates, and the store of vectors in memory.

The only module that imports Faiss (measured with 1.15.1). `KINDS` is the extension point: a kind is a
structure that quickly proposes rows to score; the scores are computed from the half-precision rows.

    exact    no structure: all rows are scored
    rabitq   one bit per dimension, all scanned (RaBitQ fast-scan, arXiv 2405.12497)
    ivf      the same bits in inverted lists, of which the nearest few are scanned
    hnsw     a neighbour graph over the codes (arXiv 1603.09320)

Faiss spreads a batch over OpenMP threads; a single query is faster on one (8 against 13 ms), hence
`threads`; a snapshot's codes are divided for the cores instead (see `PARTS`). OPENBLAS_CORETYPE is left
alone: searching fp16 codes uses no BLAS; on a Zen 3 CPU, Haswell gained nothing in a batched flat search
and 12 % in the k-means of ivf's build.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

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
_TRAINING = 64  # vectors per list of the k-means: all of them are in memory at once
# Structures that the rows of a flat scan are dealt to in turn, so that cores can share one query.
PARTS = 4


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let Faiss use `count` threads (None: as many as it would) for calls made by this thread.

    The setting is OpenMP's nthreads-var, of which every thread of the program has its own
    (OpenMP 5.2, section 2.2), so concurrent searches do not disturb each other.
    """
    before = faiss.omp_get_max_threads()
    if count in (None, before):  # each setting waits for the interpreter's lock
        yield
        return
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class Searches:
    """The searches that run in this process. Only one that runs alone is spread over the cores: others
    would wait for them, and 32 clients' searches take less time one thread each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one search while the block runs."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def spread(self, work: Callable[[int], None], count: int) -> None:
        """Call work(0), ..., work(count - 1), on several cores if at most one search runs."""
        helpers = min(os.cpu_count() or 1, count) - 1
        # The threads share it: the interpreter's lock makes next() atomic.
        todo = iter(range(count))

        def some() -> None:
            for number in todo:
                work(number)

        if helpers < 1 or self._running > 1:
            return some()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    min(os.cpu_count() or 1, PARTS) - 1,
                    "clipkit-scan",
                    lambda: faiss.omp_set_num_threads(1),
                )
        futures = [self._pool.submit(some) for _ in range(helpers)]
        try:
            some()
        finally:
            for future in futures:
                if not future.cancel():  # one that has not begun has nothing left to do
                    future.result()
        return None


searches = Searches()


@cache
def _codec(dim: int) -> Any:
    return faiss.IndexScalarQuantizer(
        dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )


def decoded(halves: npt.NDArray[np.float16]) -> Floats:
    """Return contiguous half-precision rows (M, D) as float32: exact, and twice as fast as numpy."""
    with threads(1):
        rows: Floats = _codec(halves.shape[1]).sa_decode(halves.view(np.uint8))
    return rows


def cosines(vectors: Floats, query: Floats, out: Floats) -> None:
    """Write the cosines of `vectors` (M, D) with one query (D,) to `out` (M,).

    einsum without BLAS sums every row in the same order, at any position, so equal vectors get
    equal scores; a BLAS product does not guarantee that.
    """
    np.einsum("ij,j->i", vectors, query, out=out)


def best(ids: Ids, rows: Ids, scores: Floats, k: int) -> Hits:
    """Return the k best of `rows`, in any order, with these scores, by (-score, id); ids are sorted."""
    if k < len(scores):  # keep everything that ties with rank k, then sort only that
        enough = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        scores, rows = scores[enough], rows[enough]
    order = np.lexsort((rows, -scores))[:k]  # row order is id order
    return ids[rows[order]], scores[order]


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
        self.size = size
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

    def chunks(self) -> Iterator[Floats]:
        """Yield all rows in order, float32 (M, D), some thousand at a time."""
        for start in range(0, len(self.ids), CHUNK):
            yield self.decode(slice(start, start + CHUNK))

    def scores(self, query: Floats, rows: Ids | None) -> Floats:
        """Return the cosines, float32 (M,), of `rows` (None: all) with one query."""
        count = len(self.ids) if rows is None else len(rows)
        out = np.empty(count, np.float32)
        with threads(1):  # blocks are too small for more than one
            for start in range(0, count, _BLOCK):
                part = slice(start, start + _BLOCK)
                cosines(self.decode(part if rows is None else rows[part]), query, out[part])
        return out

    def best(self, query: Floats, rows: Ids | None, k: int) -> Hits:
        """Return the k best of `rows` (None: all) by (-score, id)."""
        scores = self.scores(query, rows)
        return best(self.ids, np.arange(len(scores)) if rows is None else rows, scores, k)

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


class Vectors(Protocol):
    """What a structure is built over: a store in memory, or the rows of a snapshot on disk."""

    dim: int
    size: int

    def drawn(self, count: int, seed: int) -> Floats:
        """Draw `count` rows (all if there are fewer) without replacement: float32 (M, D)."""

    def chunks(self) -> Iterator[Floats]:
        """Yield all rows in order, float32 (M, D), some thousand at a time."""


Structure = Sequence[Any]  # Faiss indexes


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """Rows int64 (M,) by falling estimate of their cosine, float32 (M,), and a bound of the estimates of
    all other rows; it is minus infinity if there are none."""

    rows: Ids
    estimates: Floats
    others: float


@dataclass(frozen=True, slots=True)
class Kind:
    """A source of candidates.

    `build(vectors, seed)` makes the structure over all rows: Faiss indexes, of which number i of P holds
    the rows i, i + P, i + 2 P and so on. `search(structure, queries, count, settings)` returns rows
    int64 (Q, at least count), -1 for none. `levels` are the settings from fast to
    thorough, tried until the recall goal is met: in memory, "refine" candidates are scored per hit; the
    other keys are the kind's own.
    A kind that can serve a snapshot reads the vectors by `drawn` and `chunks` alone and has `scan`,
    which takes one query (D,) and the allowed rows as a mask, bool (N,) (None: all), and returns a Scan
    of about `count` rows.
    """

    build: Callable[[Any, int], Structure]
    search: Callable[[Structure, Floats, int, Mapping[str, Any]], Ids]
    levels: tuple[Mapping[str, int], ...]
    scan: Callable[[Structure, Floats, int, Mapping[str, Any], Mask | None], Scan] | None = None


def write_structure(structure: Structure, write: Callable[[bytes], int]) -> None:
    """Serialise a structure, one part after the other, through `write`; an exception of it is raised
    again as it was."""
    failed: list[BaseException] = []

    def piece(data: bytes) -> int:
        try:
            return write(data)
        except BaseException as error:
            failed.append(error)
            raise

    try:
        for part in structure:
            faiss.write_index(part, faiss.PyCallbackIOWriter(piece, 1 << 20))
    except BaseException:
        if failed:
            raise failed[0] from None
        raise


def structure_bytes(structure: Structure) -> int:
    """Return the size in bytes of a structure, without the vectors that it shares with a store."""
    return sum(len(faiss.serialize_index(part, faiss.IO_FLAG_SKIP_STORAGE)) for part in structure)


def read_structure(path: Path, size: int) -> Structure:
    """Read a structure over `size` rows from a file that was checked: Faiss's reader trusts it."""
    reader = faiss.FileIOReader(str(path))
    structure: list[Any] = []
    while sum(part.ntotal for part in structure) < size:
        structure.append(faiss.read_index(reader))
    return structure


def _in_lists(vectors: Vectors, seed: int, lists: int) -> Any:
    """Make an empty structure of one-bit codes in `lists` lists, after a random rotation.

    Real embeddings have a few dimensions far larger than the others, on which a sign per dimension
    wastes bits: rotating raised recall@10 of thin-margin queries on such synthetic data from 0.34 to
    0.66. A Hadamard rotation is as good as one by a random matrix, and as it uses no BLAS, its result
    does not depend on the number of threads; it pads the dimensions to a power of two.
    """
    rotation = faiss.HadamardRotation(vectors.dim, seed)
    coarse = faiss.IndexFlatIP(rotation.d_out)
    inverted = faiss.IndexIVFRaBitQFastScan(
        coarse, rotation.d_out, lists, faiss.METRIC_INNER_PRODUCT
    )
    inverted.cp.seed, inverted.cp.spherical = seed, True
    inverted.cp.max_points_per_centroid = _TRAINING
    sample = vectors.drawn(max(_TRAINING * lists, CHUNK // 4), seed)
    if lists == 1:
        # the mean itself, of which codes of the residuals lose least; k-means would normalise it
        coarse.add(rotation.apply(sample).mean(axis=0, keepdims=True))
    structure = faiss.IndexPreTransform(rotation, inverted)
    structure.referenced_objects = [rotation, inverted, coarse]
    structure.train(sample)
    return structure


def _build_rabitq(vectors: Vectors, seed: int) -> Structure:
    # One list: a flat index of these codes takes no selector.
    return _add_all([_in_lists(vectors, seed, 1) for _ in range(PARTS)], vectors)


def _build_ivf(vectors: Vectors, seed: int) -> Structure:
    lists = 2 ** round(np.log2(max(1, vectors.size) ** 0.5))
    lists = max(2, min(lists, vectors.size // 39))  # Faiss warns under 39 vectors per list
    return _add_all([_in_lists(vectors, seed, lists)], vectors)


def _add_all(structure: Structure, vectors: Vectors) -> Structure:
    added = 0
    for chunk in vectors.chunks():
        for number, part in enumerate(structure):
            part.add(
                np.ascontiguousarray(chunk[(number - added) % len(structure) :: len(structure)])
            )
        added += len(chunk)
    return structure


def _share(count: int, parts: int) -> int:
    """Return how many of the best `count` rows one part holds, or up to three standard deviations more
    than the mean, as the rows are dealt without regard to the query."""
    if parts == 1:
        return count
    return int(np.ceil(count / parts + 3 * (count * (parts - 1)) ** 0.5 / parts))


def _list_parameters(settings: Mapping[str, Any], mask: Mask | None) -> Any:
    selector = None if mask is None else selecting(mask)
    lists = faiss.SearchParametersIVF(nprobe=settings.get("nprobe", 1), sel=selector)
    return faiss.SearchParametersPreTransform(index_params=lists)


def _scan_lists(
    structure: Structure, query: Floats, count: int, settings: Mapping[str, Any], mask: Mask | None
) -> Scan:
    parts, found = len(structure), {}
    share = _share(count, parts)

    def scan(number: int) -> None:
        # contiguous, or packing its bits takes a millisecond
        own = None if mask is None else np.ascontiguousarray(mask[number::parts])
        wanted = min(share, structure[number].ntotal)
        parameters = _list_parameters(settings, own)
        (estimates,), (rows,) = structure[number].search(query[None], wanted, params=parameters)
        full = wanted < structure[number].ntotal and rows[-1] >= 0
        others = float(estimates[-1]) if full else -np.inf
        present = rows >= 0
        found[number] = rows[present] * parts + number, estimates[present], others

    searches.spread(scan, parts)
    rows, estimates = (np.concatenate([found[i][at] for i in range(parts)]) for at in (0, 1))
    order = np.lexsort((rows, -estimates))
    return Scan(rows[order], estimates[order], max(others for _, _, others in found.values()))


def _search_lists(
    structure: Structure, queries: Floats, count: int, settings: Mapping[str, Any]
) -> Ids:
    parts = len(structure)
    parameters = _list_parameters(settings, None)
    each = []
    for number, part in enumerate(structure):
        rows = part.search(queries, min(_share(count, parts), part.ntotal), params=parameters)[1]
        each.append(np.where(rows < 0, -1, rows * parts + number))
    return np.concatenate(each, axis=1)


def _build_hnsw(store: Store, _: int) -> Structure:  # Faiss seeds the levels itself
    codes = faiss.IndexScalarQuantizer(
        store.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    structure = faiss.IndexHNSW(codes, 32)
    structure.hnsw.efConstruction = 80
    _add_all([structure], store)  # since Faiss 1.15 the same graph on any number of threads
    structure.storage = store.flat
    structure.own_fields = False
    structure.referenced_objects = [store.flat]  # and frees the codes it was built with
    return [structure]


def _search_hnsw(
    structure: Structure, queries: Floats, count: int, settings: Mapping[str, Any]
) -> Ids:
    params = faiss.SearchParametersHNSW(efSearch=max(settings["ef"], 2 * count))
    rows: Ids = structure[0].search(queries, count, params=params)[1]
    return rows


KINDS: dict[str, Kind | None] = {
    "exact": None,  # no candidates: all codes are scanned
    "rabitq": Kind(
        _build_rabitq,
        _search_lists,
        tuple({"refine": r} for r in (16, 32, 64, 128)),
        _scan_lists,
    ),
    "ivf": Kind(
        _build_ivf,
        _search_lists,
        tuple({"nprobe": n, "refine": n} for n in (32, 64, 128, 256)),
        _scan_lists,
    ),
    "hnsw": Kind(
        _build_hnsw,
        _search_hnsw,
        tuple({"ef": e, "refine": 1} for e in (64, 128, 256, 512, 1024, 2048)),
    ),
}
