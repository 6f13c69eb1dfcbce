"""Pictures and their words as files tell them: dataset folders, and captions beside any picture.

A dataset is a Hugging Face `imagefolder`: `train/`, `validation/` and `test/`, each with its pictures
and a `metadata.jsonl` of one JSON object a line: `file_name` and `image_id`, captions, and any other
columns (kept in `meta`). Captions stand in `captions`, `caption` or `text`, tags in `keywords` or
`tags`; a list of strings or one string, which for tags is split at commas.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import reprlib
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO

from clipkit.errors import DatasetError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
METADATA = "metadata.jsonl"
MAX_LINE = 16 * 2**20  # bytes; a longer line is no metadata
MAX_SIDECAR = 64 * 2**10  # bytes
_CAPTION_FIELDS = ("captions", "caption", "text")
_TAG_FIELDS = ("keywords", "tags")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    image_id: str  # hash of the picture's content
    path: str  # POSIX, relative to the dataset's folder: "train/000001.jpg"
    captions: tuple[str, ...]
    split: str | None
    meta: Mapping[str, Any]  # the columns that are none of the above


@dataclass(frozen=True, slots=True)
class CaptionPair:
    image_id: str
    caption: str


@dataclass(frozen=True, slots=True)
class Texts:
    """What is written about a picture; no empty and no repeated entries."""

    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def read_dataset(folder: Path, split: str | None = None) -> Iterator[ImageRecord]:
    """The records of one split, or of all, in the order of the files, a line at a time.

    DatasetError: at once for a folder or split that is not there; while reading for a bad line, with
    its file and number. Whether the pictures exist is not looked at.
    """
    folder = Path(folder)
    present = [name for name in SPLITS if (folder / name / METADATA).is_file()]
    if not present:
        raise DatasetError(
            f"{folder} is no dataset: none of train/, validation/, test/ holds a {METADATA}"
        )
    if split is not None and split not in present:
        raise DatasetError(f"dataset {folder} has no split {split!r}; it has {', '.join(present)}")
    return _records(folder, [split] if split else present)


def _records(folder: Path, splits: list[str]) -> Iterator[ImageRecord]:
    for split in splits:
        path = folder / split / METADATA
        try:
            with path.open("rb") as file:
                for number, line in _lines(file):
                    try:
                        yield _record(parse_object(line), split)
                    except ValueError as error:
                        raise DatasetError(f"{path}, line {number}: {error}") from None
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None


def _record(fields: dict[str, Any], split: str) -> ImageRecord:
    image_id = fields.get("image_id")
    if not isinstance(image_id, str) or not image_id:
        raise ValueError(
            f"image_id must be a string of at least one character, got {reprlib.repr(image_id)}"
        )
    used = {"file_name", "image_id", *_CAPTION_FIELDS}
    meta = {key: value for key, value in fields.items() if key not in used}
    path = f"{split}/{_file_name(fields)}"
    return ImageRecord(image_id, path, _captions(fields), split, MappingProxyType(meta))


class FolderCaptions:
    """Captions and tags that lie beside pictures in any folder; thread-safe.

    From all of: the line for the picture in its folder's `metadata.jsonl`; a text file of one caption
    a line, `NAME.txt` or `NAME.jpg.txt`; a JSON object with metadata.jsonl's fields, `NAME.json` or
    `NAME.jpg.json`. Sidecars count up to 64 kB. What is broken is no fault of the picture: it is
    logged and left out. Each metadata.jsonl is parsed once; make a new object to see changes.
    """

    _KEPT = 8  # parsed folders; a walk is in one or two at a time

    def __init__(self) -> None:
        self._folders: OrderedDict[Path, dict[str, Texts]] = OrderedDict()
        self._mutex = threading.Lock()

    def for_picture(self, path: Path) -> Texts:
        """The texts of the picture at `path`, which need not exist; empty if there are none."""
        found = [self._folder(path.parent).get(_same_form(path.name), Texts())]
        for name in dict.fromkeys((path.stem, path.name)):
            found.append(_text_sidecar(path.with_name(f"{name}.txt")))
            found.append(_json_sidecar(path.with_name(f"{name}.json")))
        return Texts(
            tuple(dict.fromkeys(caption for texts in found for caption in texts.captions)),
            tuple(dict.fromkeys(tag for texts in found for tag in texts.tags)),
        )

    def _folder(self, folder: Path) -> dict[str, Texts]:
        with self._mutex:
            if folder not in self._folders:
                self._folders[folder] = _folder_texts(folder / METADATA)
                if len(self._folders) > self._KEPT:
                    self._folders.popitem(last=False)
            self._folders.move_to_end(folder)
            return self._folders[folder]


def _folder_texts(path: Path) -> dict[str, Texts]:
    found: dict[str, Texts] = {}
    problems: list[str] = []
    try:
        if _is_file(path):
            with path.open("rb") as file:
                for number, line in _lines(file):
                    try:
                        fields = parse_object(line)
                        found[_same_form(_file_name(fields))] = _texts(fields)
                    except ValueError as error:
                        problems.append(f"line {number}: {error}")
    except OSError as error:
        problems.append(str(error))
    if problems:
        log.warning("%s: %d lines left out, the first: %s", path, len(problems), problems[0])
    return found


def _text_sidecar(path: Path) -> Texts:
    data = _sidecar(path)
    text = data[:MAX_SIDECAR].decode("utf-8-sig", "replace")
    lines = text.splitlines()
    if len(data) > MAX_SIDECAR:
        lines = lines[:-1]  # cut in the middle, perhaps
    return Texts(captions=_stripped(lines))


def _json_sidecar(path: Path) -> Texts:
    data = _sidecar(path)
    try:
        if len(data) > MAX_SIDECAR:
            raise ValueError(f"it is larger than {MAX_SIDECAR // 1024} kB")
        return _texts(parse_object(data)) if data else Texts()
    except ValueError as error:
        log.warning("%s left out: %s", path, error)
        return Texts()


def _sidecar(path: Path) -> bytes:
    """The file's first bytes, one more than the limit; none if there is no such regular file."""
    try:
        if not _is_file(path):
            return b""
        with path.open("rb") as file:
            return file.read(MAX_SIDECAR + 1)
    except OSError as error:
        log.warning("%s left out: %s", path, error)
        return b""


