"""Health of an embedding space: is it used, are captions near their pictures, are there hubs?

The measures are the field's (clipkit/metrics/space.py names the papers). Warnings are given where a
space is far from what trained towers give (`_NARROW` and so on, each with its reason). Where a figure
is a mean over pictures its interval is a bootstrap over them; effective rank, uniformity and hubness
have no interval: drawing a picture twice makes a space that is narrower and has closer neighbours
than any honest sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipkit import metrics
from clipkit.arrays import Float32, Float64, Int64
from clipkit.errors import InputError
from clipkit.index import VectorIndex
from clipkit.metrics import Interval, mean_interval
from clipkit.wording import percent
from eval.data import Captioned, Labelled, Pictures
from eval.features import Encoder, Stopped, fingerprint
from eval.reports.report import EvalReport, curve, exhibit, histogram_series
from eval.reports.wording import percent_interval
from eval.session import Results, Session

LOOKED_AT = 10_000  # pictures, drawn at random, whose neighbours are searched
_BLOCK = 1024  # queries searched at a time
_SAME = 1e-6  # variance of rows that differ by rounding only
# Variance of unit rows, which is 1 minus the mean cosine of two: random towers had up to 0.015 in
# our tests, the built-in model has 0.97 on photos.
_NARROW = 0.1
# Effective rank as a share of what it could be: the built-in model has 0.15 on 1,000 photos.
_FLAT = 0.05
# Skewness of the k-occurrence: below 1 for the built-in model and for random directions. About 3,
# some picture is among the 10 nearest of ten times as many as it should.
_HUBBY = 3.0
_SHOWN_HUBS = 12
_BINS = np.linspace(-1, 1, 101)


def evaluate_space(
    encoder: Encoder,
    data: Captioned | Labelled,
    *,
    k: int = 10,
    session: Session | None = None,
) -> EvalReport:
    """Measure the space that a model makes of pictures, and of their captions where they have some.

    Raises what `picture_features` and `space_of_vectors` raise.
    """
    session, results = session or Session(), Results("space")
    features = session.picture_features(encoder, data.pictures)
    read = data.select(features.rows)
    captions: Sequence[str] = read.captions if isinstance(read, Captioned) else ()
    texts = session.text_features(encoder, captions) if captions else None
    owner = read.owner if isinstance(read, Captioned) else None
    results.lap("encoding")
    _measure(features.vectors, texts, owner, read.pictures, k, LOOKED_AT, session, results)
    return results.report_on(
        session,
        encoder,
        data,
        features,
        n={"captions": len(captions)} if captions else {},
        fingerprint=fingerprint(features.fingerprint, captions),
    )


def space_of_vectors(
    vectors: Float32,
    texts: Float32 | None = None,
    owner: Int64 | None = None,
    *,
    pictures: Pictures | None = None,
    k: int = 10,
    sample: int = LOOKED_AT,
    dataset: str = "vectors",
    model: str = "",
    encoder_id: str = "",
    session: Session | None = None,
) -> EvalReport:
    """Measure the space of picture vectors (N, D) and, if given, texts (M, D) of pictures `owner` (M,).

    All are unit rows; `pictures` are shown where given. Neighbours are looked for among at most
    `sample` pictures, drawn at random. Raises InputError for fewer than 3 pictures, shapes that do
    not match, values that are not finite, or rows that are not of unit length.
    """
    session, results = session or Session(), Results("space")
    _measure(vectors, texts, owner, pictures, k, sample, session, results)
    return results.report(
        session,
        n={"pictures": len(vectors)} | ({} if texts is None else {"captions": len(texts)}),
        fingerprint=fingerprint("", (v.tobytes() for v in (vectors, texts) if v is not None)),
        dataset=dataset,
        model=model,
        encoder_id=encoder_id,
    )


def _measure(
    vectors: Float32,
    texts: Float32 | None,
    owner: Int64 | None,
    pictures: Pictures | None,
    k: int,
    sample: int,
    session: Session,
    results: Results,
) -> None:
    vectors, texts, owner = _checked(vectors, texts, owner)
    seed = session.seed
    variances = "direction, by variance", "share of the variance"
    results.curves = [
        curve("Covariance spectrum", *variances, [], log_x=True),
        curve("Cosines of pairs", "cosine", "share of the pairs", []),
    ]
    columns = ["", "dimensions", "lowest", "median", "highest", "under 1 % of the mean"]
    results.tables = [{"title": "Variance per dimension", "columns": columns, "rows": []}]
    _spread("pictures", vectors, seed, results)
    if texts is not None and owner is not None:
        _spread("texts", texts, seed, results)
        _pairs(vectors, texts, owner, seed, results)
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(len(vectors))[:sample])
    k = min(k, len(rows) - 1)
    results.settings |= {"k": k, "neighbours_among": len(rows)}
    if results.metrics["pictures/variance"].value > _SAME:  # else neighbours are chance
        near = neighbours(vectors[rows], k, session=session)[0]
        _hubs("pictures", "pictures", near, rows, pictures, results)
        if texts is not None:
            queries = texts[np.sort(random.permutation(len(texts))[:sample])]
            near = nearest_known(queries, vectors[rows], k, session=session)[0]
            _hubs("searches", "captions", near, rows, pictures, results)


def _checked(
    vectors: Float32, texts: Float32 | None, owner: Int64 | None
) -> tuple[Float32, Float32 | None, Int64 | None]:
    if vectors.ndim != 2 or len(vectors) < 3:
        raise InputError(f"vectors have shape {vectors.shape}; a space needs (N, D), N at least 3")
    check_unit("picture", vectors)
    if texts is None or owner is None or len(texts) == 0:
        return vectors, None, None
    if texts.shape[1:] != vectors.shape[1:] or owner.shape != texts.shape[:1]:
        raise InputError(
            f"texts have shape {texts.shape}, owners {owner.shape}; (M, {vectors.shape[1]}) and "
            "(M,) are expected"
        )
    if owner.min() < 0 or owner.max() >= len(vectors):
        raise InputError(f"a text belongs to picture {owner.max()} of {len(vectors)}")
    check_unit("text", texts)
    return vectors, texts, owner


def _cosines(left: Float32, right: Float32) -> Float64:
    """Return the cosines of matching unit rows, float64 (N,)."""
    cosines: Float64 = np.einsum("ij,ij->i", left, right, dtype=np.float64)
    return cosines


def _spread(name: str, vectors: Float32, seed: int, results: Results) -> None:
    """Add how far pictures, or texts, spread over the space."""
    n, dim = vectors.shape
    spectrum = metrics.covariance_spectrum(vectors)
    total, rank, most = float(spectrum.sum()), metrics.effective_rank(spectrum), min(dim, n - 1)
    shares = spectrum / (total or 1.0)
    half, nearly = (int(np.searchsorted(np.cumsum(shares), part)) + 1 for part in (0.5, 0.9))
    order = np.random.default_rng(seed).permutation(n)
    cosines = _cosines(vectors[order[: n // 2]], vectors[order[n // 2 : n // 2 * 2]])
    cosine = mean_interval(cosines, fraction=False, seed=seed)
    each = vectors.var(axis=0, dtype=np.float64)
    distances = ((vectors - vectors.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=1)
    sentence = (
        f"Two random {name} have a cosine of {cosine.value:.2f} on average. {n:,} {name} have an "
        f"effective rank of {rank:.0f} of at most {most}; half of their variance lies in {half} "
        f"directions, 90 % in {nearly}."
    )
    if total < _SAME:
        sentence = f"All {n:,} {name} have the same vector."
        results.warnings.append(
            f"the {name} have collapsed into one vector and cannot be told apart"
        )
    elif total < _NARROW:
        results.warnings.append(
            f"the {name} lie in a narrow cone: two random ones have cosine {cosine.value:.3f} "
            f"(variance {total:.3f}, of 1); the model is collapsing, or was never trained"
        )
    elif rank < _FLAT * most:
        results.warnings.append(
            f"the {name} use few directions: effective rank {rank:.1f} of at most {most}; "
            "the model is collapsing, or they are very similar"
        )
    results.sentences.append(sentence)
    results.metrics |= {
        f"{name}/variance": mean_interval(distances, fraction=False, seed=seed),
        f"{name}/random_cosine": cosine,
        f"{name}/effective_rank": Interval.without_bounds(rank, n),
        f"{name}/uniformity": Interval.without_bounds(metrics.uniformity(vectors, seed=seed), n),
    }
    results.curves[1]["series"].append(histogram_series(f"two {name}", cosines, _BINS))
    results.curves[0]["series"].append(
        {"name": name, "x": list(range(1, len(shares) + 1)), "y": shares.tolist()}
    )
    variances = [float(np.quantile(each, q)) for q in (0, 0.5, 1)]
    low = int((each < 0.01 * each.mean()).sum())
    results.tables[0]["rows"].append([name, dim, *variances, low])


def _pairs(vectors: Float32, texts: Float32, owner: Int64, seed: int, results: Results) -> None:
    """Add how near captions are to their pictures; figures are means over pictures of means over
    captions."""
    captioned = np.unique(owner)
    counts = np.bincount(owner)[captioned]

    def per_picture(values: Float64) -> Float64:
        return np.asarray(np.bincount(owner, values)[captioned] / counts, np.float64)

    # a caption with another picture: the one after a random shift
    turn = np.random.default_rng(seed).integers(1, len(vectors), len(owner))
    own = _cosines(texts, vectors[owner])
    other = _cosines(texts, vectors[(owner + turn) % len(vectors)])
    samples = {
        "pairs/matched_cosine": per_picture(own),
        "pairs/random_cosine": per_picture(other),
        "pairs/alignment": per_picture(2 - 2 * own),
        "pairs/accuracy": per_picture((own > other) + 0.5 * (own == other)),
    }
    results.metrics |= {
        name: mean_interval(values, fraction=name == "pairs/accuracy", seed=seed)
        for name, values in samples.items()
    }
    order, starts = np.argsort(owner, kind="stable"), np.cumsum([0, *counts[:-1]])
    means = np.add.reduceat(texts[order].astype(np.float64), starts) / counts[:, None]
    gap = metrics.mean_shift(vectors[captioned], means)
    # along the gap's direction the gap is a mean over pictures, which can be resampled
    apart = vectors[captioned] - means
    along = apart @ (apart.mean(axis=0) / (gap or 1.0))
    results.metrics["pairs/modality_gap"] = mean_interval(along, fraction=False, seed=seed)
    accuracy = results.metrics["pairs/accuracy"]
    matched, random = samples["pairs/matched_cosine"].mean(), samples["pairs/random_cosine"].mean()
    results.sentences += [
        f"A caption is nearer to its own picture than to another in {percent(accuracy.value)} of "
        f"the cases ({percent_interval(accuracy)}; chance is 50 %): their mean cosines are "
        f"{matched:.3f} and {random:.3f}.",
        f"The modality gap, between the means of pictures and captions, is {gap:.2f} (CLIP: about 0.8, "
        "Liang et al. 2022). It matters only where both are ranked in one list.",
    ]
    if not accuracy.low > 0.5:
        results.warnings.append("captions are no nearer to their own picture than to another")
    if len(captioned) == len(vectors):
        results.samples |= samples
    results.curves[1]["series"] += [
        histogram_series("a caption and its picture", own, _BINS),
        histogram_series("a caption and another picture", other, _BINS),
    ]


def _hubs(
    name: str,
    queries: str,
    near: Int64,
    rows: Int64,
    pictures: Pictures | None,
    results: Results,
) -> None:
    """Add the pictures that are neighbours of very many; near (Q, K) are positions in `rows` (N,)."""
    (count, k), n = near.shape, len(rows)
    skewness = metrics.hubness(near, n)
    counts = np.bincount(near.ravel(), minlength=n)
    worst = np.argsort(-counts, kind="stable")[:_SHOWN_HUBS]
    mean, most, never = count * k / n, int(counts[worst[0]]), float((counts == 0).mean())
    results.metrics[f"{name}/hubness@{k}"] = Interval.without_bounds(skewness, count)
    results.metrics[f"{name}/never_found@{k}"] = Interval.without_bounds(never, n)
    results.sentences.append(
        f"One picture is among the {k} nearest of {most:,} of {count:,} {queries} (mean: {mean:.1f}); "
        f"{percent(never)} of the pictures are among the nearest of none."
    )
    if skewness > _HUBBY:
        results.warnings.append(
            f"a few pictures are found for very many {queries} (hubness {skewness:.1f}, one is among "
            f"the {k} nearest of {most:,}) and crowd out others"
        )
    if pictures is not None:
        usual, labels = f"{mean:.1f} {queries}", ("On average", "Among the nearest of")
        items = [
            exhibit(pictures, int(rows[at]), expected=usual, got=f"{counts[at]:,} {queries}")
            for at in worst
        ]
        results.mistakes.append(
            {"title": f"Hubs among {queries}", "items": items, "labels": labels}
        )


# ---- exact nearest neighbours, by the index that search uses


def check_unit(what: str, rows: Float32) -> None:
    """Raise InputError, naming the row, unless all rows (N, D) are finite and of unit length."""
    lengths = np.linalg.norm(rows.astype(np.float32, copy=False), axis=1)
    for row in np.flatnonzero(~(np.abs(lengths - 1) < 0.01)):  # so written, NaN is unfit
        raise InputError(f"{what} {row} has length {lengths[row]:.4g}; unit vectors are expected")


def neighbours(
    vectors: Float32,
    k: int,
    *,
    rows: Int64 | None = None,
    seed: int | None = None,
    session: Session | None = None,
) -> tuple[Int64, Float32]:
    """Return rows and cosines, both (Q, k), of the k nearest other vectors of `rows` (Q,), default all.

    vectors: (N, D), unit rows, k < N. Equal cosines are in the order of rows, or in a random order by
    `seed`: if two models collapse, the first rows would be the neighbours of all pictures in both, as
    if the models agreed. Raises InputError if the rows are not unit vectors, Stopped as `nearest_known`.
    """
    queries = np.arange(len(vectors)) if rows is None else rows
    nearest, scores = nearest_known(vectors[queries], vectors, k + 1, seed=seed, session=session)
    # the row itself is no neighbour; with many copies it may not be among the k + 1
    own = nearest == queries[:, None]
    own[~own.any(axis=1), -1] = True
    return nearest[~own].reshape(-1, k), scores[~own].reshape(-1, k)


def nearest_known(
    queries: Float32,
    vectors: Float32,
    k: int,
    *,
    seed: int | None = None,
    session: Session | None = None,
) -> tuple[Int64, Float32]:
    """Return the rows of `vectors` (N, D), k <= N, nearest to each query (Q, D), and their cosines:
    both (Q, k). Raises Stopped if the session is stopped."""
    session, ids = session or Session(), np.arange(len(vectors))
    if seed is not None:
        ids = np.random.default_rng(seed).permutation(ids)
    index = VectorIndex.build(ids, vectors, kind="exact")
    nearest = np.empty((len(queries), k), np.int64)
    cosines = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _BLOCK):
        if session.stop.is_set():
            raise Stopped("stopped while looking for neighbours; encoded pictures are kept")
        block = slice(start, start + _BLOCK)
        hits = index.search(queries[block], k)
        nearest[block] = [rows for rows, _ in hits]
        cosines[block] = [scores for _, scores in hits]
        session.on_progress("looking for neighbours", start + len(hits), len(queries))
    return np.argsort(ids)[nearest], cosines
