"""Captions and tags beside pictures, in any folder: metadata.jsonl, .txt and .json files.

Captions are in `captions`, `caption` or `text`, tags in `keywords` or `tags`: a list of strings, or one
string, which for tags is split at commas.
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
METADATA = "metadata.jsonl"
MAX_LINE = 16 * 2**20  # bytes of a JSON line
MAX_SIDECAR = 64 * 2**10  # bytes
CAPTION_FIELDS = ("captions", "caption", "text")
TAG_FIELDS = ("keywords", "tags")


@dataclass(frozen=True, slots=True)
class Texts:
    """The captions and tags of one picture, without empty and repeated entries."""

    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class FolderCaptions:
    """Read captions and tags beside pictures; thread-safe.

    They are joined from the picture's line in its folder's `metadata.jsonl`; from `NAME.txt` or
    `NAME.jpg.txt`, a caption a line; and from `NAME.json` or `NAME.jpg.json`, an object with the fields
    of metadata.jsonl. Sidecars are read up to 64 kB. Broken files and lines are logged and left out.
    Each metadata.jsonl is parsed once; make a new object to see changes.
    """

    def __init__(self) -> None:
        self._folder = lru_cache(maxsize=8)(_folder_texts)  # a walk is in one or two at a time
        self._mutex = threading.Lock()  # threads that need the same folder parse it once

    def for_picture(self, path: Path) -> Texts:
        """Return the texts of the picture at `path`, which need not exist."""
        with self._mutex:
            folder = self._folder(path.parent)
        texts = [folder.get(_same_form(path.name), Texts())]
        for name in dict.fromkeys((path.stem, path.name)):
            texts.append(_text_sidecar(path.with_name(f"{name}.txt")))
            texts.append(_json_sidecar(path.with_name(f"{name}.json")))
        return Texts(
            tuple(dict.fromkeys(caption for text in texts for caption in text.captions)),
            tuple(dict.fromkeys(tag for text in texts for tag in text.tags)),
        )


def _folder_texts(folder: Path) -> dict[str, Texts]:
    path = folder / METADATA
    texts: dict[str, Texts] = {}
    problems: list[str] = []
    try:
        if _is_file(path):
            with path.open("rb") as file:
                for number, line in _lines(file):
                    try:
                        fields = parse_object(line)
                        texts[_same_form(_file_name(fields))] = _texts(fields)
                    except ValueError as error:
                        problems.append(f"line {number}: {error}")
    except OSError as error:
        problems.append(str(error))
    if problems:
        log.warning("%s: %d lines left out, the first: %s", path, len(problems), problems[0])
    return texts


def _text_sidecar(path: Path) -> Texts:
    data = _sidecar(path)
    text = data[:MAX_SIDECAR].decode("utf-8-sig", "replace")
    lines = text.splitlines()
    if len(data) > MAX_SIDECAR:
        lines = lines[:-1]  # the last line may be cut
    return Texts(captions=_distinct(lines))


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
    """Return the file's first bytes, one more than the limit; b"" if there is no such regular file."""
    try:
        if not _is_file(path):
            return b""
        with path.open("rb") as file:
            return file.read(MAX_SIDECAR + 1)
    except OSError as error:
        log.warning("%s left out: %s", path, error)
        return b""


def _is_file(path: Path) -> bool:
    """Return whether `path` is a regular file, not a pipe. Raises OSError if access is denied."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines that are not blank; a line that is too long is cut and the last one."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if line.strip():
            yield number, line
        if len(line) > MAX_LINE:
            return


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object of at most MAX_LINE bytes, UTF-8. Raises ValueError with the reason."""
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
    tags = [tag for key in TAG_FIELDS for tag in _strings(fields, key, separator=",")]
    captions = [caption for key in CAPTION_FIELDS for caption in _strings(fields, key)]
    return Texts(_distinct(captions), _distinct(tags))


def _strings(fields: Mapping[str, Any], key: str, separator: str | None = None) -> list[str]:
    value = fields.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return value.split(separator) if separator else [value]
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a string or a list of strings, got {type(value).__name__}")
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"{key} must hold strings only, got {type(item).__name__}")
    return value


def stripped(texts: Iterable[str]) -> list[str]:
    """Return the texts without surrounding white space, and none that is empty.

    JSON can escape half a surrogate pair, which no tokenizer and no database takes: it becomes "?".
    """
    clean = (text.encode("utf-8", "replace").decode().strip() for text in texts)
    return list(filter(None, clean))


def _distinct(texts: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stripped(texts)))


def _same_form(name: str) -> str:
    """Return a file name in one Unicode form: macOS stores a decomposed one."""
    return unicodedata.normalize("NFC", name)
