"""Compare the same towers in several runtimes: cosine of their vectors, recall, pictures and texts a
second. The runs of all alternate, so that other work on the machine slows them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit import images, metrics
from clipkit.arrays import Float32, Int64
from clipkit.embed import ahead
from clipkit.errors import ImageError, InputError
from clipkit.lazy_encoder import Towers
from clipkit.metrics import Interval
from eval.data import Captioned
from eval.features import OnProgress, no_progress

RUNS = 7
RUN_PICTURES, RUN_TEXTS = 32, 64  # of one run
CUTS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class Rate:
    """The median of `runs` timings, and the lowest and highest."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosines of `n` vectors to those of the reference."""

    mean: float
    low: float  # the least
    n: int


@dataclass(frozen=True, slots=True)
class RuntimeRow:
    """The measured output of a model in one runtime; the first of a comparison is the reference.

    `recall` is in [0, 1], by direction and cut-off, such as "text_to_image/R@1"; `recall_change` its
    difference to the reference's, an interval over pictures.
    """

    name: str  # such as "onnx int8"
    encoder_id: str
    space_id: str
    image_cosine: Agreement
    text_cosine: Agreement
    recall: Mapping[str, float]
    recall_change: Mapping[str, Interval]
    pictures_per_second: Rate
    texts_per_second: Rate
    query_ms: Rate  # one text, tokenizing included


def compare_runtimes(
    towers: Mapping[str, Towers],
    data: Captioned,
    *,
    runs: int = RUNS,
    on_progress: OnProgress = no_progress,
) -> list[RuntimeRow]:
    """Measure towers, by the names that the rows get, on captioned pictures; the first is the reference.

    Pictures that cannot be read are left out. Raises InputError if none can be read.
    """
    reference, *_ = towers.values()
    pictures, texts, owner = _decoded(data, reference.preferred_side)
    image: dict[str, Float32] = {}
    text: dict[str, Float32] = {}
    hits: dict[str, dict[str, Any]] = {}
    for at, (name, one) in enumerate(towers.items()):
        on_progress("encoding", at, len(towers))
        image[name] = one.encode_images(pictures)
        text[name] = one.encode_texts(texts)
        hits[name] = _hits(image[name], text[name], owner)
    on_progress("encoding", len(towers), len(towers))
    rates = _rates(towers, pictures, texts, runs=runs, on_progress=on_progress)
    first = next(iter(towers))
    groups = {"text_to_image": owner, "image_to_text": np.arange(len(pictures))}
    return [
        RuntimeRow(
            name=name,
            encoder_id=one.encoder_id,
            space_id=one.space_id,
            image_cosine=_agreement(image[name], image[first]),
            text_cosine=_agreement(text[name], text[first]),
            recall={key: float(values.mean()) for key, values in hits[name].items()},
            recall_change={
                key: metrics.mean_interval(
                    values - hits[first][key], groups=groups[key.partition("/")[0]], fraction=False
                )
                for key, values in hits[name].items()
            },
            **rates[name],
        )
        for name, one in towers.items()
    ]


def _decoded(data: Captioned, side: int) -> tuple[list[Any], list[str], Int64]:
    """Return the RGB pictures that can be read, their captions, and each caption's picture."""

    def decode(row: int) -> Any:
        try:
            return images.decode(data.pictures.read(row), target=side).rgb
        except ImageError:
            return None

    decoded = list(ahead(range(len(data.pictures)), decode))
    rows = [row for row, picture in enumerate(decoded) if picture is not None]
    if not rows:
        raise InputError(f"no picture of {data.name} can be read; name data that has some")
    chosen = data.select(rows)
    return [decoded[row] for row in rows], list(chosen.captions), chosen.owner


def _hits(pictures: Float32, texts: Float32, owner: Int64) -> dict[str, Any]:
    directions = ("text_to_image", "image_to_text")
    rankings = metrics.rank_captions(pictures, texts, owner)
    return {
        f"{name}/R@{k}": ranking.hit_at(k)
        for name, ranking in zip(directions, rankings, strict=True)
        for k in CUTS
        if k <= ranking.candidates
    }


def _agreement(rows: Float32, reference: Float32) -> Agreement:
    cosines = np.einsum("nd,nd->n", rows.astype(np.float64), reference.astype(np.float64))
    return Agreement(float(cosines.mean()), float(cosines.min()), len(rows))


def _rates(
    towers: Mapping[str, Towers],
    pictures: Sequence[Any],
    texts: Sequence[str],
    *,
    runs: int,
    on_progress: OnProgress,
) -> dict[str, dict[str, Rate]]:
    """Time each runtime on the same preprocessed pictures and texts, one after the other, `runs` times
    after one that does not count."""
    pixels = {name: [one.preprocess(p) for p in _first(pictures)] for name, one in towers.items()}
    batch = [texts[at % len(texts)] for at in range(RUN_TEXTS)]
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in towers}
    for run in range(runs + 1):
        on_progress("timing", run, runs + 1)
        query = [texts[run % len(texts)]]
        for name, one in towers.items():
            seconds[name].append(
                (
                    _timed(one.encode_images, pixels[name]),
                    _timed(one.encode_texts, batch),
                    _timed(one.encode_texts, query),
                )
            )
    on_progress("timing", runs + 1, runs + 1)
    rates = {}
    for name, measured in seconds.items():
        image, text, single = np.array(measured[1:]).T
        rates[name] = {
            "pictures_per_second": _rate(len(pixels[name]) / image),
            "texts_per_second": _rate(len(batch) / text),
            "query_ms": _rate(1000 * single),
        }
    return rates


def _first(pictures: Sequence[Any]) -> list[Any]:
    return [pictures[at % len(pictures)] for at in range(RUN_PICTURES)]


def _timed(encode: Callable[[Any], Float32], batch: Sequence[Any]) -> float:
    started = time.perf_counter()
    encode(batch)
    return time.perf_counter() - started


def _rate(values: Any) -> Rate:
    return Rate(float(np.median(values)), float(values.min()), float(values.max()), len(values))
