"""JSON lines (or one list of objects), and the corrections that the app exports."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import DatasetError
from clipkit.records import MAX_LINE, parse_object
from clipkit.sources.columns import SAMPLE, choose
from clipkit.sources.rows import Broken, Options, PictureFinder, Row, Source, count_lines, rows_of

Record = tuple[str, dict[str, Any]]  # where an object stands, and its fields


def open_jsonl(path: Path, options: Options) -> Source:
    """Open JSON lines, or a list of objects; the keys are understood as the columns of a table are.

    Raises DatasetError if the file holds no objects, or no key is the picture's or the captions'.
    """
    sample = sample_of(read_objects(path))
    if not sample:
        raise DatasetError(f"{path} holds no JSON objects; it needs one a line")
    columns = choose(sample, options, where=str(path))
    finder = PictureFinder(path.parent, options)

    def row(item: Record) -> Row | Broken:
        return columns.row(*item, finder.row, options.split)

    total = None if path.suffix.lower() == ".json" else count_lines(path)
    return Source("jsonl", str(path), str(columns), total, lambda: rows_of(read_objects(path), row))


def open_corrections(path: Path, options: Options) -> Source:
    """Open judgements of search results: {"picture", "query", "right": true or false} a line.

    A right result makes the query a caption; a wrong one is kept in the picture's `not_captions`.
    """
    finder = PictureFinder(path.parent, options)

    def row(item: Record) -> Row | Broken:
        place, fields = item
        query, right = fields.get("query"), fields.get("right")
        if not isinstance(query, str) or not isinstance(right, bool):
            detail = f"query must be a string, right true or false: {fields!r:.120}"
            return Broken(place, "wrong-type", detail)
        name = fields.get("picture", fields.get("image"))
        meta = {} if right else {"not_captions": [query]}
        return finder.row(name, place, (query,) if right else (), meta=meta)

    description = "corrections: right queries become captions, wrong ones are kept as not_captions"
    total = count_lines(path)
    return Source(
        "corrections", str(path), description, total, lambda: rows_of(read_objects(path), row)
    )


def json_kind(path: Path) -> str:
    """Return the kind of a .json or .jsonl file by its content. Raises DatasetError for no kind."""
    if path.suffix.lower() == ".json":
        whole = load_json(path)
        if isinstance(whole, dict) and isinstance(whole.get("images"), list):
            if isinstance(whole.get("annotations"), list):
                return "coco"
            if any(isinstance(i, dict) and "sentences" in i for i in whole["images"][:20]):
                return "karpathy"
        if not isinstance(whole, list):
            keys = ", ".join(list(whole)[:12]) if isinstance(whole, dict) else type(whole).__name__
            raise DatasetError(
                f"{path} is neither COCO captions (images, annotations) nor Karpathy's split "
                f"(images with sentences) nor a list of objects; it holds {keys}"
            )
    for item in itertools.islice(read_objects(path), 20):
        if not isinstance(item, Broken):
            return "corrections" if {"query", "right"} <= item[1].keys() else "jsonl"
    return "jsonl"


def read_objects(path: Path) -> Iterator[Record | Broken]:
    """Yield ("line 7", object) for each line that is not blank, or Broken for a line without one."""
    if path.suffix.lower() == ".json":
        for number, item in enumerate(load_json(path)):
            if isinstance(item, dict):
                yield f"[{number}]", item
            else:
                detail = f"expected a JSON object, got {type(item).__name__}"
                yield Broken(f"[{number}]", "not-json", detail)
        return
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if line.strip():
                    try:
                        yield f"line {number}", parse_object(line)
                    except ValueError as error:
                        yield Broken(f"line {number}", "not-json", str(error))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None


def sample_of(records: Iterator[Record | Broken]) -> list[dict[str, Any]]:
    """Return the fields of the first SAMPLE records, and of each later one with a new key.

    For `choose`: a key that begins to occur behind the sample has a role too.
    """
    sample: list[dict[str, Any]] = []
    keys: set[str] = set()
    for item in records:
        if not isinstance(item, Broken) and (len(sample) < SAMPLE or not item[1].keys() <= keys):
            sample.append(item[1])
            keys.update(item[1])
    return sample


def load_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises DatasetError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        hint = "; name it .jsonl if it has an object a line" if "Extra data" in str(error) else ""
        raise DatasetError(f"{path} is not JSON: {error}{hint}") from None