def _is_file(path: Path) -> bool:
    """Whether there is a regular file (a pipe would wait for ever); OSError if that is hidden."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. A line that is too long is handed out cut, and ends it."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if line.strip():
            yield number, line
        if len(line) > MAX_LINE:
            return


def parse_object(data: bytes) -> dict[str, Any]:
    """One JSON object of at most MAX_LINE bytes, UTF-8; ValueError says what is wrong."""
    if len(data) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE // 2**20} MB")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _file_name(fields: Mapping[str, Any]) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(
            f"file_name must be a string of at least one character, got {reprlib.repr(name)}"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file_name {name!r} must stay below the folder of {METADATA}")
    return str(path)


def _texts(fields: Mapping[str, Any]) -> Texts:
    tags: list[str] = []
    for key in _TAG_FIELDS:
        value = fields.get(key)
        tags += _strings(key, value.split(",") if isinstance(value, str) else value)
    return Texts(_captions(fields), _stripped(tags))


def _captions(fields: Mapping[str, Any]) -> tuple[str, ...]:
    captions: list[str] = []
    for key in _CAPTION_FIELDS:
        value = fields.get(key)
        captions += _strings(key, [value] if isinstance(value, str) else value)
    return _stripped(captions)


def _strings(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a string or a list of strings, got {type(value).__name__}")
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"{key} must hold strings only, got {type(item).__name__}")
    return value


def _stripped(texts: list[str]) -> tuple[str, ...]:
    # JSON can escape half a surrogate pair, which no tokenizer and no database takes
    clean = (text.encode("utf-8", "replace").decode().strip() for text in texts)
    return tuple(dict.fromkeys(filter(None, clean)))


def _same_form(name: str) -> str:
    """File names compare in one Unicode form: macOS stores a decomposed one."""
    return unicodedata.normalize("NFC", name)
