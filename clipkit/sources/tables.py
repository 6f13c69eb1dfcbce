"""CSV, TSV and similar tables, whatever their separator, quoting and encoding."""

from __future__ import annotations

import csv
import itertools
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DatasetError
from clipkit.sources.columns import SAMPLE, Columns, choose, looks_like_picture
from clipkit.sources.json_files import sample_of
from clipkit.sources.rows import Broken, Options, PictureFinder, Row, Source, rows_of

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_MOST_LINES = 50  # of one row: more means a quote that was never closed
_MOST_CHARACTERS = 1 << 20
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def open_table(path: Path, options: Options) -> Source:
    """Open a table with a row per picture or per caption; `columns.choose` assigns the columns.

    Raises DatasetError if the file has no rows or no columns, or their roles cannot be told.
    """
    table = Table.open(path)
    sample = sample_of(itertools.islice(table.records(), SAMPLE))
    if not sample:
        raise DatasetError(f"{path} has no rows below its {len(table.names)} columns")
    columns = choose(sample, options, where=str(path))
    finder = PictureFinder(path.parent, options)

    def row(record: tuple[str, dict[str, str]]) -> Row | Broken:
        return columns.row(record[0], filled(record[1], columns), finder.row, options.split)

    description = f"{table}: {columns}"
    return Source(
        "table", str(path), description, table.lines, lambda: rows_of(table.records(), row)
    )


def filled(fields: dict[str, str], columns: Columns) -> dict[str, object]:
    """Return the cells that are not empty, a label of digits as a number.

    A row without a caption keeps one empty caption, which is rejected by name when a dataset is built.
    """
    cells: dict[str, object] = {key: value for key, value in fields.items() if value}
    if columns.captions and not any(name in cells for name in columns.captions):
        cells[columns.captions[0]] = ""
    label = fields.get(columns.label or "", "")
    if columns.label and label.isascii() and label.isdigit() and str(int(label)) == label:
        cells[columns.label] = int(label)
    return cells


@dataclass(frozen=True, slots=True)
class Table:
    """A table's file, and its encoding, separator and columns."""

    path: Path
    encoding: str
    separator: str
    names: tuple[str, ...]
    headed: bool  # whether the first line holds the names
    lines: int

    @classmethod
    def open(cls, path: Path) -> Table:
        """Detect how a file is written. Raises DatasetError if it is empty or has one column."""
        encoding, lines = _encoding(path)
        with path.open(encoding=encoding, errors="replace", newline="") as file:
            head = list(itertools.islice(file, SAMPLE))
        if not any(line.strip() for line in head):
            raise DatasetError(f"{path} is empty; it needs a line of column names and rows below")
        separator = _separator(head)
        if separator is None:
            raise DatasetError(
                f"{path} has one column only, {head[0].strip()[:80]!r}: its lines contain none "
                "of comma, semicolon, tab and bar"
            )
        cells = [cell.strip() for cell in _whole_rows(head, separator)[0]]
        headed = not any(looks_like_picture(cell) for cell in cells)
        names = cells if headed else []
        unnamed = (name or f"column {n}" for n, name in enumerate(names or [""] * len(cells), 1))
        return cls(path, encoding, separator, _distinct(unnamed), headed, lines)

    def __str__(self) -> str:
        return f"{SEPARATORS[self.separator]}-separated, {self.encoding}"

    def records(self) -> Iterator[tuple[str, dict[str, str]] | Broken]:
        """Yield ("line 7", cells by name) for every row below the names that is not blank."""
        with self.path.open(encoding=self.encoding, errors="replace", newline="") as file:
            lines = _cells_of_lines(file, self.separator, len(self.names))
            for number, record in enumerate(lines):
                if isinstance(record, Broken):
                    yield record
                    continue
                line, cells = record
                if number == 0 and self.headed:
                    continue
                if len(cells) != len(self.names):
                    start = self.separator.join(cells)[:120]
                    detail = f"{len(cells)} fields instead of {len(self.names)}: {start}"
                    yield Broken(f"line {line}", "wrong-field-count", detail)
                else:
                    values = (cell.strip() for cell in cells)
                    yield f"line {line}", dict(zip(self.names, values, strict=True))


def _cells_of_lines(
    lines: Iterator[str], separator: str, width: int | None = None
) -> Iterator[tuple[int, list[str]] | Broken]:
    """Yield (line number, cells) for each row, where an unclosed quote costs its own line only.

    The csv module alone reads on to the next quote, which may be that of another row, or to the end
    of the file. Here further lines are added to a row only while it is strictly unfinished; if the
    result is not a proper row, its first line is broken and reading goes on with the second.
    """
    number = 0  # of the last line taken
    waiting: deque[str] = deque()  # lines read ahead that turned out not to belong to the row

    def take() -> str | None:
        return waiting.popleft() if waiting else next(lines, None)

    while (line := take()) is not None:
        number += 1
        if not line.strip():
            continue
        taken = [line]
        cells = _cells(taken, separator)
        while cells is None and len(taken) < _MOST_LINES and len(line) < _MOST_CHARACTERS:
            if (further := take()) is None:
                break
            taken.append(further)
            cells = _cells(taken, separator)
            if cells is not None and width is not None and len(cells) != width:
                cells = None
                break
        if cells is None:
            waiting.extendleft(reversed(taken[1:]))
            yield Broken(f"line {number}", "unclosed-quote", line.strip()[:120])
        else:
            yield number, cells
            number += len(taken) - 1


def _cells(lines: list[str], separator: str) -> list[str] | None:
    """Return the cells of one row; None if a quoted cell is not closed."""
    try:
        return next(csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error) or len(lines) > 1:
            return None
    try:  # a stray quote, in a row that has none to close
        return next(csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE))
    except csv.Error:
        return None


def _whole_rows(head: list[str], separator: str) -> list[list[str]]:
    rows = _cells_of_lines(iter(head), separator)
    return [row[1] for row in rows if not isinstance(row, Broken)]


def _separator(head: list[str]) -> str | None:
    """Return the separator that splits most rows into as many columns as the first, and into most."""
    best: tuple[float, int, str] = (0.0, 1, "")
    for separator in SEPARATORS:
        rows = _whole_rows(head, separator)
        if rows and (width := len(rows[0])) > 1:
            widths = Counter(map(len, rows))
            best = max(best, (widths[width] / len(rows), width, separator))
    return best[2] or None


def _encoding(path: Path) -> tuple[str, int]:
    """Return (encoding, number of lines): by the byte order mark, else UTF-8 or Windows-1252.

    UTF-8 if most of the lines that are not ASCII are valid UTF-8.
    """
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
    """Number the names that occur again: "text", "text (2)"."""
    distinct: list[str] = []
    for name in names:
        again = sum(1 for n in distinct if n == name or n.startswith(f"{name} ("))
        distinct.append(f"{name} ({again + 1})" if again else name)
    return tuple(distinct)
