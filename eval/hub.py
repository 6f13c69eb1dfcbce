"""Data of the Hugging Face hub: known benchmarks by name, and any dataset by its repository.

Benchmarks are the repositories that clip-benchmark keeps (`clip-benchmark/wds_...`): shards of the
test split, downloaded once into the hub's cache and read there, with the class names they carry.
Any other dataset goes through the `datasets` library. No code of a repository is ever run.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit import images
from clipkit.errors import ClipkitError, DatasetError, ImageError, InputError
from clipkit.hub import asking_the_hub
from clipkit.records import Texts
from eval.shards import read_shards
from eval.source import Label, Source, choose_split, read_fields

log = logging.getLogger(__name__)

# github.com/LAION-AI/CLIP_benchmark, benchmark/webdatasets.txt
_VTAB = """caltech101 cifar10 cifar100 clevr_closest_object_distance clevr_count_all
    diabetic_retinopathy dmlab dsprites_label_orientation dsprites_label_x_position
    dsprites_label_y_position dtd eurosat flowers kitti_closest_vehicle_distance pcam pets resisc45
    smallnorb_label_azimuth smallnorb_label_elevation svhn""".split()
_OTHERS = """imagenet1k imagenetv2 imagenet_sketch imagenet-a imagenet-r imagenet-o objectnet fer2013
    voc2007 voc2007_multilabel sun397 cars fgvc_aircraft mnist stl10 gtsrb country211 renderedsst2
    flickr8k flickr30k mscoco_captions""".split()
SHARDED = "clip-benchmark/wds_"
BENCHMARKS = {name: SHARDED + name for name in _OTHERS}
BENCHMARKS |= {name: f"{SHARDED}vtab-{name}" for name in _VTAB}

_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")
_CAPTION_COLUMN = re.compile(r"(captions?|texts?|txt|sentences?)(_?\d+)?")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")


def open_benchmark(name: str, split: str | None) -> Source:
    """A benchmark by its name, such as "cifar10" or "wds/vtab/cifar10". InputError: not known, or
    not to be had."""
    repository = BENCHMARKS.get(_bare(name))
    if repository is None:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"data {name!r} is neither a path that exists nor a known benchmark{hint}; name a folder, "
            "a JSONL file, WebDataset shards, hf:ORG/NAME or one of "
            f"{', '.join(sorted(BENCHMARKS)[:6])}, ..."
        )
    return _download_shards(repository, split or "test", asked=name)


def open_dataset(name: str, split: str | None) -> Source:
    """ "ORG/NAME" or "ORG/NAME:CONFIG" of the hub, or a local folder that `datasets` can read."""
    repository, _, config = name.partition(":")
    if repository.startswith(SHARDED):
        return _download_shards(repository, split or "test", asked=f"hf:{name}")
    with _reaching(f"hf:{name}"), _quiet():
        import datasets

        log.info("datasets are kept in %s", datasets.config.HF_DATASETS_CACHE)
        available = datasets.get_dataset_split_names(repository, config or None)
        chosen = choose_split(available, split, where=f"hf:{name}")
        rows = datasets.load_dataset(repository, config or None, split=chosen)
        source = _source(rows, f"hf:{name}")
        return replace(source, split=chosen)


@contextlib.contextmanager
def _reaching(asked: str) -> Iterator[None]:
    """Whatever the hub's clients raise, in one sentence with what to do instead."""
    try:
        import datasets  # noqa: F401  so that it hears of a hub that is not there

        with asking_the_hub():
            yield
    except ClipkitError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].partition(". ")[0][:200]
        repository = BENCHMARKS.get(_bare(asked), asked.removeprefix("hf:").partition(":")[0])
        as_data = "FOLDER" if repository.startswith(SHARDED) else "hf:FOLDER"
        raise InputError(
            f"data {asked!r} could not be reached ({reason}); the cache is {_cache()}; on a machine "
            "with a network run "
            f"`hf download {repository} --repo-type dataset --local-dir FOLDER`, bring the folder "
            f"here and give --data {as_data}"
        ) from error


def _cache() -> str:
    """Where downloads are kept."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _bare(name: str) -> str:
    """clip-benchmark's own "wds/vtab/cifar10" is cifar10."""
    return name.removeprefix("wds/").removeprefix("vtab/")


def _download_shards(repository: str, split: str, *, asked: str) -> Source:
    """The shards of one split and the class names, from the hub or its local cache."""
    with _reaching(asked), _quiet():
        from huggingface_hub import constants, snapshot_download

        log.info("%s is kept in %s", repository, constants.HF_HUB_CACHE)
        patterns = [f"{split}/*.tar", "*.txt"]
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    tars = sorted(folder.glob(f"{split}/*.tar"))
    if not tars:
        raise InputError(f"{asked} has no split {split!r} here; try --split test or train")
    return read_shards(tars, split=split)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: whoever called shows progress, or nothing."""
    import datasets
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown, hub_shown = not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if hub_shown:
            enable_progress_bars()


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The image column of a `datasets` table, not decoded."""

    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> bytes:
        cell = self.table[row][self.table.column_names[0]]
        if cell is None:
            raise ImageError(f"row {row} has no picture", reason="empty")
        if cell.get("bytes") is not None:
            content: bytes = cell["bytes"]
            images.Limits().check_bytes(len(content))
            return content
        return images.read_bytes(Path(cell["path"]))


def _source(table: Any, asked: str) -> Source:
    """The columns that hold pictures, captions, tags and classes, told by type and name."""
    import datasets

    features = table.features
    pictured = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not pictured:
        raise DatasetError(f"{asked} has no column of pictures; it has {', '.join(features)}")
    image = next((name for name in _IMAGE_COLUMNS if name in pictured), pictured[0])
    pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    captions = [name for name in features if _CAPTION_COLUMN.fullmatch(name)]
    captions = [name for name in captions if _is_text(features[name])]
    tags = [name for name in ("keywords", "tags") if name in features and _is_text(features[name])]
    words = table.select_columns([*captions, *tags]) if captions or tags else None
    label = _label_column(features)
    kind = _inner(features[label]) if label else None
    return Source(
        _Rows(pictures),
        texts=None if words is None else [_texts(row, captions, tags) for row in words],
        labels=None if label is None else [_label(value) for value in table[label][:]],
        classes=tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None,
    )


def _inner(kind: Any) -> Any:
    """What a list column lists; a plain column's own type."""
    return getattr(kind, "feature", kind)


def _is_text(kind: Any) -> bool:
    return getattr(_inner(kind), "dtype", None) in ("string", "large_string")


def _label_column(features: Any) -> str | None:
    """The first column of classes: by its type, else by its name."""
    import datasets

    for name in (*(n for n in _LABEL_COLUMNS if n in features), *features):
        if isinstance(_inner(features[name]), datasets.ClassLabel):
            return str(name)
    kinds = {name: str(getattr(_inner(features[name]), "dtype", "")) for name in features}
    return next(
        (n for n in _LABEL_COLUMNS if re.match(r"u?int|string", kinds.get(n, ""))),
        None,
    )


def _texts(row: Any, captions: Sequence[str], tags: Sequence[str]) -> Texts:
    """One row's captions and tags, whichever columns they stand in."""
    flat: list[str] = []
    for name in captions:
        value = row[name] or []
        if isinstance(value, str):  # a shard's .txt has a caption a line
            value = value.splitlines() if name == "txt" else [value]
        flat += value
    said, _ = read_fields({"captions": flat, **{name: row[name] for name in tags}})
    return said


def _label(value: Any) -> Label | None:
    return tuple(value) if isinstance(value, list) else value
