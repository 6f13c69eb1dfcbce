"""Any data set of the `datasets` library: saved to disk, Parquet files, or on the Hugging Face hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.errors import DatasetError
from clipkit.hub import asking_the_hub
from clipkit.sources.columns import choose
from clipkit.sources.json_files import object_pairs
from clipkit.sources.rows import Broken, Options, RawPair, Source, split_name

_PREFIX = "hf:"


def open_hub(path: Path, options: Options, *, name: str | None = None) -> Source:
    """`name` "hf:ORG/NAME" or "hf:ORG/NAME/CONFIG" is streamed from the hub; else `path` is local.

    The picture's column is the one whose feature is an image. DatasetError in one sentence if the hub
    cannot be reached or knows no such data set.
    """
    import datasets

    loaded = _from_hub(name) if name else _from_disk(path)
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    first = next(iter(splits.values()))
    if first.features is None:  # some streams tell theirs only with the rows
        splits = {key: rows._resolve_features() for key, rows in splits.items()}
        first = next(iter(splits.values()))
    pictures = [key for key, kind in first.features.items() if isinstance(kind, datasets.Image)]
    if options.image_column is None and pictures:
        options = replace(options, image_column=pictures[0])
    raw = {key: _undecoded(rows, datasets.Image(decode=False)) for key, rows in splits.items()}
    labels = {k: f.names for k, f in first.features.items() if isinstance(f, datasets.ClassLabel)}
    head = itertools.islice(iter(next(iter(raw.values()))), 50)
    sample = [_shown(_with_names(row, labels)) for row in head]
    if not sample:
        raise DatasetError(f"data set {name or path} has no rows")
    columns = choose(sample, options, where=f"data set {name or path}")
    counts = [getattr(rows, "num_rows", None) for rows in splits.values()]

    def pairs() -> Iterator[RawPair | Broken]:
        for key, rows in raw.items():
            named = (_with_names(row, labels) for row in rows)
            numbered = ((f"{key or 'row'} {n}", row) for n, row in enumerate(named))
            yield from object_pairs(numbered, columns, _pair, split_name(key) or options.split)

    listed = ", ".join(key or "one split" for key in splits)
    total = None if None in counts else sum(count or 0 for count in counts)
    return Source("hf", name or str(path), f"data set ({listed}): {columns}", total, pairs)


def _from_hub(name: str) -> Any:
    import datasets

    parts = name.removeprefix(_PREFIX).split("/")
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
    try:
        with asking_the_hub():
            return datasets.load_dataset(repository, config, streaming=True)
    except Exception as error:  # the library lets every layer's own errors through
        raise DatasetError(
            f"data set {name} cannot be opened from the hub ({_first_line(error)}); check its name "
            "and the network, or give a local folder, Parquet file or shards instead"
        ) from error


def _from_disk(path: Path) -> Any:
    import datasets

    try:
        if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(path))
        if path.is_file():
            return datasets.load_dataset(
                path.suffix[1:].lower(), data_files=str(path), streaming=True
            )
        return datasets.load_dataset(str(path), streaming=True)
    except Exception as error:
        raise DatasetError(
            f"{path} is no data set that the datasets library opens ({_first_line(error)})"
        ) from error


def _undecoded(rows: Any, image: Any) -> Any:
    """The rows with pictures as bytes or paths: decoding is clipkit's part."""
    for key, kind in rows.features.items():
        if isinstance(kind, type(image)):
            rows = rows.cast_column(key, image)
    return rows


def _pair(
    picture: object,
    row: str,
    captions: tuple[str, ...],
    split: str | None,
    meta: Mapping[str, Any],
) -> RawPair | Broken:
    if isinstance(picture, bytes):
        picture = {"bytes": picture}
    if isinstance(picture, str):
        picture = {"path": picture}
    if not isinstance(picture, dict) or not (picture.get("bytes") or picture.get("path")):
        return Broken(row, "no-picture", f"the row holds no picture: {picture!r:.80}")
    name = Path(picture.get("path") or row).name
    plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float | bool | list)}
    data = picture.get("bytes")
    return RawPair(data if data else Path(picture["path"]), name, row, captions, split, plain)


def _with_names(row: Mapping[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with its classes by name; -1 stands for an unknown one."""
    named = dict(row)
    for key, names in labels.items():
        number = named.get(key)
        named[key] = names[number] if isinstance(number, int) and number >= 0 else None
    return named


def _shown(row: Mapping[str, Any]) -> dict[str, object]:
    """What the choice of columns looks at."""
    shown: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            value = value.get("path") or "picture.jpg"
        shown[key] = value[0] if isinstance(value, list) and value else value
    return shown


def _first_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {said[:200]}"
