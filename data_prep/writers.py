"""A data set's files as they are written: an imagefolder, or WebDataset shards.

imagefolder: SPLIT/metadata.jsonl beside the pictures, one object a line, the same columns in the same
order on every line of every split:

    file_name   IMAGE_ID.jpg
    image_id    BLAKE2b-128 of the source's bytes, 32 hex digits
    captions    [one or more]
    keywords, not_captions    [any number]; only where the sources have any
    width, height             of the picture beside it, pixels
    source      "captions.csv, line 12"
    meta        what else the source said, as JSON text

`meta` is text because Arrow must find one type per column, the same in every split: nulls, mixed
numbers, dates in one split only, and names such as "thumb_file_name" would each break
`datasets.load_dataset`. Shards have the same columns in each picture's .json, `meta` spread out.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from clipkit.records import METADATA

Record = dict[str, Any]  # the columns above, `meta` a dictionary


class Writer(Protocol):
    """Takes pictures that lie on the same disk, each to its split."""

    def add(self, split: str, record: Record, picture: Path) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class FolderWriter:
    """An imagefolder below `folder`. `lists`: the list columns that every line has."""

    def __init__(self, folder: Path, *, lists: Sequence[str]) -> None:
        self._folder = folder
        self._lists = tuple(lists)
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, split: str, record: Record, picture: Path) -> None:
        first = split not in self._files
        if first:
            (self._folder / split).mkdir()
            self._files[split] = (self._folder / split / METADATA).open("w", encoding="utf-8")
        os.rename(picture, self._folder / split / picture.name)
        line: Record = {"file_name": picture.name}
        line |= {key: record[key] for key in ("image_id", "captions")}
        for name in self._lists:
            line[name] = _typed(record.get(name, [])) if first else record.get(name, [])
        line |= {key: record[key] for key in ("width", "height", "source")}
        line["meta"] = json.dumps(record["meta"], ensure_ascii=False, default=str)
        self._files[split].write(json.dumps(line, ensure_ascii=False) + "\n")


def _typed(texts: list[str]) -> list[str]:
    """With an empty string if Arrow could not tell from the entries that they are text: an empty list
    has no type, and what looks like a date becomes one."""
    return texts if any(c.isalpha() for text in texts for c in text) else [*texts, ""]


class ShardWriter:
    """SPLIT/00000.tar, ..., as img2dataset names them; .txt holds the first caption, .json all."""

    def __init__(self, folder: Path, *, size: int = 10_000) -> None:
        self._folder = folder
        self._size = size  # pictures a shard; the key has room for 10,000
        self._counts: dict[str, int] = {}
        self._tars: dict[str, tarfile.TarFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tar in self._tars.values():
            tar.close()

    def add(self, split: str, record: Record, picture: Path) -> None:
        shard, place = divmod(self._counts.get(split, 0), self._size)
        self._counts[split] = self._counts.get(split, 0) + 1
        if place == 0:
            (self._folder / split).mkdir(exist_ok=True)
            if split in self._tars:
                self._tars[split].close()
            self._tars[split] = tarfile.open(self._folder / split / f"{shard:05d}.tar", "w")  # noqa: SIM115
        key = f"{shard:05d}{place:04d}"
        fields: Mapping[str, Any] = {
            "key": key,
            "caption": record["captions"][0],
            **{name: value for name, value in record.items() if name != "meta"},
            "split": split,
            "meta": record["meta"],
        }
        text = json.dumps(fields, ensure_ascii=False, default=str)
        for suffix, body in (
            ("jpg", picture.read_bytes()),
            ("txt", record["captions"][0].encode()),
            ("json", text.encode()),
        ):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(body)
            self._tars[split].addfile(member, io.BytesIO(body))
        picture.unlink()
