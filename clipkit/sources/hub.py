"""Datasets of the `datasets` library (saved, Parquet, on the Hugging Face hub), and known benchmarks.

Benchmarks are the repositories that clip-benchmark keeps (`clip-benchmark/wds_...`): shards, downloaded
once into the hub's cache and read there, with their class names. Evaluation takes one split, a build
takes both. No code of a repository is ever run.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.errors import ClipkitError, DatasetError, ImageError, InputError
from clipkit.hub import asking_the_hub
from clipkit.images import Limits, read_bytes
from clipkit.sources.columns import SAMPLE, choose
from clipkit.sources.folders import choose_split
from clipkit.sources.rows import (
    Broken,
    Options,
    Picture,
    PictureBytes,
    PictureFile,
    Row,
    Source,
    split_name,
)
from clipkit.sources.shards import open_shards

log = logging.getLogger(__name__)

SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk
_LIMITS = Limits()
_SHARDED = "clip-benchmark/wds_"
# github.com/LAION-AI/CLIP_benchmark, benchmark/webdatasets.txt
_VTAB = """caltech101 cifar10 cifar100 clevr_closest_object_distance clevr_count_all
    diabetic_retinopathy dmlab dsprites_label_orientation dsprites_label_x_position
    dsprites_label_y_position dtd eurosat flowers kitti_closest_vehicle_distance pcam pets resisc45
    smallnorb_label_azimuth smallnorb_label_elevation svhn""".split()
_OTHERS = """imagenet1k imagenetv2 imagenet_sketch imagenet-a imagenet-r imagenet-o objectnet fer2013
    voc2007 voc2007_multilabel sun397 cars fgvc_aircraft mnist stl10 gtsrb country211 renderedsst2
    flickr8k flickr30k mscoco_captions""".split()
_BENCHMARKS = {name: _SHARDED + name for name in _OTHERS}
_BENCHMARKS |= {name: f"{_SHARDED}vtab-{name}" for name in _VTAB}


@dataclass(frozen=True, slots=True, eq=False)
class TableCell:
    """A picture in a row of an Arrow table of the `datasets` library, whose only column it is."""

    table: Any
    row: int
    path: None = None

    def read(self, limits: Limits = _LIMITS) -> bytes:
        cell = self.table[self.row][self.table.column_names[0]]
        if cell is None:
            raise ImageError(f"row {self.row} has no picture", reason="empty")
        if cell.get("bytes") is not None:
            content: bytes = cell["bytes"]
            limits.check_bytes(len(content))
            return content
        return read_bytes(Path(cell["path"]), limits=limits)


def open_hub(path: Path, options: Options, *, name: str | None = None) -> Source:
    """Open "hf:ORG/NAME" or "hf:ORG/NAME/CONFIG" (`name`), or else the local dataset at `path`.

    It is streamed, or with options.indexed one split is loaded into the library's cache. The picture's
    column is the one whose type is an image. Raises DatasetError if the dataset cannot be opened.
    """
    where = name or str(path)
    repository, config = _repository(name) if name else (str(path), None)
    if repository.startswith(_SHARDED) and options.indexed:
        return _download_shards(repository, options, name=where)
    with _reaching(where, repository if name else None), _quiet():
        splits, loaded = _load(repository, config, options, where)
    return _rows_of(splits, options, where, loaded)


def open_benchmark(name: str, options: Options) -> Source | None:
    """Open a benchmark by its name, such as "cifar10" or "wds/vtab/cifar10"; None if unknown."""
    repository = _BENCHMARKS.get(name.removeprefix("wds/").removeprefix("vtab/"))
    return None if repository is None else _download_shards(repository, options, name=name)


def similar_benchmark(name: str) -> str | None:
    """Return the known benchmark whose name is most similar, if any is."""
    return next(iter(difflib.get_close_matches(name, _BENCHMARKS, n=1, cutoff=0.6)), None)


def _repository(name: str) -> tuple[str, str | None]:
    """ "hf:ORG/NAME/CONFIG" -> ("ORG/NAME", "CONFIG"); "hf:ORG/NAME:CONFIG" is understood, too."""
    parts = name.removeprefix("hf:").replace(":", "/", 1).split("/", 2)
    if not all(parts):
        raise DatasetError(f"{name!r} names no dataset; write hf:ORG/NAME or hf:ORG/NAME/CONFIG")
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def _load(
    repository: str, config: str | None, options: Options, where: str
) -> tuple[dict[str, Any], str | None]:
    """Return the rows of each split, and the split's name if only one was loaded."""
    import datasets

    path = Path(repository)
    splits: dict[str, Any] = {}
    builder, files = repository, {}
    if path.is_dir() and any((path / file).is_file() for file in SAVED):
        saved = datasets.load_from_disk(repository)
        splits = dict(saved) if isinstance(saved, dict) else {"": saved}
    elif path.is_file():
        builder, files = path.suffix[1:].lower(), {"data_files": repository}
    if not options.indexed:
        return splits or dict(datasets.load_dataset(builder, config, streaming=True, **files)), None
    if list(splits) == [""]:
        return splits, None
    log.info("datasets are kept in %s", datasets.config.HF_DATASETS_CACHE)
    available = list(splits) or datasets.get_dataset_split_names(builder, config, **files)
    split = choose_split(available, options.only, where=where)
    if not splits:
        splits = {split: datasets.load_dataset(builder, config, split=split, **files)}
    return {split: splits[split]}, split


