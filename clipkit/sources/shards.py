"""WebDataset shards: tars in which a picture, a .txt and a .json share a name, as img2dataset writes.

Read as a stream from the first byte to the last: nothing is unpacked, so no name inside can lead
anywhere, and a shard larger than memory costs one picture's room at a time.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES, Limits
from clipkit.records import SPLITS, parse_object
from clipkit.sources.rows import (
    Broken,
    Options,
    RawPair,
    Source,
    split_name,
    split_of_file,
    strings,
)

_LARGEST_TEXT = 16 * 2**20  # bytes
# img2dataset's notes on how it fetched a picture say nothing of what it shows.
_NOTES = {"key", "status", "error_message", "exif", "md5", "sha256", "width", "height"}
_ORDER: dict[str | None, int] = {split: n for n, split in enumerate(SPLITS)}
_TEXTS = ("txt", "text", "caption")


def open_shards(path: Path, options: Options) -> Source:
    """A .tar, a folder of them (splits by the folders' or files' names), or a glob."""
    files = shard_files(path)
    if not files:
        raise DatasetError(f"no tar files at {path}; give a .tar, a folder of them or a pattern")
    largest = int(Limits().max_megabytes * 1e6)

    def pairs() -> Iterator[RawPair | Broken]:
        for file in files:
            split = split_name(file.parent.name) or split_of_file(file.stem) or options.split
            try:
                for key, parts in _samples(file, largest):
                    yield _pair(f"{file.name}: {key}", parts, split, options)
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Broken(file.name, "damaged-shard", f"{error}; what is behind this is lost")

    says = f"WebDataset, {len(files):,} shard{'s' * (len(files) > 1)}, captions from .json or .txt"
    return Source("webdataset", str(path), says, _count(files), pairs)


def shard_files(path: Path) -> list[Path]:
    """The tars that `path` means, in the order of their names."""
    if path.is_dir():
        found = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
        return sorted(found, key=lambda file: _ORDER.get(split_name(file.parent.name), -1))
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".tar"))


def _samples(file: Path, largest: int) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, {suffix: content}) of each run of members that share a key; None: too large to be read."""
    key, parts = "", dict[str, bytes | None]()
    with tarfile.open(file, "r|*") as tar:
        for member in tar:
            if not member.isreg():
                continue
            # WebDataset: the key ends at the first dot of the last name
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if parts and folder + slash + stem != key:
                yield key, parts
                parts = {}
            key = folder + slash + stem
            body = tar.extractfile(member)  # a view of the stream; writes nothing
            limit = largest if f".{suffix.lower()}" in SUFFIXES else _LARGEST_TEXT
            fits = body is not None and member.size <= limit
            parts[suffix.lower()] = body.read() if body is not None and fits else None
    if parts:
        yield key, parts


def _pair(
    row: str, parts: dict[str, bytes | None], split: str | None, options: Options
) -> RawPair | Broken:
    suffix = next((name for name in parts if f".{name}" in SUFFIXES), None)
    if suffix is None:
        return Broken(row, "no-picture", f"only {', '.join(sorted(parts))} under this name")
    data = parts[suffix]
    if data is None:
        return Broken(row, "too-large", "the picture's file is beyond 256 MB")
    fields: dict[str, Any] = {}
    if body := parts.get("json"):
        try:
            fields = parse_object(body)
        except ValueError as error:
            return Broken(row, "not-json", f"its .json: {error}")
    captions: tuple[str, ...] = ()
    for name in options.caption_columns or ("captions", "caption"):
        captions = captions or strings(fields.pop(name, None)) or ()
    text = next((body for name in _TEXTS if (body := parts.get(name))), None)
    if not captions and text is not None:
        captions = tuple(text.decode("utf-8-sig", "replace").splitlines())
    known = {"captions", "caption", "split", *_NOTES}
    meta = {key: value for key, value in fields.items() if key not in known and value is not None}
    said = fields.get("split")
    return RawPair(data, row, row, captions, split_name(said) or split, meta)


def _count(files: list[Path]) -> int | None:
    """Pictures, told from the members' headers; None if a tar is compressed or damaged."""
    total = 0
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                total += sum(Path(name).suffix.lower() in SUFFIXES for name in tar.getnames())
        except (tarfile.TarError, OSError, EOFError):
            return None
    return total
