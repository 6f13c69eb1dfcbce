"""WebDataset shards: tars of samples whose files share a name up to the first dot.

    000000012.jpg  000000012.txt  000000012.json      as img2dataset and `clipkit data build` write them
    s0000012.webp  s0000012.cls                       as clip-benchmark's datasets hold them

Nothing is unpacked, so no name inside can lead anywhere. Of an uncompressed tar only headers and small
files are read: a picture is a `TarMember`, read from its offset when it is needed. A compressed tar is
a stream, and holds one picture in memory at a time.
"""

from __future__ import annotations

import glob
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES, Limits
from clipkit.records import CAPTION_FIELDS, TAG_FIELDS, parse_object
from clipkit.sources.rows import (
    ORDER,
    Broken,
    Options,
    Picture,
    PictureBytes,
    Row,
    Source,
    TarMember,
    split_name,
    split_of_file,
    strings,
    tag_list,
)

_CLASS_NAMES = "classnames.txt"
_MAX_TEXT = 16 * 2**20  # bytes
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz
# img2dataset's notes on how it fetched a picture say nothing of what the picture shows.
_NOTES = {"key", "status", "error_message", "exif", "md5", "sha256", "width", "height"}
_TEXTS = ("txt", "text", "caption")


def open_shards(path: Path, options: Options) -> Source:
    """Open a .tar, a folder of them (splits by the names of folders or files), or a glob pattern.

    Raises DatasetError if there are none, or if options.indexed and one is compressed.
    """
    files = shard_files(path)
    if not files:
        raise DatasetError(f"no tar files at {path}; give a .tar, a folder of them or a pattern")
    if options.indexed:
        for file in files:
            if _is_compressed(file):
                raise DatasetError(
                    f"{file} is not an uncompressed tar, so its pictures cannot be read one by one; "
                    "unpack it with gunzip, bunzip2 or unxz"
                )

    def rows() -> Iterator[Row | Broken]:
        for file in files:
            split = split_name(file.parent.name) or split_of_file(file.stem) or options.split
            try:
                for key, parts in _samples(file):
                    yield _row(file, key, parts, split, options)
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Broken(file.name, "damaged-shard", f"not a whole tar ({error})")

    plural = "s" * (len(files) > 1)
    description = f"WebDataset, {len(files):,} shard{plural}, captions from .json or .txt"
    total = None if options.indexed else _count(files)
    return Source("webdataset", str(path), description, total, rows, class_names(files))


def shard_files(path: Path) -> list[Path]:
    """Return the tars that `path` means, in the order of their splits and names."""
    if path.is_dir():
        files = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
        return sorted(files, key=lambda file: ORDER.get(split_name(file.parent.name), -1))
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".tar"))


def class_names(files: Sequence[Path]) -> tuple[str, ...] | None:
    """Return the lines of a classnames.txt beside the shards or one folder up; None without one."""
    folders = (files[0].parent, files[0].parent.parent)
    path = next((f / _CLASS_NAMES for f in folders if (f / _CLASS_NAMES).is_file()), None)
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the class names in {path}: {error}") from None
    return tuple(line.strip() for line in lines)


def _samples(file: Path) -> Iterator[tuple[str, dict[str, bytes | Picture | None]]]:
    """Yield (key, {suffix: content}) for each run of files that share a key; None: too large."""
    key, parts = "", dict[str, bytes | Picture | None]()
    largest = int(Limits().max_megabytes * 1e6)
    compressed = _is_compressed(file)
    with tarfile.open(file, "r|*" if compressed else "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")  # WebDataset: the key ends at the first dot
            if not (member.isreg() and stem and suffix):
                continue
            if parts and folder + slash + stem != key:
                yield key, parts
                parts = {}
            key = folder + slash + stem
            suffix = suffix.rpartition(".")[2].lower()
            pictured = f".{suffix}" in SUFFIXES
            if member.size > (largest if pictured else _MAX_TEXT):
                parts[suffix] = None
            elif pictured and not compressed:
                parts[suffix] = TarMember(file, member.offset_data, member.size)
            else:
                body = tar.extractfile(member)  # a view; writes nothing
                data = b"" if body is None else body.read()
                parts[suffix] = PictureBytes(data) if pictured else data
    if parts:
        yield key, parts


def _row(
    file: Path,
    key: str,
    parts: dict[str, bytes | Picture | None],
    split: str | None,
    options: Options,
) -> Row | Broken:
    place = f"{file.name}: {key}"
    suffix = next((name for name in parts if f".{name}" in SUFFIXES), None)
    if suffix is None:
        return Broken(place, "no-picture", f"only {', '.join(sorted(parts))} under this name")
    picture = parts[suffix]
    if picture is None or isinstance(picture, bytes):
        return Broken(place, "too-large", "the picture's file is larger than 256 MB")
    texts = {name: body for name, body in parts.items() if isinstance(body, bytes)}
    fields: dict[str, Any] = {}
    if "json" in texts:
        try:
            fields = parse_object(texts["json"])
        except ValueError as error:
            return Broken(place, "not-json", f"its .json: {error}")
    try:
        label = _label(texts, fields)
    except ValueError as error:
        return Broken(place, "wrong-type", f"its .cls or .npy: {error}")
    captions = _captions(texts, fields, options.caption_columns)
    used = {*CAPTION_FIELDS[:2], *options.caption_columns, *TAG_FIELDS, "split", *_NOTES}
    meta = {key: value for key, value in fields.items() if key not in used and value is not None}
    if tags := [tag for name in TAG_FIELDS for tag in tag_list(fields.get(name))]:
        meta["keywords"] = tags
    split = split_name(fields.get("split")) or split
    image_id = fields.get("image_id") if isinstance(fields.get("image_id"), str) else None
    return Row(picture, f"{file.stem}/{key}", place, captions, label, split, image_id, meta)


def _captions(
    texts: dict[str, bytes], fields: dict[str, Any], columns: Sequence[str]
) -> tuple[str, ...]:
    """Return the captions of one sample, each once: writers repeat the first one in .txt and .json."""
    if named := tuple(text for name in columns for text in strings(fields.get(name)) or ()):
        return named
    if listed := strings(fields.get("captions")):
        return listed
    body = next((texts[name] for name in _TEXTS if name in texts), b"")
    if lines := body.decode("utf-8-sig", "replace").splitlines():
        return tuple(lines)
    return next((text for name in CAPTION_FIELDS if (text := strings(fields.get(name)))), ())


def _label(texts: dict[str, bytes], fields: dict[str, Any]) -> object:
    """Return the class of one sample. Raises ValueError if its file cannot be read."""
    if "cls" in texts:
        text = texts["cls"].decode().strip()
        return int(text) if text.lstrip("-").isdigit() else text
    if "npy" in texts:  # clip-benchmark's multi-label sets: a 0/1 vector over the classes
        vector = np.load(io.BytesIO(texts["npy"]), allow_pickle=False)
        return [int(at) for at in np.flatnonzero(vector > 0)]
    label = fields.get("labels", fields.get("label"))
    return None if label == "" else label


def _is_compressed(file: Path) -> bool:
    with file.open("rb") as start:
        return start.read(6).startswith(_MAGIC)


def _count(files: Sequence[Path]) -> int | None:
    """Return the number of pictures by the members' headers; None if a tar is compressed or damaged."""
    total = 0
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                total += sum(Path(name).suffix.lower() in SUFFIXES for name in tar.getnames())
        except (tarfile.TarError, OSError, EOFError):
            return None
    return total
