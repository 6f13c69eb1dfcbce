"""A run's work in bounded memory: two sorted streams side by side, and rows in a temporary file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from clipkit.catalog import KnownFile
from clipkit.embed.walk import Folder, FoundFile, Problem


def side_by_side(
    found: Iterable[FoundFile | Problem | Folder], known: Iterable[tuple[str, KnownFile]]
) -> Iterator[tuple[FoundFile | Problem | Folder | None, tuple[str, KnownFile] | None]]:
    """Yield everything of `found` with the record of its path in `known`, if there is one, and each
    record of a path that was not found with None, all in the order of the paths' bytes.

    Both must be in this order, as `walk` and `Catalog.known_files` are. A Folder comes at its end.
    """
    keyed = ((os.fsencode(path), (path, record)) for path, record in known)
    key, record = next(keyed, (b"", None))
    for item in found:
        if isinstance(item, Folder):
            yield item, None
            continue
        while record is not None and key < item.key:
            yield None, record
            key, record = next(keyed, (b"", None))
        if record is not None and key == item.key:
            yield item, record
            key, record = next(keyed, (b"", None))
        else:
            yield item, None
    while record is not None:
        yield None, record
        key, record = next(keyed, (b"", None))


class Spool:
    """Rows of numbers and texts in a temporary file without a name, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, *row: Any) -> None:
        # JSON escapes what is not ASCII: lone surrogates, which names that are not UTF-8 have, survive
        self._file.write(json.dumps(row).encode() + b"\n")
        self._rows += 1

    def mark(self) -> tuple[int, int]:
        """Return the present end, to which `cut` goes back."""
        return self._file.tell(), self._rows

    def cut(self, mark: tuple[int, int]) -> None:
        """Remove the rows that were added since `mark`."""
        position, self._rows = mark
        self._file.seek(position)
        self._file.truncate()

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the rows, once and after the last was added."""
        self._file.seek(0)
        return map(json.loads, self._file)
