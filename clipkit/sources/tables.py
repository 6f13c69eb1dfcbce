"""CSV, TSV and their relatives: whatever separates, quotes or encodes them."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DatasetError
from clipkit.sources.columns import Columns, choose, looks_like_picture
from clipkit.sources.rows import Broken, Options, Pictures, RawPair, Source, split_name

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_MOST_LINES = 50  # of one row: more is a quote that was never closed
_MOST_CHARACTERS = 1 << 20
_SAMPLE = 200  # rows that the guesses look at
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def open_table(path: Path, options: Options) -> Source:
    """A row per picture or per caption; see `Table` and `columns.choose` for what is guessed."""
    table = Table.open(path)
    sample = [row for row in itertools.islice(table.rows(), _SAMPLE) if isinstance(row, Row)]
    if not sample:
        raise DatasetError(f"{path} has no rows below its {len(table.names)} columns")
    columns = choose([row.fields for row in sample], options, where=str(path))
    pictures = Pictures(path.parent, options.pictures)

    def pairs() -> Iterator[RawPair | Broken]:
        for row in table.rows():
            yield row if isinstance(row, Broken) else _pair(row, columns, pictures, options.split)

    return Source("table", str(path), f"{table}: {columns}", table.lines, pairs)


def _pair(row: Row, columns: Columns, pictures: Pictures, usual: str | None) -> RawPair | Broken:
    fields = dict(row.fields)
    name = fields.pop(columns.image)
    captions = tuple(fields.pop(column) for column in columns.captions)
    captions = tuple(c for c in captions if c) or captions[:1]  # one empty caption says it is empty
    split = split_name(fields.pop(columns.split)) if columns.split else None
    meta: dict[str, object] = {}
    if columns.tags and (said := fields.pop(columns.tags)):
        meta["keywords"] = [tag.strip() for tag in re.split("[,;|]", said) if tag.strip()]
    meta |= {key: value for key, value in fields.items() if value}
    return pictures.pair(name, row.row, captions, split or usual, meta)


@dataclass(frozen=True, slots=True)
class Row:
    row: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table's file and how it is written."""

    path: Path
    encoding: str
    separator: str
    names: tuple[str, ...]
    headed: bool  # whether the first line holds the names
    lines: int

    @classmethod
    def open(cls, path: Path) -> Table:
        """DatasetError if the file is empty or nothing separates columns."""
        encoding, lines = _encoding(path)
        with path.open(encoding=encoding, errors="replace", newline="") as file:
            head = list(itertools.islice(file, _SAMPLE))
        if not any(line.strip() for line in head):
            raise DatasetError(f"{path} is empty; it needs a line of column names and rows below")
        separator = _separator(head)
        if separator is None:
            raise DatasetError(
                f"{path} has one column only, {head[0].strip()[:80]!r}: its lines are split by none "
                "of comma, semicolon, tab and bar"
            )
        first = next(row for row in _records(iter(head), separator) if not isinstance(row, Broken))
        cells = [cell.strip() for cell in first[1]]
        headed = not any(looks_like_picture(cell) for cell in cells)
        names = cells if headed else []
        unnamed = (name or f"column {n}" for n, name in enumerate(names or [""] * len(cells), 1))
        return cls(path, encoding, separator, _distinct(unnamed), headed, lines)

    def __str__(self) -> str:
        return f"{SEPARATORS[self.separator]}-separated, {self.encoding}"

    def rows(self) -> Iterator[Row | Broken]:
        """Every row below the names; blank lines are no rows."""
        with self.path.open(encoding=self.encoding, errors="replace", newline="") as file:
            records = _records(file, self.separator, len(self.names))
            for number, record in enumerate(records):
                if isinstance(record, Broken):
                    yield record
                    continue
                line, cells = record
                if number == 0 and self.headed:
                    continue
                if len(cells) != len(self.names):
                    shown = self.separator.join(cells)[:120]
                    detail = f"{len(cells)} fields instead of {len(self.names)}: {shown}"
                    yield Broken(f"line {line}", "wrong-field-count", detail)
                else:
                    values = (cell.strip() for cell in cells)
                    yield Row(f"line {line}", dict(zip(self.names, values, strict=True)))


def _records(
    lines: Iterator[str], separator: str, width: int | None = None
) -> Iterator[tuple[int, list[str]] | Broken]:
    """(line number, cells) of each row. A quote that is never closed costs its own line only.

    The csv module alone would read on to the next quote, which may be that of another row, or the end
    of the file. So a row is read on only as long as it is strictly unfinished, and if what comes out
    is no proper row, its first line is called broken and reading goes on with the second.
    """
    number = 0  # of the line last taken
    waiting: list[str] = []  # lines that were read ahead in vain
    while True:
        line = waiting.pop(0) if waiting else next(lines, None)
        if line is None:
            return
        number += 1
        if not line.strip():
            continue
        taken = [line]
        cells = _cells(taken, separator)
        while cells is None and len(taken) < _MOST_LINES and len(taken[0]) < _MOST_CHARACTERS:
            further = waiting[len(taken) - 1] if len(waiting) >= len(taken) else next(lines, None)
            if further is None:
                break
            if len(waiting) < len(taken):
                waiting.append(further)
            taken.append(further)
            cells = _cells(taken, separator)
            if cells is not None and width is not None and len(cells) != width:
                cells = None
                break
        if cells is None:
            yield Broken(f"line {number}", "unclosed-quote", line.strip()[:120])
            continue
        yield number, cells
        number += len(taken) - 1
        del waiting[: len(taken) - 1]


def _cells(lines: list[str], separator: str) -> list[str] | None:
    """The cells of one row; None if a quoted cell is not closed."""
    try:
        return next(csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error) or len(lines) > 1:
            return None
    try:  # a stray quote, in a row that has none to close
        return next(csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE))
    except csv.Error:
        return None


def _separator(head: list[str]) -> str | None:
    """The one that splits most of the first rows like the first of them, and into most columns."""
    best: tuple[float, int, str] = (0.0, 1, "")
    for separator in SEPARATORS:
        rows = [row for row in _records(iter(head), separator) if not isinstance(row, Broken)]
        if rows and (width := len(rows[0][1])) > 1:
            widths = Counter(len(cells) for _, cells in rows)
            best = max(best, (widths[width] / len(rows), width, separator))
    return best[2] or None


def _encoding(path: Path) -> tuple[str, int]:
    """(encoding, number of lines): by its mark; UTF-8 if most lines beyond ASCII are; else Windows'."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            for mark, name in _BOMS:
                if start.startswith(mark):
                    with path.open(encoding=name, errors="replace") as text:
                        return name, sum(1 for _ in text)
            file.seek(0)
            lines = good = bad = 0
            for line in file:
                lines += 1
                if not line.isascii():
                    try:
                        line.decode("utf-8")
                        good += 1
                    except UnicodeDecodeError:
                        bad += 1
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None
    return ("cp1252" if bad > good else "utf-8"), lines


def _distinct(names: Iterator[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        again = sum(1 for n in found if n == name or n.startswith(f"{name} ("))
        found.append(f"{name} ({again + 1})" if again else name)
    return tuple(found)
