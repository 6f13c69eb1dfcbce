"""What any kind of data gives before it is asked for captions or for classes.

Every reader (folders, JSONL files, WebDataset shards, the hub) makes one `Source`; `eval.data` turns
it into what an evaluator takes. Pictures stay where they are and are read one at a time.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clipkit import images
from clipkit.errors import DatasetError, InputError
from clipkit.records import Texts

# A class by its number or its name; a tuple where a picture may have several.
Label = int | str | tuple[int | str, ...]

SPLIT_NAMES = ("test", "validation", "val", "valid", "dev", "train")  # the first there is, is taken
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


class Pictures(Protocol):
    """Pictures by row. Threads may share it."""

    def __len__(self) -> int: ...
    def name(self, row: int) -> str:
        """How a person finds it again: a path relative to the data, or "row 12"."""

    def read(self, row: int) -> bytes:
        """The file's bytes. ImageError if they cannot be had."""


@dataclass(frozen=True, slots=True)
class Files:
    """Picture files below a folder."""

    root: Path
    paths: tuple[str, ...]  # relative to root, or absolute

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return self.paths[row]

    def read(self, row: int) -> bytes:
        return images.read_bytes(self.root / self.paths[row])


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some rows of other pictures."""

    pictures: Pictures
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return self.pictures.name(self.rows[row])

    def read(self, row: int) -> bytes:
        return self.pictures.read(self.rows[row])


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Pictures and, one per picture, whatever else the data says of them."""

    pictures: Pictures
    split: str | None = None
    texts: Sequence[Texts] | None = None
    labels: Sequence[Label | None] | None = None
    classes: tuple[str, ...] | None = None  # the names of numbered labels, or all there are
    domains: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()


def choose_split(available: Sequence[str], asked: str | None, *, where: str) -> str:
    """The split to measure on: the one asked for ("val" is "validation"), else test, validation
    or what there is. InputError if it is not there."""
    if asked is None:
        return next((name for name in SPLIT_NAMES if name in available), available[0])
    wanted = _ALIASES.get(asked, asked)
    for name in available:
        if asked == name:
            return name
    for name in available:
        if _ALIASES.get(name, name) == wanted:
            return name
    raise InputError(f"{where} has no split {asked!r}; it has {', '.join(available)}")


def read_fields(fields: Mapping[str, Any]) -> tuple[Texts, Label | None]:
    """What one JSON object says of its picture: captions, tags, and class or classes.

    Captions stand in `captions`, `caption` or `text`, tags in `keywords` or `tags` (one string of
    them is split at commas), a class in `label`, several in `labels`. ValueError if ill-typed.
    """
    captions = [text for key in ("captions", "caption", "text") for text in _strings(fields, key)]
    tags = [
        tag
        for key in ("keywords", "tags")
        for text in _strings(fields, key)
        for tag in (text.split(",") if isinstance(fields[key], str) else [text])
    ]
    return Texts(_stripped(captions), tuple(dict.fromkeys(_stripped(tags)))), _label(fields)


def read_class_names(path: Path) -> tuple[str, ...]:
    """A file of one class name a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the class names in {path}: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(line.strip() for line in lines)


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ValueError(f"{key} must be a string or a list of strings, got {reprlib.repr(value)}")
    return listed


def _stripped(texts: Sequence[str]) -> tuple[str, ...]:
    # JSON can escape half a surrogate pair, which no tokenizer takes. Repeated captions stay: the
    # field counts each as a query.
    clean = (text.encode("utf-8", "replace").decode().strip() for text in texts)
    return tuple(filter(None, clean))


def _label(fields: Mapping[str, Any]) -> Label | None:
    several = fields.get("labels")
    found = several if isinstance(several, list) else [fields.get("label", several)]
    if found == [None]:
        return None
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(f"a label must be a name or a number, got {reprlib.repr(item)}")
    return tuple(found) if isinstance(several, list) else found[0]