def _rows_of(splits: dict[str, Any], options: Options, where: str, loaded: str | None) -> Source:
    import datasets

    first = next(iter(splits.values()))
    if first.features is None:  # some streams learn their columns only from the rows
        splits = {key: rows._resolve_features() for key, rows in splits.items()}
        first = next(iter(splits.values()))
    pictured = [key for key, kind in first.features.items() if isinstance(kind, datasets.Image)]
    if options.image_column is None and pictured:
        options = replace(options, image_column=pictured[0])
    undecoded = {key: _undecoded(rows) for key, rows in splits.items()}
    names = _class_columns(first.features)
    head = itertools.islice(iter(next(iter(undecoded.values()))), SAMPLE if options.indexed else 50)
    sample = [_with_names(row, names) for row in head]
    if not sample:
        raise DatasetError(f"dataset {where} has no rows")
    columns = choose(sample, options, where=f"dataset {where}")
    if names:  # a column whose type is a class is the label, whatever its name
        columns = replace(columns, label=next(iter(names)))
    counts = [getattr(rows, "num_rows", None) for rows in splits.values()]

    def rows() -> Iterator[Row | Broken]:
        for key, table in undecoded.items():
            split = loaded or split_name(key) or options.split
            place = "row" if loaded or not key else key
            for n, row in enumerate(_indexed(table, columns.image) if options.indexed else table):
                made = columns.row(f"{place} {n}", _with_names(row, names), _row, split)
                if isinstance(made, Row) and columns.label in names:
                    number = row[columns.label]
                    made = replace(made, label=None if number == -1 else number)
                yield made

    listed = ", ".join(key or "one split" for key in splits)
    total = None if None in counts else sum(count or 0 for count in counts)
    description = f"dataset ({listed}): {columns}"
    classes = tuple(names[columns.label]) if columns.label in names else None
    return Source("hf", where, description, total, rows, classes, loaded)


def _indexed(table: Any, image: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table, the picture in each as a TableCell that is not read yet."""
    cells = table.select_columns([image])
    others = [name for name in table.column_names if name != image]
    rows: Any = table.select_columns(others) if others else itertools.repeat({}, len(table))
    for n, row in enumerate(rows):
        yield {**row, image: TableCell(cells, n)}


def _undecoded(rows: Any) -> Any:
    """Return the rows with pictures as bytes or paths: `clipkit.images` decodes them."""
    import datasets

    for key, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(key, datasets.Image(decode=False))
    return rows


def _row(
    cell: object,
    place: str,
    captions: tuple[str, ...],
    label: object,
    split: str | None,
    meta: Mapping[str, Any],
) -> Row | Broken:
    plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float | bool | list)}
    if isinstance(cell, TableCell):
        return Row(cell, place, place, captions, label, split, meta=plain)
    if isinstance(cell, bytes):
        cell = {"bytes": cell}
    if isinstance(cell, str):
        cell = {"path": cell}
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        return Broken(place, "no-picture", f"the row holds no picture: {cell!r:.80}")
    name = Path(cell.get("path") or place).name
    data = cell.get("bytes")
    picture: Picture = PictureBytes(data) if data else PictureFile(Path(cell["path"]))
    return Row(picture, name, place, captions, label, split, meta=plain)


def _class_columns(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of each column that holds a class or a list of classes."""
    import datasets

    inner = {key: getattr(kind, "feature", kind) for key, kind in features.items()}
    return {k: kind.names for k, kind in inner.items() if isinstance(kind, datasets.ClassLabel)}


def _with_names(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the row with its classes by name; -1 stands for an unknown one."""

    def name(key: str, number: object) -> str | None:
        return names[key][number] if isinstance(number, int) and number >= 0 else None

    return dict(row) | {
        key: [name(key, n) for n in row[key]] if isinstance(row[key], list) else name(key, row[key])
        for key in names
    }


@contextmanager
def _reaching(where: str, repository: str | None) -> Iterator[None]:
    """Turn whatever the hub's clients raise into one DatasetError with a remedy."""
    import datasets  # noqa: F401  imported first, so that asking_the_hub can put it offline

    try:
        with asking_the_hub():
            yield
    except ClipkitError:
        raise
    except Exception as error:  # the clients let every layer's own errors through
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = re.split(r"\. |\.$", lines[0])[0][:200]
        if repository is None:
            raise DatasetError(
                f"{where} is no dataset that the datasets library opens ({reason})"
            ) from error
        from huggingface_hub import constants

        raise DatasetError(
            f"{where} could not be reached ({reason}); the cache is {constants.HF_HUB_CACHE}; on a "
            f"machine with a network run `hf download {repository} --repo-type dataset --local-dir "
            "FOLDER`, copy the folder to this machine and name it instead"
        ) from error


def _download_shards(repository: str, options: Options, *, name: str) -> Source:
    """Open shards and class names from the hub or its local cache: one split, as evaluation needs it,
    with options.indexed or options.only; else train and test, as far as they are there."""
    split = options.only or "test"
    splits = (split,) if options.indexed or options.only else ("train", "test")
    with _reaching(name, repository), _quiet():
        from huggingface_hub import constants, snapshot_download

        log.info("%s is kept in %s", repository, constants.HF_HUB_CACHE)
        patterns = [*(f"{split}/*.tar" for split in splits), "*.txt"]
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    if not any(any(folder.glob(f"{split}/*.tar")) for split in splits):
        raise InputError(f"{name} has no split {split!r}; try test or train")
    if len(splits) > 1:
        return replace(open_shards(folder, options), path=name)
    return replace(open_shards(folder / split, options), path=name, split=split)


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch the libraries' progress bars off: the caller shows progress, or nothing."""
    import datasets
    from huggingface_hub import utils

    shown = [bars for bars in (datasets, utils) if not bars.are_progress_bars_disabled()]
    for bars in shown:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bars()
